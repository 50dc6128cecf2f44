// SPDX-License-Identifier: Apache-2.0
//
// Planner splits the model's layers over the workers of a pipeline by their memory, as each of them
// counts it.
//
// Thread:  pure functions.
// Errors:  ResourceExhausted says what is needed and what there is.
// Limits:  O(stages x layers²).
// Why:     first the smallest cache (in rows of a sequence) of all stages is made as large as it can be,
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
  uint64_t cache_bytes = 0;  // of latent blocks
  friend bool operator==(const StagePlan&, const StagePlan&) = default;
};

struct PipelinePlan {
  std::vector<StagePlan> stages;
  uint64_t capacity_rows = 0;  // the longest sequence that every stage can hold
};

// What a worker offers, and how its stages' memory is counted. Borrows `costs`.
struct WorkerMemory {
  WorkerMemory(uint64_t bytes, const StageCosts* costs = nullptr)  // NOLINT: bytes alone are most
      : bytes(bytes), costs(costs) {}
  uint64_t bytes;
  const StageCosts* costs;  // null: as ModelShape says
  uint32_t num_stages = 1;  // that its layers are cut into; they share its memory
};

// `layers` cut into `num_stages` contiguous ranges that are read about equally fast.
// REQUIRES: 0 < num_stages <= layers.size().
std::vector<LayerRange> SplitLayers(const ModelShape& model, LayerRange layers,
                                    uint32_t num_stages);

// Bytes of weights that a stage with these layers holds, as ModelShape says.
uint64_t StageWeightBytes(const ModelShape& model, LayerRange layers);

// Bytes that it takes for activations, besides weights and pool.
uint64_t StageWorkspaceBytes(const ModelShape& model, LayerRange layers,
                             const WorkerMemory& memory = 0);

// And for its edges, where they lie in the memory that the worker offers.
uint64_t StageEdgeBytes(const CoreOptions& options, LayerRange layers, const WorkerMemory& memory);

// What latent blocks take there that are `cache_bytes` as the model counts them; and the longest sequence for
// which `bytes` of it have room in `num_layers` layers.
uint64_t CacheMemoryBytes(const ModelShape& model, const WorkerMemory& memory,
                          uint64_t cache_bytes);
uint64_t CacheMemoryRows(const ModelShape& model, const WorkerMemory& memory, uint64_t bytes,
                         uint32_t num_layers);

// The longest sequence that a stage with these layers can hold, or all stages that the worker cuts them into;
// 0: not one row.
uint64_t StageRowsMax(const CoreOptions& options, const ModelShape& model, LayerRange layers,
                      const WorkerMemory& memory);

// Bytes of latent blocks, as the model counts them, of a stage that StageRowsMax says holds `rows`: there may
// be more of them than one sequence has.
uint64_t StageCacheBytes(const ModelShape& model, LayerRange layers, uint64_t rows);

// As many stages for each entry of `memory` as it says, in that order.
absl::StatusOr<PipelinePlan> PlanPipeline(const CoreOptions& options, const ModelShape& model,
                                          absl::Span<const WorkerMemory> memory);

}  // namespace strait
