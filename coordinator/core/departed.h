// SPDX-License-Identifier: Apache-2.0
//
// DepartedStages remembers the stages of workers whose stream ended, so that one that comes back
// with its stages gets its place again, and one that claims another's is found.
//
// Owns:    the records, and in each what the stage may have of sequences.
// Thread:  loop thread only.
// Limits:  kMaxDepartedStages; the stage that was made first is forgotten first.
// Why:     a stage is known by its id and the process that it was given to: ids are never reused, a
//          process has a random instance. What is forgotten here costs a load, never a wrong row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "coordinator/core/survivors.h"
#include "coordinator/core/worker_books.h"
#include "proto/base/ids.h"

namespace strait {

inline constexpr size_t kMaxDepartedStages = 1024;

struct DepartedStage {
  uint64_t instance = 0;    // of the process that it was given to
  std::string worker_name;  // for people
  HostedStage hosted;
  // It may have its place again while that is vacant; else it had none, or its worker was evicted for what it
  // did.
  bool may_return = false;
  uint64_t wanted_cache_bytes = 0;
  Holdings may_hold;
  uint64_t rows_computed = 0;
  uint64_t rows_stored = 0;
};

class DepartedStages {
 public:
  void Add(uint64_t stage_id, DepartedStage stage);
  // Null: never departed, back already, or forgotten.
  const DepartedStage* Find(uint64_t stage_id) const;
  // Takes it back. REQUIRES: Find(stage_id) != nullptr.
  DepartedStage Take(uint64_t stage_id);

 private:
  std::map<uint64_t, DepartedStage> stages_;  // by id: as they were made
};

}  // namespace strait
