// SPDX-License-Identifier: Apache-2.0
//
// ProcedureCounts says how often each fault met each phase of what a cluster does beside steps and moves (those:
// move_counts.h): a pair that never comes is a pair that nobody has tested.
//
// Thread:  plain value.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/shape.h"

namespace strait::sim {

enum class Phase {
  // Copying blocks of a stage to its buddy.
  kCopiesCome,   // the buddy was told of some and has not answered
  kCopiesThere,  // all that it was told of
  // A worker takes a dead one's place.
  kReplaceLoads,
  kReplaceRestores,  // it fetches copies before it is active
  kReplaceActivates,
  kReplaceBegins,  // active, without a step
  // A drain, also of a worker that leaves.
  kDrainWaits,
  kDrainMoves,
  kDrainReplaces,
  kDrainUnloads,
  // A worker that comes.
  kJoinGreets,  // until Welcome
  kJoinIdles,
  kJoinWarms,  // a spare: it holds weights ready, or loads them
  kJoinLoads,
  kJoinActivates,
  kJoinBegins,
  // A pipeline gets other stages: by a scale; since one of its workers is drained.
  kScaleRoom,
  kScaleLoads,
  kScaleCopies,
  kScaleStill,
  kScaleSwitched,
  kScaleGrows,
  kReplacementRoom,
  kReplacementLoads,
  kReplacementCopies,
  kReplacementStill,
  kReplacementSwitched,
  kReplacementGrows,
};
inline constexpr size_t kNumPhases = 28;
inline constexpr size_t kNumChangePhases = 6;

// "Own" is the worker that the procedure is about: whose blocks are copied; who takes the place; who goes; who comes; who
// gets a stage. The peer: the buddy; who has the copies, or another one of the pipeline; who had a stage; any other.
enum class Fault {
  kKillOwn,
  kKillPeer,
  kStallOwn,
  kStallPeer,
  kHangOwn,  // it lives and answers, and no step, load or copy of it ends
  kHangPeer,
  kStreamOwn,
  kStreamPeer,
  kPartOwn,  // from the coordinator, or other workers, or both
  kPartPeer,
  kBreakRows,
  kCorrupt,  // a frame, or a copy that is there
  kDuplicate,
  kSlowLink,
  kNoRoom,  // at who receives: for copies, for a stage's weights, for sequences
  kCoordinatorStops,
  kCoordinatorStops20s,
};
inline constexpr size_t kNumFaults = 17;

const char* Name(Phase phase);
const char* Name(Fault fault);
// Of which kind of seeds it is: one of kReplicas, kDrains, kScales, kReplacements.
Shape ShapeOf(Phase phase);
// Whether such a fault can be in that phase.
bool CanMeet(Fault fault, Phase phase);
// "by scale: loads/own dies": as MissingPairs and tables say it.
std::optional<std::pair<Phase, Fault>> PairOf(const std::string& name);

class ProcedureCounts {
 public:
  void Add(Fault fault, Phase phase, uint64_t times = 1) {
    counts_[static_cast<size_t>(fault)][static_cast<size_t>(phase)] += times;
  }
  // That a phase was reached; and how a procedure ended.
  void AddReached(Phase phase) { ++reached_[static_cast<size_t>(phase)]; }
  void AddEnd(const std::string& how) { ++ends_[how]; }
  void Add(const ProcedureCounts& other);
  uint64_t reached(Phase phase) const { return reached_[static_cast<size_t>(phase)]; }
  uint64_t ends(const std::string& how) const {
    const auto it = ends_.find(how);
    return it == ends_.end() ? 0 : it->second;
  }

  // A line a phase; pairs that never came are dashes, those that cannot be are dots. Then a line for each way to end.
  std::string Table() const;
  uint64_t count(Fault fault, Phase phase) const {
    return counts_[static_cast<size_t>(fault)][static_cast<size_t>(phase)];
  }
  // Of the pairs that can be, those that never came.
  // `shape`: of its phases only.
  std::vector<std::pair<Phase, Fault>> MissingPairs(
      std::optional<Shape> shape = std::nullopt) const;
  std::string Missing() const;

 private:
  std::array<std::array<uint64_t, kNumPhases>, kNumFaults> counts_{};
  std::array<uint64_t, kNumPhases> reached_{};
  std::map<std::string, uint64_t> ends_;
};

}  // namespace strait::sim
