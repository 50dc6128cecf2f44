// SPDX-License-Identifier: Apache-2.0
//
// Defends: attention of few (token, head) rows over fp8 and bf16 cache rows is its float64 twin's, in every
// variant: 1 to 16 heads, lengths about a block, stretches of odd and of no length, split or not,
// scales far apart; unused rows hold NaN, ends of page tables wild ids. Deterministic results are those
// of the sequence alone. Copies that overtake each other, in the emulator: any order.
#include "kernels/cuda/attention/mla_few_rows.h"

#include <gtest/gtest.h>

#include <iterator>
#include <string>
#include <vector>

#include "tests/kernels/cuda/attention/mla_case.h"

namespace strait::cuda {
namespace {

using mla_test::Case;
using mla_test::Shape;
using mla_test::Tokens;

constexpr int32_t kVariants = std::size(kMlaFewRowsVariants);

// Codes and q are exact, products fp32. Weights and scales are halves, and so is their product: each
// at most 2^-11 off, independently, 3e-4 as measured. bf16 outputs add their own rounding, 1.7e-3. Of
// bf16 rows weights are bf16: what all other kernels are allowed.
double Tolerance(const Shape& shape) {
  if (shape.format == RowFormat::kBf16) return mla_test::kTolerance;
  return shape.out_fp32 ? 5e-4 : 2.5e-3;
}

class MlaFewRowsTest : public gpu_test::GpuTest {
 public:
  static std::vector<int32_t> AllVariants() {
    return Variants([](const MlaFewRowsVariant&) { return true; });
  }

 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    int major = 0;
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    if (major != 9) GTEST_SKIP() << "a kernel of the Hopper path";
  }
  static Shape Of(int32_t heads, int32_t variant = 0) {
    Shape shape{.heads = heads, .format = kMlaFewRowsVariants[variant].format, .few_rows = true};
    shape.variant = variant;
    return shape;
  }
  // Those that give results; whether `also` holds of them too.
  template <class Also>
  static std::vector<int32_t> Variants(const Also& also) {
    std::vector<int32_t> variants;
    for (int32_t i = 0; i < kVariants; ++i) {
      const MlaFewRowsVariant& variant = kMlaFewRowsVariants[i];
      if (!variant.copies_only && also(variant)) variants.push_back(i);
    }
    return variants;
  }
  void Check(const Shape& shape, const std::vector<Tokens>& tokens, int32_t grid = 0) {
    SCOPED_TRACE(std::to_string(shape.heads) + " heads, variant " + std::to_string(shape.variant) +
                 ", " + std::to_string(grid) + " thread blocks");
    const Case c(rng_, shape, tokens);
    c.Expect(c.Run(grid), Tolerance(shape));
  }
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng_);
  }
  kernel_test::Rng rng_{kernel_test::Seed()};
};

TEST_F(MlaFewRowsTest, LengthsAboutABlock) {
  STRAIT_TRACE_SEED();
  for (const int32_t variant : AllVariants()) {
    Shape shape = Of(16, variant);
    shape.out_fp32 = true;
    Check(shape, {{1, 0}, {1, 62}, {1, 63}, {1, 64}, {1, 999}, {1, 127}, {1, 9, true}}, 2);
  }
}

TEST_F(MlaFewRowsTest, AllHeadCounts) {
  STRAIT_TRACE_SEED();
  for (int32_t heads = 1; heads <= 16; ++heads) {
    Shape shape = Of(heads);
    shape.out_fp32 = heads % 2 == 0;
    Check(shape, {{1, Pick(0, 300)}, {16 / heads, Pick(0, 300)}, {1, Pick(64, 130)}}, Pick(1, 6));
  }
}

// LaunchMla's own choice is the first variant.
TEST_F(MlaFewRowsTest, LaunchMlaTakesIt) {
  STRAIT_TRACE_SEED();
  Shape shape = Of(16);
  const Case first(rng_, shape, {{1, 300}, {1, 64}});
  const Case::Result expected = first.Run(3);
  Case chosen = first;
  chosen.shape().variant = -1;
  EXPECT_TRUE(kernel_test::SameBits(chosen.Run(3).out, expected.out));
  chosen.shape().few_rows = false;
  EXPECT_FALSE(kernel_test::SameBits(chosen.Run(3).out, expected.out));
}

TEST_F(MlaFewRowsTest, LongSequencesAreSplitAndMerged) {
  STRAIT_TRACE_SEED();
  for (const int32_t variant : AllVariants()) {
    Check(Of(16, variant), {{1, 5000 + Pick(0, 64)}, {1, Pick(0, 700)}}, 7);
    Check(Of(16, variant), {{1, 2600 + Pick(0, 64)}}, 1);
  }
  Check(Of(8), {{1, 20000 + Pick(0, 64)}});
}

// By variant: many turns of the stages in one stretch, then stretches that begin at any stage.
class MlaFewRowsVariantTest : public MlaFewRowsTest, public testing::WithParamInterface<int32_t> {};

TEST_P(MlaFewRowsVariantTest, GroupsDoNotTakeEachOthersSteps) {
  STRAIT_TRACE_SEED();
  const int32_t variant = GetParam();
  Check(Of(16, variant), {{1, 64 * 40 + Pick(0, 63)}}, 1);
  Check(Of(16, variant), {{1, 64 * Pick(4, 8)}, {1, 64 * Pick(4, 8)}, {1, 64 * 5}, {1, 7}}, 1);
}

INSTANTIATE_TEST_SUITE_P(Variants, MlaFewRowsVariantTest,
                         testing::ValuesIn(MlaFewRowsTest::AllVariants()),
                         [](const testing::TestParamInfo<int32_t>& info) {
                           const MlaFewRowsVariant& v = kMlaFewRowsVariants[info.param];
                           return std::string(v.format == RowFormat::kFp8 ? "Fp8" : "Bf16") +
                                  "Groups" + std::to_string(v.groups) + "Stages" +
                                  std::to_string(v.stages) + "Copies" + std::to_string(v.copies) +
                                  (v.integer_bits ? "Bits" : "");
                         });

// A half has 30 powers of two for weights times scales.
TEST_F(MlaFewRowsTest, ScalesFarApart) {
  STRAIT_TRACE_SEED();
  for (const int32_t variant : Variants([](const MlaFewRowsVariant& v) {
         return v.format == RowFormat::kFp8 && (v.integer_bits || v == kMlaFewRowsVariants[0]);
       })) {
    Shape shape = Of(16, variant);
    shape.scale_spread = 1e3f;
    shape.out_fp32 = true;
    Check(shape, {{1, 700}, {1, 70}}, 2);
  }
}

// More rows than stated: several passes.
TEST_F(MlaFewRowsTest, TilesOfMoreRows) {
  STRAIT_TRACE_SEED();
  for (const int32_t variant : AllVariants()) {
    Check(Of(16, variant), {{3, 300}, {20, 40}, {1, 130}}, 5);
    Check(Of(5, variant), {{4, 61}, {13, 0}}, 2);
  }
}

TEST_F(MlaFewRowsTest, BlocksThatSayTheirPositions) {
  STRAIT_TRACE_SEED();
  for (const int32_t variant : AllVariants()) {
    Shape shape = Of(4, variant);
    shape.positions = true;
    shape.out_fp32 = true;
    Check(shape, {{4, 496}, {1, 1999}});
  }
}

TEST_F(MlaFewRowsTest, DeterministicResultsAreThoseOfTheSequenceAlone) {
  STRAIT_TRACE_SEED();
  for (const int32_t variant : AllVariants()) {
    Shape shape = Of(variant % 2 == 0 ? 16 : 6, variant);
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

TEST_F(MlaFewRowsTest, WhatIsNotItsIsRefusedOrLeftToOthers) {
  MlaParams p;
  p.rank = 512;
  p.rope = 64;
  p.num_heads = 16;
  p.format = RowFormat::kFp8;
  p.plan.limits.num_thread_blocks = 1;
  p.tile_rows = 17;
  EXPECT_EQ(LaunchMlaFewRows(p, {}, nullptr), cudaErrorInvalidValue);
  p.tile_rows = 16;
  EXPECT_EQ(LaunchMlaFewRows(p, {.groups = 9}, nullptr), cudaErrorInvalidValue);
  p.format = RowFormat::kBf16;
  EXPECT_EQ(LaunchMlaFewRows(p, {}, nullptr), cudaErrorInvalidValue);
  p.tile_rows = 16;
  p.units = true;
  EXPECT_EQ(LaunchMlaFewRows(p, {.format = RowFormat::kBf16}, nullptr), cudaErrorInvalidValue);
  Shape shape = Of(16);
  shape.variant = -1;
  shape.block_lse = true;
  const Case others(rng_, shape, {{1, 150}});
  others.Expect(others.Run());
}

}  // namespace
}  // namespace strait::cuda
