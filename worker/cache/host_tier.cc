// SPDX-License-Identifier: Apache-2.0
#include "worker/cache/host_tier.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "xxhash.h"

namespace strait {

HostTier::HostTier(uint32_t num_layers, BlockCopies* copies, HostBudget* budget)
    : num_layers_(num_layers),
      copies_(copies),
      budget_(budget),
      slot_bytes_(size_t{num_layers} * limits::kBlockTokens * copies->row_bytes()) {}

HostTier::~HostTier() {
  STRAIT_CHECK(!busy(), "its copies are under way");
  Clear({});
}

bool HostTier::TakeMemory(Slot* slot) {
  if (free_.empty()) {
    if (budget_ == nullptr) return false;
    const uint64_t room =
        budget_->limit_bytes - std::min(budget_->limit_bytes, budget_->used_bytes);
    const size_t wanted = wanted_blocks_ - std::min<size_t>(wanted_blocks_, num_slots_);
    const size_t piece = std::min(wanted, kTierPieceBytes / slot_bytes_);
    const size_t num_slots = std::min<uint64_t>(room / slot_bytes_, std::max<size_t>(piece, 1));
    if (num_slots == 0) return false;
    absl::StatusOr<CopyMemory> memory = copies_->Take(num_slots * slot_bytes_);
    if (!memory.ok()) return false;
    budget_->used_bytes += memory->bytes;
    num_slots_ += num_slots;
    for (size_t i = num_slots; i-- > 0;) free_.push_back(memory->data.get() + i * slot_bytes_);
    memory_.push_back(*std::move(memory));
  }
  slot->data = free_.back();
  free_.pop_back();
  return true;
}

HostTier::SlotPtr HostTier::MakeSlot() {
  return {new Slot, [this](Slot* gone) {
            if (gone->data != nullptr) free_.push_back(gone->data);
            delete gone;
          }};
}

uint64_t HostTier::Checksum(const Slot& slot) const { return XXH3_64bits(slot.data, slot_bytes_); }

void HostTier::Offload(const ContentKey& key, absl::Span<const BlockId> blocks) {
  STRAIT_CHECK(blocks.size() == num_layers_);
  const auto [it, is_new] = slots_.emplace(key, MakeSlot());
  STRAIT_CHECK(is_new, "a copy of the block is there already");
  tasks_.push_back({key, false, it->second, {blocks.begin(), blocks.end()}});
}

void HostTier::Return(const ContentKey& key, absl::Span<const BlockId> blocks) {
  STRAIT_CHECK(blocks.size() == num_layers_);
  const auto it = slots_.find(key);
  STRAIT_CHECK(it != slots_.end(), "there is no copy of the block");
  tasks_.push_back({key, true, it->second, {blocks.begin(), blocks.end()}});
}

void HostTier::Forget(const ContentKey& key) {
  STRAIT_CHECK(slots_.erase(key) == 1, "there is no copy of the block");
}

bool HostTier::Uses(const ContentKey& key) const {
  return std::any_of(tasks_.begin(), tasks_.end(),
                     [&](const Task& task) { return task.key == key && !task.is_abandoned; });
}

void HostTier::Abandon(const ContentKey& key, std::vector<BlockId> blocks) {
  // Copies end in the order of their calls: those before the last one have ended with it.
  const auto it = std::find_if(tasks_.rbegin(), tasks_.rend(), [&](const Task& task) {
    return task.key == key && !task.is_abandoned;
  });
  STRAIT_CHECK(it != tasks_.rend() && it->blocks == blocks, "no copy uses these blocks");
  it->is_abandoned = true;
}

std::vector<BlockRows> HostTier::ListOf(const Task& task) const {
  std::vector<BlockRows> list;
  list.reserve(num_layers_);
  for (uint32_t layer = 0; layer < num_layers_; ++layer) {
    list.push_back({layer, task.blocks[layer], 0, limits::kBlockTokens});
  }
  return list;
}

bool HostTier::Begin(Task* task) {
  Slot& slot = *task->slot;
  absl::StatusOr<CopyId> copy = absl::DataLossError("");
  if (task->is_return) {
    // Its own copy out may be under way.
    if (slot.state == Slot::State::kEmpty) return false;
    if (slot.state == Slot::State::kFilled && Checksum(slot) == slot.checksum) {
      copy = copies_->Write(ListOf(*task), {{slot.data, slot_bytes_}, false});
    }
  } else if (slots_.contains(task->key) && slots_.at(task->key) == task->slot) {
    // A slot may be free when a copy under way has ended.
    if (slot.data == nullptr && !TakeMemory(&slot) && num_begun_ > 0) return false;
    if (slot.data != nullptr)
      copy = copies_->Read(ListOf(*task), {{slot.data, slot_bytes_}, false});
  }  // else it was forgotten before it began
  if (absl::IsResourceExhausted(copy.status()) && num_begun_ > 0) return false;
  if (copy.ok()) task->copy = *copy;
  return true;
}

void HostTier::Begin(std::vector<End>* ends) {
  while (num_begun_ < tasks_.size() && num_begun_ < kMaxTierCopies) {
    Task& task = tasks_[num_begun_];
    if (!Begin(&task)) return;
    if (task.copy != CopyId{}) {
      ++num_begun_;
      continue;
    }
    if (num_begun_ > 0) return;  // it fails when those before it have ended
    const Task failed = std::move(task);
    tasks_.pop_front();
    Finish(failed, false, ends);
  }
}

void HostTier::Finish(const Task& task, bool ok, std::vector<End>* ends) {
  Slot& slot = *task.slot;
  if (!task.is_return) {
    slot.state = ok ? Slot::State::kFilled : Slot::State::kBad;
    if (ok) slot.checksum = Checksum(slot);
  }
  End end{task.key, task.is_return, ok, {}};
  if (task.is_abandoned) end.abandoned = task.blocks;
  ends->push_back(std::move(end));
}

std::vector<HostTier::End> HostTier::Poll(uint64_t now_us, absl::Span<const CopyEnd> copies) {
  std::vector<End> ends;
  if (was_copying_) copied_.us += now_us - std::min(now_us, last_poll_us_);
  last_poll_us_ = now_us;
  for (const CopyEnd& end : copies) {
    // All of a model's copies end in the order of their ids.
    if (num_begun_ == 0 || tasks_.front().copy != end.id) continue;
    const Task task = std::move(tasks_.front());
    tasks_.pop_front();
    --num_begun_;
    copied_.bytes += end.status.ok() ? slot_bytes_ : 0;
    Finish(task, end.status.ok(), &ends);
  }
  Begin(&ends);
  was_copying_ = num_begun_ > 0;
  return ends;
}

std::vector<HostTier::End> HostTier::Clear(const std::function<std::vector<CopyEnd>()>& poll) {
  std::vector<End> all;
  slots_.clear();
  while (busy()) {
    std::vector<End> ends = Poll(last_poll_us_, num_begun_ > 0 ? poll() : std::vector<CopyEnd>());
    if (ends.empty() && busy()) std::this_thread::yield();
    all.insert(all.end(), std::make_move_iterator(ends.begin()),
               std::make_move_iterator(ends.end()));
  }
  was_copying_ = false;
  free_.clear();
  for (const CopyMemory& memory : memory_) budget_->used_bytes -= memory.bytes;
  memory_.clear();
  num_slots_ = 0;
  copied_ = {};
  return all;
}

HostTier::Copied HostTier::TakeCopied() { return std::exchange(copied_, {}); }

}  // namespace strait
