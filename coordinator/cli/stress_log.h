// SPDX-License-Identifier: Apache-2.0
//
// StressLog gathers what a stress run does and sees, and sums it up.
//
// Thread:  any, synchronized inside.
// Limits:  kMaxViolationsShown texts; of each stream the times of its tokens stay until the end, 8 bytes
//          each.
// Why:     a move's pause is known only when its stream's tokens are: the two meet here, by the
//          request's name, at the end.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/cli/move_call.h"
#include "coordinator/cli/stress_load.h"
#include "proto/base/json.h"

namespace strait::cli {

inline constexpr size_t kMaxViolationsShown = 20;

// All that may be done to a cluster, and under what name the report counts it; those that were not done are the
// skipped ones.
struct FaultKind {
  std::string_view name;
  std::string_view member;
};
inline constexpr FaultKind kFaultKinds[] = {
    {"migration",
     "migrations"},  // of the report: only those that moved all and computed nothing again
    {"death", "worker_deaths"},
    {"stop", "worker_stops"},
    {"coordinator stop", "coordinator_stops"},
    {"reshape", "reshapes"},
    {"drain", "drains"},
    {"partition", "partitions"},
    {"bandwidth limit", "bandwidth_limits"},
    {"join", "joins"},
    {"leave", "leaves"},
};

class StressLog {
 public:
  // `start`: zero of the times of streams' tokens.
  explicit StressLog(StressClock::time_point start = StressClock::now()) : start_(start) {}
  // From here on the cluster is disturbed: zero of the report's times.
  void Begin();
  // A stream ended; `violation` is Difference's, empty where there is none.
  void AddStream(StreamOutcome outcome, uint32_t prompt_tokens, std::string violation);
  // A move ended, of this choice of this request ("" where the server does not tell).
  void AddMove(const std::string& request, uint32_t choice, const MoveOutcome& outcome);
  // A fault of another kind came about; or did not, for a reason in few words.
  void AddFault(std::string_view kind);
  void AddFailure(std::string_view kind, const std::string& reason);

  uint64_t num_migrations() const;  // that moved every row and recomputed none
  uint64_t num_streams() const;
  uint64_t num_violations() const;
  std::vector<std::string> violations() const;  // the first ones
  std::string Progress() const;                 // in few words

  // The report, but for what is known elsewhere (options, what the coordinator counted). `seconds`: from
  // Begin to now.
  json::Object Report(double seconds) const;

 private:
  struct Move {
    std::string request;
    uint32_t choice;
    MoveLine line;
    double at_s;  // when it was done
  };
  struct Times {
    uint32_t prompt_tokens;
    std::vector<ChoiceOutcome> choices;  // without ids and log-probabilities
  };
  double NowLocked() const;
  void CountFaultLocked(std::string_view kind);
  std::optional<double> PauseLocked(const Move& move) const;
  void ReportMovesLocked(json::Object& out) const;
  void ReportTimesLocked(json::Object& out, double seconds) const;

  const StressClock::time_point start_;
  mutable std::mutex mu_;  // guards all that follows
  uint64_t num_streams_ = 0;
  uint64_t num_sequences_ = 0;
  uint64_t num_violations_ = 0;
  std::vector<std::string> violations_;
  std::vector<Move> moves_;           // that moved every row and recomputed none
  uint64_t num_replaying_moves_ = 0;  // that did not
  double begin_s_ = 0;                // of Begin, since start_
  std::map<std::string, std::vector<double>, std::less<>> faults_;  // when they came about, by kind
  std::map<std::string, std::map<std::string, uint64_t>, std::less<>>
      failed_;                          // by kind and reason
  std::map<std::string, Times> times_;  // by request
};

}  // namespace strait::cli
