// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a sequence holds under tiers is what its blocks add up to, block by block and point by
// point; what is reserved for it is the most that it holds on its way; the exact policy knows nothing of it.
#include "proto/model/cache_tiers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "proto/model/reservation.h"

namespace strait {
namespace {

using testing::HasSubstr;

CacheTiers::Spec V3Spec() {
  CacheTiers::Spec spec;
  spec.rope = 64;
  spec.young = {RowFormat::kBf16, 512};
  // 8 + 1 + 16 grains; nothing; 8 + 1 + 8 grains.
  spec.old = {{RowFormat::kFp8, 256}, {RowFormat::kFp8, 0}, {RowFormat::kInt4, 256}};
  spec.sink_rows = 64;
  spec.young_rows = 256;
  spec.interval_rows = 1024;
  return spec;
}

// By the words of the header alone: goes through all points, and through all blocks of each layer.
uint64_t HeldByBlocks(const CacheTiers::Spec& spec, uint32_t length, LayerRange layers) {
  uint64_t bytes = 0;
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
    for (uint32_t begin = 0; begin < length; begin += 64) {
      bool old = false;
      for (uint32_t point = spec.interval_rows; point < length; point += spec.interval_rows) {
        old |= begin >= spec.sink_rows && begin + 64 + spec.young_rows <= point;
      }
      const BlockShape& shape = old ? spec.old[layer] : spec.young;
      if (shape.rank > 0) bytes += UnitBlockBytes(shape, spec.rope);
    }
  }
  return bytes;
}

TEST(CacheTiersTest, BytesByHand) {
  const CacheTiers tiers = CacheTiers::Create(V3Spec()).value();
  const CachePolicy policy{.tiers = &tiers};
  const LayerRange first{0, 1}, second{1, 2}, third{2, 3}, all{0, 3};
  constexpr uint64_t kYoung = 73'728, kFp8 = 25'600, kInt4 = 17'408;
  for (const auto& [length, blocks] :
       {std::pair(0u, 0u), {1u, 1u}, {63u, 1u}, {64u, 1u}, {65u, 2u}, {1000u, 16u}, {1024u, 16u}}) {
    EXPECT_EQ(HeldBytes(policy, length, second), blocks * kYoung) << length;
    EXPECT_EQ(HeldBytes(policy, length, all), 3 * blocks * kYoung) << length;
    EXPECT_EQ(ReservedBytes(policy, length, all), 3 * blocks * kYoung) << length;
  }
  // Row 1,024 is there: rows 64 to 767 are old.
  EXPECT_EQ(HeldBytes(policy, 1025, first), 6 * kYoung + 11 * kFp8);
  EXPECT_EQ(HeldBytes(policy, 1025, second), 6 * kYoung);
  EXPECT_EQ(HeldBytes(policy, 1025, third), 6 * kYoung + 11 * kInt4);
  EXPECT_EQ(ReservedBytes(policy, 1025, first), 16 * kYoung);
  // 125 blocks; at 7,168 rows 64 to 6,911 became old.
  EXPECT_EQ(HeldBytes(policy, 8000, first), 18 * kYoung + 107 * kFp8);
  EXPECT_EQ(HeldBytes(policy, 8000, second), 18 * kYoung);
  EXPECT_EQ(HeldBytes(policy, 8000, all), 54 * kYoung + 107 * (kFp8 + kInt4));
  // At 7,168 itself: 112 blocks, 91 of them old.
  EXPECT_EQ(ReservedBytes(policy, 8000, first),
            std::max(18 * kYoung + 107 * kFp8, 21 * kYoung + 91 * kFp8));
  EXPECT_EQ(ReservedBytes(policy, 8000, second), 21 * kYoung);
  // All together have grown beyond what they held there: 63 young blocks and 91 of each old kind.
  EXPECT_EQ(ReservedBytes(policy, 8000, all), HeldBytes(policy, 8000, all));
  EXPECT_EQ(HeldBytes(policy, 7168, all), 63 * kYoung + 91 * (kFp8 + kInt4));
  EXPECT_EQ(ReservedBytes(policy, 7169, all), 63 * kYoung + 91 * (kFp8 + kInt4));
}

TEST(CacheTiersTest, HeldAndReservedAreThoseOfTheBlocks) {
  constexpr uint32_t kSeed = 3;
  std::mt19937 random(kSeed);
  const auto up_to = [&](uint32_t most) { return static_cast<uint32_t>(random() % (most + 1)); };
  for (int i = 0; i < 60; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << kSeed << " case " << i);
    CacheTiers::Spec spec;
    spec.rope = i % 2 == 0 ? 64 : 16;
    spec.young = {static_cast<RowFormat>(up_to(2)), 16 * (1 + up_to(31))};
    spec.sink_rows = 64 * up_to(3);
    spec.young_rows = 64 * (1 + up_to(8));
    spec.interval_rows = 64 * (1 + up_to(9));
    const uint32_t num_layers = 1 + up_to(5);
    for (uint32_t l = 0; l < num_layers; ++l) {
      // Old blocks may be larger than young ones: nobody would, but the sums are right.
      spec.old.push_back({static_cast<RowFormat>(up_to(3)), up_to(spec.young.rank / 16) * 16});
    }
    const CacheTiers tiers = CacheTiers::Create(spec).value();
    const CachePolicy policy{.tiers = &tiers};
    const LayerIndex begin = up_to(num_layers - 1);
    const LayerRange layers{begin, begin + 1 + up_to(num_layers - begin - 1)};
    uint64_t most = 0;
    for (uint32_t length = 0; length <= 2500; ++length) {
      const uint64_t held = HeldBytes(policy, length, layers);
      if (length % 64 <= 2 || length % 64 == 63) {
        ASSERT_EQ(held, HeldByBlocks(spec, length, layers)) << length;
      }
      most = std::max(most, held);
      ASSERT_EQ(ReservedBytes(policy, length, layers), most) << length;
      if (CostTheSame(policy, length, length + 1)) {
        ASSERT_EQ(HeldBytes(policy, length + 1, layers), held) << length;
        ASSERT_EQ(ReservedBytes(policy, length + 1, layers), most) << length;
      }
    }
    for (int n = 0; n < 20; ++n) {
      const uint64_t bytes = random() % (most + 1);
      const auto rows = static_cast<uint32_t>(RowsThatFit(policy, bytes, layers));
      ASSERT_EQ(rows % 64, 0u);
      ASSERT_LE(ReservedBytes(policy, rows, layers), bytes);
      if (rows < limits::kMaxPositionEmbeddings) {
        ASSERT_GT(ReservedBytes(policy, rows + 1, layers), bytes);
      }
    }
  }
}

// A window in every layer holds no more after its first points, however long it gets.
TEST(CacheTiersTest, WindowsFitForever) {
  CacheTiers::Spec spec = V3Spec();
  spec.old.assign(3, {RowFormat::kBf16, 0});
  const CacheTiers tiers = CacheTiers::Create(spec).value();
  const CachePolicy policy{.tiers = &tiers};
  const uint64_t most = ReservedBytes(policy, 100'000, {0, 3});
  EXPECT_EQ(most, 3u * (1 + 4 + 16) * 73'728);
  EXPECT_EQ(RowsThatFit(policy, most, {0, 3}), limits::kMaxPositionEmbeddings);
  EXPECT_LT(RowsThatFit(policy, most - 1, {0, 3}), 2048u);
}

TEST(CacheTiersTest, WrongTiersAreRefusedByTheirField) {
  const std::vector<std::pair<const char*, std::function<void(CacheTiers::Spec*)>>> wrong = {
      {"rope is 24", [](auto* s) { s->rope = 24; }},
      {"the young rank is 0", [](auto* s) { s->young.rank = 0; }},
      {"the young rank is 8193", [](auto* s) { s->young.rank = 8193; }},
      {"the young format is 3", [](auto* s) { s->young.format = RowFormat::kInt4; }},
      {"the number of layers is 0", [](auto* s) { s->old.clear(); }},
      {"the number of layers is 1025", [](auto* s) { s->old.resize(1025); }},
      {"the old rank of layer 2 is 528", [](auto* s) { s->old[2].rank = 528; }},
      {"the old format of layer 1 is 4",
       [](auto* s) { s->old[1].format = static_cast<RowFormat>(4); }},
      {"sink_rows is 32", [](auto* s) { s->sink_rows = 32; }},
      {"young_rows is 0", [](auto* s) { s->young_rows = 0; }},
      {"interval_rows is 0", [](auto* s) { s->interval_rows = 0; }},
      {"interval_rows is 1000", [](auto* s) { s->interval_rows = 1000; }},
      {"interval_rows is 4194368", [](auto* s) { s->interval_rows = (1u << 22) + 64; }},
  };
  for (const auto& [message, spoil] : wrong) {
    CacheTiers::Spec spec = V3Spec();
    spoil(&spec);
    const absl::Status status = CacheTiers::Create(spec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

}  // namespace
}  // namespace strait
