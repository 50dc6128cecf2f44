// SPDX-License-Identifier: Apache-2.0
//
// Defends: log-probabilities, the best tokens and samples are those of the formulas, the noise is
// Philox4x32-10 bit for bit, and everything is the same on every instruction set.
#include "kernels/sample.h"

#include <algorithm>
#include <limits>

#include "kernels/reference/kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using kernel_test::MakeContext;
using kernel_test::RandomFloats;

// The known-answer vectors that the authors publish with their library.
TEST(PhiloxTest, KnownAnswers) {
  using Four = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (Four{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Four{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Four{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(PhiloxTest, UniformsDifferByEveryKeyPart) {
  const double base = SamplingUniform(1, 2, 3);
  EXPECT_EQ(base, SamplingUniform(1, 2, 3));
  EXPECT_NE(base, SamplingUniform(2, 2, 3));
  EXPECT_NE(base, SamplingUniform(1ull << 40, 2, 3));
  EXPECT_NE(base, SamplingUniform(1, 3, 3));
  EXPECT_NE(base, SamplingUniform(1, 2, 4));
  EXPECT_NE(base, SamplingUniform(1, 2, 3 + (1ull << 33)));
  double sum = 0;
  for (uint64_t i = 0; i < 10000; ++i) {
    const double u = SamplingUniform(77, 0, i);
    ASSERT_TRUE(u >= 0 && u < 1);
    sum += u;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 0.02);  // seven standard deviations, and the key is fixed
}

class SampleTest : public kernel_test::LevelTest {};
STRAIT_FOR_EACH_LEVEL(SampleTest);

TEST_P(SampleTest, LogitStatsMatchReference) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam());
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  for (int64_t vocab : {1, 7, 1000, 1025, 50001}) {
    const std::vector<float> logits = RandomFloats(rng, vocab, 5.0f);
    const LogitStats stats = cpu::ComputeLogitStats(*context, logits.data(), vocab);
    const LogitStats expected = reference::ComputeLogitStats(logits.data(), vocab);
    EXPECT_EQ(stats.max, expected.max);
    EXPECT_NEAR(stats.log_sum_exp, expected.log_sum_exp, 2e-6);  // runs of 64 fp32 sums per lane
    EXPECT_EQ(stats.log_sum_exp,
              cpu::ComputeLogitStats(*portable, logits.data(), vocab).log_sum_exp);
    EXPECT_NEAR(LogProb(logits[0], stats), logits[0] - expected.log_sum_exp, 1e-5);
  }
}

TEST_P(SampleTest, TopTokensAreTheBestInOrder) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam());
  std::vector<float> logits(500);
  for (float& logit : logits) logit = static_cast<float>(rng() % 40);  // many ties
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  std::vector<int32_t> order(500);
  for (int32_t i = 0; i < 500; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float x = a == 3 ? -1e30f : logits[a];
    const float y = b == 3 ? -1e30f : logits[b];
    return x > y;
  });
  for (int64_t k : {0, 1, 20, 500, 1000}) {
    const auto best = cpu::TopTokens(*context, logits.data(), 500, k);
    ASSERT_EQ(static_cast<int64_t>(best.size()), std::min<int64_t>(k, 500));
    for (size_t i = 0; i < best.size(); ++i) EXPECT_EQ(best[i].token_id, order[i]);
  }
}

TEST_P(SampleTest, MatchesReference) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam());
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  const TokenCount prompt[] = {{3, 1}, {10, 2}, {17, 1}};
  const TokenCount output[] = {{10, 3}, {30, 1}};
  const TokenBias bias[] = {{5, 2.0f}, {17, -1.0f}, {40, 100.0f}};
  const int32_t banned[] = {40, 41};
  int64_t differences = 0;
  constexpr int64_t kRounds = 600;
  for (int64_t round = 0; round < kRounds; ++round) {
    const int64_t vocab = round % 3 == 0 ? 50 : 3000;
    const std::vector<float> logits = RandomFloats(rng, vocab, 3.0f);
    SampleParams p = {.logits = logits.data(), .vocab_size = vocab};
    p.temperature = round % 5 == 0 ? 0.0f : 0.3f + static_cast<float>(rng() % 100) / 50.0f;
    if (round % 2 == 0) p.top_k = 1 + static_cast<int32_t>(rng() % 40);
    if (round % 7 < 3) p.top_p = 0.05f + static_cast<float>(rng() % 90) / 100.0f;
    if (round % 11 < 4) p.min_p = static_cast<float>(rng() % 50) / 100.0f;
    if (round % 3 != 1) {
      p.repetition_penalty = 1.3f;
      p.presence_penalty = 0.4f;
      p.frequency_penalty = 0.2f;
      p.prompt_tokens = prompt;
      p.num_prompt_tokens = 3;
      p.output_tokens = output;
      p.num_output_tokens = 2;
      p.logit_bias = bias;
      p.num_logit_bias = 3;
      p.banned_tokens = banned;
      p.num_banned_tokens = 2;
    }
    const double uniform = SamplingUniform(kernel_test::Seed(), 0, static_cast<uint64_t>(round));
    const int32_t token = cpu::Sample(*context, p, uniform);
    EXPECT_EQ(token, cpu::Sample(*portable, p, uniform));
    differences += token != reference::Sample(p, uniform);
  }
  // A draw may fall between the fp32 and the float64 edge of a token: about 1e-6 each.
  EXPECT_LE(differences, 1);
}

TEST_P(SampleTest, Corners) {
  auto context = MakeContext(GetParam());
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> logits = {1.0f, 3.0f, 3.0f, kNan, -2.0f};
  SampleParams p = {.logits = logits.data(), .vocab_size = 5, .temperature = 0};
  EXPECT_EQ(cpu::Sample(*context, p, 0.9), 1);  // the tie goes to the lower id, NaN never wins
  const int32_t ban_best[] = {1};
  p.banned_tokens = ban_best;
  p.num_banned_tokens = 1;
  EXPECT_EQ(cpu::Sample(*context, p, 0.0), 2);
  const int32_t ban_all[] = {0, 1, 2, 3, 4};
  p.banned_tokens = ban_all;
  p.num_banned_tokens = 5;
  p.temperature = 1;
  EXPECT_EQ(cpu::Sample(*context, p, 0.5), 0);
  p.num_banned_tokens = 0;
  p.temperature = 1e-39f;  // logits overflow: as good as greedy
  EXPECT_EQ(cpu::Sample(*context, p, 0.99), 1);
  p.temperature = 1;
  p.top_k = 1;
  EXPECT_EQ(cpu::Sample(*context, p, 0.999999), 1);
  p.top_k = 0;
  EXPECT_EQ(cpu::Sample(*context, p, 0.0), 0);  // the distribution runs by id
  EXPECT_EQ(cpu::Sample(*context, p, std::nextafter(1.0, 0.0)), 4);
  EXPECT_EQ(logits[1], 3.0f);  // never changed
}

}  // namespace
}  // namespace strait
