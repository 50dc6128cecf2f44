// SPDX-License-Identifier: Apache-2.0
//
// EventCounts says how often each event met a stage of a worker in each of its states: a pair that never
// comes in thousands of seeds is a pair that nobody has tested.
//
// Thread:  plain value.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "worker/core/worker_core.h"

namespace strait::sim {

enum class SimEvent {
  kLoad,
  kLoaded,
  kUnload,
  kActivate,
  kPlan,
  kEdgeUp,
  kEdgeDown,
  kNcclId,
  kHidden,
  kSampled,
  kBegin,
  kFinish,
  kDetach,
  kAttach,
  kOrphan,
  kResize,
  kFetch,
  kServe,
  kAsk,
};
inline constexpr size_t kNumSimEvents = 19;
inline constexpr size_t kNumHostedStates = 6;
using HostedState = WorkerCore::HostedState;

class EventCounts {
 public:
  void Add(HostedState state, SimEvent event) {
    ++counts_[static_cast<size_t>(state)][static_cast<size_t>(event)];
  }
  void Add(const EventCounts& other);
  uint64_t count(HostedState state, SimEvent event) const {
    return counts_[static_cast<size_t>(state)][static_cast<size_t>(event)];
  }

  // A line a state; pairs that never came are dashes.
  std::string Table() const;
  // Of the pairs that random clusters bring about, those that never came. The others are races that take
  // millions of seeds, or nothing that an honest cluster does: tests/worker/core brings about every one.
  std::string Missing() const;

 private:
  std::array<std::array<uint64_t, kNumSimEvents>, kNumHostedStates> counts_{};
};

}  // namespace strait::sim
