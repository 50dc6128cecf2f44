// SPDX-License-Identifier: Apache-2.0
//
// CallScale asks a coordinator to give every pipeline another number of stages (POST /strait/scale), or what that would
// come to, and follows its reports.
//
// Thread:  the caller's; a client is used by one thread.
// Errors:  FollowVerb's (coordinator/cli/verb_call.h).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/verb_call.h"

namespace strait::cli {

inline constexpr double kDefaultScaleTimeoutS = 1800;

struct ScaleAsk {
  uint32_t num_stages = 0;
  bool dry_run = false;
  double timeout_s = kDefaultScaleTimeoutS;
};

// Of a dry run: a stage that a worker would get.
struct PlannedStageLine {
  std::string worker;
  uint64_t layer_begin = 0;
  uint64_t layer_end = 0;
  double cache_bytes = 0;
  double load_bytes = 0;
  double rows_bytes = 0;
};
struct PlannedLine {
  uint64_t pipeline = 0;
  uint64_t tokens_max = 0;
  std::vector<PlannedStageLine> stages;  // none: nothing changes
  std::string why;
};

// One line of the answer.
struct ScaleLine : VerbLine {
  uint64_t stages = 0;
  uint64_t pipelines_done = 0;
  uint64_t pipelines_total = 0;
  uint64_t pipeline = 0;
  std::string phase;
  double bytes_loaded = 0;
  double bytes_to_load = 0;
  uint64_t rows = 0;
  uint64_t rows_total = 0;
  double moved_bytes = 0;
  uint64_t edges_up = 0;
  uint64_t edges_total = 0;
  double total_ms = 0;
  // Of the last one.
  uint64_t pipelines = 0;
  double pause_ms = 0;
  uint64_t rows_kept = 0;
  uint64_t rows_lost = 0;
  uint64_t residents = 0;
  double pause_min_ms = 0;
  double pause_p50_ms = 0;
  double pause_max_ms = 0;
  std::vector<PlannedLine> plans;
};

using ScaleOutcomeLine = VerbOutcome<ScaleLine>;

absl::StatusOr<ScaleLine> ParseScaleLine(std::string_view line);

absl::StatusOr<ScaleOutcomeLine> CallScale(HttpClient& client, const ScaleAsk& ask,
                                           const std::function<void(const ScaleLine&)>& on_report);

// ---- In words ----

// "pipeline 1 (2 of 3): copying, 640 of 1024 rows, 1.20 MiB, 1 of 2 edges"
std::string ProgressText(const ScaleLine& report);
// Of the phase that it is in: loading, copying; negative: unknown.
double ShareDone(const ScaleLine& report);
// Of one that is done: pauses, rows, bytes; of a dry run: a table of what each worker would get.
std::string DoneText(const ScaleLine& report, const ScaleAsk& ask);

}  // namespace strait::cli
