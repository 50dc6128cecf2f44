// SPDX-License-Identifier: Apache-2.0
//
// Defends: attention of few (token, head) rows over fp8 cache rows is its float64 twin's: 1 to 16 heads,
// lengths about a block, stretches of odd and of no length, split or not, scales far apart; unused rows
// hold NaN, ends of page tables wild ids. Deterministic results are those of the sequence alone. Copies
// that overtake each other, in the emulator: any order. What the kernel does not take goes to the other.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/kernels/cuda/attention/mla_fp8_test.h"

namespace strait::cuda {
namespace {

using mla_test::Case;
using mla_test::Shape;
using mla_test::Tokens;

class MlaFewRowsTest : public mla_test::MlaFp8Test {
 protected:
  static Shape Of(int32_t heads) {
    return {.heads = heads, .format = RowFormat::kFp8, .tile_rows = kMlaFewRows};
  }
  // Codes and q are exact, products fp32. Weights and scales are halves, and so is their product: each
  // at most 2^-11 off, independently, 3e-4 as measured. bf16 outputs add their own rounding, 1.7e-3.
  double Tolerance(const Shape& shape) const override { return shape.out_fp32 ? 5e-4 : 2.5e-3; }
};

TEST_F(MlaFewRowsTest, LengthsAboutABlock) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(16);
  shape.out_fp32 = true;
  Check(shape, {{1, 0}, {1, 62}, {1, 63}, {1, 64}, {1, 999}, {1, 127}, {1, 9, true}}, 2);
}

TEST_F(MlaFewRowsTest, AllHeadCounts) {
  STRAIT_TRACE_SEED();
  for (int32_t heads = 1; heads <= 16; ++heads) {
    Shape shape = Of(heads);
    shape.out_fp32 = heads % 2 == 0;
    Check(shape, {{1, Pick(0, 300)}, {16 / heads, Pick(0, 300)}, {1, Pick(64, 130)}}, Pick(1, 6));
  }
}

TEST_F(MlaFewRowsTest, LongSequencesAreSplitAndMerged) {
  STRAIT_TRACE_SEED();
  Check(Of(16), {{1, 5000 + Pick(0, 64)}, {1, Pick(0, 700)}}, 7);
  Check(Of(16), {{1, 2600 + Pick(0, 64)}}, 1);
  Check(Of(8), {{1, 20000 + Pick(0, 64)}});
}

// Many turns of the stages in one stretch, then stretches that begin at any stage.
TEST_F(MlaFewRowsTest, GroupsDoNotTakeEachOthersBlocks) {
  STRAIT_TRACE_SEED();
  Check(Of(16), {{1, 64 * 40 + Pick(0, 63)}}, 1);
  for (int round = 0; round < 4; ++round) {
    Check(Of(16), {{1, 64 * Pick(4, 8)}, {1, 64 * Pick(4, 8)}, {1, 64 * 5}, {1, 7}}, 1);
  }
}

// A half has 30 powers of two for weights times scales.
TEST_F(MlaFewRowsTest, ScalesFarApart) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(16);
  shape.scale_spread = 1e3f;
  shape.out_fp32 = true;
  Check(shape, {{1, 700}, {1, 70}}, 2);
}

// More rows than stated: several passes.
TEST_F(MlaFewRowsTest, TilesOfMoreRows) {
  STRAIT_TRACE_SEED();
  Check(Of(16), {{3, 300}, {20, 40}, {1, 130}}, 5);
  Check(Of(5), {{4, 61}, {13, 0}}, 2);
}

TEST_F(MlaFewRowsTest, BlocksThatSayTheirPositions) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(4);
  shape.positions = true;
  shape.out_fp32 = true;
  Check(shape, {{4, 496}, {1, 1999}});
}

TEST_F(MlaFewRowsTest, DeterministicResultsAreThoseOfTheSequenceAlone) {
  STRAIT_TRACE_SEED();
  for (const int32_t heads : {16, 6}) {
    Shape shape = Of(heads);
    shape.deterministic = true;
    shape.out_fp32 = true;
    const Case batch(rng_, shape, {{1, Pick(0, 2000)}, {1, 1023}, {1, Pick(2000, 3000)}, {1, 0}});
    const Case::Result together = batch.Run();
    batch.Expect(together, Tolerance(shape));
    size_t at = 0;
    for (size_t s = 0; s < 4; ++s) {
      const Case::Result alone = batch.Alone(s).Run(Pick(2, 132));
      const std::vector<float> part(
          together.out.begin() + static_cast<int64_t>(at),
          together.out.begin() + static_cast<int64_t>(at + alone.out.size()));
      EXPECT_TRUE(kernel_test::SameBits(part, alone.out)) << "sequence " << s;
      at += alone.out.size();
    }
  }
}

// It rounds elsewhere: that shows which kernel ran.
TEST_F(MlaFewRowsTest, OnlyFp8RowsWithoutBlocksOwnSumsTakeIt) {
  STRAIT_TRACE_SEED();
  const auto is_hint_taken = [&](Shape shape) {
    Case c(rng_, shape, {{1, 300}, {1, 64}});
    const Case::Result few = c.Run(3);
    c.Expect(few);
    c.shape().tile_rows = kMlaTileRows;
    return !kernel_test::SameBits(few.out, c.Run(3).out);
  };
  EXPECT_TRUE(is_hint_taken(Of(16)));
  Shape shape = Of(16);
  shape.block_lse = true;
  EXPECT_FALSE(is_hint_taken(shape));
  shape = Of(16);
  shape.format = RowFormat::kBf16;
  EXPECT_FALSE(is_hint_taken(shape));
  shape = Of(16);
  shape.path = MlaPath::kPortable;
  EXPECT_FALSE(is_hint_taken(shape));
}

}  // namespace
}  // namespace strait::cuda
