// SPDX-License-Identifier: Apache-2.0
//
// Defends: every plan covers all layers once, in order, fits every worker, and no other split
// holds more tokens; what cannot fit is refused with the numbers.
#include "coordinator/core/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>

#include "proto/model/reservation.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

CoreOptions Options() {
  CoreOptions options;
  options.max_running = 1000;
  return options;
}

// The best smallest capacity in rows, by trying every split.
uint64_t BestByTrying(const CoreOptions& options, const ModelShape& model,
                      const std::vector<WorkerMemory>& memory) {
  const auto num_layers = static_cast<uint32_t>(model.layer_weight_bytes.size());
  std::function<uint64_t(size_t, uint32_t)> best = [&](size_t stage, uint32_t begin) -> uint64_t {
    if (stage + 1 == memory.size()) {
      return StageRowsMax(options, model, {begin, num_layers}, memory[stage]);
    }
    uint64_t most = 0;
    for (uint32_t end = begin + 1; end + (memory.size() - stage - 1) <= num_layers; ++end) {
      most = std::max(most, std::min(StageRowsMax(options, model, {begin, end}, memory[stage]),
                                     best(stage + 1, end)));
    }
    return most;
  };
  return best(0, 0);
}

TEST(PlannerTest, IsAsGoodAsTryingEverySplit) {
  const uint32_t seed = 20260101;
  std::mt19937 random(seed);
  int planned = 0;
  for (int i = 0; i < 500; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << " case " << i);
    ModelShape model = SmallModel(1 + random() % 8);
    for (uint64_t& bytes : model.layer_weight_bytes) bytes = 500 + random() % 3000;
    model.embedding_bytes = random() % 3000;
    model.head_bytes = random() % 3000;
    if (i % 2 == 0) model.workspace_bytes = {50, 150, 300, 500};  // 5 % of 3, 6 and 10 kB
    CoreOptions options = Options();
    if (random() % 4 == 0) options.max_cache_bytes_per_stage = 1000 + random() % 5000;
    const uint32_t num_stages =
        1 + random() % std::min<uint32_t>(4, model.layer_weight_bytes.size());
    std::vector<WorkerMemory> memory;
    for (uint32_t s = 0; s < num_stages; ++s) memory.push_back(2000 + random() % 12000);

    const uint64_t best = BestByTrying(options, model, memory);
    const absl::StatusOr<PipelinePlan> plan = PlanPipeline(options, model, memory);
    ASSERT_EQ(plan.ok(), best > 0) << plan.status();
    if (!plan.ok()) {
      EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
      continue;
    }
    ++planned;
    EXPECT_EQ(plan->capacity_rows, best);
    LayerIndex next = 0;
    for (uint32_t s = 0; s < num_stages; ++s) {
      const StagePlan& stage = plan->stages[s];
      EXPECT_EQ(stage.layers.begin, next);
      EXPECT_GT(stage.layers.end, stage.layers.begin);
      next = stage.layers.end;
      EXPECT_EQ(stage.cache_bytes, StageCacheBytes(model, stage.layers, best));
      EXPECT_LE(StageWeightBytes(model, stage.layers) + StageWorkspaceBytes(model, stage.layers) +
                    stage.cache_bytes,
                memory[s].bytes);
    }
    EXPECT_EQ(next, model.layer_weight_bytes.size());
  }
  EXPECT_GT(planned, 200);
}

TEST(PlannerTest, EqualWorkersShareEqualLayers) {
  ModelShape model = SmallModel(8);
  model.embedding_bytes = model.head_bytes = 0;
  const auto plan = PlanPipeline(Options(), model, std::vector<WorkerMemory>{10000, 10000});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages[0].layers, (LayerRange{0, 4}));
  EXPECT_EQ(plan->stages[1].layers, (LayerRange{4, 8}));
}

TEST(PlannerTest, MoreCacheThanCanBeUsedIsNotTaken) {
  CoreOptions options = Options();
  options.max_running = 3;
  ModelShape model = SmallModel(4);
  const auto plan = PlanPipeline(options, model, std::vector<WorkerMemory>{1 << 30, 1 << 30});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->capacity_rows, 3 * BlocksPerLayer(model.max_positions) * limits::kBlockTokens);
  // With room to spare, the pace decides: 1000 x 2 against 1000 x 2 + 500 of head.
  EXPECT_EQ(plan->stages[0].layers, (LayerRange{0, 2}));
}

// The bug: the planner reckoned without the workspace, which a worker takes on top: 5 % of the
// weights.
TEST(PlannerTest, AStagesWorkspaceFollowsItsWeights) {
  ModelShape model = SmallModel(4);
  model.workspace_bytes = {50, 150, 300};
  EXPECT_EQ(StageWorkspaceBytes(model, {1, 2}), 50u) << "more than 5 %: the least there is";
  EXPECT_EQ(StageWorkspaceBytes(model, {0, 3}), 150u) << "of 3500";
  EXPECT_EQ(StageWorkspaceBytes(model, {0, 4}), 150u) << "of 5000";
  for (uint64_t& bytes : model.layer_weight_bytes) bytes = 1500;
  EXPECT_EQ(StageWorkspaceBytes(model, {0, 4}), 300u) << "of 7000";
  const uint64_t fixed = 7000 + 300;
  EXPECT_EQ(StageRowsMax(Options(), model, {0, 4}, fixed + 4 * 128 - 1), 0u);
  EXPECT_EQ(StageRowsMax(Options(), model, {0, 4}, fixed + 4 * 128), 64u);
  model.workspace_bytes.clear();
  EXPECT_EQ(StageRowsMax(Options(), model, {0, 4}, 7000 + 4 * 128), 64u);
}

// The bug: NCCL's communicators and the arenas of edges lay beside what was planned, so a GPU that
// was planned full had no room for them.
TEST(PlannerTest, EdgesAreCountedWhereAStageHasThem) {
  const ModelShape model = SmallModel(6);
  CoreOptions options = Options();
  options.max_step_tokens = 16;
  StageCosts costs;
  costs.layer_bytes = model.layer_weight_bytes;
  costs.block_bytes = model.block_bytes;
  costs.workspace_bytes = costs.last_workspace_bytes = {50};
  const auto rows = [&](LayerRange layers, uint64_t bytes) {
    return StageRowsMax(options, model, layers, {bytes, &costs});
  };
  constexpr uint64_t kTwoLayers = 2000 + 50 + 2 * 128;  // and one block each
  EXPECT_EQ(rows({2, 4}, kTwoLayers), 64u);
  costs.edge_bytes = 100;
  costs.edge_row_bytes = 3;
  EXPECT_EQ(StageEdgeBytes(options, {0, 6}, {0, &costs}), 0u) << "alone, it has none";
  EXPECT_EQ(StageEdgeBytes(options, {0, 2}, {0, &costs}), 148u);
  EXPECT_EQ(StageEdgeBytes(options, {4, 6}, {0, &costs}), 148u);
  EXPECT_EQ(StageEdgeBytes(options, {2, 4}, {0, &costs}), 296u);
  EXPECT_EQ(StageEdgeBytes(options, {2, 4}, 1000), 0u) << "of a CPU worker";
  for (const auto& [layers, edges] :
       {std::pair(LayerRange{0, 2}, 148u), std::pair(LayerRange{2, 4}, 296u)}) {
    EXPECT_EQ(rows(layers, kTwoLayers + edges - 1), 0u);
    EXPECT_EQ(rows(layers, kTwoLayers + edges), 64u);
  }
  // Three stages of two layers: 6 x 1000, 3 x 50, 6 x 128, four ends of edges.
  const std::vector<WorkerMemory> three(3, {2000, &costs});
  const auto refused = PlanPipeline(options, model, three);
  EXPECT_NE(refused.status().message().find("at least 7510 bytes"), absl::string_view::npos)
      << refused.status();
}

TEST(PlannerTest, RefusalNamesTheNumbers) {
  const auto plan = PlanPipeline(Options(), SmallModel(4), std::vector<WorkerMemory>{2500, 2400});
  ASSERT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  // 4 x 1000 + 500 + 500 of weights, 2 x 50 of workspace, 4 blocks of 128.
  EXPECT_NE(plan.status().message().find("5612"), absl::string_view::npos) << plan.status();
  EXPECT_NE(plan.status().message().find("4900 (2500 + 2400)"), absl::string_view::npos)
      << plan.status();
}

}  // namespace
}  // namespace strait
