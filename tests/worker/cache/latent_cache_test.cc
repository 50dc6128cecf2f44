// SPDX-License-Identifier: Apache-2.0
//
// Defends: blocks are neither lost nor owned twice, a sequence holds exactly what
// proto/model/reservation.h says, and the same calls give the same block ids.
#include "worker/cache/latent_cache.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "proto/base/limits.h"
#include "proto/wire/tables_digest.h"

namespace strait {
namespace {

TEST(BlockPoolTest, HandsOutLowestIdsFirstThenTheLastGivenBack) {
  BlockPool pool(4);
  EXPECT_EQ(pool.Take(), 0u);
  EXPECT_EQ(pool.Take(), 1u);
  EXPECT_EQ(pool.Take(), 2u);
  pool.Give(1);
  EXPECT_FALSE(pool.held(1));
  EXPECT_EQ(pool.used(), 2u);
  EXPECT_EQ(pool.Take(), 1u);
  EXPECT_EQ(pool.Take(), 3u);
  EXPECT_EQ(pool.used(), pool.size());
  EXPECT_TRUE(pool.CheckIntegrity().ok());
}

TEST(BlockPoolDeathTest, ChecksItsCaller) {
  BlockPool pool(1);
  EXPECT_DEATH(pool.Give(0), "given back twice");
  EXPECT_DEATH(pool.Give(1), "given back twice");
  pool.Take();
  EXPECT_DEATH(pool.Take(), "counted when it was accepted");
}

TEST(BlockPoolTest, GrowsBehindWhatIsFree) {
  BlockPool pool(2);
  pool.Take();
  pool.Grow(4);
  EXPECT_EQ(pool.size(), 4u);
  EXPECT_EQ(pool.used(), 1u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  for (const BlockId block : {1u, 2u, 3u}) EXPECT_EQ(pool.Take(), block);
  pool.Grow(4);
  EXPECT_EQ(pool.used(), pool.size());
}

TEST(BlockPoolTest, HandsOutNothingBehindWhereItWasNarrowedTo) {
  BlockPool pool(6);
  for (int i = 0; i < 5; ++i) pool.Take();
  pool.Give(0);
  pool.Give(1);
  pool.Narrow(3);  // 2, 3 and 4 are held, 0 and 1 are free
  EXPECT_EQ(pool.size(), 6u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  EXPECT_EQ(pool.Take(), 1u);
  pool.Give(4);
  EXPECT_EQ(pool.Take(), 0u);
  pool.Give(3);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  pool.DropNarrowed();
  EXPECT_EQ(pool.size(), 3u);
  EXPECT_EQ(pool.used(), 3u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  EXPECT_FALSE(pool.held(3));
  pool.Grow(5);
  EXPECT_EQ(pool.Take(), 3u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
}

TEST(BlockPoolDeathTest, ChecksWhoMakesItSmaller) {
  BlockPool pool(4);
  pool.Take();
  pool.Take();
  EXPECT_DEATH(pool.Grow(3), "");
  EXPECT_DEATH(pool.Narrow(1), "more blocks are held than are left");
  EXPECT_DEATH(pool.Narrow(5), "more blocks are held than are left");
  pool.Give(0);
  pool.Narrow(1);
  EXPECT_DEATH(pool.Grow(4), "");
  EXPECT_DEATH(pool.Narrow(2), "more blocks are held than are left");
  EXPECT_DEATH(pool.DropNarrowed(), "behind the pool's end is held");
}

TEST(LatentCacheTest, GrowsByPositionInEveryLayer) {
  constexpr uint32_t kLayers = 3;
  BlockPool pool(30);
  LatentCache cache(kLayers, &pool);
  const SequenceId id{7};
  cache.Open(id);
  EXPECT_EQ(cache.blocks_used(), 0u);
  ASSERT_EQ(cache.PageTables(id).size(), kLayers);
  EXPECT_TRUE(cache.PageTables(id)[0].empty());
  for (const uint32_t length : {1u, 63u, 64u, 65u, 128u, 500u}) {
    cache.Grow(id, length);
    EXPECT_EQ(cache.length(id), length);
    EXPECT_EQ(cache.blocks_used(), BlocksOfSequence(length, kLayers)) << length;
    for (const auto table : cache.PageTables(id)) EXPECT_EQ(table.size(), BlocksPerLayer(length));
    EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
  }
  cache.Close(id);
  EXPECT_FALSE(cache.resident(id));
  EXPECT_EQ(cache.blocks_used(), 0u);
  EXPECT_TRUE(cache.CheckIntegrity().ok());
}

// What a backend builds on that keeps tables: they are the same as long as the number is.
TEST(LatentCacheTest, TablesThatLoseABlockHaveAnotherNumber) {
  BlockPool pool(30);
  LatentCache cache(2, &pool);
  cache.Open({1});
  cache.Open({2});
  const uint64_t first = cache.tables_id({1});
  EXPECT_NE(first, 0u);
  EXPECT_GT(cache.tables_id({2}), first);
  cache.Grow({1}, 63);
  cache.Grow({1}, 200);
  EXPECT_EQ(cache.tables_id({1}), first) << "entries were only appended";
  cache.Cut({1}, 193);
  EXPECT_EQ(cache.tables_id({1}), first) << "every block is still there";
  cache.Cut({1}, 192);
  const uint64_t cut = cache.tables_id({1});
  EXPECT_GT(cut, cache.tables_id({2}));
  cache.Grow({1}, 193);
  EXPECT_EQ(cache.tables_id({1}), cut);
  cache.Cut({1}, 0);
  const uint64_t emptied = cache.tables_id({1});
  EXPECT_GT(emptied, cut);
  cache.Close({1});
  cache.Open({1});
  EXPECT_GT(cache.tables_id({1}), emptied);
}

TEST(LatentCacheTest, CutGivesBackWhatIsBehind) {
  BlockPool pool(12);
  LatentCache cache(2, &pool);
  cache.Open({7});
  cache.Grow({7}, 300);
  for (const uint32_t length : {257u, 256u, 65u, 64u, 1u, 0u}) {
    cache.Cut({7}, length);
    EXPECT_EQ(cache.length({7}), length);
    EXPECT_EQ(cache.blocks_used(), BlocksOfSequence(length, 2)) << length;
    EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
  }
  EXPECT_EQ(pool.used(), 0u);
}

TEST(LatentCacheTest, CompactMovesWhatIsBehindAndNothingElse) {
  BlockPool pool(6);
  LatentCache cache(1, &pool);
  cache.Open({1});
  cache.Open({2});
  cache.Grow({1}, 64);
  cache.Grow({2}, 64);
  cache.Grow({1}, 192);  // 0, 2, 3
  cache.Grow({2}, 128);  // 1, 4
  cache.Close({1});
  cache.Open({3});
  cache.Grow({3}, 1);  // 0 again
  pool.Narrow(3);
  std::vector<BlockMove> moves;
  cache.Compact(3, &moves);
  ASSERT_EQ(moves.size(), 1u);
  EXPECT_EQ(moves[0].from, 4u);
  EXPECT_EQ(moves[0].to, 2u);
  EXPECT_EQ(cache.PageTables({2})[0], (std::vector<BlockId>{1, 2}));
  EXPECT_EQ(cache.PageTables({3})[0], (std::vector<BlockId>{0}));
  EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
  pool.DropNarrowed();
  EXPECT_EQ(cache.blocks_used(), 3u);
  EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
}

TEST(LatentCacheTest, ALayerIsGivenAndAdopted) {
  BlockPool pool(20);
  LatentCache from(2, &pool);
  from.Open({1});
  from.Open({2});  // without a row
  from.Grow({1}, 130);
  const std::vector<BlockId> second(from.PageTables({1})[1].begin(), from.PageTables({1})[1].end());
  std::map<SequenceId, std::vector<BlockId>> given = from.GiveLayer(1).tables;
  EXPECT_FALSE(from.given(0));
  EXPECT_TRUE(from.given(1));
  EXPECT_EQ(from.blocks_used(), 3u);
  EXPECT_EQ(pool.used(), 6u);
  EXPECT_TRUE(from.CheckIntegrity().ok()) << from.CheckIntegrity();
  ASSERT_EQ(given.size(), 2u);
  EXPECT_EQ(given.at({1}), second);
  EXPECT_TRUE(given.at({2}).empty());

  LatentCache to(1, &pool);
  pool.Give(given.at({1}).back());  // two rows of the third block are not wanted
  given.at({1}).pop_back();
  to.Adopt({1}, 128, {}, {given.at({1})});
  EXPECT_EQ(to.length({1}), 128u);
  EXPECT_EQ(to.blocks_used(), 2u);
  EXPECT_EQ(pool.used(), 5u);
  EXPECT_EQ(to.PageTables({1})[0], absl::MakeConstSpan(second).first(2));
  EXPECT_TRUE(to.CheckIntegrity().ok()) << to.CheckIntegrity();
  from.CloseAll();
  EXPECT_EQ(pool.used(), 2u);
  to.Grow({1}, 129);
  to.Close({1});
  EXPECT_EQ(pool.used(), 0u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
}

// While a step computes it uses blocks that the next one may free already.
TEST(LatentCacheTest, FreedBlocksAreKeptForStepsUnderWay) {
  BlockPool pool(8);
  LatentCache mine(1, &pool), other(1, &pool);
  mine.Open({1});
  mine.Open({2});
  mine.Grow({1}, 128);  // 0 and 1
  mine.Grow({2}, 128);  // 2 and 3
  mine.KeepFreed(StepId{4});
  mine.Close({1});
  mine.KeepFreed(StepId{5});
  mine.Cut({2}, 64);  // 3
  mine.KeepFreed(StepId{});
  EXPECT_EQ(mine.blocks_used(), 1u);
  EXPECT_EQ(mine.blocks_taken(), 4u);
  EXPECT_EQ(pool.used(), 4u);
  EXPECT_TRUE(mine.CheckIntegrity().ok()) << mine.CheckIntegrity();
  // Others get none of them; it has them itself before new ones.
  other.Open({3});
  other.Grow({3}, 64);
  EXPECT_EQ(other.PageTables({3})[0], (std::vector<BlockId>{4}));
  mine.Grow({2}, 128);
  EXPECT_EQ(mine.PageTables({2})[0], (std::vector<BlockId>{2, 3}));
  EXPECT_EQ(mine.blocks_taken(), 4u);
  mine.StepDone(StepId{3});
  EXPECT_EQ(pool.used(), 5u);
  mine.StepDone(StepId{4});
  EXPECT_EQ(pool.used(), 3u);
  EXPECT_EQ(mine.blocks_taken(), 2u);
  EXPECT_TRUE(mine.CheckIntegrity().ok()) << mine.CheckIntegrity();
  other.Grow({3}, 128);
  EXPECT_EQ(other.PageTables({3})[0], (std::vector<BlockId>{4, 0}));
  mine.KeepFreed(StepId{9});
  mine.Close({2});
  std::set<BlockId> blocks;
  mine.ForBlocks([&](BlockId block) { blocks.insert(block); });
  EXPECT_EQ(blocks, (std::set<BlockId>{2, 3}));
}

TEST(LatentCacheTest, ACacheThatEndsGivesItsBlocksBack) {
  BlockPool pool(4);
  {
    LatentCache cache(2, &pool);
    cache.Open({1});
    cache.Grow({1}, 100);
    cache.KeepFreed(StepId{1});
    cache.Cut({1}, 10);
    EXPECT_EQ(pool.used(), 4u);
  }
  EXPECT_EQ(pool.used(), 0u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
}

TEST(LatentCacheTest, DigestIsThatOfIdsAndLengthsByRisingId) {
  BlockPool pool(8);
  LatentCache cache(1, &pool);
  TablesDigest none;
  EXPECT_EQ(cache.Digest(), none.Value());
  cache.Open({9});
  cache.Open({2});
  cache.Grow({9}, 70);
  TablesDigest two;
  two.Add({2}, 0);
  two.Add({9}, 70);
  EXPECT_EQ(cache.Digest(), two.Value());
  cache.Close({2});
  EXPECT_NE(cache.Digest(), two.Value());
}

TEST(LatentCacheDeathTest, ChecksItsCaller) {
  BlockPool pool(2);
  LatentCache cache(1, &pool);
  EXPECT_DEATH(cache.Grow({1}, 1), "not resident");
  EXPECT_DEATH(cache.Close({1}), "not resident");
  EXPECT_DEATH(cache.tables_id({1}), "not resident");
  cache.Open({1});
  EXPECT_DEATH(cache.Open({1}), "resident already");
  cache.Grow({1}, 65);
  EXPECT_DEATH(cache.Grow({1}, 64), "does not shrink");
  EXPECT_DEATH(cache.Cut({1}, 66), "does not lengthen");
  EXPECT_DEATH(cache.Adopt({1}, 0, {}, {{}}), "resident already");
  EXPECT_DEATH(cache.Adopt({2}, 1, {}, {{}}), "other blocks were given");
  cache.GiveLayer(0);
  EXPECT_DEATH(cache.GiveLayer(0), "given once");
}

class LatentCacheFuzzTest : public testing::TestWithParam<uint32_t> {};

TEST_P(LatentCacheFuzzTest, NoBlockIsLostOrOwnedTwice) {
  std::mt19937 rng(GetParam());
  constexpr uint32_t kLayers = 5;
  constexpr uint32_t kBlocks = 400;
  BlockPool pool(kBlocks);
  BlockPool twin_pool(kBlocks);
  LatentCache cache(kLayers, &pool);
  LatentCache twin(kLayers, &twin_pool);
  std::map<uint64_t, uint32_t> lengths;
  uint64_t next_id = 1;
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " step " << i);
    const uint32_t choice = rng() % 10;
    if (choice < 2 || lengths.empty()) {
      cache.Open({next_id});
      twin.Open({next_id});
      lengths[next_id++] = 0;
    } else {
      auto it = lengths.begin();
      std::advance(it, rng() % lengths.size());
      if (choice < 4) {
        cache.Close({it->first});
        twin.Close({it->first});
        lengths.erase(it);
      } else {
        const uint32_t length = it->second + rng() % 200;
        const uint64_t more =
            BlocksOfSequence(length, kLayers) - BlocksOfSequence(it->second, kLayers);
        if (cache.blocks_used() + more > kBlocks) continue;
        cache.Grow({it->first}, length);
        twin.Grow({it->first}, length);
        it->second = length;
      }
    }
    uint64_t expected = 0;
    std::set<BlockId> blocks;
    for (const auto& [id, length] : lengths) {
      expected += BlocksOfSequence(length, kLayers);
      const auto tables = cache.PageTables({id});
      const auto twin_tables = twin.PageTables({id});
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        blocks.insert(tables[layer].begin(), tables[layer].end());
        ASSERT_EQ(tables[layer], twin_tables[layer]);
      }
    }
    ASSERT_EQ(blocks.size(), expected);
    ASSERT_EQ(cache.blocks_used(), expected);
    ASSERT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
  }
  cache.CloseAll();
  EXPECT_EQ(cache.blocks_used(), 0u);
  EXPECT_TRUE(cache.CheckIntegrity().ok());
}

INSTANTIATE_TEST_SUITE_P(Seeds, LatentCacheFuzzTest, testing::Range(1u, 9u));

}  // namespace
}  // namespace strait
