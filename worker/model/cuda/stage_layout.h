// SPDX-License-Identifier: Apache-2.0
//
// What a stage takes on the device: weights, its share of the cache, page tables, workspace. The worker
// allocates by it, and the coordinator plans by what the worker tells of it (StageCosts).
//
// Thread:  pure functions; no GPU is needed.
// Limits:  every stage of `layers` with `pool_blocks` takes no more than CudaStageCosts says, and
//          chooses the same tile by its weights.
// Why:     sizes follow from configuration, range and pool before anything is allocated, so a plan
//          that does not fit is never made, and a load that does not fit says so at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "proto/model/model_config.h"
#include "proto/model/stage_memory.h"
#include "worker/backend.h"
#include "worker/model/cuda/cuda_workspace.h"
#include "worker/model/cuda/weights.h"

namespace strait {

// CUDA keeps the decode graphs of a stage in memory of its own: so much is theirs (graph_ledger.h).
inline constexpr uint64_t kCudaGraphBytes = 1 << 20;
inline constexpr uint64_t kCudaGraphBytesEachLayer = 3 << 20;

struct CudaStageBytes {
  uint64_t weights = 0;
  uint64_t pool = 0;
  uint64_t workspace = 0;  // activations, step tables, plans, page tables, graphs
  uint64_t graphs = 0;     // of the workspace: taken by CUDA as graphs are made
  uint64_t total() const { return weights + pool + workspace; }
};

struct CudaStageLayout {
  CudaStageBytes bytes;
  uint64_t region_end = 0;  // of the workspace
  StepLimits limits;
  float* inv_freq = nullptr;  // [qk_rope_head_dim / 2]
  CudaWorkspace workspace;
};

// The workspace at `base`; null: only measures.
CudaStageLayout LayOutStage(const ModelConfig& config, const StageSpec& spec,
                            const CudaTraits& traits, std::byte* base);

StageCosts CudaStageCosts(const ModelConfig& config, const CudaTraits& traits);

// What of a stage that does not fit in `bytes` would: the same layers with less cache, or fewer
// layers with as much for each.
std::string WhatWouldFit(const StageCosts& costs, const StageSpec& spec, uint64_t bytes);

// The rows of a tile of a stage with these layers, whose weights take so much.
uint32_t TileRowsOf(const StageCosts& costs, LayerRange layers, uint64_t weight_bytes);

}  // namespace strait
