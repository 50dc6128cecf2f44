// SPDX-License-Identifier: Apache-2.0
//
// UnitPool lends latent blocks of mixed row formats and ranks out of one array of equal units, in the
// pieces that proto/model/block_units.h makes of a block. It never touches a row.
//
// Owns:    which unit and which grain is held, and by how many.
// Thread:  loop thread only.
// Errors:  none but CheckIntegrity's. Take has no value where units are too few, and nothing has
//          changed then; what holders get wrong is checked.
// Limits:  kMaxUnits. A run of grains is found and given back in a time that does not grow with the pool.
// Why:     runs of grains come from units that are split already, the fullest first, and a unit whose
//          grains are all free is whole at once. So without cuts little is stranded: free, but in split
//          units, where no whole unit can be made of it. A cut leaves the head of a unit held and its
//          tail free, and moves nothing. If no small runs want these tails they add up; so when units are
//          lacking, runs are moved together (Compact), at most 1.5 bytes for each that was stranded.
//          Holders are counted for each unit, in a split one for each grain: who cuts a block that others
//          hold lets go of its tail alone. Who wants other bytes in a shared block takes a new one. All
//          is deterministic: the same calls give the same pieces.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "proto/model/block_units.h"

namespace strait {

// One holder's block. Moved, never copied: Share makes another holder.
struct UnitBlock {
  UnitBlock() = default;
  UnitBlock(UnitBlock&&) = default;
  UnitBlock& operator=(UnitBlock&&) = default;

  BlockShape shape;
  // [BlockUnits(shape, rope).size()]: the first grain of each piece; grain g is the (g % 8)th of unit
  // g / 8, and lies g * GrainBytes from the array's begin.
  std::vector<uint32_t> pieces;
};

// All bytes of a run of grains go elsewhere.
struct RunMove {
  uint32_t from = 0;
  uint32_t to = 0;
  uint32_t grains = 0;
};

class UnitPool {
 public:
  static constexpr uint32_t kMaxUnits = 1u << 28;
  static constexpr uint32_t kMaxStrandedPercent = 1;

  // REQUIRES: HasUnits(rope).
  explicit UnitPool(uint32_t rope, uint32_t num_units = 0);

  // ---- Blocks ----
  // All pieces, or no value and nothing is taken: there are too few whole units.
  std::optional<UnitBlock> Take(BlockShape shape);
  // Another holder of the same rows.
  UnitBlock Share(const UnitBlock& block);
  // The columns from `rank` on are this holder's no more; what nobody else holds of them is free. What
  // is left has the pieces of a block of that rank, where they were. REQUIRES: 0 < rank <= its rank.
  void Cut(UnitBlock* block, uint32_t rank);
  void Give(UnitBlock block);

  // ---- Moves ----
  // What they append to `moves` is to be done to the bytes in that order: a place may be one that an
  // earlier move has emptied. Every block is to Follow, once, before anything else is done with the pool.

  // Runs of split units move together until less than a unit is stranded. For who lacks whole units while
  // more than kMaxStrandedPercent of the pool is stranded.
  void Compact(std::vector<RunMove>* moves);
  void Follow(UnitBlock* block);

  // ---- The array's size, in units ----
  // REQUIRES: num_units from size() to kMaxUnits; not narrowed.
  void Grow(uint32_t num_units);
  // Units from num_units on are lent no more: what is held there moves, whole units of 8 grains.
  // REQUIRES: units_used() <= num_units <= size(); not narrowed.
  void Narrow(uint32_t num_units, std::vector<RunMove>* moves);
  // The pool ends where it was narrowed to. REQUIRES: every block followed.
  void DropNarrowed();

  // ---- Counts, of distinct bytes however many hold them ----
  uint32_t size() const { return static_cast<uint32_t>(units_.size()); }
  uint32_t rope() const { return rope_; }
  // Units of which something is held; whole free ones.
  uint32_t units_used() const { return end_ - units_free(); }
  uint32_t units_free() const { return static_cast<uint32_t>(free_.size()); }
  // Held: rows and padding.
  uint64_t used_bytes() const { return used_grains_ * grain_bytes_; }
  // In grains that are held, and no holder has a row's byte there.
  uint64_t padded_bytes() const { return padded_bytes_; }
  // Free, but in units that are split.
  uint64_t stranded_bytes() const { return stranded_grains_ * grain_bytes_; }

  // Whole, split and free units are all units, each once, and all counts are those of the units.
  absl::Status CheckIntegrity() const;

 private:
  static constexpr uint32_t kNone = ~0u;
  static constexpr uint32_t kSplit = 1u << 31;

  // Holders that fill a grain only up to a byte; a list for each such grain. Others fill it whole.
  struct Partial {
    uint32_t used_bytes = 0;
    uint32_t holders = 0;
    uint32_t next = kNone;
  };
  struct Unit {
    uint32_t state = 0;         // holders of the whole unit, 0: free; or kSplit + index of a Split
    uint32_t partials = kNone;  // of the last grain; none where split
  };
  struct Split {
    uint32_t unit = kNone;  // kNone: this entry is free
    uint32_t prev = kNone;  // in the list of its mask
    uint32_t next = kNone;
    uint32_t free = 0;  // mask of free grains
    std::array<uint32_t, kUnitGrains> holders = {};
    std::array<uint32_t, kUnitGrains> partials = {};
  };
  // Of a run of grains, of which the last is filled up to last_used bytes.
  struct Run {
    uint32_t first = 0;
    uint32_t grains = 0;
    uint32_t last_used = 0;
  };

  Run RunOf(uint32_t first, BlockPiece piece) const;
  // First grain of so many that are nobody's, or kNone.
  uint32_t Find(uint32_t grains);
  void Hold(const Run& run);
  void Release(const Run& run);
  // A holder of this grain fills it otherwise.
  void Refill(uint32_t grain, uint32_t from, uint32_t to);
  // A whole unit becomes a split one with the same holders.
  void SplitUnit(uint32_t unit);
  uint32_t NewSplit(uint32_t unit);
  bool IsSplit(uint32_t unit) const { return (units_[unit].state & kSplit) != 0; }
  Split& SplitOf(uint32_t unit) { return splits_[units_[unit].state - kSplit]; }
  const Split& SplitOf(uint32_t unit) const { return splits_[units_[unit].state - kSplit]; }
  void SetFree(Split* split, uint32_t mask);
  void Link(uint32_t index);
  void Unlink(uint32_t index);
  // Padding of a grain: 0 as soon as one holder fills it.
  uint64_t Padding(uint32_t holders, uint32_t partials) const;
  // What is held of a run of a split unit goes to a free one.
  void MoveHeld(uint32_t from, uint32_t to, uint32_t grains,
                absl::flat_hash_map<uint32_t, uint32_t>* origins, std::vector<RunMove>* moves);
  void AddPartial(uint32_t* partials, uint32_t used_bytes);
  void RemovePartial(uint32_t* partials, uint32_t used_bytes);
  absl::Status CheckGrain(uint32_t grain, uint32_t holders, uint32_t partials,
                          uint64_t* padded) const;
  absl::Status CheckLists() const;

  const uint32_t rope_;
  const uint32_t grain_bytes_;
  std::vector<Unit> units_;
  std::vector<uint32_t> free_;         // a stack of whole units; the lowest leave first; below end_
  std::vector<Split> splits_;          // of split units, and free entries
  std::vector<uint32_t> free_splits_;  // a stack
  std::vector<Partial> partials_;
  std::vector<uint32_t> free_partials_;  // a stack
  std::array<uint32_t, 256> lists_;      // [mask]: the first Split with these grains free, 1 to 254
  std::array<std::array<uint64_t, 4>, 3> has_ =
      {};                              // [run size]: masks with a list, the fullest first
  uint32_t end_ = 0;                   // size, or what it was narrowed to
  std::vector<uint32_t> units_moved_;  // [size - end_] while narrowed: to where
  absl::flat_hash_map<uint32_t, uint32_t> grains_moved_;  // by Compact: to where
  uint64_t to_follow_ = 0;                                // grains of blocks that have not
  uint64_t used_grains_ = 0;
  uint64_t stranded_grains_ = 0;
  uint64_t padded_bytes_ = 0;
};

}  // namespace strait
