// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/slot_arena.h"

#include <utility>

#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

size_t RoundUp(size_t bytes) { return (bytes + kSlotAlign - 1) / kSlotAlign * kSlotAlign; }

}  // namespace

ArenaPool::~ArenaPool() {
  for (const auto& [bytes, memory] : idle_) device_->Give(memory);
}

absl::StatusOr<std::shared_ptr<SlotArena>> ArenaPool::Take(size_t bytes) {
  bytes = RoundUp(bytes);
  {
    std::lock_guard lock(mu_);
    const auto it = idle_.lower_bound(bytes);
    if (it != idle_.end()) {
      const auto [size, memory] = *it;
      idle_.erase(it);
      return std::make_shared<SlotArena>(shared_from_this(), memory, size);
    }
  }
  STRAIT_ASSIGN_OR_RETURN(std::byte * memory, device_->Take(bytes));
  return std::make_shared<SlotArena>(shared_from_this(), memory, bytes);
}

size_t ArenaPool::bytes_idle() const {
  std::lock_guard lock(mu_);
  size_t sum = 0;
  for (const auto& [bytes, memory] : idle_) sum += bytes;
  return sum;
}

void ArenaPool::PutBack(std::byte* memory, size_t bytes) {
  if (!device_->GiveWaits()) return device_->Give(memory);
  std::lock_guard lock(mu_);
  idle_.emplace(bytes, memory);
}

SlotArena::SlotArena(std::shared_ptr<ArenaPool> pool, std::byte* memory, size_t bytes)
    : pool_(std::move(pool)), memory_(memory), bytes_(bytes), free_{{0, bytes}} {}

SlotArena::~SlotArena() {
  // A place holds the arena, so all are back.
  STRAIT_CHECK(free_.size() == 1 && free_.begin()->second == bytes_);
  pool_->PutBack(memory_, bytes_);
}

std::optional<HiddenBuffer> SlotArena::Take(size_t bytes) {
  STRAIT_CHECK(bytes > 0);
  const size_t taken = RoundUp(bytes);
  std::lock_guard lock(mu_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [begin, end] = *it;
    if (end - begin < taken) continue;
    free_.erase(it);
    if (end - begin > taken) free_.emplace(begin + taken, end);
    return HiddenBuffer(memory_ + begin, bytes,
                        [arena = shared_from_this(), begin, taken] { arena->Give(begin, taken); });
  }
  return std::nullopt;
}

void SlotArena::Give(size_t begin, size_t bytes) {
  std::lock_guard lock(mu_);
  size_t end = begin + bytes;
  auto next = free_.lower_bound(begin);
  STRAIT_CHECK(next == free_.end() || next->first >= end, "a place came back twice");
  if (next != free_.end() && next->first == end) {
    end = next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->second == begin) {
      before->second = end;
      return;
    }
  }
  free_.emplace(begin, end);
}

}  // namespace strait
