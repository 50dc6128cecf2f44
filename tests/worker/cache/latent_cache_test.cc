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
