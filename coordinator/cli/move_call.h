// SPDX-License-Identifier: Apache-2.0
//
// CallMigrate asks a coordinator to move a sequence (POST /strait/migrate) and follows its reports.
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

inline constexpr double kDefaultMoveTimeoutS = 300;

struct MoveRequest {
  std::string sequence;
  uint64_t to = 0;
  bool dry_run = false;
  bool force_numerics = false;
  double timeout_s = kDefaultMoveTimeoutS;
};

// One line of the answer.
struct MoveLine : VerbLine {
  uint64_t sequence = 0;
  uint64_t from = 0;
  uint64_t to = 0;
  std::string phase;
  uint64_t rounds = 0;
  uint64_t rows = 0;  // there by now; when done: the length at which the sequence changed over
  uint64_t rows_total = 0;
  uint64_t moved_bytes = 0;
  uint64_t recomputed_rows = 0;
  double pause_ms = 0;
  double total_ms = 0;
};

using MoveOutcome = VerbOutcome<MoveLine>;

absl::StatusOr<MoveLine> ParseMoveLine(std::string_view line);

absl::StatusOr<MoveOutcome> CallMigrate(HttpClient& client, const MoveRequest& request,
                                        const std::function<void(const MoveLine&)>& on_report);

// ---- In words ----

// "sequence 12 from pipeline 1 to 2: copy, round 2, 640 of 1024 rows, 1.20 MiB"
std::string ProgressText(const MoveLine& report);
// Of a move that is done: bytes, rounds, pause, time, GB/s.
std::string DoneText(const MoveLine& report, bool dry_run);

}  // namespace strait::cli
