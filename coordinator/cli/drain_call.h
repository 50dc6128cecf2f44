// SPDX-License-Identifier: Apache-2.0
//
// CallDrain asks a coordinator to drain a worker, or to undo that (POST /strait/drain), and follows its
// reports.
//
// Thread:  the caller's; a client is used by one thread.
// Errors:  FollowVerb's (coordinator/cli/verb_call.h).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/verb_call.h"

namespace strait::cli {

inline constexpr double kDefaultDrainTimeoutS = 300;

struct DrainRequest {
  std::string worker;
  bool dry_run = false;
  bool undo = false;
  double timeout_s = kDefaultDrainTimeoutS;
};

// One line of the answer.
struct DrainLine : VerbLine {
  uint64_t worker_id = 0;
  std::string worker;
  uint64_t pipeline = 0;  // 0: it had no stage
  std::string way;        // "move", "replace", "none"
  std::string phase;
  uint64_t sequences_left = 0;
  uint64_t sequences_moved = 0;
  uint64_t moved_bytes = 0;
  uint64_t rows_kept = 0;
  uint64_t rows_lost = 0;
  double pause_ms = 0;
  double total_ms = 0;
};

using DrainOutcome = VerbOutcome<DrainLine>;

absl::StatusOr<DrainLine> ParseDrainLine(std::string_view line);

absl::StatusOr<DrainOutcome> CallDrain(HttpClient& client, const DrainRequest& request,
                                       const std::function<void(const DrainLine&)>& on_report);

// ---- In words ----

// "worker worker-1 in pipeline 2: moving, 3 sequences left, 2 moved, 1.20 MiB"
std::string ProgressText(const DrainLine& report);
// Of one that is done: what moved or was replaced, the longest pause, the time.
std::string DoneText(const DrainLine& report, const DrainRequest& request);

}  // namespace strait::cli
