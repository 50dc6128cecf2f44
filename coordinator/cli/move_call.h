// SPDX-License-Identifier: Apache-2.0
//
// CallMigrate asks a coordinator to move a sequence (POST /strait/migrate) and follows its reports.
//
// Thread:  the caller's; a client is used by one thread.
// Errors:  the client's (Cancelled: the cancel descriptor; the move goes on), Internal (an answer
//          that is none). What the coordinator says against the move is in MoveOutcome.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"

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
struct MoveLine {
  std::string event;  // "progress", "done", "error"
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
  std::string error_code;  // of an error
  std::string error_message;
};

struct MoveOutcome {
  bool done = false;
  MoveLine last;        // the last report; of a refused move: nothing
  int http_status = 0;  // 200 also of a move that failed under way
  // Why it is not done: "no_room", "aborted" …, or "HTTP 400"; and in words.
  std::string code;
  std::string message;
};

absl::StatusOr<MoveLine> ParseMoveLine(std::string_view line);

absl::StatusOr<MoveOutcome> CallMigrate(HttpClient& client, const MoveRequest& request,
                                        const std::function<void(const MoveLine&)>& on_report);

// ---- In words ----

// "sequence 12 from pipeline 1 to 2: copy, round 2, 640 of 1024 rows, 1.20 MiB"
std::string ProgressText(const MoveLine& report);
// Of a move that is done: bytes, rounds, pause, time, GB/s.
std::string DoneText(const MoveLine& report, bool dry_run);

}  // namespace strait::cli
