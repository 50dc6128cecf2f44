// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/table_places.h"

#include <algorithm>
#include <bit>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"

namespace strait {

TablePlaces::TablePlaces(uint64_t num_columns) : num_columns_(num_columns) { Forget(); }

void TablePlaces::Forget() {
  tables_.clear();
  by_id_.clear();
  unpromised_.clear();
  free_.clear();
  if (num_columns_ > 0) free_[0] = num_columns_;
}

absl::Span<const TablePlace> TablePlaces::Place(absl::Span<const Need> needs) {
  ++batch_;
  for (const Run& run : unpromised_) Give(run);
  unpromised_.clear();
  if (!TryPlace(needs)) {
    Forget();
    STRAIT_CHECK(TryPlace(needs), "the batch has more blocks than the pool");
  }
  return places_;
}

bool TablePlaces::TryPlace(absl::Span<const Need> needs) {
  // What this batch has must not go to make room for it.
  for (const Need& need : needs) {
    STRAIT_CHECK(need.num_columns > 0);
    if (need.tables_id == 0) continue;
    const auto [it, inserted] = by_id_.try_emplace(need.tables_id);
    if (inserted) {
      it->second = tables_.insert(tables_.end(), {.tables_id = need.tables_id});
    } else {
      tables_.splice(tables_.end(), tables_, it->second);
    }
    STRAIT_CHECK(it->second->batch != batch_, "two sequences of a batch have the same tables_id");
    it->second->batch = batch_;
  }
  places_.clear();
  for (const Need& need : needs) {
    if (need.tables_id == 0) {
      uint64_t first = 0;
      if (!Take(need.num_columns, &first)) return false;
      unpromised_.push_back({first, need.num_columns});
      places_.push_back({first, need.num_columns, 0});
      continue;
    }
    Tables& tables = *by_id_.at(need.tables_id);
    if (tables.num_columns < need.num_columns) {
      if (tables.num_columns > 0) Give({tables.first_column, tables.num_columns});
      tables.num_known = 0;
      tables.num_columns = 0;
      const uint32_t room = 2 * std::bit_floor(need.num_columns);
      if (!Take(room, &tables.first_column)) return false;
      tables.num_columns = room;
    }
    places_.push_back({tables.first_column, tables.num_columns, tables.num_known});
    tables.num_known = std::max(tables.num_known, need.num_columns);
  }
  return true;
}

bool TablePlaces::Take(uint32_t num_columns, uint64_t* first_column) {
  auto run = std::find_if(free_.begin(), free_.end(),
                          [&](const auto& free) { return free.second >= num_columns; });
  while (run == free_.end()) {
    if (tables_.empty() || tables_.front().batch == batch_) return false;
    const Tables gone = tables_.front();
    by_id_.erase(gone.tables_id);
    tables_.pop_front();
    run = Give({gone.first_column, gone.num_columns});  // no other run has become longer
    if (run->second < num_columns) run = free_.end();
  }
  const auto [first, count] = *run;
  free_.erase(run);
  if (count > num_columns) free_[first + num_columns] = count - num_columns;
  *first_column = first;
  return true;
}

std::map<uint64_t, uint64_t>::iterator TablePlaces::Give(Run run) {
  auto it = free_.emplace(run.first_column, run.num_columns).first;
  const auto after = std::next(it);
  if (after != free_.end() && it->first + it->second == after->first) {
    it->second += after->second;
    free_.erase(after);
  }
  if (it == free_.begin()) return it;
  const auto before = std::prev(it);
  if (before->first + before->second != it->first) return it;
  before->second += it->second;
  free_.erase(it);
  return before;
}

absl::Status TablePlaces::CheckIntegrity() const {
  std::map<uint64_t, uint64_t> runs = free_;
  const auto add = [&](uint64_t first, uint64_t count) {
    return runs.emplace(first, count).second;
  };
  for (const Run& run : unpromised_) {
    if (!add(run.first_column, run.num_columns)) return absl::InternalError("a run is lent twice");
  }
  for (const Tables& tables : tables_) {
    if (tables.num_known > tables.num_columns || !add(tables.first_column, tables.num_columns)) {
      return absl::InternalError(absl::StrCat("tables ", tables.tables_id, " lie wrong"));
    }
  }
  uint64_t end = 0;
  for (const auto& [first, count] : runs) {
    if (first != end || count == 0) {
      return absl::InternalError(absl::StrCat("a run begins at ", first, ", not at ", end));
    }
    end = first + count;
  }
  if (end != num_columns_ || by_id_.size() != tables_.size()) {
    return absl::InternalError(absl::StrCat(end, " of ", num_columns_, " columns are there"));
  }
  return absl::OkStatus();
}

}  // namespace strait
