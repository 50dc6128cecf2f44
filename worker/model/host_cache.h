// SPDX-License-Identifier: Apache-2.0
//
// HostCache is the latent blocks of a CPU worker: addresses for as many as its memory could ever hold,
// pages for those that are used.
//
// Owns:    the mapping, a share of the budget.
// Thread:  as CacheMemory.
// Errors:  as CacheMemory; Create: ResourceExhausted, the system refuses the addresses.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "worker/cache/cache_memory.h"
#include "worker/model/memory.h"

namespace strait {

class HostCache final : public CacheMemory {
 public:
  static absl::StatusOr<std::unique_ptr<HostCache>> Create(std::shared_ptr<MemoryBudget> budget,
                                                           uint64_t block_bytes);

  absl::Status Resize(uint32_t num_blocks, absl::Span<const BlockMove> moves) override;
  uint32_t num_blocks() const override { return num_blocks_; }
  std::byte* blocks() const { return mapping_.data(); }

 private:
  HostCache(Mapping mapping, MemoryBudget::Share share, uint64_t block_bytes)
      : block_bytes_(block_bytes), mapping_(std::move(mapping)), share_(std::move(share)) {}

  const uint64_t block_bytes_;
  const Mapping mapping_;
  MemoryBudget::Share share_;
  std::atomic<uint32_t> num_blocks_ = 0;
};

}  // namespace strait
