// SPDX-License-Identifier: Apache-2.0
//
// Replicas are the books of copies of prefix blocks in other workers' host memory: which worker keeps which
// layers of which block, and how much memory that takes.
//
// Thread:  loop thread only. Plain values: what is sent for it, Cluster decides (replicating.cc).
// Limits:  what each worker offers (Hello.replica_bytes).
// Why:     a copy is known by content key and layers, so it is true whatever became of the stage, the epoch or
//          the pipeline that it was read from. A stage has all of its copies at one worker, its buddy, whatever others
//          have: who takes its place asks one for all of a sequence's blocks, and they never are where the stage
//          is. Where memory is full, ends of sequences give way: a block goes before what leads to it, for without that it is
//          of no use. First those that no sequence has, then those that are cheaper to compute again than what comes
//          (recompute_cost.h); of equal ones those made first. So what is protected is what costs most, and two
//          sequences never drive each other out in turn.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "proto/model/content_key.h"

namespace strait {

class Replicas {
 public:
  // What a worker has for copies; 0: nothing, and it is no buddy.
  void Offer(WorkerId worker, uint64_t bytes);
  // It is gone, and its copies with it.
  void Forget(WorkerId worker);
  bool any() const { return !keepers_.empty(); }
  bool Offers(WorkerId worker) const { return keepers_.contains(worker); }
  uint64_t limit_bytes(WorkerId worker) const { return keepers_.at(worker).limit_bytes; }
  uint64_t used_bytes(WorkerId worker) const { return keepers_.at(worker).used_bytes; }

  // Where in a sequence a block lies.
  struct Place {
    uint32_t block = 0;
    std::optional<ContentKey> before;  // absent: it is the first
  };
  // Whether `worker` has a copy of what leads to it, or one comes: without that a copy is of no use.
  bool HasBefore(const Place& place, WorkerId worker) const;
  // A copy comes to `worker`, of a stage's layers. REQUIRES: it offers, and has room; it has none of these layers, nor
  // are any on their way to it; HasBefore.
  void Begin(const ContentKey& key, const Place& place, LayerRange layers, uint64_t stage_id,
             WorkerId worker, uint64_t bytes);
  // It is there, or is not to be. False: nobody asked for it.
  bool End(const ContentKey& key, uint64_t stage_id, WorkerId worker, bool ok);
  // What is to be forgotten at `worker` for so many bytes more, of a block of this place: O(log n). `is_held`: a sequence
  // has it. Absent: there is no room.
  struct Gone {
    ContentKey key;
    LayerRange layers;
  };
  std::optional<std::vector<Gone>> MakeRoom(WorkerId worker, uint64_t bytes, const Place& place,
                                            const std::function<bool(const ContentKey&)>& is_held);

  // All that are there and that `is_held` does not know: they are to be forgotten.
  std::vector<std::pair<WorkerId, Gone>> DropUnheld(
      const std::function<bool(const ContentKey&)>& is_held);

  // All of these layers have copies at `worker`, there or on their way.
  bool Has(const ContentKey& key, LayerRange layers, WorkerId worker) const;
  bool IsThere(const ContentKey& key, LayerRange layers, WorkerId worker) const;
  // Copies at `worker` of some of these layers are to be forgotten, for one of all of them. Absent: some are on their way.
  std::optional<std::vector<Gone>> MakeWay(const ContentKey& key, LayerRange layers,
                                           WorkerId worker);
  struct Part {
    WorkerId worker;
    LayerRange layers;
    friend bool operator==(const Part&, const Part&) = default;
  };
  // Copies that are there of all of these layers, by rising layers; empty: not of all.
  std::vector<Part> Find(const ContentKey& key, LayerRange layers) const;
  // Workers that have all of them.
  std::vector<WorkerId> KeepersOf(const ContentKey& key, LayerRange layers) const;
  // That are there.
  uint64_t num_there() const { return num_there_; }
  // Rises whenever a copy is lost that a sequence may have: what was known to be there may not be.
  uint64_t losses() const { return losses_; }
  absl::Status CheckIntegrity() const;

 private:
  struct Copy {
    WorkerId worker;
    LayerRange layers;
    uint64_t stage_id = 0;  // that it was read from
    uint64_t bytes = 0;
    bool is_there = false;
  };
  using Rank = std::pair<uint64_t, uint64_t>;  // RecomputeCost, age
  // A block of which a keeper has copies, or of one that follows it.
  struct Block {
    Place place;
    Rank rank;
    uint32_t num_copies = 0;
    uint32_t num_coming = 0;  // of these
    uint32_t num_after = 0;   // blocks that follow it
    bool is_held = false;     // when it was last looked at
    bool is_end() const { return num_copies > 0 && num_coming == 0 && num_after == 0; }
  };
  using Ends = std::map<Rank, ContentKey>;
  struct Keeper {
    uint64_t limit_bytes = 0;
    uint64_t used_bytes = 0;
    absl::flat_hash_map<ContentKey, Block, ContentKeyHash> blocks;
    Ends free_ends;
    Ends held_ends;
    Rank looked_at;  // of held_ends, last
    Ends& EndsOf(const Block& block) { return block.is_held ? held_ends : free_ends; }
  };
  void Drop(const ContentKey& key, size_t index);
  // All of a keeper's copies of it.
  void DropBlock(const ContentKey& key, WorkerId worker, std::vector<Gone>* gone);
  // After its counts have changed: it is an end or none, or goes, and so may those before it.
  static void Settle(Keeper* keeper, ContentKey key);
  // Held ends of which no sequence has some any more become free ones; a few each time.
  static void LookAgain(Keeper* keeper, const std::function<bool(const ContentKey&)>& is_held);
  absl::Status CheckEnds(WorkerId worker, const Keeper& keeper) const;
  bool Covers(const ContentKey& key, LayerRange layers, WorkerId worker, bool are_there) const;

  std::map<WorkerId, Keeper> keepers_;
  absl::flat_hash_map<ContentKey, std::vector<Copy>, ContentKeyHash> copies_;
  uint64_t last_age_ = 0;
  uint64_t num_there_ = 0;
  uint64_t losses_ = 0;
};

}  // namespace strait
