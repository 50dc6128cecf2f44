// SPDX-License-Identifier: Apache-2.0
//
// Defends: a block that is freed while a copy uses it is held and nobody's until the last such copy has ended,
// whatever freed it, and however steps and the host tier hold it besides.
#include <gtest/gtest.h>

#include <vector>

#include "worker/cache/latent_cache.h"

namespace strait {
namespace {

constexpr ContentKey kA{.low = 1, .high = 9};

class LatentCopiesTest : public testing::Test {
 protected:
  LatentCopiesTest() {
    cache_.Open({1});
    cache_.Grow({1}, 130);  // three blocks
  }
  ~LatentCopiesTest() override { Sound(); }
  void Sound() const {
    EXPECT_TRUE(cache_.CheckIntegrity().ok()) << cache_.CheckIntegrity();
    EXPECT_EQ(pool_.used(), cache_.blocks_taken());
    uint32_t visited = 0;
    cache_.ForBlocks([&](BlockId) { ++visited; });
    EXPECT_EQ(visited, cache_.blocks_taken());
  }
  BlockPool pool_{6};
  LatentCache cache_{1, &pool_};
};

TEST_F(LatentCopiesTest, AFreedBlockWaitsForItsLastCopy) {
  cache_.BeginCopy(std::vector<BlockId>{0, 1});
  cache_.BeginCopy(std::vector<BlockId>{1});
  EXPECT_EQ(cache_.num_pinned(), 0u);
  cache_.Close({1});
  EXPECT_EQ(cache_.blocks_used(), 0u);
  EXPECT_EQ(cache_.num_pinned(), 2u);
  EXPECT_EQ(cache_.blocks_taken(), 2u);
  Sound();
  // Nobody gets them.
  cache_.Open({2});
  cache_.Grow({2}, 64 * 4);
  for (const BlockId block : cache_.PageTables({2})[0]) EXPECT_GE(block, 2u);
  cache_.EndCopy(std::vector<BlockId>{0, 1});
  EXPECT_EQ(cache_.num_pinned(), 1u);
  Sound();
  cache_.EndCopy(std::vector<BlockId>{1});
  EXPECT_EQ(cache_.num_pinned(), 0u);
  EXPECT_FALSE(cache_.in_copies());
  cache_.Grow({2}, 64 * 6);
}

TEST_F(LatentCopiesTest, ABlockThatStaysIsNotPinned) {
  cache_.BeginCopy(std::vector<BlockId>{0, 2});
  cache_.Cut({1}, 64);
  EXPECT_EQ(cache_.num_pinned(), 1u);  // the third
  EXPECT_EQ(pool_.used(), 2u);
  cache_.EndCopy(std::vector<BlockId>{0, 2});
  EXPECT_EQ(pool_.used(), 1u);
  EXPECT_EQ(cache_.length({1}), 64u);
}

TEST_F(LatentCopiesTest, AfterItsCopyItWaitsForTheStepThatMayUseIt) {
  cache_.BeginCopy(std::vector<BlockId>{0});
  cache_.KeepFreed(StepId{5});
  cache_.Close({1});
  cache_.EndCopy(std::vector<BlockId>{0});
  EXPECT_EQ(pool_.used(), 3u);
  cache_.KeepFreed(StepId{});
  cache_.StepDone(StepId{5});
  EXPECT_EQ(pool_.used(), 0u);
}

TEST_F(LatentCopiesTest, APrefixBlockThatTheTierHoldsToo) {
  cache_.KeepPrefix({1}, kA);
  cache_.BeginCopy(std::vector<BlockId>{0});
  cache_.Close({1});
  EXPECT_EQ(cache_.num_pinned(), 0u);  // it stays without a sequence
  const std::vector<BlockId> blocks = cache_.DropPinned(kA);
  EXPECT_EQ(cache_.num_pinned(), 1u);
  cache_.Unpin(blocks);
  EXPECT_EQ(cache_.num_pinned(), 1u);  // of the copy
  Sound();
  cache_.EndCopy(std::vector<BlockId>{0});
  EXPECT_EQ(pool_.used(), 0u);
}

TEST_F(LatentCopiesTest, TheTierMayBeTheLast) {
  cache_.KeepPrefix({1}, kA);
  cache_.BeginCopy(std::vector<BlockId>{0});
  cache_.Close({1});
  const std::vector<BlockId> blocks = cache_.DropPinned(kA);
  cache_.EndCopy(std::vector<BlockId>{0});
  EXPECT_EQ(cache_.num_pinned(), 1u);
  Sound();
  cache_.Unpin(blocks);
  EXPECT_EQ(pool_.used(), 0u);
}

using LatentCopiesDeathTest = LatentCopiesTest;

TEST_F(LatentCopiesDeathTest, ChecksItsCaller) {
  EXPECT_DEATH(cache_.EndCopy(std::vector<BlockId>{0}), "no copy uses the block");
  cache_.BeginCopy(std::vector<BlockId>{0});
  pool_.Narrow(3);
  std::vector<BlockMove> moves;
  EXPECT_DEATH(cache_.Compact(3, &moves), "check failed");
  EXPECT_DEATH(cache_.GiveLayer(0), "check failed");
  cache_.EndCopy(std::vector<BlockId>{0});
}

}  // namespace
}  // namespace strait
