// SPDX-License-Identifier: Apache-2.0
//
// Id types: a SequenceId can never be passed where a StepId is wanted.
//
// Thread:  plain values.
// Why:     ids come off the wire as uint64; they become typed at the place that validates them.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace strait {

template <class Tag>
struct Id {
  uint64_t value = 0;
  friend auto operator<=>(Id, Id) = default;
  template <class H>
  friend H AbslHashValue(H h, Id id) {
    return H::combine(std::move(h), id.value);
  }
};

using RequestId = Id<struct RequestTag>;    // what a client asked; unique in one coordinator
using SequenceId = Id<struct SequenceTag>;  // one token stream; never reused
using StepId = Id<struct StepTag>;  // one batch's trip; grows by one in a pipeline epoch, from 1
using WorkerId = Id<struct WorkerTag>;  // given by the coordinator at registration; never reused
using PipelineId = Id<struct PipelineTag>;

// A physical latent block: an index into a stage's pool.
using BlockId = uint32_t;
using LayerIndex = uint32_t;
using TokenId = uint32_t;

// [begin, end) of decoder layers. The embedding belongs to the stage with begin == 0; norm, head and
// sampling to the stage with end == num_hidden_layers.
struct LayerRange {
  LayerIndex begin = 0;
  LayerIndex end = 0;
  constexpr uint32_t size() const { return end - begin; }
  friend bool operator==(const LayerRange&, const LayerRange&) = default;
};
// Layers of both; none: of size 0.
constexpr LayerRange Intersection(LayerRange a, LayerRange b) {
  const LayerRange both{a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
  return both.begin < both.end ? both : LayerRange{};
}

// Incarnation of a pipeline: what an older one says is refused everywhere. `term` counts coordinators,
// `counter` the incarnations under one coordinator.
struct PipelineEpoch {
  uint64_t term = 0;
  uint64_t counter = 0;
  friend auto operator<=>(const PipelineEpoch&, const PipelineEpoch&) = default;
};

inline std::string ToString(PipelineEpoch e) {
  return std::to_string(e.term) + "." + std::to_string(e.counter);
}

// Incarnation of where a sequence lives: one is given each time that it is placed in a pipeline. A type
// of its own, because a sequence may be placed anew without its pipeline's epoch moving on, and a
// pipeline's epoch may move on while rows of its sequences stay.
struct PlacementEpoch {
  uint64_t term = 0;
  uint64_t counter = 0;
  friend auto operator<=>(const PlacementEpoch&, const PlacementEpoch&) = default;
};

inline std::string ToString(PlacementEpoch e) {
  return std::to_string(e.term) + "." + std::to_string(e.counter);
}

}  // namespace strait

template <class Tag>
struct std::hash<strait::Id<Tag>> {
  size_t operator()(strait::Id<Tag> id) const noexcept { return std::hash<uint64_t>()(id.value); }
};
