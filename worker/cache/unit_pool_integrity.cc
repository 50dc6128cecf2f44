// SPDX-License-Identifier: Apache-2.0
#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "worker/cache/unit_fit.h"
#include "worker/cache/unit_pool.h"

namespace strait {

absl::Status UnitPool::CheckGrain(uint32_t grain, uint32_t holders, uint32_t partials,
                                  uint64_t* padded) const {
  uint64_t partial_holders = 0;
  for (uint32_t p = partials; p != kNone; p = partials_[p].next) {
    if (partials_[p].holders == 0 || partials_[p].used_bytes >= grain_bytes_) {
      return absl::InternalError(absl::StrCat("grain ", grain, " has a wrong fill"));
    }
    partial_holders += partials_[p].holders;
  }
  if (partial_holders > holders) {
    return absl::InternalError(absl::StrCat("grain ", grain, " is filled by ", partial_holders,
                                            " holders, but held by ", holders));
  }
  *padded += Padding(holders, partials);
  return absl::OkStatus();
}

absl::Status UnitPool::CheckLists() const {
  size_t linked = 0;
  for (uint32_t mask = 0; mask < lists_.size(); ++mask) {
    uint32_t prev = kNone;
    for (uint32_t i = lists_[mask]; i != kNone; prev = i, i = splits_[i].next) {
      const Split& split = splits_[i];
      if (split.unit == kNone || split.free != mask || split.prev != prev ||
          ++linked > splits_.size()) {
        return absl::InternalError(absl::StrCat("the list of free grains ", mask, " is broken"));
      }
    }
    for (uint32_t size = 0; size < kNumRunSizes; ++size) {
      if (kFit.place[size][mask] == kUnitGrains) continue;
      if (mask == 0 || mask == kAllGrains) continue;
      const uint32_t rank = kFit.rank[size][mask];
      if ((has_[size][rank / 64] >> rank % 64 & 1) != (lists_[mask] != kNone ? 1u : 0u)) {
        return absl::InternalError(absl::StrCat("the list of free grains ", mask, " is not seen"));
      }
    }
  }
  size_t due = 0;
  for (const Split& split : splits_) due += split.unit != kNone && split.free != 0;
  if (linked == due) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(due, " split units have free grains, ", linked, " are in a list"));
}

absl::Status UnitPool::CheckIntegrity() const {
  std::vector<bool> is_free(units_.size(), false);
  for (const uint32_t unit : free_) {
    if (unit >= end_ || units_[unit].state != 0) {
      return absl::InternalError(absl::StrCat("free unit ", unit, " is held, or none"));
    }
    if (is_free[unit]) return absl::InternalError(absl::StrCat("unit ", unit, " is free twice"));
    is_free[unit] = true;
  }
  uint64_t used = 0;
  uint64_t stranded = 0;
  uint64_t padded = 0;
  uint64_t num_splits = 0;
  for (uint32_t unit = 0; unit < units_.size(); ++unit) {
    const Unit& whole = units_[unit];
    if (whole.state == 0 || !IsSplit(unit)) {
      if ((whole.state == 0) != (unit >= end_ || is_free[unit])) {
        return absl::InternalError(absl::StrCat("unit ", unit, " is neither held nor free"));
      }
      used += whole.state == 0 ? 0 : kUnitGrains;
      STRAIT_RETURN_IF_ERROR(
          CheckGrain(unit * kUnitGrains + kUnitGrains - 1, whole.state, whole.partials, &padded));
      continue;
    }
    const Split& split = SplitOf(unit);
    ++num_splits;
    if (unit >= end_ || split.unit != unit || split.free == kAllGrains) {
      return absl::InternalError(absl::StrCat("unit ", unit, " is not split as it says"));
    }
    for (uint32_t g = 0; g < kUnitGrains; ++g) {
      if ((split.holders[g] == 0) != ((split.free >> g & 1) != 0)) {
        return absl::InternalError(
            absl::StrCat("grain ", unit * kUnitGrains + g, " is held and free, or neither"));
      }
      (split.holders[g] == 0 ? stranded : used) += 1;
      STRAIT_RETURN_IF_ERROR(
          CheckGrain(unit * kUnitGrains + g, split.holders[g], split.partials[g], &padded));
    }
  }
  STRAIT_RETURN_IF_ERROR(CheckLists());
  if (used != used_grains_ || stranded != stranded_grains_ || padded != padded_bytes_ ||
      num_splits + free_splits_.size() != splits_.size()) {
    return absl::InternalError(absl::StrCat(
        "grains: used ", used_grains_, " (counted ", used, "), stranded ", stranded_grains_,
        " (counted ", stranded, "); padded bytes ", padded_bytes_, " (counted ", padded, ")"));
  }
  return absl::OkStatus();
}

}  // namespace strait
