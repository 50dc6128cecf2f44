// SPDX-License-Identifier: Apache-2.0
//
// Defends: attention of tiles of 17 to 32 (token, head) rows over fp8 cache rows, whose codes are widened
// in registers, is its float64 twin's: 17 to 32 heads, several tokens a tile, lengths about a block,
// stretches of odd and of no length, split or not, scales and queries far apart; unused rows hold NaN,
// ends of page tables wild ids. What the kernel does not take goes to the other.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/kernels/cuda/attention/mla_fp8_test.h"

namespace strait::cuda {
namespace {

using mla_test::Case;
using mla_test::Shape;
using mla_test::Tokens;

class MlaCodesTest : public mla_test::MlaFp8Test {
 protected:
  static Shape Of(int32_t heads) {
    return {.heads = heads, .format = RowFormat::kFp8, .tile_rows = kMlaHalfTileRows};
  }
  // Products are exact, sums fp32 or, of 128 codes, good to 2^-13. q is the sum of two codes, at most 2^-9
  // off, 5e-4 in the mean square; scales, codes times scales and weights are halves, 2e-4 each: 6e-4 to 8e-4
  // of the output as measured. bf16 outputs add their own rounding, 1.7e-3.
  double Tolerance(const Shape& shape) const override { return shape.out_fp32 ? 1.5e-3 : 3e-3; }
};

TEST_F(MlaCodesTest, LengthsAboutABlock) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(32);
  shape.out_fp32 = true;
  Check(shape, {{1, 0}, {1, 62}, {1, 63}, {1, 64}, {1, 999}, {1, 127}, {1, 9, true}}, 2);
}

TEST_F(MlaCodesTest, AllHeadCounts) {
  STRAIT_TRACE_SEED();
  for (int32_t heads = 17; heads <= 32; heads += 3) {
    Shape shape = Of(heads);
    shape.out_fp32 = heads % 2 == 0;
    Check(shape, {{1, Pick(0, 300)}, {1, Pick(0, 300)}, {1, Pick(64, 130)}}, Pick(1, 6));
  }
}

TEST_F(MlaCodesTest, SeveralTokensATile) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(8);
  shape.out_fp32 = true;
  Check(shape, {{4, 61}, {3, 0}, {1, 300}, {4, 124}}, 3);
  Check(Of(16), {{2, 62}, {2, 126}}, 2);
}

TEST_F(MlaCodesTest, LongSequencesAreSplitAndMerged) {
  STRAIT_TRACE_SEED();
  Check(Of(32), {{1, 3000 + Pick(0, 64)}, {1, Pick(0, 700)}}, 7);
  Check(Of(32), {{1, 2600 + Pick(0, 64)}}, 1);
}

// Many turns of the stages in one stretch, then stretches that begin at any stage, turn and group.
TEST_F(MlaCodesTest, StretchesBeginAtAnyStage) {
  STRAIT_TRACE_SEED();
  for (int round = 0; round < 3; ++round) {
    Check(Of(32), {{1, 64 * Pick(3, 8)}, {1, 5, true}, {1, 64 * 5}, {1, 7}, {1, 8}}, 1);
  }
}

// A half has 30 powers of two for codes times scales.
TEST_F(MlaCodesTest, ScalesFarApart) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(32);
  shape.scale_spread = 1e3f;
  shape.out_fp32 = true;
  Check(shape, {{1, 700}, {1, 70}}, 2);
}

// Codes would lose or overflow such numbers as they are.
TEST_F(MlaCodesTest, QueriesOfAnySize) {
  STRAIT_TRACE_SEED();
  for (const float by : {0x1p-40f, 0x1p20f}) {
    Shape shape = Of(32);
    shape.query_factor = by;
    shape.out_fp32 = true;
    Check(shape, {{1, 200}}, 1);
  }
}

// More rows than stated: several passes.
TEST_F(MlaCodesTest, TilesOfMoreRows) {
  STRAIT_TRACE_SEED();
  Check(Of(48), {{1, 300}, {1, 130}}, 2);
  Check(Of(16), {{4, 200}, {3, 61}}, 3);
}

TEST_F(MlaCodesTest, BlocksThatSayTheirPositions) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(10);
  shape.positions = true;
  shape.out_fp32 = true;
  Check(shape, {{3, 496}, {1, 1999}}, 4);
}

// It rounds elsewhere: that shows which kernel ran.
TEST_F(MlaCodesTest, OnlyFp8RowsWithoutBlocksOwnSumsTakeIt) {
  STRAIT_TRACE_SEED();
  const auto is_hint_taken = [&](Shape shape) {
    Case c(rng_, shape, {{1, 300}, {1, 64}});
    const Case::Result codes = c.Run(3);
    c.Expect(codes);
    c.shape().tile_rows = kMlaTileRows;
    return !kernel_test::SameBits(codes.out, c.Run(3).out);
  };
  EXPECT_TRUE(is_hint_taken(Of(32)));
  Shape shape = Of(32);
  shape.block_lse = true;
  EXPECT_FALSE(is_hint_taken(shape));
  shape = Of(32);
  shape.format = RowFormat::kBf16;
  EXPECT_FALSE(is_hint_taken(shape));
  shape = Of(32);
  shape.tile_rows = kMlaHalfTileRows + 1;
  EXPECT_FALSE(is_hint_taken(shape));
}

}  // namespace
}  // namespace strait::cuda
