// SPDX-License-Identifier: Apache-2.0
//
// Defends: a prefix block is held once however many sequences have it, nobody loses it while one has, and it moves,
// is given and adopted as one block of each layer.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "worker/cache/latent_cache.h"

namespace strait {
namespace {

constexpr ContentKey kA{.low = 1, .high = 9}, kB{.low = 2, .high = 9}, kC{.low = 3, .high = 9};

// Two layers; sequence 1 has 130 rows, the first two blocks are prefix blocks.
class LatentPrefixTest : public testing::Test {
 protected:
  LatentPrefixTest() {
    cache_.Open({1});
    cache_.Grow({1}, 130);
    cache_.KeepPrefix({1}, kA);
    cache_.KeepPrefix({1}, kB);
  }
  ~LatentPrefixTest() override { Sound(cache_); }
  static void Sound(const LatentCache& cache) {
    EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
  }
  static std::vector<BlockId> Table(const LatentCache& cache, uint64_t id, uint32_t layer) {
    const auto table = cache.PageTables({id})[layer];
    return {table.begin(), table.end()};
  }
  BlockPool pool_{40};
  LatentCache cache_{2, &pool_};
};

TEST_F(LatentPrefixTest, KeepingChangesNoTableAndNoCount) {
  EXPECT_EQ(cache_.blocks_used(), 6u);
  EXPECT_EQ(Table(cache_, 1, 0), (std::vector<BlockId>{0, 1, 2}));
  EXPECT_EQ(cache_.num_prefixes(), 2u);
  EXPECT_EQ(cache_.prefix({1}).size(), 2u);
  const uint64_t tables_id = cache_.tables_id({1});
  cache_.Grow({1}, 192);
  cache_.KeepPrefix({1}, kC);
  EXPECT_EQ(cache_.tables_id({1}), tables_id);
}

TEST_F(LatentPrefixTest, SequencesBeginWithThemAndHaveTheRestThemselves) {
  const std::vector<ContentKey> prefix = {kA, kB};
  cache_.Open({2}, prefix);
  EXPECT_EQ(cache_.length({2}), 128u);
  EXPECT_EQ(cache_.blocks_used(), 6u);
  cache_.Grow({2}, 140);
  EXPECT_EQ(cache_.blocks_used(), 8u);
  EXPECT_EQ(Table(cache_, 2, 1)[1], Table(cache_, 1, 1)[1]);
  EXPECT_NE(Table(cache_, 2, 1)[2], Table(cache_, 1, 1)[2]);
  Sound(cache_);
  std::map<BlockId, int> visits;
  cache_.ForBlocks([&](BlockId block) { ++visits[block]; });
  EXPECT_EQ(visits.size(), 8u);
  for (const auto& [block, times] : visits) EXPECT_EQ(times, 1) << block;
  cache_.Close({1});
  EXPECT_EQ(cache_.blocks_used(), 6u);
  Sound(cache_);
  cache_.Close({2});
  EXPECT_EQ(cache_.blocks_used(), 4u) << "they stay";
  cache_.DropPrefix(kB);
  EXPECT_EQ(cache_.blocks_used(), 2u);
  EXPECT_FALSE(cache_.has_prefix(kB));
  cache_.DropUnheldPrefixes();
  EXPECT_EQ(pool_.used(), 0u);
}

TEST_F(LatentPrefixTest, DroppingThoseThatNobodyHasLeavesTheOthers) {
  cache_.Open({2}, std::vector<ContentKey>{kA});
  cache_.Close({1});
  cache_.DropUnheldPrefixes();
  EXPECT_TRUE(cache_.has_prefix(kA));
  EXPECT_FALSE(cache_.has_prefix(kB));
  EXPECT_EQ(cache_.blocks_used(), 2u);
}

TEST_F(LatentPrefixTest, ACutLeavesThemToOthers) {
  cache_.Open({2}, std::vector<ContentKey>{kA, kB});
  const uint64_t tables_id = cache_.tables_id({1});
  cache_.Cut({1}, 129);
  EXPECT_EQ(cache_.prefix({1}).size(), 2u);
  EXPECT_EQ(cache_.tables_id({1}), tables_id) << "no block went";
  cache_.Cut({1}, 64);
  EXPECT_NE(cache_.tables_id({1}), tables_id);
  EXPECT_EQ(cache_.prefix({1}).size(), 1u);
  EXPECT_EQ(cache_.blocks_used(), 4u);
  Sound(cache_);
  // Its next rows are its own.
  cache_.Grow({1}, 128);
  EXPECT_NE(Table(cache_, 1, 0)[1], Table(cache_, 2, 0)[1]);
  cache_.Cut({2}, 0);
  EXPECT_TRUE(cache_.has_prefix(kB)) << "until it is dropped";
}

TEST_F(LatentPrefixTest, FreedWhileAStepComputesTheyAreKept) {
  cache_.KeepFreed(StepId{3});
  cache_.Close({1});
  cache_.DropUnheldPrefixes();
  cache_.KeepFreed(StepId{});
  EXPECT_EQ(cache_.blocks_used(), 0u);
  EXPECT_EQ(cache_.blocks_taken(), 6u);
  Sound(cache_);
  cache_.StepDone(StepId{3});
  EXPECT_EQ(pool_.used(), 0u);
}

TEST_F(LatentPrefixTest, TheyAreMovedOnceAndAllTablesFollow) {
  LatentCache late(2, &pool_);
  late.Open({1});
  late.Grow({1}, 128);
  late.KeepPrefix({1}, kA);
  late.KeepPrefix({1}, kB);
  late.Open({2}, std::vector<ContentKey>{kA, kB});
  late.Grow({2}, 130);
  cache_.CloseAll();
  const uint64_t tables_id = late.tables_id({2});
  pool_.Narrow(8);
  std::vector<BlockMove> moves;
  late.Compact(8, &moves);
  EXPECT_EQ(moves.size(), 4u);
  pool_.DropNarrowed();
  EXPECT_NE(late.tables_id({2}), tables_id);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(Table(late, 1, layer)[0], Table(late, 2, layer)[0]);
    EXPECT_EQ(Table(late, 1, layer)[1], Table(late, 2, layer)[1]);
  }
  Sound(late);
  late.CloseAll();
}

// What was given belongs to another cache, which moves it itself.
TEST_F(LatentPrefixTest, WhatWasGivenIsNotMoved) {
  cache_.Open({2}, std::vector<ContentKey>{kA, kB});
  LatentCache::Layer given = cache_.GiveLayer(0);
  ASSERT_EQ(given.prefixes.size(), 2u);
  EXPECT_EQ(given.prefixes.at(kB), given.tables.at({2})[1]);
  Sound(cache_);
  for (const auto& [key, block] : given.prefixes) pool_.Give(block);
  pool_.Give(given.tables.at({1})[2]);
  std::vector<BlockMove> moves;
  pool_.Narrow(3);
  cache_.Compact(3, &moves);
  EXPECT_EQ(moves.size(), 3u);
  EXPECT_EQ(pool_.used(), 3u);
  pool_.DropNarrowed();
  Sound(cache_);
}

TEST_F(LatentPrefixTest, ASuccessorAdoptsThem) {
  cache_.Open({2}, std::vector<ContentKey>{kA, kB});
  cache_.Grow({2}, 129);
  LatentCache to(1, &pool_);
  LatentCache::Layer given = cache_.GiveLayer(1);
  EXPECT_EQ(cache_.blocks_used(), 4u) << "of the other layer";
  for (const ContentKey& key : {kA, kB}) to.AdoptPrefix(key, {given.prefixes.at(key)});
  for (const uint64_t id : {1, 2}) {
    to.Adopt({id}, 129, std::vector<ContentKey>{kA, kB}, {{given.tables.at({id})[2]}});
  }
  EXPECT_EQ(to.blocks_used(), 4u);
  EXPECT_EQ(to.length({2}), 129u);
  EXPECT_EQ(Table(to, 1, 0), given.tables.at({1}));
  Sound(to);
  Sound(cache_);
  cache_.CloseAll();
  EXPECT_EQ(pool_.used(), 4u);
  to.CloseAll();
  EXPECT_EQ(pool_.used(), 0u);
}

using LatentPrefixDeathTest = LatentPrefixTest;

TEST_F(LatentPrefixDeathTest, ChecksItsCaller) {
  EXPECT_DEATH(cache_.KeepPrefix({1}, kC), "not full");
  EXPECT_DEATH(cache_.Open({2}, std::vector<ContentKey>{kC}), "not here");
  EXPECT_DEATH(cache_.DropPrefix(kA), "a sequence has the block");
  EXPECT_DEATH(cache_.DropPrefix(kC), "a sequence has the block");
  EXPECT_DEATH(cache_.Cut({1}, 127), "would be written");
  EXPECT_DEATH(cache_.AdoptPrefix(kA, {7, 8}), "taken");
  cache_.Open({2});
  cache_.Grow({2}, 64);
  EXPECT_DEATH(cache_.KeepPrefix({2}, kA), "taken");
}

class LatentPrefixFuzzTest : public testing::TestWithParam<uint32_t> {};

TEST_P(LatentPrefixFuzzTest, NoBlockIsLostOrOwnedTwice) {
  std::mt19937 rng(GetParam());
  const auto below = [&](uint32_t end) { return static_cast<uint32_t>(rng() % end); };
  BlockPool pool(300);
  {
    LatentCache cache(3, &pool);
    std::map<uint64_t, uint32_t> lengths;
    std::vector<std::vector<ContentKey>> paths = {{}};  // every sequence's, and those of ended ones
    uint64_t next_id = 1, next_key = 1;
    for (int step = 0; step < 400; ++step) {
      const auto any = [&] {
        auto it = lengths.begin();
        std::advance(it, below(static_cast<uint32_t>(lengths.size())));
        return it;
      };
      const uint32_t what = below(6);
      if (what == 0 && lengths.size() < 8) {
        std::vector<ContentKey> prefix = paths[below(static_cast<uint32_t>(paths.size()))];
        const auto gone = std::find_if(prefix.begin(), prefix.end(), [&](const ContentKey& key) {
          return !cache.has_prefix(key);
        });
        prefix.erase(gone, prefix.end());
        cache.Open({next_id}, prefix);
        lengths[next_id++] = static_cast<uint32_t>(prefix.size()) * 64;
      } else if (lengths.empty()) {
        continue;
      } else if (what == 1 && pool.size() - pool.used() > 20) {
        const auto it = any();
        it->second += below(300);
        if (BlocksPerLayer(it->second) * 3 > 40) it->second = cache.length({it->first});
        cache.Grow({it->first}, it->second);
      } else if (what == 2) {
        const auto it = any();
        const size_t kept = cache.prefix({it->first}).size();
        if ((kept + 1) * 64 > it->second) continue;
        cache.KeepPrefix({it->first}, ContentKey{.low = next_key++, .high = 1});
        const auto prefix = cache.prefix({it->first});
        paths.emplace_back(prefix.begin(), prefix.end());
      } else if (what == 3) {
        const auto it = any();
        const auto kept = static_cast<uint32_t>(cache.prefix({it->first}).size());
        uint32_t to = below(it->second + 1);
        if (to < kept * 64) to -= to % 64;
        cache.Cut({it->first}, to);
        it->second = to;
      } else if (what == 4) {
        const auto it = any();
        cache.Close({it->first});
        lengths.erase(it);
      } else if (below(10) == 0) {
        cache.DropUnheldPrefixes();
      }
      ASSERT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
      ASSERT_EQ(pool.used(), cache.blocks_used());
      for (const auto& [id, length] : lengths) ASSERT_EQ(cache.length({id}), length);
    }
  }
  EXPECT_EQ(pool.used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, LatentPrefixFuzzTest, testing::Range(0u, 20u));

}  // namespace
}  // namespace strait
