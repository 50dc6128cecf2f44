// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a cache row takes in each format, which both sides reckon with; the names of the
// formats, which both sides' --cache-format takes.
#include "proto/model/reservation.h"

#include <gtest/gtest.h>

namespace strait {
namespace {

TEST(ReservationTest, RowsOfV3) {
  EXPECT_EQ(RowBytes(RowFormat::kFp32, 512, 64), 2304u);
  EXPECT_EQ(RowBytes(RowFormat::kBf16, 512, 64), 1152u);
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 512, 64), 656u);  // 512 + 4 * 4 + 64 * 2
  EXPECT_EQ(BlockBytes(RowFormat::kFp8, 512, 64), 656u * 64);
}

TEST(ReservationTest, OddRowsAreRoundedUp) {
  EXPECT_EQ(RowBytes(RowFormat::kFp32, 36, 24), 240u);
  EXPECT_EQ(RowBytes(RowFormat::kBf16, 36, 24), 128u);  // 120
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 36, 24), 112u);   // 36 to 48, 4, 48: 100
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 128, 16), 176u);  // 128 + 4 + 32: 164
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 144, 16), 192u);  // 144 + 8 + 32: 184
}

TEST(ReservationTest, NamesGoBothWays) {
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kFp8}) {
    EXPECT_EQ(RowFormatOf(RowFormatName(format)), format);
  }
  EXPECT_EQ(RowFormatOf("fp8"), RowFormat::kFp8);
  for (const char* name : {"", "fp", "FP8", "fp16"}) EXPECT_EQ(RowFormatOf(name), std::nullopt);
}

}  // namespace
}  // namespace strait
