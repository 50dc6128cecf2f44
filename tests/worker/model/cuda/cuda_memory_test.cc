// SPDX-License-Identifier: Apache-2.0
//
// Defends: what the coordinator plans for a CUDA worker, from the costs that it tells, loads within
// the worker's memory: the stage lies within what was counted, in the tile that was counted. And
// decode graphs stay within their part. Needs no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/core/planner.h"
#include "proto/model/reservation.h"
#include "tests/worker/model/cuda/cuda_fixture.h"
#include "worker/model/cuda/graph_ledger.h"
#include "worker/model/cuda/stage_layout.h"

namespace strait {
namespace {

// Half of V2-Lite's width: enough weights for tiles of all sizes.
ModelConfig Wide() {
  ModelConfig config = OnCuda(TinyV2Lite());
  config.hidden_size = 1024;
  config.intermediate_size = 4096;
  config.moe_intermediate_size = 704;
  config.n_routed_experts = 64;
  config.num_experts_per_tok = 6;
  config.num_hidden_layers = 12;
  config.max_position_embeddings = 163840;
  return config;
}

ModelConfig TrueHeads() { return WithTrueHeads(Wide()); }

std::vector<ModelConfig> Models() {
  ModelConfig one_layer = OnCuda(TinyV3());
  one_layer.num_hidden_layers = 1;
  return {OnCuda(TinyV3()), OnCuda(TinyV3Fp8()), OnCuda(TinyV2Lite()), OnCuda(TinyV2()), one_layer,
          Wide(),           TrueHeads()};
}

constexpr CudaTraits kTraits[] = {
    {132, false},
    {132, true},
    {1, true},
    {148, false},
    {.num_multiprocessors = 132, .row_format = RowFormat::kFp8},
    {.num_multiprocessors = 132, .deterministic = true, .row_format = RowFormat::kFp8},
    {.num_multiprocessors = 132, .fp8_activations = true},
    {.num_multiprocessors = 132, .deterministic = true, .fp8_activations = true},
    {.num_multiprocessors = 132, .has_mha_prefill = true},
    {.num_multiprocessors = 132, .deterministic = true, .has_mha_prefill = true}};

uint64_t Counted(const StageCosts& costs, LayerRange layers, uint64_t pool_blocks) {
  return StageFixedBytes(costs, layers) + pool_blocks * costs.block_bytes;
}

TEST(CudaMemoryTest, EveryRangeOfEveryModelLiesWithinWhatIsCounted) {
  for (const ModelConfig& config : Models()) {
    for (const CudaTraits& traits : kTraits) {
      const StageCosts costs = CudaStageCosts(config, traits);
      ASSERT_EQ(costs.layer_bytes.size(), config.num_hidden_layers);
      for (const auto* sizes : {&costs.workspace_bytes, &costs.last_workspace_bytes}) {
        EXPECT_TRUE(std::is_sorted(sizes->begin(), sizes->end()));
      }
      for (LayerIndex begin = 0; begin < config.num_hidden_layers; ++begin) {
        for (LayerIndex end = begin + 1; end <= config.num_hidden_layers; ++end) {
          for (const uint32_t blocks : {1u, 63u, 1000u, 1'000'001u}) {
            StageSpec spec;
            spec.layers = {begin, end};
            spec.pool_blocks = blocks;
            const CudaStageLayout layout = LayOutStage(config, spec, traits, nullptr);
            const uint64_t weights = StageWeightBytes(costs.layer_bytes, costs.embedding_bytes,
                                                      costs.head_bytes, spec.layers);
            EXPECT_EQ(layout.bytes.weights, weights) << begin << " to " << end;
            EXPECT_LE(layout.bytes.total(), Counted(costs, spec.layers, blocks))
                << begin << " to " << end << ", " << blocks << " blocks";
            EXPECT_EQ(layout.limits.tile_rows, TileRowsOf(costs, spec.layers, weights));
          }
        }
      }
    }
  }
}

// The bug: the coordinator counted the CPU's workspace and bf16 weights as stored for GPU stages,
// so a GPU worker refused plans, or took more than its memory.
TEST(CudaMemoryTest, WhatIsPlannedFits) {
  int planned = 0;
  uint32_t largest = 0;
  for (const ModelConfig& config : Models()) {
    ModelShape shape;  // as the server makes it, for a CPU
    shape.max_positions = config.max_position_embeddings;
    for (LayerIndex layer = 0; layer < config.num_hidden_layers; ++layer) {
      shape.layer_weight_bytes.push_back(LayerWeightBytes(config, layer));
    }
    shape.embedding_bytes = EmbeddingBytes(config);
    shape.head_bytes = HeadBytes(config);
    shape.workspace_bytes = WorkspaceSizes(config);
    CoreOptions options;
    options.max_running = 1'000'000;  // the memory alone bounds the cache
    for (const CudaTraits& traits : kTraits) {
      shape.block_bytes =
          BlockBytes(traits.row_format, config.kv_lora_rank, config.qk_rope_head_dim);
      const StageCosts costs = CudaStageCosts(config, traits);
      const uint64_t least = Counted(costs, {0, config.num_hidden_layers}, 0);
      for (const uint32_t stages : {1u, 2u, 3u}) {
        if (stages > config.num_hidden_layers) continue;
        for (uint64_t percent = 50; percent <= 300; percent += 25) {
          const uint64_t memory = least * percent / 100;
          const auto plan =
              PlanPipeline(options, shape, std::vector<WorkerMemory>(stages, {memory, &costs}));
          if (!plan.ok()) {
            EXPECT_LT(percent, 200u) << plan.status();
            continue;
          }
          ++planned;
          for (const StagePlan& stage : plan->stages) {
            StageSpec spec;
            spec.layers = stage.layers;
            spec.pool_blocks = static_cast<uint32_t>(stage.cache_bytes / shape.block_bytes);
            const CudaStageLayout layout = LayOutStage(config, spec, traits, nullptr);
            EXPECT_LE(layout.bytes.total(), memory);
            largest = std::max(largest, layout.limits.tile_rows);
          }
        }
      }
    }
  }
  EXPECT_GT(planned, 200);
  EXPECT_GT(largest, kCudaMinTileRows) << "a model with larger tiles was meant to be among them";
}

TEST(CudaMemoryTest, AStageOfAGoodSizeIsCountedWithinAPercent) {
  const ModelConfig config = Wide();
  for (const CudaTraits& traits : kTraits) {
    const StageCosts costs = CudaStageCosts(config, traits);
    for (const LayerRange layers : {LayerRange{0, config.num_hidden_layers}, LayerRange{2, 5},
                                    LayerRange{7, config.num_hidden_layers}}) {
      StageSpec spec;
      spec.layers = layers;
      spec.pool_blocks = 20'000;
      const auto exact =
          static_cast<double>(LayOutStage(config, spec, traits, nullptr).bytes.total());
      EXPECT_LT(static_cast<double>(Counted(costs, layers, spec.pool_blocks)), 1.01 * exact);
    }
  }
}

// What fp8 rows are for: 656 bytes a token and layer of V3 where bf16 has 1,152.
TEST(CudaMemoryTest, RowsOfFp8AreCountedAsTheyLie) {
  ModelConfig config = Wide();
  config.kv_lora_rank = 512;
  config.qk_rope_head_dim = 64;
  StageSpec spec;
  spec.layers = {2, 5};
  spec.pool_blocks = 1000;
  for (const auto& [format, row_bytes] :
       {std::pair(RowFormat::kBf16, 1152u), std::pair(RowFormat::kFp8, 656u)}) {
    const CudaTraits traits = {.num_multiprocessors = 132, .row_format = format};
    EXPECT_EQ(LayOutStage(config, spec, traits, nullptr).bytes.pool, 1000u * 64 * row_bytes);
    EXPECT_EQ(CudaStageCosts(config, traits).block_bytes, 64u * row_bytes + 12);
  }
}

TEST(CudaMemoryTest, TheExpandedFormTakesItsWeightAndLittleElse) {
  const ModelConfig config = TrueHeads();
  const uint64_t weight_bytes = uint64_t{config.num_attention_heads} * (128 + 128) * 512 * 2;
  const StageCosts without = CudaStageCosts(config, {.num_multiprocessors = 132});
  const StageCosts with =
      CudaStageCosts(config, {.num_multiprocessors = 132, .has_mha_prefill = true});
  for (LayerIndex layer = 0; layer < config.num_hidden_layers; ++layer) {
    EXPECT_EQ(with.layer_bytes[layer], without.layer_bytes[layer] + weight_bytes);
  }
  for (size_t i = 0; i < with.workspace_bytes.size(); ++i) {
    const uint64_t tile_rows = kCudaMinTileRows * (i + 1);
    const uint64_t key_rows = tile_rows < 256 ? 0 : 2 * tile_rows;
    EXPECT_LE(with.workspace_bytes[i],
              without.workspace_bytes[i] + key_rows * (sizeof(int32_t) + 64 * 2));
  }
  // None where the form is not used.
  for (const CudaTraits& traits :
       {CudaTraits{.num_multiprocessors = 132, .deterministic = true},
        CudaTraits{.num_multiprocessors = 132, .row_format = RowFormat::kFp8}}) {
    CudaTraits on_hopper = traits;
    on_hopper.has_mha_prefill = true;
    EXPECT_EQ(CudaStageCosts(config, on_hopper).layer_bytes,
              CudaStageCosts(config, traits).layer_bytes);
    EXPECT_EQ(CudaStageCosts(config, on_hopper).workspace_bytes,
              CudaStageCosts(config, traits).workspace_bytes);
  }
}

TEST(CudaMemoryTest, WhatWouldFitIsToldAndFits) {
  const ModelConfig config = Wide();
  const StageCosts costs = CudaStageCosts(config, kTraits[0]);
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 1000 * spec.layers.size();
  const uint64_t fixed = StageFixedBytes(costs, spec.layers);
  const uint64_t column = costs.block_bytes * spec.layers.size();
  EXPECT_EQ(WhatWouldFit(costs, spec, fixed + 999 * column),
            "with a cache of 6000 latent blocks (32000 tokens) it would fit");
  EXPECT_EQ(WhatWouldFit(costs, spec, fixed + column),
            "with a cache of 12 latent blocks (64 tokens) it would fit");
  const std::string fewer = WhatWouldFit(costs, spec, fixed - 1);
  EXPECT_NE(fewer.find("its layers 0 to 1"), std::string::npos) << fewer;
  EXPECT_NE(fewer.find("use more stages"), std::string::npos) << fewer;
  const std::string none = WhatWouldFit(costs, spec, costs.layer_bytes[0]);
  EXPECT_NE(none.find("not one of its layers would fit"), std::string::npos) << none;
}

TEST(CudaModelTest, AGpuWithTooLittleSharedMemoryIsRefusedInWords) {
  ModelConfig config = OnCuda(TinyV3());
  config.kv_lora_rank = 512;
  config.qk_rope_head_dim = 64;
  cuda::Device device;
  device.name = "NVIDIA L40S";
  device.compute_capability = 89;
  device.shared_bytes = 101'376;
  const absl::Status refused = CheckCudaAttention(config, device);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  for (const char* part : {"NVIDIA L40S", "101376", "shared memory", "512 and 64"}) {
    EXPECT_NE(refused.message().find(part), std::string::npos) << part << " in: " << refused;
  }
  EXPECT_TRUE(CheckCudaAttention(OnCuda(TinyV3()), device).ok()) << "small rows fit";
  device.compute_capability = 80;  // A100
  device.shared_bytes = 166'912;
  EXPECT_TRUE(CheckCudaAttention(config, device).ok());
}

TEST(GraphLedgerTest, TheOneUnusedForLongestGoesFirst) {
  GraphLedger ledger(100);
  EXPECT_TRUE(ledger.Add(1, 40).empty());
  EXPECT_TRUE(ledger.Add(2, 40).empty());
  ledger.Used(1);
  EXPECT_EQ(ledger.Add(3, 40), std::vector<int32_t>{2});
  EXPECT_EQ(ledger.bytes(), 80u);
  EXPECT_EQ(ledger.Add(4, 90), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(ledger.Add(5, 1000), std::vector<int32_t>{4}) << "one is kept, however large";
  EXPECT_EQ(ledger.size(), 1u);
}

TEST(GraphLedgerTest, RandomUseStaysWithinBothLimits) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  GraphLedger ledger(1000);
  std::map<int32_t, uint64_t> held;
  for (int i = 0; i < 5000; ++i) {
    const auto rows = static_cast<int32_t>(1 + random() % 256);
    if (!held.contains(rows)) {
      held[rows] = i % 2 == 0 ? random() % 30 : 0;
      for (const int32_t gone : ledger.Add(rows, held[rows])) {
        EXPECT_NE(gone, rows);
        EXPECT_EQ(held.erase(gone), 1u);
      }
    }
    ledger.Used(rows);
    uint64_t bytes = 0;
    for (const auto& [row, size] : held) bytes += size;
    ASSERT_EQ(ledger.bytes(), bytes);
    ASSERT_EQ(ledger.size(), held.size());
    ASSERT_LE(bytes, 1000u);
    ASSERT_LE(held.size(), kMaxGraphs);
  }
  EXPECT_EQ(held.size(), kMaxGraphs) << "the count was meant to bind, too";
}

}  // namespace
}  // namespace strait
