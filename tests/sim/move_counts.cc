// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/move_counts.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace strait::sim {
namespace {

constexpr const char* kFaults[kNumMoveFaults] = {"source dies",         "destination dies",
                                                 "source stalls",       "destination stalls",
                                                 "source hangs",        "destination hangs",
                                                 "source's stream",     "destination's stream",
                                                 "rows' connection",    "corrupt frame",
                                                 "frame comes twice",   "slow link",
                                                 "partition of rows",   "source parted",
                                                 "destination parted",  "no room",
                                                 "coordinator stopped", "coordinator stopped 20 s",
                                                 "sequence cancelled"};

// By fault: the phases in which it can be.
constexpr bool kExpected[kNumMoveFaults][kNumMovePhases] = {
    // reserve copy freeze last-rows adopt
    {1, 1, 1, 1, 1},  // source dies
    {1, 1, 1, 1, 1},  // destination dies
    {1, 1, 1, 1, 1},  // source stalls
    {1, 1, 1, 1, 1},  // destination stalls
    {1, 1, 1, 1, 1},  // source hangs
    {1, 1, 1, 1, 1},  // destination hangs
    {1, 1, 1, 1, 1},  // source's stream
    {1, 1, 1, 1, 1},  // destination's stream
    {0, 1, 0, 1, 0},  // rows' connection: rows are asked for in rounds only
    {0, 1, 0, 1, 0},  // corrupt frame
    {0, 1, 1, 1, 1},  // frame comes twice: the second time later
    {1, 1, 1, 1, 1},  // slow link
    {1, 1, 1, 1, 1},  // partition of rows
    {1, 1, 1, 1, 1},  // source parted
    {1, 1, 1, 1, 1},  // destination parted
    {1, 1, 1, 1, 0},  // no room: after the commit nobody takes it any more
    {1, 1, 1, 1, 1},  // coordinator stopped
    {1, 1, 1, 1, 1},  // for 20 s
    {1, 1, 1, 1, 1},  // sequence cancelled
};

}  // namespace

bool CanMeet(MoveFault fault, MovePhase phase) {
  return kExpected[static_cast<size_t>(fault)][static_cast<size_t>(phase)];
}

void MoveCounts::Add(const MoveCounts& other) {
  for (size_t f = 0; f < kNumMoveFaults; ++f) {
    for (size_t p = 0; p < kNumMovePhases; ++p) counts_[f][p] += other.counts_[f][p];
  }
  for (const auto& [how, count] : other.ends_) ends_[how] += count;
}

std::string MoveCounts::Table() const {
  std::string table = absl::StrFormat("%-24s", "");
  for (size_t p = 0; p < kNumMovePhases; ++p) {
    absl::StrAppendFormat(&table, " %9s", Name(static_cast<MovePhase>(p)));
  }
  for (size_t f = 0; f < kNumMoveFaults; ++f) {
    absl::StrAppendFormat(&table, "\n%-24s", kFaults[f]);
    for (const uint64_t count : counts_[f]) {
      absl::StrAppendFormat(&table, " %9s", count == 0 ? "-" : absl::StrCat(count));
    }
  }
  for (const auto& [how, count] : ends_) absl::StrAppendFormat(&table, "\n%9d %s", count, how);
  return table;
}

std::string MoveCounts::Missing() const {
  std::string missing;
  for (size_t f = 0; f < kNumMoveFaults; ++f) {
    for (size_t p = 0; p < kNumMovePhases; ++p) {
      if (!kExpected[f][p] || counts_[f][p] > 0) continue;
      absl::StrAppend(&missing, missing.empty() ? "" : ", ", kFaults[f], "/",
                      Name(static_cast<MovePhase>(p)));
    }
  }
  return missing;
}

}  // namespace strait::sim
