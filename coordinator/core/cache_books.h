// SPDX-License-Identifier: Apache-2.0
//
// CacheBooks accounts for the latent blocks of every stage of one pipeline, in bytes: what there
// is, what is reserved for sequences, and what their rows hold after all steps planned so far.
//
// Owns:    nothing beyond the sums.
// Thread:  loop thread only.
// Limits:  Reserve and Resize REQUIRE room; the scheduler preempts until there is.
// Why:     stages differ in layers, in memory and, during a replay, in the lengths of sequences, so
//          each has sums of its own. What a sequence costs is never kept, but asked of
//          proto/model/reservation.h by its rows, before and after. A prefix block counts once, apart
//          from the sequences that have it; they cost what their rows do, less those of such blocks.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/core/prefix_index.h"
#include "coordinator/core/replay.h"
#include "proto/base/ids.h"
#include "proto/model/reservation.h"

namespace strait {

struct StageCache {
  LayerRange layers;
  uint64_t capacity_bytes = 0;
  uint64_t reserved_bytes = 0;  // of residents, closing sequences and prefix blocks
  uint64_t held_bytes = 0;      // by rows, of blocks begun; and of prefix blocks
  uint64_t host_blocks = 0;     // prefix blocks that it may have in host memory
  uint64_t free_bytes() const { return capacity_bytes - reserved_bytes; }
  friend bool operator==(const StageCache&, const StageCache&) = default;
};

class CacheBooks {
 public:
  // Every stage is empty.
  void Start(const CachePolicy& policy, std::vector<StageCache> stages);
  void Stop() { stages_.clear(); }

  // A sequence of so many rows fits where nobody else is.
  bool CanEverHold(uint32_t rows) const;
  // A sequence that has `prefix` of its rows as prefix blocks fits, if `num_free` other prefix blocks
  // leave, and each of `num_growing` others may still grow a little.
  bool HasRoom(uint32_t rows, const StageBlocks& prefix, uint64_t num_free,
               uint32_t num_growing) const;
  // The longest sequence that fits if so many prefix blocks leave.
  uint64_t free_rows(uint64_t num_free) const;

  // What is reserved has room in stages of these sizes; they have them from now on.
  bool Fits(const std::vector<uint64_t>& capacity_bytes) const;
  void Resize(const std::vector<uint64_t>& capacity_bytes);

  // Every stage has what it takes to reserve `to` rows in place of `from`.
  bool CanReserve(uint32_t from, uint32_t to) const;
  void Reserve(uint32_t from, uint32_t to);
  // A sequence with `reserved_rows` and these prefix blocks comes; leaves.
  bool CanEnter(uint32_t reserved_rows, const StageBlocks& prefix) const;
  void Enter(uint32_t reserved_rows, const StageBlocks& prefix);
  void Leave(uint32_t reserved_rows, const StageBlocks& prefix);
  // A prefix block comes to a stage; leaves.
  void AddPrefix(uint32_t stage_index);
  void RemovePrefix(uint32_t stage_index);

  // A sequence is there with these rows; is there no more.
  void Hold(const StageRows& rows, const StageBlocks& prefix);
  void Free(const StageRows& rows, const StageBlocks& prefix);
  // Its next chunk, before it advances.
  void Grow(const StageRows& rows, uint32_t num_rows);

  const std::vector<StageCache>& stages() const { return stages_; }
  // What the rows hold in one layer, but for prefix blocks; what a prefix block does.
  uint64_t HeldInLayer(const StageRows& rows, const StageBlocks& prefix, uint32_t stage_index,
                       LayerIndex layer) const;
  uint64_t PrefixBytes(LayerRange layers) const;
  // Internal, with the numbers, if other sums than these are due; free + reserved = capacity.
  absl::Status CheckEqual(const CacheBooks& due) const;
  // The same stages, with nothing in them.
  CacheBooks Empty() const;

 private:
  CachePolicy policy_;
  std::vector<StageCache> stages_;
};

}  // namespace strait
