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
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/cli/move_call.h"
#include "coordinator/cli/stress_load.h"
#include "proto/base/json.h"

namespace strait::cli {

inline constexpr size_t kMaxViolationsShown = 20;

// All that may be done to a cluster; in the report those that were not done are the skipped ones. Later kinds stand
// here already, so that no report looks complete that is not.
inline constexpr std::string_view kFaultKinds[] = {"migration", "death", "stop", "reshape",
                                                   "partition", "drain", "join", "bandwidth limit"};

class StressLog {
 public:
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

  // The report, but for what is known elsewhere (options, what the coordinator counted).
  json::Object Report() const;

 private:
  struct Move {
    std::string request;
    uint32_t choice;
    MoveLine line;
  };
  struct Times {
    uint32_t prompt_tokens;
    std::vector<ChoiceOutcome> choices;  // without ids and log-probabilities
  };
  std::vector<double> PausesLocked() const;

  mutable std::mutex mu_;  // guards all that follows
  uint64_t num_streams_ = 0;
  uint64_t num_sequences_ = 0;
  uint64_t num_violations_ = 0;
  std::vector<std::string> violations_;
  std::vector<Move> moves_;                              // that moved every row and recomputed none
  uint64_t num_replaying_moves_ = 0;                     // that did not
  std::map<std::string, uint64_t, std::less<>> faults_;  // by kind
  std::map<std::string, std::map<std::string, uint64_t>, std::less<>>
      failed_;                          // by kind and reason
  std::map<std::string, Times> times_;  // by request
};

}  // namespace strait::cli
