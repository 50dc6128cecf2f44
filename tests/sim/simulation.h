// SPDX-License-Identifier: Apache-2.0
//
// Simulation runs a whole cluster from a seed: the real Core and WorkerCores, clients, faults, on
// one thread in virtual time, and checks everything after every event.
//
// Owns:    all of it.
// Thread:  one.
// Errors:  Outcome::violation, empty if all went well.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "coordinator/core/core.h"
#include "tests/sim/event_counts.h"
#include "tests/sim/move_counts.h"
#include "tests/sim/procedure_counts.h"
#include "tests/sim/shape.h"

namespace strait::sim {

struct Outcome {
  std::string violation;
  CoreStats stats;
  uint32_t requests = 0;
  uint32_t sequences_finished = 0;  // got all that they asked for
  uint32_t sequences_nan = 0;       // ended because their logits were NaN
  uint64_t cached_tokens = 0;       // of prompts, when they were placed first
  uint32_t scales = 0;              // asked for
  uint32_t scales_done = 0;         // of them, all pipelines had it in the end
  uint64_t scale_kept = 0;          // rows that stayed, summed over layers
  uint32_t corruptions = 0;         // of host memory, or copies that fail
  uint32_t evictions = 0;
  uint32_t lies_told = 0;
  uint32_t lies_caught = 0;
  uint64_t steps_ahead = 0;  // begun while the one before was computing
  uint64_t late_ids = 0;     // that went from one step to the next without the host
  EventCounts events;
  MoveCounts moves;
  uint32_t moves_asked = 0;
  uint32_t moves_done = 0;
  uint32_t moves_other_layers = 0;  // of them, between pipelines whose stages have other layers
  uint32_t moves_other_stages = 0;  // of them, as many stages even
  uint64_t late_frames = 0;         // that nobody waited for any more
  ProcedureCounts procedures;
  uint32_t drains_asked = 0;
  uint32_t drains_done = 0;
  uint32_t drains_undone = 0;
  uint32_t leaves = 0;  // workers that were told to stop
  uint32_t left = 0;    // of them, that ended of themselves
  uint32_t left_with_stages =
      0;  // of these, that had got tired of waiting, or lost the coordinator
  uint32_t joins = 0;
  uint64_t rows_restored = 0;  // from copies, that a stage began with; each layer has its own
  uint64_t virtual_us = 0;

  // Sums all but the violation and the times, which stay; of `stats` what tests ask for.
  void Add(const Outcome& other);
};

struct SimulationOptions {
  bool trace = false;
  Shape shape = Shape::kAny;
  bool forge_rows = false;  // a moved row is another one, and no checksum tells: it must be noticed
  // All faults that wait for a phase of a procedure but the first are this one.
  std::optional<std::pair<Phase, Fault>> aim;
  bool check_always = true;  // integrity after every event; else after faults and in idle moments
};

Outcome RunSimulation(uint64_t seed, const SimulationOptions& options = {});

}  // namespace strait::sim
