// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a sequence takes in a range of layers, which both sides reckon with; the names of the
// row formats, which both sides' --cache-format takes.
#include "proto/model/reservation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

namespace strait {
namespace {

TEST(ReservationTest, ASequenceHoldsWholeBlocksInEveryLayer) {
  constexpr CachePolicy policy = ExactPolicy(RowFormat::kBf16, 512, 64);
  static_assert(policy.block_bytes == 73'728);
  constexpr LayerRange layers{10, 25};
  EXPECT_EQ(HeldBytes(policy, 0, layers), 0u);
  for (const auto& [length, blocks] :
       {std::pair(1u, 1u), {63u, 1u}, {64u, 1u}, {65u, 2u}, {1000u, 16u}, {8000u, 125u}}) {
    EXPECT_EQ(HeldBytes(policy, length, layers), uint64_t{blocks} * 15 * 73'728) << length;
  }
}

TEST(ReservationTest, ReservedIsTheMostThatIsHeldOnTheWay) {
  constexpr CachePolicy policy{1000};
  constexpr LayerRange layers{0, 3};
  uint64_t most = 0;
  for (uint32_t length = 0; length <= 300; ++length) {
    most = std::max(most, HeldBytes(policy, length, layers));
    EXPECT_EQ(ReservedBytes(policy, length, layers), most);
    EXPECT_EQ(CostTheSame(policy, length, length + 1),
              HeldBytes(policy, length, layers) == HeldBytes(policy, length + 1, layers));
  }
  for (const uint64_t bytes : {0u, 2'999u, 3'000u, 5'999u, 6'000u, 100'000u}) {
    const auto rows = static_cast<uint32_t>(RowsThatFit(policy, bytes, layers));
    EXPECT_LE(ReservedBytes(policy, rows, layers), bytes);
    EXPECT_GT(ReservedBytes(policy, rows + 1, layers), bytes);
  }
}

TEST(ReservationTest, NamesGoBothWays) {
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kFp8}) {
    EXPECT_EQ(RowFormatOf(RowFormatName(format)), format);
  }
  EXPECT_EQ(RowFormatOf("fp8"), RowFormat::kFp8);
  for (const char* name : {"", "fp", "FP8", "fp16"}) EXPECT_EQ(RowFormatOf(name), std::nullopt);
  // Named, but not offered.
  EXPECT_STREQ(RowFormatName(RowFormat::kInt4), "int4");
  EXPECT_EQ(RowFormatOf("int4"), std::nullopt);
}

}  // namespace
}  // namespace strait
