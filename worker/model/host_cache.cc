// SPDX-License-Identifier: Apache-2.0
#include "worker/model/host_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

constexpr uint64_t kPage = 4096;

}  // namespace

absl::StatusOr<std::unique_ptr<HostCache>> HostCache::Create(std::shared_ptr<MemoryBudget> budget,
                                                             uint64_t block_bytes) {
  const uint64_t bytes = std::max(budget->total(), kPage);
  STRAIT_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Create(bytes, "latent cache"));
  STRAIT_ASSIGN_OR_RETURN(MemoryBudget::Share share,
                          MemoryBudget::Take(std::move(budget), 0, "latent cache"));
  return std::unique_ptr<HostCache>(
      new HostCache(std::move(mapping), std::move(share), block_bytes));
}

absl::Status HostCache::Resize(uint32_t num_blocks, absl::Span<const BlockMove> moves) {
  const uint64_t bytes = num_blocks * block_bytes_;
  if (num_blocks >= num_blocks_) {
    STRAIT_CHECK(moves.empty());
    STRAIT_RETURN_IF_ERROR(MemoryBudget::Resize(
        &share_, bytes, absl::StrCat("a latent cache of ", num_blocks, " blocks")));
    num_blocks_ = num_blocks;
    return absl::OkStatus();
  }
  for (const BlockMove& move : moves) {
    std::memcpy(blocks() + move.to * block_bytes_, blocks() + move.from * block_bytes_,
                block_bytes_);
  }
  const uint64_t first = (bytes + kPage - 1) / kPage * kPage;
  const uint64_t end = share_.bytes();
  if (first < end) {
    STRAIT_CHECK(madvise(blocks() + first, end - first, MADV_DONTNEED) == 0);
  }
  num_blocks_ = num_blocks;
  return MemoryBudget::Resize(&share_, bytes, "latent cache");
}

}  // namespace strait
