// SPDX-License-Identifier: Apache-2.0
//
// TablePlaces keeps the books of the device memory in which page tables stay from step to step: where
// those of which sequence lie, and how many of their entries are there.
//
// Owns:    places, and which tables have them. It touches no device.
// Thread:  loop thread only.
// Shapes:  a column is one entry in each layer. A place is a run of columns; what lies in it how is its
//          user's.
// Limits:  its columns: ColumnsFor a pool always suffice for a batch whose blocks are the pool's.
// Why:     nobody says that a sequence was closed, and tables that were cut come back under another
//          number. So places are taken from those that no step had for longest. Room doubles: a
//          sequence of n columns moves log2(n) times in its life. If what is free is in pieces, all is
//          forgotten and the batch laid out anew: that step brings all that it has.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/types/span.h"

namespace strait {

struct TablePlace {
  uint64_t first_column = 0;
  uint32_t num_columns = 0;  // there is room for
  uint32_t num_known = 0;    // that were there before this batch
};

class TablePlaces {
 public:
  // What a sequence of a batch is to have on the device.
  struct Need {
    uint64_t tables_id = 0;  // of BatchSequence
    uint32_t num_columns = 0;
  };

  explicit TablePlaces(uint64_t num_columns);
  // Each place is at most twice what is needed.
  static constexpr uint64_t ColumnsFor(uint64_t pool_columns) { return 2 * pool_columns; }

  // A place for each of `needs`, valid until the next call. Afterwards their columns count as known:
  // the caller brings those of [num_known, Need::num_columns), before any later batch's.
  // REQUIRES: needs of a batch, above 0, no tables_id but 0 twice; ColumnsFor their sum fit.
  absl::Span<const TablePlace> Place(absl::Span<const Need> needs);
  // Nothing is on the device.
  void Forget();

  // Free and taken columns are all there are, none twice; what is known lies within its place.
  absl::Status CheckIntegrity() const;

 private:
  struct Tables {
    uint64_t tables_id = 0;
    uint64_t first_column = 0;
    uint32_t num_columns = 0;  // 0: has no place yet
    uint32_t num_known = 0;
    uint64_t batch = 0;  // the last that had it
  };
  struct Run {
    uint64_t first_column = 0;
    uint64_t num_columns = 0;
  };

  bool TryPlace(absl::Span<const Need> needs);
  // Takes from tables that this batch does not have; false: there is no such run all the same.
  bool Take(uint32_t num_columns, uint64_t* first_column);
  // The free run that they are part of now.
  std::map<uint64_t, uint64_t>::iterator Give(Run run);

  const uint64_t num_columns_;
  std::map<uint64_t, uint64_t> free_;  // first column to number; no two touch
  std::list<Tables> tables_;           // those of the oldest batch first
  absl::flat_hash_map<uint64_t, std::list<Tables>::iterator> by_id_;
  std::vector<Run> unpromised_;     // of the last batch: of tables_id 0
  std::vector<TablePlace> places_;  // of the last batch
  uint64_t batch_ = 0;
};

}  // namespace strait
