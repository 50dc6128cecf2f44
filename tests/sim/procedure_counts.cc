// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/procedure_counts.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace strait::sim {
namespace {

constexpr const char* kPhases[kNumPhases] = {
    "copies come",        "copies there",    "replace loads",      "replace restores",
    "replace activates",  "replace begins",  "drain waits",        "drain moves",
    "drain replaces",     "drain unloads",   "join greets",        "join idles",
    "join warms",         "join loads",      "join activates",     "join begins",
    "by scale: room",     "by scale: loads", "by scale: copies",   "by scale: still",
    "by scale: switched", "by scale: grows", "by drain: room",     "by drain: loads",
    "by drain: copies",   "by drain: still", "by drain: switched", "by drain: grows"};

constexpr const char* kFaults[kNumFaults] = {
    "own dies",   "peer dies",   "own stalls", "peer stalls", "own hangs",      "peer hangs",
    "own stream", "peer stream", "own parted", "peer parted", "row connection", "corrupt",
    "twice",      "slow link",   "no room",    "coordinator", "coord. 20 s"};

// By phase: the faults that can be. Those of workers and of the coordinator can always be.
constexpr bool kRows[kNumPhases][5] = {
    // connection corrupt twice slow no-room
    {1, 1, 1, 1, 1},  // copies come
    {0, 1, 0, 1, 0},  // copies there: memory changes
    {0, 0, 0, 1, 1},  // replace loads
    {1, 1, 1, 1, 0},  // replace restores: what is asked for fits
    {0, 0, 0, 1, 0},  // replace activates
    {0, 0, 0, 1, 0},  // replace begins
    {0, 0, 0, 1, 1},  // drain waits: neither way has room
    {1, 1, 1, 1, 1},  // drain moves
    {0, 0, 0, 1, 0},  // drain replaces
    {0, 0, 0, 1, 0},  // drain unloads
    {0, 0, 0, 1, 0},  // join greets
    {0, 0, 0, 1, 0},  // join idles
    {0, 0, 0, 1, 1},  // join warms
    {0, 0, 0, 1, 1},  // join loads
    {0, 0, 0, 1, 0},  // join activates
    {0, 0, 0, 1, 0},  // join begins
    {0, 0, 0, 1, 0},  // by scale: room: no row goes yet, and what is planned fits
    {0, 0, 0, 1, 1},  // loads
    {1, 1, 1, 1, 1},  // copies
    {1, 1, 1, 1, 1},  // still
    {0, 0, 0, 1, 0},  // switched: the last rows have come, or are given up
    {0, 0, 0, 1, 0},  // grows
    {0, 0, 0, 1, 0},  // by drain: likewise
    {0, 0, 0, 1, 1},  //
    {1, 1, 1, 1, 1},  //
    {1, 1, 1, 1, 1},  //
    {0, 0, 0, 1, 0},  //
    {0, 0, 0, 1, 0},  //
};

}  // namespace

const char* Name(Phase phase) { return kPhases[static_cast<size_t>(phase)]; }
const char* Name(Fault fault) { return kFaults[static_cast<size_t>(fault)]; }

Shape ShapeOf(Phase phase) {
  if (phase >= Phase::kReplacementRoom) return Shape::kReplacements;
  if (phase >= Phase::kScaleRoom) return Shape::kScales;
  return phase >= Phase::kDrainWaits && phase <= Phase::kDrainUnloads ? Shape::kDrains
                                                                      : Shape::kReplicas;
}

bool CanMeet(Fault fault, Phase phase) {
  if (fault == Fault::kStreamOwn && phase == Phase::kJoinGreets) return false;  // it has none
  const auto first = static_cast<size_t>(Fault::kBreakRows);
  const auto f = static_cast<size_t>(fault);
  if (f < first || fault >= Fault::kCoordinatorStops) return true;
  return kRows[static_cast<size_t>(phase)][f - first];
}

std::optional<std::pair<Phase, Fault>> PairOf(const std::string& name) {
  for (size_t p = 0; p < kNumPhases; ++p) {
    for (size_t f = 0; f < kNumFaults; ++f) {
      if (name == absl::StrCat(kPhases[p], "/", kFaults[f])) {
        return std::pair(static_cast<Phase>(p), static_cast<Fault>(f));
      }
    }
  }
  return std::nullopt;
}

void ProcedureCounts::Add(const ProcedureCounts& other) {
  for (size_t p = 0; p < kNumPhases; ++p) {
    reached_[p] += other.reached_[p];
    for (size_t f = 0; f < kNumFaults; ++f) counts_[f][p] += other.counts_[f][p];
  }
  for (const auto& [how, count] : other.ends_) ends_[how] += count;
}

std::string ProcedureCounts::Table() const {
  std::string table = absl::StrFormat("%-18s %8s", "", "reached");
  for (const char* fault : kFaults) absl::StrAppendFormat(&table, " %11.11s", fault);
  for (size_t p = 0; p < kNumPhases; ++p) {
    absl::StrAppendFormat(&table, "\n%-18s %8d", kPhases[p], reached_[p]);
    for (size_t f = 0; f < kNumFaults; ++f) {
      const bool can = CanMeet(static_cast<Fault>(f), static_cast<Phase>(p));
      const uint64_t count = counts_[f][p];
      absl::StrAppendFormat(&table, " %11s",
                            count > 0 ? absl::StrCat(count) : std::string(can ? "-" : "."));
    }
  }
  for (const auto& [how, count] : ends_) absl::StrAppendFormat(&table, "\n%9d %s", count, how);
  return table;
}

std::vector<std::pair<Phase, Fault>> ProcedureCounts::MissingPairs(
    std::optional<Shape> shape) const {
  std::vector<std::pair<Phase, Fault>> missing;
  for (size_t p = 0; p < kNumPhases; ++p) {
    if (shape && ShapeOf(static_cast<Phase>(p)) != *shape) continue;
    for (size_t f = 0; f < kNumFaults; ++f) {
      const auto phase = static_cast<Phase>(p);
      const auto fault = static_cast<Fault>(f);
      if (CanMeet(fault, phase) && count(fault, phase) == 0) missing.emplace_back(phase, fault);
    }
  }
  return missing;
}

std::string ProcedureCounts::Missing() const {
  std::string missing;
  for (const auto& [phase, fault] : MissingPairs()) {
    absl::StrAppend(&missing, missing.empty() ? "" : ", ", Name(phase), "/", Name(fault));
  }
  return missing;
}

}  // namespace strait::sim
