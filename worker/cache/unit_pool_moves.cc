// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>

#include "proto/base/check.h"
#include "worker/cache/unit_fit.h"
#include "worker/cache/unit_pool.h"

namespace strait {

// ---- The array's size ----

void UnitPool::Grow(uint32_t num_units) {
  STRAIT_CHECK(end_ == size() && num_units >= size() && num_units <= kMaxUnits);
  // Below what is free already: units that were used once are used again first.
  std::vector<uint32_t> free;
  free.reserve(free_.size() + num_units - size());
  for (uint32_t unit = num_units; unit > end_; --unit) free.push_back(unit - 1);
  free.insert(free.end(), free_.begin(), free_.end());
  free_ = std::move(free);
  units_.resize(num_units);
  end_ = num_units;
}

void UnitPool::Narrow(uint32_t num_units, std::vector<RunMove>* moves) {
  STRAIT_CHECK(end_ == size() && to_follow_ == 0, "blocks have moved that did not follow");
  STRAIT_CHECK(units_used() <= num_units && num_units <= size(),
               "more units are held than are left");
  end_ = num_units;
  free_.erase(std::remove_if(free_.begin(), free_.end(), [&](uint32_t u) { return u >= end_; }),
              free_.end());
  units_moved_.assign(size() - end_, kNone);
  for (uint32_t unit = end_; unit < size(); ++unit) {
    if (units_[unit].state == 0) continue;
    const uint32_t to = free_.back();
    free_.pop_back();
    if (IsSplit(unit)) {
      SplitOf(unit).unit = to;
      for (const uint32_t holders : SplitOf(unit).holders) to_follow_ += holders;
    } else {
      to_follow_ += uint64_t{units_[unit].state} * kUnitGrains;
    }
    units_[to] = std::exchange(units_[unit], Unit());
    units_moved_[unit - end_] = to;
    moves->push_back({unit * kUnitGrains, to * kUnitGrains, kUnitGrains});
  }
}

void UnitPool::DropNarrowed() {
  STRAIT_CHECK(to_follow_ == 0, "a block did not follow its units");
  units_.resize(end_);
  units_moved_.clear();
}

// ---- Moving runs together ----

// Of blocks of two halves, one of them free: two such become a full one and a free one. First for halves of
// a grain, then of two, then of four; so at most one such block of each size is left.
void UnitPool::Compact(std::vector<RunMove>* moves) {
  STRAIT_CHECK(end_ == size() && to_follow_ == 0, "blocks have moved that did not follow");
  grains_moved_.clear();
  absl::flat_hash_map<uint32_t, uint32_t> origins;  // by where a moved grain is now
  for (uint32_t half = 1; half < kUnitGrains; half *= 2) {
    uint32_t open = kNone;  // the free half of a block whose other one is not
    for (uint32_t i = 0; i < splits_.size(); ++i) {
      for (uint32_t first = 0; first < kUnitGrains; first += 2 * half) {
        if (splits_[i].unit == kNone) break;
        const bool low = (splits_[i].free & MaskOf(first, half)) == MaskOf(first, half);
        const uint32_t upper = MaskOf(first + half, half);
        if (low == ((splits_[i].free & upper) == upper)) continue;
        const uint32_t begin = splits_[i].unit * kUnitGrains + first;
        if (open == kNone) {
          open = begin + (low ? 0 : half);
        } else {
          MoveHeld(begin + (low ? half : 0), open, half, &origins, moves);
          open = kNone;
        }
      }
    }
  }
  for (const auto& [now, before] : origins) {
    grains_moved_[before] = now;
    to_follow_ += SplitOf(now / kUnitGrains).holders[now % kUnitGrains];
  }
}

void UnitPool::MoveHeld(uint32_t from, uint32_t to, uint32_t grains,
                        absl::flat_hash_map<uint32_t, uint32_t>* origins,
                        std::vector<RunMove>* moves) {
  Split& source = SplitOf(from / kUnitGrains);
  Split& target = SplitOf(to / kUnitGrains);
  bool joined = false;
  uint32_t moved = 0;
  for (uint32_t i = 0; i < grains; ++i) {
    const uint32_t at = (from + i) % kUnitGrains;
    const uint32_t goal = (to + i) % kUnitGrains;
    if (source.holders[at] == 0) {
      joined = false;
      continue;
    }
    moved |= 1u << i;
    target.holders[goal] = std::exchange(source.holders[at], 0);
    target.partials[goal] = std::exchange(source.partials[at], kNone);
    uint32_t origin = from + i;
    if (const auto it = origins->find(from + i); it != origins->end()) {
      origin = it->second;
      origins->erase(it);
    }
    (*origins)[to + i] = origin;
    if (joined) {
      ++moves->back().grains;
    } else {
      moves->push_back({from + i, to + i, 1});
    }
    joined = true;
  }
  SetFree(&target, target.free & ~(moved << to % kUnitGrains));
  SetFree(&source, source.free | moved << from % kUnitGrains);
}

void UnitPool::Follow(UnitBlock* block) {
  if (to_follow_ == 0) return;
  const BlockUnits layout(block->shape, rope_);
  STRAIT_CHECK(block->pieces.size() == layout.size());
  for (uint32_t i = 0; i < layout.size(); ++i) {
    uint32_t& first = block->pieces[i];
    uint32_t to = first;
    if (first / kUnitGrains >= end_) {
      const uint32_t unit = units_moved_.at(first / kUnitGrains - end_);
      STRAIT_CHECK(unit != kNone);
      to = unit * kUnitGrains + first % kUnitGrains;
    } else if (!units_moved_.empty() || layout[i].grains == kUnitGrains) {
      continue;
    } else if (const auto it = grains_moved_.find(first); it != grains_moved_.end()) {
      to = it->second;
    }
    if (to == first) continue;
    STRAIT_CHECK(to_follow_ >= layout[i].grains, "a block followed twice");
    first = to;
    to_follow_ -= layout[i].grains;
  }
}

}  // namespace strait
