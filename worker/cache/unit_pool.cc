// SPDX-License-Identifier: Apache-2.0
#include "worker/cache/unit_pool.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "proto/base/check.h"
#include "worker/cache/unit_fit.h"

namespace strait {
UnitPool::UnitPool(uint32_t rope, uint32_t num_units)
    : rope_(rope), grain_bytes_(GrainBytes(rope)) {
  STRAIT_CHECK(HasUnits(rope), "rows with such a key have no units");
  lists_.fill(kNone);
  Grow(num_units);
}

// ---- Blocks ----

UnitPool::Run UnitPool::RunOf(uint32_t first, BlockPiece piece) const {
  return {first, piece.grains, piece.used_bytes - (piece.grains - 1) * grain_bytes_};
}

std::optional<UnitBlock> UnitPool::Take(BlockShape shape) {
  STRAIT_CHECK(shape.rank > 0 && shape.rank <= limits::kMaxLoraRank);
  const BlockUnits layout(shape, rope_);
  UnitBlock block;
  block.shape = shape;
  block.pieces.reserve(layout.size());
  for (uint32_t i = 0; i < layout.size(); ++i) {
    const uint32_t first = Find(layout[i].grains);
    if (first == kNone) {
      // Backwards: every list is then as it was.
      while (i-- > 0) Release(RunOf(block.pieces[i], layout[i]));
      return std::nullopt;
    }
    Hold(RunOf(first, layout[i]));
    block.pieces.push_back(first);
  }
  return block;
}

UnitBlock UnitPool::Share(const UnitBlock& block) {
  const BlockUnits layout(block.shape, rope_);
  STRAIT_CHECK(block.pieces.size() == layout.size());
  UnitBlock other;
  other.shape = block.shape;
  other.pieces = block.pieces;
  for (uint32_t i = 0; i < layout.size(); ++i) Hold(RunOf(block.pieces[i], layout[i]));
  return other;
}

void UnitPool::Cut(UnitBlock* block, uint32_t rank) {
  STRAIT_CHECK(rank > 0 && rank <= block->shape.rank, "a cut does not widen");
  const BlockUnits from(block->shape, rope_);
  block->shape.rank = rank;
  const BlockUnits to(block->shape, rope_);
  std::vector<uint32_t>& pieces = block->pieces;
  STRAIT_CHECK(pieces.size() == from.size());
  // Pieces of the same size stay, but the last columns or scales in one may go.
  uint32_t same = 0;
  for (; same < to.size() && to[same].grains == from[same].grains; ++same) {
    const Run had = RunOf(pieces[same], from[same]);
    const Run has = RunOf(pieces[same], to[same]);
    if (had.last_used == has.last_used) continue;
    Refill(had.first + had.grains - 1, had.last_used, has.last_used);
  }
  // The piece that the cut goes through leaves smaller runs, from its begin on. They are held anew
  // before it is let go, so that they are never free.
  const uint32_t begin = same < to.size() ? pieces[same] : 0;
  if (same < to.size() && !IsSplit(begin / kUnitGrains)) SplitUnit(begin / kUnitGrains);
  for (uint32_t i = same, first = begin; i < to.size(); first += to[i++].grains) {
    Hold(RunOf(first, to[i]));
  }
  for (uint32_t i = from.size(); i-- > same;) Release(RunOf(pieces[i], from[i]));
  pieces.resize(same);
  for (uint32_t i = same, first = begin; i < to.size(); first += to[i++].grains) {
    pieces.push_back(first);
  }
}

void UnitPool::Give(UnitBlock block) {
  const BlockUnits layout(block.shape, rope_);
  STRAIT_CHECK(block.pieces.size() == layout.size(), "a block was given back twice");
  for (uint32_t i = layout.size(); i-- > 0;) Release(RunOf(block.pieces[i], layout[i]));
}

// ---- Runs ----

uint32_t UnitPool::Find(uint32_t grains) {
  if (grains < kUnitGrains) {
    const auto size = static_cast<uint32_t>(std::countr_zero(grains));
    for (uint32_t word = 0; word < 4; ++word) {
      if (has_[size][word] == 0) continue;
      const auto rank = word * 64 + static_cast<uint32_t>(std::countr_zero(has_[size][word]));
      const uint32_t mask = kFit.order[size][rank];
      return splits_[lists_[mask]].unit * kUnitGrains + kFit.place[size][mask];
    }
  }
  return free_.empty() ? kNone : free_.back() * kUnitGrains;
}

void UnitPool::Hold(const Run& run) {
  const uint32_t unit = run.first / kUnitGrains;
  STRAIT_CHECK(unit < end_ && run.last_used <= grain_bytes_);
  const bool partial = run.last_used < grain_bytes_;
  if (units_[unit].state == 0) {
    STRAIT_CHECK(!free_.empty() && free_.back() == unit, "the unit is not the next free one");
    free_.pop_back();
    if (run.grains < kUnitGrains) {
      const uint32_t index = NewSplit(unit);
      units_[unit].state = kSplit + index;
      splits_[index].free = kAllGrains;
      stranded_grains_ += kUnitGrains;
      Link(index);
    }
  }
  if (!IsSplit(unit)) {
    STRAIT_CHECK(run.grains == kUnitGrains);
    Unit& whole = units_[unit];
    if (whole.state == 0) {
      used_grains_ += kUnitGrains;
    } else {
      padded_bytes_ -= Padding(whole.state, whole.partials);
    }
    ++whole.state;
    STRAIT_CHECK(whole.state < kSplit);
    if (partial) AddPartial(&whole.partials, run.last_used);
    padded_bytes_ += Padding(whole.state, whole.partials);
    return;
  }
  Split& split = SplitOf(unit);
  const uint32_t begin = run.first % kUnitGrains;
  const uint32_t end = begin + run.grains;
  for (uint32_t g = begin; g < end; ++g) {
    padded_bytes_ -= Padding(split.holders[g], split.partials[g]);
    ++split.holders[g];
    if (partial && g + 1 == end) AddPartial(&split.partials[g], run.last_used);
    padded_bytes_ += Padding(split.holders[g], split.partials[g]);
  }
  SetFree(&split, split.free & ~MaskOf(run.first, run.grains));
}

void UnitPool::Release(const Run& run) {
  const uint32_t unit = run.first / kUnitGrains;
  STRAIT_CHECK(unit < end_ && units_[unit].state != 0, "a unit was given back twice");
  const bool partial = run.last_used < grain_bytes_;
  if (!IsSplit(unit)) {
    STRAIT_CHECK(run.grains == kUnitGrains, "part of a unit was given back that is whole");
    Unit& whole = units_[unit];
    padded_bytes_ -= Padding(whole.state, whole.partials);
    if (partial) RemovePartial(&whole.partials, run.last_used);
    --whole.state;
    padded_bytes_ += Padding(whole.state, whole.partials);
    if (whole.state > 0) return;
    used_grains_ -= kUnitGrains;
    free_.push_back(unit);
    return;
  }
  Split& split = SplitOf(unit);
  const uint32_t begin = run.first % kUnitGrains;
  const uint32_t end = begin + run.grains;
  uint32_t freed = 0;
  for (uint32_t g = begin; g < end; ++g) {
    STRAIT_CHECK(split.holders[g] > 0, "a grain was given back twice");
    padded_bytes_ -= Padding(split.holders[g], split.partials[g]);
    if (partial && g + 1 == end) RemovePartial(&split.partials[g], run.last_used);
    if (--split.holders[g] == 0) freed |= 1u << g;
    padded_bytes_ += Padding(split.holders[g], split.partials[g]);
  }
  SetFree(&split, split.free | freed);
}

void UnitPool::Refill(uint32_t grain, uint32_t from, uint32_t to) {
  const uint32_t unit = grain / kUnitGrains;
  STRAIT_CHECK(unit < end_ && units_[unit].state != 0);
  uint32_t holders = units_[unit].state;
  uint32_t* partials = &units_[unit].partials;
  if (IsSplit(unit)) {
    holders = SplitOf(unit).holders[grain % kUnitGrains];
    partials = &SplitOf(unit).partials[grain % kUnitGrains];
  }
  padded_bytes_ -= Padding(holders, *partials);
  if (from < grain_bytes_) RemovePartial(partials, from);
  if (to < grain_bytes_) AddPartial(partials, to);
  padded_bytes_ += Padding(holders, *partials);
}

// ---- Split units ----

uint32_t UnitPool::NewSplit(uint32_t unit) {
  if (free_splits_.empty()) {
    free_splits_.push_back(static_cast<uint32_t>(splits_.size()));
    splits_.emplace_back();
  }
  const uint32_t index = free_splits_.back();
  free_splits_.pop_back();
  splits_[index] = Split();
  splits_[index].unit = unit;
  splits_[index].partials.fill(kNone);
  return index;
}

void UnitPool::SplitUnit(uint32_t unit) {
  const uint32_t index = NewSplit(unit);
  Split& split = splits_[index];
  split.holders.fill(units_[unit].state);
  split.partials.back() = std::exchange(units_[unit].partials, kNone);
  units_[unit].state = kSplit + index;
}

// Lists and counts follow; a unit that is all free is split no more.
void UnitPool::SetFree(Split* split, uint32_t mask) {
  if (mask == split->free) return;
  const auto index = static_cast<uint32_t>(split - splits_.data());
  Unlink(index);
  const auto before = static_cast<uint32_t>(std::popcount(split->free));
  const auto after = static_cast<uint32_t>(std::popcount(mask));
  used_grains_ = used_grains_ + before - after;
  stranded_grains_ = stranded_grains_ + after - before;
  split->free = mask;
  if (mask != kAllGrains) {
    Link(index);
    return;
  }
  stranded_grains_ -= kUnitGrains;
  units_[split->unit].state = 0;
  free_.push_back(split->unit);
  split->unit = kNone;
  free_splits_.push_back(index);
}

void UnitPool::Link(uint32_t index) {
  Split& split = splits_[index];
  if (split.free == 0 || split.free == kAllGrains) return;
  uint32_t& head = lists_[split.free];
  split.prev = kNone;
  split.next = head;
  if (head != kNone) splits_[head].prev = index;
  head = index;
  for (uint32_t size = 0; size < kNumRunSizes; ++size) {
    if (kFit.place[size][split.free] == kUnitGrains) continue;
    const uint32_t rank = kFit.rank[size][split.free];
    has_[size][rank / 64] |= uint64_t{1} << rank % 64;
  }
}

void UnitPool::Unlink(uint32_t index) {
  const Split& split = splits_[index];
  if (split.free == 0 || split.free == kAllGrains) return;
  if (split.next != kNone) splits_[split.next].prev = split.prev;
  if (split.prev != kNone) {
    splits_[split.prev].next = split.next;
    return;
  }
  lists_[split.free] = split.next;
  if (split.next != kNone) return;
  for (uint32_t size = 0; size < kNumRunSizes; ++size) {
    if (kFit.place[size][split.free] == kUnitGrains) continue;
    const uint32_t rank = kFit.rank[size][split.free];
    has_[size][rank / 64] &= ~(uint64_t{1} << rank % 64);
  }
}

// ---- Padding ----

uint64_t UnitPool::Padding(uint32_t holders, uint32_t partials) const {
  if (partials == kNone) return 0;
  uint32_t most = 0;
  for (uint32_t p = partials; p != kNone; p = partials_[p].next) {
    holders -= partials_[p].holders;
    most = std::max(most, partials_[p].used_bytes);
  }
  return holders > 0 ? 0 : grain_bytes_ - most;
}

void UnitPool::AddPartial(uint32_t* partials, uint32_t used_bytes) {
  for (uint32_t p = *partials; p != kNone; p = partials_[p].next) {
    if (partials_[p].used_bytes != used_bytes) continue;
    ++partials_[p].holders;
    return;
  }
  if (free_partials_.empty()) {
    free_partials_.push_back(static_cast<uint32_t>(partials_.size()));
    partials_.emplace_back();
  }
  const uint32_t added = free_partials_.back();
  free_partials_.pop_back();
  partials_[added] = {used_bytes, 1, *partials};
  *partials = added;
}

void UnitPool::RemovePartial(uint32_t* partials, uint32_t used_bytes) {
  for (uint32_t* at = partials; *at != kNone; at = &partials_[*at].next) {
    Partial& partial = partials_[*at];
    if (partial.used_bytes != used_bytes) continue;
    if (--partial.holders > 0) return;
    free_partials_.push_back(*at);
    *at = partial.next;
    return;
  }
  STRAIT_CHECK(false, "a block was cut or given back that is not as it was taken");
}

}  // namespace strait
