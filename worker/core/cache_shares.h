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
//          blocks. A successor's share is a part of its predecessors' until they are gone: their
//          blocks become its own. While both are here the cache does not become smaller.
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

  // `successor_of`: stages that have shares, and are successors of none; of its share together with
  // those of their other successors they have no less.
  absl::Status Add(uint64_t stage_id, uint32_t blocks, std::vector<uint64_t> successor_of = {});
  // REQUIRES: it has a share.
  void Remove(uint64_t stage_id);
  void Clear() { shares_.clear(); }
  // FailedPrecondition while it has a predecessor or a successor here. More blocks are there at once,
  // fewer go with Shrink. REQUIRES: it has a share.
  absl::Status Change(uint64_t stage_id, uint32_t blocks);
  // REQUIRES: it has a share.
  uint32_t BlocksOf(uint64_t stage_id) const { return shares_.at(stage_id).blocks; }
  const std::vector<uint64_t>& PredecessorsOf(uint64_t stage_id) const {
    return shares_.at(stage_id).successor_of;
  }
  // One of its predecessors is still here.
  bool HasPredecessor(uint64_t stage_id) const;

  // Whether the cache has more blocks than all shares; and whether as few would be enough for what is
  // held.
  bool ShrinkIsDue() const { return Due() < pool_.size(); }
  bool CanShrink() const { return pool_.used() <= Due(); }
  // `compact` replaces the blocks behind `end` in all page tables. REQUIRES: ShrinkIsDue, CanShrink; what
  // CacheMemory::Resize does.
  using Compact = std::function<void(BlockId end, std::vector<BlockMove>* moves)>;
  void Shrink(const Compact& compact);

  BlockPool* pool() { return &pool_; }
  const BlockPool& pool() const { return pool_; }

 private:
  struct Share {
    uint32_t blocks = 0;
    std::vector<uint64_t> successor_of;
  };
  bool HasSuccessor(uint64_t stage_id) const;
  bool AnyPredecessor() const;
  // Blocks that all shares need.
  uint64_t Due() const;
  absl::Status GrowTo(uint64_t blocks);

  CacheMemory* const memory_;
  BlockPool pool_;
  std::map<uint64_t, Share> shares_;
};

}  // namespace strait
