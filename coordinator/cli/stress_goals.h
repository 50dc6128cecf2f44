// SPDX-License-Identifier: Apache-2.0
//
// StressGoals are what an acceptance run must have done to a cluster, and what may not have happened.
//
// Thread:  pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proto/base/json.h"

namespace strait::cli {

struct StressGoals {
  double seconds = 600;
  uint64_t migrations = 1000;
  double share_of_1000_rows = 0.5;  // of the migrations
  double share_of_4000_rows = 0.1;
  uint64_t worker_deaths = 100;
  uint64_t reshapes = 20;
  double protected_share = 0.99;  // of decode time
};

// What a report (Stress::Report) lacks of the goals, in words; empty: nothing. Any violation and any kind
// of fault that did not come about are misses too.
std::vector<std::string> Missed(const json::Object& report, const StressGoals& goals);

}  // namespace strait::cli
