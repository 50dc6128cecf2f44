// SPDX-License-Identifier: Apache-2.0
//
// HostTier keeps copies of a stage's prefix blocks in host memory: it takes them out of the pool beside
// steps, with a checksum, and brings them back if the checksum is still right.
//
// Owns:    the memory, taken lazily and given back with Clear; the copies under way.
// Borrows: the model's BlockCopies, which others use, too, so what its Poll tells is handed in; the worker's HostBudget
//          (null: no memory). Both outlive it.
// Thread:  loop thread only.
// Errors:  a copy that failed, memory that is not there, bytes that changed: the block is lost, and whoever
//          asks for it is told.
// Limits:  the budget; kMaxTierCopies of copies under way, what is asked beyond waits in order.
// Why:     a block's bytes lie in a slot of their own, so a slot is free when the last copy that uses it has
//          ended, whatever became of its key meanwhile. A checksum finds what memory or a driver did to
//          rows that nobody looked at for minutes: they would be a client's wrong tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/model/content_key.h"
#include "worker/block_copies.h"

namespace strait {

// The host memory of one worker that its stages' tiers share.
struct HostBudget {
  uint64_t limit_bytes = 0;
  uint64_t used_bytes = 0;
};

// Of one tier; the others of kMaxCopiesUnderWay are for whoever else copies.
inline constexpr size_t kMaxTierCopies = 16;
// Memory is taken in pieces of so much, or of one block.
inline constexpr size_t kTierPieceBytes = 64u << 20;

class HostTier {
 public:
  HostTier(uint32_t num_layers, BlockCopies* copies, HostBudget* budget);
  ~HostTier();  // REQUIRES: !busy()
  HostTier(const HostTier&) = delete;
  HostTier& operator=(const HostTier&) = delete;

  // How many it is to have; memory for a few more may be taken while copies of forgotten ones end.
  void SetBlocks(uint32_t num_blocks) { wanted_blocks_ = num_blocks; }

  // A copy of these blocks, [num_layers], is made. REQUIRES: !has(key); their rows are finished.
  void Offload(const ContentKey& key, absl::Span<const BlockId> blocks);
  // The rows go into these blocks. REQUIRES: has(key).
  void Return(const ContentKey& key, absl::Span<const BlockId> blocks);
  // REQUIRES: has(key).
  void Forget(const ContentKey& key);

  bool has(const ContentKey& key) const { return slots_.contains(key); }
  size_t num_blocks() const { return slots_.size(); }
  // Copies into or out of the blocks that this key has now have not ended.
  bool Uses(const ContentKey& key) const;
  // These blocks are the key's no more, and nobody else's before the copies have ended: Poll tells. REQUIRES:
  // Uses(key).
  void Abandon(const ContentKey& key, std::vector<BlockId> blocks);
  // Any copy is under way, or waits.
  bool busy() const { return !tasks_.empty(); }
  size_t num_copies() const { return num_begun_; }

  // What has ended, in order.
  struct End {
    ContentKey key;
    bool is_return = false;
    bool ok = false;                 // of a return: the rows are there
    std::vector<BlockId> abandoned;  // the blocks, if they were
  };
  // `copies`: what BlockCopies::Poll told; those of others are passed over.
  std::vector<End> Poll(uint64_t now_us, absl::Span<const CopyEnd> copies);
  // Waits for all of its copies, then has no block any more. What Poll would have told. `poll` calls
  // BlockCopies::Poll.
  std::vector<End> Clear(const std::function<std::vector<CopyEnd>()>& poll);

  // Since the last call.
  struct Copied {
    uint64_t bytes = 0;
    uint64_t us = 0;
  };
  Copied TakeCopied();

 private:
  struct Slot {
    std::byte* data = nullptr;
    uint64_t checksum = 0;
    enum class State { kEmpty, kFilled, kBad } state = State::kEmpty;
  };
  using SlotPtr = std::shared_ptr<Slot>;  // of its key, and of tasks
  struct Task {
    ContentKey key;
    bool is_return = false;
    SlotPtr slot;
    std::vector<BlockId> blocks;  // [num_layers]
    bool is_abandoned = false;
    CopyId copy;  // 0: it waits
  };

  SlotPtr MakeSlot();
  bool TakeMemory(Slot* slot);
  uint64_t Checksum(const Slot& slot) const;
  // Begins copies as far as they may, in order.
  void Begin(std::vector<End>* ends);
  // False: it must wait.
  bool Begin(Task* task);
  void Finish(const Task& task, bool ok, std::vector<End>* ends);
  std::vector<BlockRows> ListOf(const Task& task) const;

  const uint32_t num_layers_;
  BlockCopies* const copies_;
  HostBudget* const budget_;
  const size_t slot_bytes_;
  uint32_t wanted_blocks_ = 0;
  size_t num_slots_ = 0;
  std::vector<CopyMemory> memory_;
  std::vector<std::byte*> free_;  // a stack
  std::map<ContentKey, SlotPtr> slots_;
  std::deque<Task> tasks_;  // oldest first; those begun lead
  size_t num_begun_ = 0;
  Copied copied_;
  uint64_t last_poll_us_ = 0;
  bool was_copying_ = false;  // at the last poll
};

}  // namespace strait
