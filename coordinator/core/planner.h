// SPDX-License-Identifier: Apache-2.0
//
// Planner splits the model's layers over the workers of a pipeline by their memory, as each of them
// counts it.
//
// Thread:  pure functions.
// Errors:  ResourceExhausted says what is needed and what there is.
// Limits:  O(stages x layers²).
// Why:     first the smallest cache (in tokens) of all stages is made as large as it can be,
//          because it bounds what a pipeline holds; among the splits that reach it, the one whose
//          heaviest stage is lightest, because that one sets the pace. More cache than max_running
//          full contexts is of no use.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "coordinator/core/core.h"
#include "proto/base/ids.h"
#include "proto/model/stage_memory.h"

namespace strait {

struct StagePlan {
  LayerRange layers;
  uint32_t pool_blocks = 0;  // latent blocks of one layer
  friend bool operator==(const StagePlan&, const StagePlan&) = default;
};

struct PipelinePlan {
  std::vector<StagePlan> stages;
  uint32_t capacity_columns = 0;  // of latent blocks: the least of pool_blocks / layers
};

// What a worker offers, and how its stages' memory is counted. Borrows `costs`.
struct WorkerMemory {
  WorkerMemory(uint64_t bytes, const StageCosts* costs = nullptr)  // NOLINT: bytes alone are most
      : bytes(bytes), costs(costs) {}
  uint64_t bytes;
  const StageCosts* costs;  // null: as ModelShape says
};

// Bytes of weights that a stage with these layers holds, as ModelShape says.
uint64_t StageWeightBytes(const ModelShape& model, LayerRange layers);

// Bytes that it takes for activations, besides weights and pool.
uint64_t StageWorkspaceBytes(const ModelShape& model, LayerRange layers,
                             const WorkerMemory& memory = 0);

// And for its edges, where they lie in the memory that the worker offers.
uint64_t StageEdgeBytes(const CoreOptions& options, LayerRange layers, const WorkerMemory& memory);

// Columns of latent blocks (one block in each of its layers) that a stage with these layers can
// hold; 0: not even one.
uint32_t StageColumns(const CoreOptions& options, const ModelShape& model, LayerRange layers,
                      const WorkerMemory& memory);

// One stage per entry of `memory`, in that order.
absl::StatusOr<PipelinePlan> PlanPipeline(const CoreOptions& options, const ModelShape& model,
                                          absl::Span<const WorkerMemory> memory);

}  // namespace strait
