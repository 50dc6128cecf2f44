// SPDX-License-Identifier: Apache-2.0
//
// Seeds runs many of a shape, and aims at the pairs of a fault and a phase that did not come by themselves.
//
// Thread:  one.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "tests/sim/simulation.h"

namespace strait::sim {

// The shapes whose phases procedure_counts.h knows.
inline constexpr Shape kProcedureShapes[] = {Shape::kReplicas, Shape::kDrains, Shape::kScales,
                                             Shape::kReplacements};

// What a failure is told by: it says how to see it again.
using OnRun = std::function<void(const std::string& replay, const Outcome& outcome)>;

struct Seeds {
  Shape shape = Shape::kAny;
  uint64_t first = 1;
  uint64_t count = 1;
  uint32_t check_every =
      1;  // of so many seeds one has its integrity checked after every event; 0: none
};
// `options`: but for what `seeds` says.
void RunSeeds(const Seeds& seeds, const SimulationOptions& options, const OnRun& on_run);
// For each pair of this shape that is missing in `counts`: at most kMostAimed seeds that aim at it. Adds what they met.
inline constexpr uint64_t kMostAimed = 40;
void AimAtMissing(Shape shape, ProcedureCounts* counts, const OnRun& on_run);

// The seed under way, for whoever handles a crash.
uint64_t RunningSeed();

std::string Replay(Shape shape, uint64_t seed, const SimulationOptions& options);
// As on the command line: "--moves".
std::optional<Shape> ShapeOfOption(const std::string& option);

}  // namespace strait::sim
