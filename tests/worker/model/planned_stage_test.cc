// SPDX-License-Identifier: Apache-2.0
//
// Defends: what the coordinator's planner thinks fits into a worker's memory does: the worker
// loads it, and weights, cache and workspace together stay within the memory.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "coordinator/core/planner.h"
#include "proto/model/stage_memory.h"
#include "tests/worker/model/load_with_cache.h"
#include "tests/worker/model/tiny_models.h"
#include "worker/model/cpu_backend.h"
#include "worker/model/cpu_workspace.h"

namespace strait {
namespace {

// As the server makes it.
ModelShape Shape(const ModelConfig& config, RowFormat format) {
  ModelShape shape;
  shape.max_positions = config.max_position_embeddings;
  for (LayerIndex layer = 0; layer < config.num_hidden_layers; ++layer) {
    shape.layer_weight_bytes.push_back(LayerWeightBytes(config, layer));
  }
  shape.embedding_bytes = EmbeddingBytes(config);
  shape.head_bytes = HeadBytes(config);
  shape.block_bytes = BlockBytes(format, config.kv_lora_rank, config.qk_rope_head_dim);
  shape.workspace_bytes = WorkspaceSizes(config);
  return shape;
}

// Loads what is planned for workers of `memory` each; the largest tile, 0 if nothing fits.
uint32_t LoadAsPlanned(const ModelConfig& config, RowFormat format, uint32_t num_stages,
                       uint64_t memory) {
  CoreOptions options;
  options.max_running = 1'000'000;  // the memory alone bounds the cache
  const auto plan =
      PlanPipeline(options, Shape(config, format), std::vector<WorkerMemory>(num_stages, memory));
  if (!plan.ok()) return 0;
  uint32_t largest = 0;
  for (const StagePlan& stage : plan->stages) {
    CpuBackendOptions backend_options;
    backend_options.memory_bytes = memory;
    backend_options.row_format = format;
    const auto backend = CpuBackend::Create(backend_options, MakeRandomWeights(config, 1, 1));
    EXPECT_TRUE(backend.ok()) << backend.status();
    const auto model = LoadWithCache(
        backend->get(),
        {stage.layers, static_cast<uint32_t>(stage.cache_bytes / (*backend)->block_bytes())});
    EXPECT_TRUE(model.ok()) << model.status();
    if (!model.ok()) continue;
    const auto workspace = CreateCpuWorkspace(config, (*model)->weight_bytes());
    EXPECT_TRUE(workspace.ok()) << workspace.status();
    EXPECT_LE((*model)->weight_bytes() + stage.cache_bytes + workspace->memory.bytes(), memory);
    largest = std::max(largest, workspace->tile_rows);
  }
  return largest;
}

// The bug: planner and worker gave all that weights left to the cache, the workspace came on top.
TEST(PlannedStageTest, WhatIsPlannedIsLoadedWithinTheMemory) {
  int planned = 0;
  for (const ModelConfig& config : {TinyV3(), TinyV3Fp8(), TinyV2Lite(), TinyV2()}) {
    const uint64_t all = StageWeightBytes(config, {0, config.num_hidden_layers});
    for (const RowFormat format : {RowFormat::kFp32, RowFormat::kBf16}) {
      for (const uint32_t num_stages : {1, 2}) {
        for (uint64_t percent = 80; percent <= 400; percent += 40) {
          planned += LoadAsPlanned(config, format, num_stages, all * percent / 100) > 0;
        }
      }
    }
  }
  EXPECT_GT(planned, 50);
}

TEST(PlannedStageTest, WhereTheWeightsJustifyALargerTileToo) {
  ModelConfig config = TinyV3();
  config.hidden_size = 1024;
  config.intermediate_size = 2048;
  config.n_routed_experts = 0;
  config.num_hidden_layers = 6;
  const uint64_t all = StageWeightBytes(config, {0, config.num_hidden_layers});
  EXPECT_GT(LoadAsPlanned(config, RowFormat::kFp32, 1, all * 3 / 2), kMinTileRows);
}

}  // namespace
}  // namespace strait
