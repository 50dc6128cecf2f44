// SPDX-License-Identifier: Apache-2.0
//
// CacheShares divides a worker's cache among its stages: how many latent blocks each may hold, and so
// how much memory the cache takes.
//
// Owns:    the worker's BlockPool.
// Borrows: the backend's CacheMemory, which outlives it.
// Thread:  loop thread only.
// Errors:  ResourceExhausted: the memory for more blocks is not there; FailedPrecondition and
//          InvalidArgument say what of a request contradicts the shares. Nothing is changed then.
// Why:     the cache has as many blocks as all shares together, so that every accepted plan finds its
//          blocks. A share that became smaller counts as it was until its stage can do with less:
//          plans from before may still need it.
//          A successor's share is a part of its predecessors' until they are gone: their blocks become
//          its own. Predecessors that have a successor in common, and all their successors, are one
//          handover: while it lasts it counts as what its predecessors had, and none of its successors
//          may step. Else a successor would grow into blocks that are held. It lasts until all of its
//          predecessors have gone, or all of its successors.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "worker/cache/latent_cache.h"

namespace strait {

class CacheShares {
 public:
  explicit CacheShares(CacheMemory* memory) : memory_(memory) {}

  // `successor_of`: each once, stages that have shares, that are settled, and that wait for no
  // predecessor themselves. Successors of a handover have together no more than its predecessors.
  absl::Status Add(uint64_t stage_id, uint32_t blocks, std::vector<uint64_t> successor_of = {});
  // REQUIRES: it has a share.
  void Remove(uint64_t stage_id);
  void Clear();
  // FailedPrecondition in a handover. More blocks are there at once; fewer count when it is settled.
  // REQUIRES: it has a share.
  absl::Status Change(uint64_t stage_id, uint32_t blocks);
  // The stage holds no more than its share, nor will it until the plans that it has have run. REQUIRES: it
  // has a share.
  void Settle(uint64_t stage_id);

  // REQUIRES, of all: it has a share.
  uint32_t BlocksOf(uint64_t stage_id) const { return shares_.at(stage_id).blocks; }
  bool IsSettled(uint64_t stage_id) const {
    return shares_.at(stage_id).most == shares_.at(stage_id).blocks;
  }
  // What is kept for it: its share, or what that was.
  uint32_t MostOf(uint64_t stage_id) const { return shares_.at(stage_id).most; }
  // Those that it follows and that are here.
  const std::vector<uint64_t>& PredecessorsOf(uint64_t stage_id) const {
    return shares_.at(stage_id).successor_of;
  }
  // The predecessors of its handover that are still here. Not empty: it must not step.
  std::vector<uint64_t> WaitsFor(uint64_t stage_id) const;

  // Whether the cache has more blocks than are needed.
  bool ShrinkIsDue() const { return needed_ < pool_.size(); }
  // `compact` replaces the blocks behind `end` in all page tables. REQUIRES: ShrinkIsDue; what
  // CacheMemory::Resize does.
  using Compact = std::function<void(BlockId end, std::vector<BlockMove>* moves)>;
  void Shrink(const Compact& compact);

  BlockPool* pool() { return &pool_; }
  const BlockPool& pool() const { return pool_; }
  // Blocks that all shares need.
  uint64_t needed() const { return needed_; }
  // The pool is well, has what is needed, and what is held of it is no more.
  absl::Status CheckIntegrity() const;

 private:
  struct Share {
    uint32_t blocks = 0;
    uint32_t most = 0;  // not below `blocks`
    std::vector<uint64_t> successor_of;
    uint64_t handover = 0;  // 0: none
  };
  struct Handover {
    uint64_t blocks = 0;                 // of all predecessors, those too that have gone
    uint64_t successors_blocks = 0;      // of those that are here; no more
    std::vector<uint64_t> predecessors;  // that are here
    std::vector<uint64_t> successors;
  };
  absl::Status AddSuccessor(uint64_t stage_id, uint32_t blocks, std::vector<uint64_t> successor_of);
  // What becomes of the handover of a stage that has no share any more.
  void LeaveHandover(uint64_t stage_id, const Share& share);
  // What is needed.
  void Count();
  absl::Status GrowTo(uint64_t blocks);

  CacheMemory* const memory_;
  BlockPool pool_;
  std::map<uint64_t, Share> shares_;
  std::map<uint64_t, Handover> handovers_;
  uint64_t last_handover_ = 0;
  uint64_t needed_ = 0;
};

}  // namespace strait
