// SPDX-License-Identifier: Apache-2.0
//
// Defends: frequencies and scales are those of transformers' initializers, angles stay exact at far
// positions, and the rotation turns pairs (2i, 2i + 1).
#include "kernels/rope.h"

#include "kernels/float64_math.h"
#include "kernels/reference/kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using kernel_test::kEps;
using kernel_test::MakeContext;
using kernel_test::RandomFloats;
using kernel_test::SameBits;

RopeConfig DeepSeekV3() {
  return {.qk_rope_head_dim = 64,
          .rope_theta = 10000.0,
          .yarn = true,
          .factor = 40.0,
          .original_max_position_embeddings = 4096.0,
          .beta_fast = 32.0,
          .beta_slow = 1.0,
          .mscale = 1.0,
          .mscale_all_dim = 1.0};
}

TEST(RopeTest, PlainFrequencies) {
  const RopeConfig config = {.qk_rope_head_dim = 24, .rope_theta = 50000.0};
  std::vector<float> inv_freq(12);
  RopeInverseFrequencies(config, inv_freq.data());
  for (int i = 0; i < 12; ++i) {
    const double expected = std::pow(50000.0, -2.0 * i / 24.0);
    // The exponent is rounded to float32 before the power, as transformers does: 11 eps at most.
    EXPECT_NEAR(inv_freq[i] / expected, 1.0, 12 * kEps) << i;
  }
  EXPECT_EQ(RopeAttentionScaling(config), 1.0f);
  EXPECT_FLOAT_EQ(AttentionSoftmaxScale(48, config), 1.0f / std::sqrt(48.0f));
}

// DeepSeek-V3: dimensions below 10 keep their frequency, those from 23 on are divided by 40, and
// between them runs a straight ramp.
TEST(RopeTest, YarnFrequencies) {
  const RopeConfig config = DeepSeekV3();
  std::vector<float> inv_freq(32);
  RopeInverseFrequencies(config, inv_freq.data());
  for (int i = 0; i < 32; ++i) {
    const double plain = std::pow(10000.0, -2.0 * i / 64.0);
    const double ramp = std::min(1.0, std::max(0.0, (i - 10.0) / (23.0 - 10.0)));
    const double expected = plain / 40.0 * ramp + plain * (1.0 - ramp);
    EXPECT_NEAR(inv_freq[i] / expected, 1.0, 40 * kEps) << i;
  }
}

TEST(RopeTest, ScalesWithBothFormsOfMscale) {
  RopeConfig config = DeepSeekV3();
  EXPECT_EQ(RopeAttentionScaling(config), 1.0f);
  EXPECT_NEAR(AttentionSoftmaxScale(192, config), 0.1352337788608801, 1e-8);
  config.mscale = 0.707;  // V2-Lite's pair of equal values, then an unequal one
  config.mscale_all_dim = 0.707;
  EXPECT_EQ(RopeAttentionScaling(config), 1.0f);
  config.mscale_all_dim = 1.0;
  const double ln40 = std::log(40.0);
  EXPECT_NEAR(RopeAttentionScaling(config), (0.0707 * ln40 + 1) / (0.1 * ln40 + 1), 1e-7);
  config.mscale_all_dim = 0;  // one of the two is missing: the plain form
  EXPECT_NEAR(RopeAttentionScaling(config), 0.1 * ln40 + 1, 1e-7);
  EXPECT_FLOAT_EQ(AttentionSoftmaxScale(192, config), 1.0f / std::sqrt(192.0f));
  config.attention_factor = 0.5;
  EXPECT_EQ(RopeAttentionScaling(config), 0.5f);
  config.factor = 0.5;
  config.attention_factor.reset();
  EXPECT_EQ(RopeAttentionScaling(config), 1.0f);
}

class RopeLevelTest : public kernel_test::LevelTest {};
STRAIT_FOR_EACH_LEVEL(RopeLevelTest);

TEST_P(RopeLevelTest, TableAndRotationMatchReference) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  const RopeConfig config = DeepSeekV3();
  constexpr int64_t kTokens = 300, kHeads = 3, kDim = 64;
  std::vector<float> inv_freq(32);
  RopeInverseFrequencies(config, inv_freq.data());
  std::vector<int32_t> positions;
  for (int64_t i = 0; i < kTokens; ++i) {
    positions.push_back(i < 100 ? static_cast<int32_t>(i) : static_cast<int32_t>(rng() % 10000000));
  }
  std::vector<float> table(kTokens * kDim), expected(table.size()), again(table.size());
  RopeTableParams p = {.positions = positions.data(),
                       .inv_freq = inv_freq.data(),
                       .attention_scaling = 1.0f,
                       .num_tokens = kTokens,
                       .dim = kDim,
                       .cos_sin = table.data()};
  auto one = MakeContext(GetParam(), 1);
  auto three = MakeContext(GetParam(), 3);
  cpu::RopeTable(*one, p);
  p.cos_sin = again.data();
  cpu::RopeTable(*three, p);
  EXPECT_TRUE(SameBits(table, again));
  p.cos_sin = expected.data();
  reference::RopeTable(p);
  // Both round a float64 value with an error far below float32's: at most one unit apart at a tie.
  EXPECT_TRUE(kernel_test::Within(table, expected, 2 * kEps));

  const std::vector<float> x = RandomFloats(rng, kTokens * kHeads * (kDim + 2));
  std::vector<float> y(kTokens * kHeads * kDim), y_expected(y.size());
  RopeParams r = {.x = x.data(),
                  .x_token_stride = kHeads * (kDim + 2),
                  .x_head_stride = kDim + 2,
                  .cos_sin = table.data(),
                  .y = y.data(),
                  .y_token_stride = kHeads * kDim,
                  .y_head_stride = kDim,
                  .num_tokens = kTokens,
                  .num_heads = kHeads,
                  .dim = kDim};
  cpu::Rope(*three, r);
  std::vector<float> in_place = x;
  RopeParams same = r;
  same.x = in_place.data();
  same.y = in_place.data();
  same.y_token_stride = r.x_token_stride;
  same.y_head_stride = r.x_head_stride;
  cpu::Rope(*one, same);
  EXPECT_TRUE(SameBits(y.data(), in_place.data(), kDim));
  r.y = y_expected.data();
  reference::Rope(r);
  EXPECT_TRUE(kernel_test::Within(y, y_expected, 3 * 6 * kEps));  // two products of at most 6
}

TEST(Float64MathTest, AgreesWithTheMathLibrary) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  std::uniform_real_distribution<double> angle(-1.3e8, 1.3e8), power(-700.0, 700.0),
      exponent(-1000.0, 1000.0);
  for (int i = 0; i < 100000; ++i) {
    const double x = i % 2 == 0 ? angle(rng) : angle(rng) * 1e-7;
    const SinCos value = Float64SinCos(x);
    ASSERT_NEAR(value.sin, std::sin(x), 4e-16) << x;
    ASSERT_NEAR(value.cos, std::cos(x), 4e-16) << x;
    const double e = power(rng);
    ASSERT_NEAR(Float64Exp(e) / std::exp(e), 1.0, 8e-16) << e;
    const double y = std::exp2(exponent(rng));
    ASSERT_NEAR(Float64Log(y), std::log(y), 4e-16 * std::max(1.0, std::abs(std::log(y)))) << y;
  }
  EXPECT_EQ(Float64SinCos(0.0).sin, 0.0);
  EXPECT_EQ(Float64SinCos(0.0).cos, 1.0);
  EXPECT_EQ(Float64Exp(0.0), 1.0);
  EXPECT_EQ(Float64Log(1.0), 0.0);
}

}  // namespace
}  // namespace strait
