// SPDX-License-Identifier: Apache-2.0
//
// Scenario is everything that a seed decides before a simulation starts: the model, the cluster,
// its speeds and which faults it will see.
//
// Thread:  plain value.
#pragma once

#include <cstdint>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/limits.h"
#include "tests/sim/row_network.h"
#include "tests/sim/shape.h"
#include "tests/sim/world.h"

namespace strait::sim {

struct Scenario {
  CoreOptions options;
  ModelShape model;
  std::vector<uint64_t> worker_memory;  // one worker each; more than needed are spares
  bool equal_memory = true;
  uint32_t columns_least = 0;  // of latent blocks, that every formed pipeline can hold

  uint32_t num_requests = 0;
  uint64_t arrival_us = 0;  // requests arrive within
  double cancel_chance = 0;
  double deadline_chance = 0;
  double bad_request_chance = 0;
  double nan_chance = 0;     // of a sequence whose logits become NaN
  uint32_t tokens_each = 0;  // prompt and output of every sequence, one a request; 0: any
  uint32_t prompt_tokens_max = 0;
  double stem_chance = 0;  // of a prompt that begins as others do
  uint32_t max_tokens_max = 0;

  uint64_t control_delay_us_max = 0;
  uint64_t data_delay_us_max = 0;
  uint64_t compute_us_max = 0;
  uint32_t rows_ahead = 0;  // of steps that a backend takes ahead; 0: none
  uint64_t load_us_max = 0;
  uint64_t host_cache_bytes = 0;  // of each worker
  uint64_t copy_us_max = 0;       // between two polls of copies
  uint32_t copy_polls = 0;        // that a copy takes
  uint32_t num_corruptions = 0;   // of host memory
  uint32_t num_flushes = 0;
  uint64_t orphan_timeout_us = 0;  // of a worker without its coordinator
  double slow_message_chance = 0;  // of a delay a hundred times as long

  uint32_t num_faults = 0;
  uint64_t faults_us = 0;  // all within
  double replacement_chance = 1;
  bool heals = true;  // workers that are missing come back in the end
  uint32_t num_lies = 0;

  uint32_t num_scales = 0;  // to 1, 2 or 3 stages, or as many as there are layers
  uint64_t scales_us = 0;   // all within
  bool breaks_scale =
      false;  // one fails when some pipelines have other numbers of stages than others

  uint32_t num_moves = 0;      // of sequences from pipeline to pipeline
  uint64_t moves_us = 0;       // all asked for within
  uint32_t num_aimed = 0;      // faults, beside num_faults, that wait for a phase of a move
  uint64_t replica_bytes = 0;  // of each worker, for copies of others' prefix blocks

  uint32_t num_drains = 0;  // asked for; all within drains_us
  uint32_t num_leaves = 0;  // workers that ask to be drained and end
  uint32_t num_joins = 0;   // workers that come while sequences run
  bool drains_serving =
      false;  // only workers with stages are drained, and another one comes for each that is
  uint64_t drains_us = 0;
  uint64_t leave_timeout_us = 30'000'000;  // for which a worker that leaves waits
  // Faults that wait for a phase of a procedure (procedure_counts.h), beside the others. The seed says which.
  uint32_t num_procedure_aims = 0;
  uint32_t all_faults() const {
    return num_faults + num_aimed + num_procedure_aims + num_lies + num_drains + num_leaves;
  }
  RowNetworkOptions rows;
  uint64_t transfer_frame_bytes = limits::kTransferFrameBytes;
};

Scenario MakeScenario(Shape shape, World* world);
Scenario MakeAnyScenario(World* world);
// At least two pipelines, five workers, eight sequences of 300 tokens each, two moves, three faults.
Scenario MakeGroundScenario(World* world);
// Prompts of some hundred tokens that begin alike and part at any place, in caches of few blocks.
Scenario MakeSharingScenario(World* world);
// As moves, with copies of blocks; and with drains, leaves and joins (scenario_procedures.cc).
Scenario MakeReplicasScenario(World* world);
Scenario MakeDrainsScenario(World* world);
// Pipelines get other stages: several scales, or drains where only one pipeline is (scenario_procedures.cc).
Scenario MakeScalesScenario(World* world);
Scenario MakeReplacementsScenario(World* world);
// As ground: two moves and more, three faults, most of them at phases of moves; splits that differ.
Scenario MakeMovesScenario(World* world);

}  // namespace strait::sim
