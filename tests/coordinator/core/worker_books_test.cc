// SPDX-License-Identifier: Apache-2.0
//
// What the stages of one worker take of its memory: what they share counts once, nothing else does.
#include "coordinator/core/worker_books.h"

#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using Role = HostedStage::Role;

uint64_t Booked(const HostedStages& stages, const StageCosts* costs = nullptr) {
  CoreOptions options;
  options.max_step_tokens = 10;
  return BookedBytes(options, SmallModel(), {1 << 20, costs}, stages);
}

// SmallModel: 1,000 a layer, 500 of embedding, 500 of head, 50 of workspace, blocks of 128.
TEST(WorkerBooksTest, LayersEmbeddingAndHeadCountOnceWorkspaceAndCacheForEach) {
  EXPECT_EQ(Booked({}), 0u);
  HostedStages stages;
  stages[1] = {.layers = {0, 2}, .cache_bytes = 256};
  EXPECT_EQ(Booked(stages), 2000u + 500 + 50 + 256);
  stages[2] = {.layers = {1, 4}, .cache_bytes = 384};
  EXPECT_EQ(Booked(stages), 4000u + 500 + 500 + 2 * 50 + 256 + 384);
  stages[3] = {.role = Role::kUnloading, .layers = {0, 4}, .cache_bytes = 512};
  EXPECT_EQ(Booked(stages), 4000u + 500 + 500 + 3 * 50 + 256 + 384 + 512);
}

TEST(WorkerBooksTest, ACacheThatIsResizedTakesTheLargerSize) {
  HostedStages stages;
  stages[1] = {.layers = {1, 2}, .cache_bytes = 256, .resize = HostedStage::Resize{128, 0}};
  EXPECT_EQ(Booked(stages), 1000u + 50 + 256);
  stages[1].resize->cache_bytes = 512;
  EXPECT_EQ(Booked(stages), 1000u + 50 + 512);
}

TEST(WorkerBooksTest, ASuccessorsCacheIsAPartOfItsPredecessorsUntilTheyAreGone) {
  HostedStages stages;
  stages[1] = {.role = Role::kFollowed, .layers = {0, 2}, .cache_bytes = 256};
  stages[2] = {.role = Role::kFollowed, .layers = {2, 4}, .cache_bytes = 512};
  stages[3] = {.layers = {0, 4}, .cache_bytes = 640, .successor_of = {1, 2}};
  EXPECT_EQ(Booked(stages), 5000u + 3 * 50 + 256 + 512);
  // One of them went: what is left of their cache is the successor's.
  stages.erase(1);
  EXPECT_EQ(Booked(stages), 5000u + 2 * 50 + 640);
  stages.erase(2);
  EXPECT_EQ(Booked(stages), 5000u + 50 + 640);
}

TEST(WorkerBooksTest, AWorkersOwnCostsCountWithTheBlocksAsItStoresThem) {
  StageCosts costs;
  costs.layer_bytes = {100, 200, 300, 400};
  costs.embedding_bytes = 10;
  costs.head_bytes = 20;
  costs.block_bytes = 130;
  costs.workspace_bytes = {7};
  costs.last_workspace_bytes = {9};
  costs.layer_workspace_bytes = 1;
  costs.edge_bytes = 1000;
  costs.edge_row_bytes = 2;
  HostedStages stages;
  stages[1] = {.layers = {0, 3}, .cache_bytes = 2 * 128};
  stages[2] = {.layers = {2, 4}, .cache_bytes = 3 * 128};
  EXPECT_EQ(Booked(stages, &costs),
            1000u + 10 + 20 + (7 + 3) + (9 + 2) + 2 * (1000 + 10 * 2) + 5 * 130);
}

}  // namespace
}  // namespace strait
