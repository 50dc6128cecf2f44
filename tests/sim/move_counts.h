// SPDX-License-Identifier: Apache-2.0
//
// MoveCounts says how often each fault met a move in each of its phases, and how moves ended: a pair that
// never comes in thousands of seeds is a pair that nobody has tested.
//
// Thread:  plain value.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "coordinator/core/migration.h"

namespace strait::sim {

using MovePhase = Migration::Phase;
inline constexpr size_t kNumMovePhases = 5;

enum class MoveFault {
  kKillSource,
  kKillDestination,
  kStallSource,
  kStallDestination,
  kHangSource,  // it answers, and no step, load or copy of it ends
  kHangDestination,
  kStreamSource,  // to the coordinator, lost
  kStreamDestination,
  kBreakRows,  // the connection, with asks on it
  kCorruptFrame,
  kDuplicateFrame,
  kSlowLink,
  kPartition,   // of the two, for rows
  kPartSource,  // from the coordinator, or other workers, or both
  kPartDestination,
  kNoRoom,  // at the destination: the move was given up
  kCoordinatorStops,
  kCoordinatorStops20s,
  kCancel,
};
inline constexpr size_t kNumMoveFaults = 19;

// Whether such a fault can be in that phase.
bool CanMeet(MoveFault fault, MovePhase phase);

class MoveCounts {
 public:
  void Add(MoveFault fault, MovePhase phase) {
    ++counts_[static_cast<size_t>(fault)][static_cast<size_t>(phase)];
  }
  // "done", or where and why it was given up.
  void AddEnd(const std::string& how) { ++ends_[how]; }
  void Add(const MoveCounts& other);
  uint64_t count(MoveFault fault, MovePhase phase) const {
    return counts_[static_cast<size_t>(fault)][static_cast<size_t>(phase)];
  }
  uint64_t ends(const std::string& how) const {
    const auto it = ends_.find(how);
    return it == ends_.end() ? 0 : it->second;
  }

  // A line a fault; pairs that never came are dashes. Then a line for each way to end.
  std::string Table() const;
  // Of the pairs that can be, those that never came.
  std::string Missing() const;

 private:
  std::array<std::array<uint64_t, kNumMovePhases>, kNumMoveFaults> counts_{};
  std::map<std::string, uint64_t> ends_;
};

}  // namespace strait::sim
