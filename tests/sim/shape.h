// SPDX-License-Identifier: Apache-2.0
//
// Shape is what a seed decides within.
#pragma once

namespace strait::sim {

enum class Shape {
  kAny,  // anything, small: most clusters have few workers and short sequences
  kGround,  // at least two pipelines, five workers, eight sequences of 300 tokens, two moves, three faults
  kSharing,   // prompts that begin alike, caches of few blocks
  kMoves,     // as kGround: faults at phases of moves, pipelines of other splits
  kReplicas,  // as kMoves: blocks have copies on other workers; faults at phases of copying, and of replacing workers
  kDrains,    // as kMoves: workers are drained, leave and come; faults at phases of that
  kScales,    // as kMoves: pipelines get other numbers of stages; faults at phases of that
  kReplacements,  // likewise: the only pipeline gets other stages since a worker of it is drained
};
inline constexpr int kNumShapes = 8;

// As strait_sim's options say it, without the dashes; "any" has no option.
inline const char* Name(Shape shape) {
  constexpr const char* kNames[kNumShapes] = {"any",      "ground", "sharing", "moves",
                                              "replicas", "drains", "scales",  "replacements"};
  return kNames[static_cast<int>(shape)];
}

}  // namespace strait::sim
