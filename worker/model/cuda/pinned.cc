// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/pinned.h"

#include <algorithm>

#include "proto/base/status_macros.h"

namespace strait {
namespace {

constexpr uint64_t kPiece = 64 << 10;  // sizes are rounded up, so that more of them serve again

}  // namespace

PinnedMemory::~PinnedMemory() {
  if (pool_ != nullptr) pool_->PutBack(std::move(memory_));
}

absl::StatusOr<PinnedMemory> PinnedPool::Take(uint64_t bytes) {
  const uint64_t size = std::max(kPiece, (bytes + kPiece - 1) / kPiece * kPiece);
  PinnedMemory memory;
  memory.bytes_ = bytes;
  {
    const std::lock_guard lock(mutex_);
    const auto it = idle_.lower_bound(size);
    if (it != idle_.end() && it->first <= 2 * size) {
      memory.memory_ = std::move(it->second);
      idle_.erase(it);
      memory.pool_ = shared_from_this();
      return memory;
    }
  }
  STRAIT_ASSIGN_OR_RETURN(memory.memory_, PinnedMemory::Owner::Create(size));
  memory.pool_ = shared_from_this();
  return memory;
}

void PinnedPool::PutBack(PinnedMemory::Owner memory) {
  const uint64_t size = memory.bytes();
  const std::lock_guard lock(mutex_);
  idle_.emplace(size, std::move(memory));
}

}  // namespace strait
