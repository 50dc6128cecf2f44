// SPDX-License-Identifier: Apache-2.0
//
// Defends: where caches share a pool that becomes larger and smaller, and layers change hands, no block is
// lost or owned twice, and every row is found again.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "worker/cache/latent_cache.h"

namespace strait {
namespace {

// Two caches that share a pool and the layers of a model, as two stages of a worker do; of each block it
// is written down which one it is to its sequence, and that is moved as CacheMemory moves rows.
class SharedPool {
 public:
  static constexpr uint32_t kLayers = 6;

  explicit SharedPool(uint32_t seed) : rng_(seed), pool_(120) { Cut(3); }

  void Step() {
    switch (rng_() % 12) {
      case 0:
      case 1:
        return Open();
      case 2:
        return Close();
      case 3:
        return Shorten();
      case 4:
        return pool_.Grow(std::min(pool_.size() + Below(40), 300u));
      case 5:
        return Shrink();
      case 6:
        return CutAnew();
      default:
        return Grow();
    }
  }

  void CheckAll() const {
    ASSERT_TRUE(pool_.CheckIntegrity().ok()) << pool_.CheckIntegrity();
    uint32_t used = 0;
    for (const Half& half : halves_) {
      ASSERT_TRUE(half.cache->CheckIntegrity().ok()) << half.cache->CheckIntegrity();
      ASSERT_EQ(half.cache->num_sequences(), half.lengths.size());
      uint64_t due = 0;
      for (const auto& [id, length] : half.lengths) {
        ASSERT_EQ(half.cache->length({id}), length);
        due += BlocksOfSequence(length, half.cache->num_layers());
        const auto tables = half.cache->PageTables({id});
        for (uint32_t layer = 0; layer < tables.size(); ++layer) {
          for (uint32_t i = 0; i < tables[layer].size(); ++i) {
            ASSERT_EQ(rows_.at(tables[layer][i]), (Rows{id, half.begin + layer, i}));
          }
        }
      }
      ASSERT_EQ(half.cache->blocks_used(), due);
      used += half.cache->blocks_used();
    }
    ASSERT_EQ(pool_.used(), used);
  }

  void End() {
    for (Half& half : halves_) half.cache.reset();
    EXPECT_EQ(pool_.used(), 0u);
    EXPECT_TRUE(pool_.CheckIntegrity().ok()) << pool_.CheckIntegrity();
  }

 private:
  using Rows = std::array<uint64_t, 3>;  // sequence, layer, which of its blocks there
  struct Half {
    uint32_t begin = 0;
    std::unique_ptr<LatentCache> cache;
    std::map<uint64_t, uint32_t> lengths;
  };

  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(rng_() % end); }
  void Cut(uint32_t at) {
    halves_[0] = {0, std::make_unique<LatentCache>(at, &pool_), {}};
    halves_[1] = {at, std::make_unique<LatentCache>(kLayers - at, &pool_), {}};
  }
  Half& AnyHalf() { return halves_[Below(2)]; }
  std::optional<uint64_t> AnySequence(const Half& half) {
    if (half.lengths.empty()) return std::nullopt;
    return std::next(half.lengths.begin(), Below(static_cast<uint32_t>(half.lengths.size())))
        ->first;
  }
  void Open() {
    for (Half& half : halves_) {
      half.cache->Open({next_id_});
      half.lengths[next_id_] = 0;
    }
    ++next_id_;
  }
  void Close() {
    Half& half = AnyHalf();
    const auto id = AnySequence(half);
    if (!id) return;
    half.cache->Close({*id});
    half.lengths.erase(*id);
  }
  void Shorten() {
    Half& half = AnyHalf();
    const auto id = AnySequence(half);
    if (!id) return;
    half.lengths[*id] -= Below(half.lengths[*id] + 1);
    half.cache->Cut({*id}, half.lengths[*id]);
  }
  void Grow() {
    Half& half = AnyHalf();
    const auto id = AnySequence(half);
    if (!id) return;
    uint32_t& length = half.lengths[*id];
    const uint32_t longer = length + Below(150);
    const uint32_t layers = half.cache->num_layers();
    const uint64_t more = BlocksOfSequence(longer, layers) - BlocksOfSequence(length, layers);
    if (pool_.used() + more > pool_.size()) return;
    length = longer;
    half.cache->Grow({*id}, length);
    const auto tables = half.cache->PageTables({*id});
    for (uint32_t layer = 0; layer < layers; ++layer) {
      for (uint32_t i = 0; i < tables[layer].size(); ++i) {
        rows_[tables[layer][i]] = {*id, half.begin + layer, i};
      }
    }
  }
  void Shrink() {
    const uint32_t end = pool_.used() + Below(pool_.size() - pool_.used() + 1);
    pool_.Narrow(end);
    ASSERT_TRUE(pool_.CheckIntegrity().ok()) << pool_.CheckIntegrity();
    std::vector<BlockMove> moves;
    for (const Half& half : halves_) half.cache->Compact(end, &moves);
    ASSERT_TRUE(pool_.CheckIntegrity().ok()) << pool_.CheckIntegrity();
    pool_.DropNarrowed();
    std::set<BlockId> ends;
    for (const BlockMove& move : moves) {
      ASSERT_GE(move.from, end);
      ASSERT_LT(move.to, end);
      ASSERT_TRUE(ends.insert(move.from).second && ends.insert(move.to).second);
      rows_[move.to] = rows_.at(move.from);
    }
    rows_.erase(rows_.lower_bound(end), rows_.end());
  }
  // Other caches take the layers over, cut elsewhere.
  void CutAnew() {
    std::map<uint64_t, std::vector<std::vector<BlockId>>> tables;  // by global layer
    std::map<uint64_t, std::vector<uint32_t>> lengths;
    std::array<Half, 2> old = std::move(halves_);
    Cut(1 + Below(kLayers - 1));
    for (Half& half : old) {
      for (uint32_t layer = 0; layer < half.cache->num_layers(); ++layer) {
        LatentCache::Layer given = half.cache->GiveLayer(layer);
        for (auto& [id, blocks] : given.tables) {
          auto& of = tables.try_emplace(id.value, kLayers).first->second;
          of[half.begin + layer] = std::move(blocks);
          lengths.try_emplace(id.value, kLayers).first->second[half.begin + layer] =
              half.lengths.at(id.value);
        }
        ASSERT_TRUE(half.cache->CheckIntegrity().ok()) << half.cache->CheckIntegrity();
      }
      ASSERT_EQ(half.cache->blocks_used(), 0u);
    }
    for (auto& [id, of] : tables) {
      for (Half& half : halves_) {
        const auto first = of.begin() + half.begin;
        const auto last = first + half.cache->num_layers();
        const auto length = lengths.at(id).begin() + half.begin;
        const uint32_t least = *std::min_element(length, length + half.cache->num_layers());
        if (Below(8) == 0) {
          for (auto table = first; table != last; ++table) {
            for (const BlockId block : *table) pool_.Give(block);
          }
          continue;
        }
        for (auto table = first; table != last; ++table) {
          for (; table->size() > BlocksPerLayer(least); table->pop_back())
            pool_.Give(table->back());
        }
        half.cache->Adopt({id}, least, {}, {first, last});
        half.lengths[id] = least;
      }
    }
  }

  std::mt19937 rng_;
  BlockPool pool_;
  std::array<Half, 2> halves_;
  std::map<BlockId, Rows> rows_;
  uint64_t next_id_ = 1;
};

class SharedPoolFuzzTest : public testing::TestWithParam<uint32_t> {};

TEST_P(SharedPoolFuzzTest, NoRowIsLostWhateverBecomesOfThePool) {
  SharedPool shared(GetParam());
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " step " << i);
    shared.Step();
    shared.CheckAll();
    if (testing::Test::HasFatalFailure()) return;
  }
  shared.End();
}

INSTANTIATE_TEST_SUITE_P(Seeds, SharedPoolFuzzTest, testing::Range(1u, 9u));

}  // namespace
}  // namespace strait
