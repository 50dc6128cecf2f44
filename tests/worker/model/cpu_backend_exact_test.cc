// SPDX-License-Identifier: Apache-2.0
//
// Defends: the backend computes the published model: its log-probabilities are those of a float64
// forward that expands every head's keys and values.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/model/reference_model.h"
#include "tests/worker/model/test_pipeline.h"
#include "tests/worker/model/tiny_models.h"

namespace strait {
namespace {

struct Case {
  const char* name;
  ModelConfig (*config)();
  RowFormat row_format;
  // fp32 arithmetic over some hundred operations per sum is off by about 1e-6 of a logit's size (2
  // to 3); the worst seen here is 1.3e-5. bf16 rows carry 8 bits: 2^-9 of a latent, hundreds of
  // rows averaged.
  double tolerance;
};

class ExactTest : public testing::TestWithParam<Case> {};

TEST_P(ExactTest, AgreesWithAFloat64ForwardOfThePaper) {
  constexpr uint64_t kSeed = 11;
  constexpr uint32_t kTokens = 150;  // three blocks, three tiles
  const ModelConfig config = GetParam().config();
  std::mt19937 rng(5);
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < kTokens; ++i) tokens.push_back(rng() % config.vocab_size);

  auto source = MakeRandomWeights(config, kSeed, 1);
  auto weights = LoadStageWeights(*source, {0, config.num_hidden_layers}, 1, {});
  ASSERT_TRUE(weights.ok()) << weights.status();
  ReferenceModel reference(config, *std::move(weights));

  CpuBackendOptions options;
  options.row_format = GetParam().row_format;
  options.memory_bytes = 1 << 30;
  TestPipeline pipeline(options, MakeRandomWeights(config, kSeed, 1), {config.num_hidden_layers});
  v1::StepPlan plan = pipeline.Plan();
  AddOpen(&plan, 1, kTokens);
  v1::SequenceStep* rows = AddRows(&plan, 1, 0, tokens);
  for (uint32_t i = 0; i + 1 < kTokens; ++i) {
    WantScore(rows, i, tokens[i + 1]);
    rows->mutable_logits(i)->set_num_top(5);
  }
  const auto results = pipeline.Run(plan);
  ASSERT_EQ(results.size(), 1u);
  ASSERT_EQ(results[0].scored_size(), static_cast<int>(kTokens) - 1);

  double worst = 0;
  double mean_chosen = 0;
  for (uint32_t i = 0; i + 1 < kTokens; ++i) {
    const ReferenceModel::Row expected = reference.Next(tokens[i]);
    const v1::TokenLogprob& got = results[0].scored(i);
    const auto compare = [&](uint32_t token, float logprob) {
      worst = std::max(worst, std::abs(logprob - expected[token]));
      ASSERT_NEAR(logprob, expected[token], GetParam().tolerance) << "position " << i;
    };
    compare(got.token_id(), got.logprob());
    for (int k = 0; k < got.top_ids_size(); ++k) compare(got.top_ids(k), got.top_logprobs(k));
    if (HasFatalFailure()) return;
    mean_chosen += expected[got.token_id()] / (kTokens - 1);
  }
  std::printf(
      "%s: worst difference %.2e, closest choice of experts %.2e, mean log-probability %.2f\n",
      GetParam().name, worst, reference.closest_choice(), mean_chosen);
  // A flat distribution would agree by itself.
  EXPECT_LT(mean_chosen, -std::log(config.vocab_size) - 0.5);
}

INSTANTIATE_TEST_SUITE_P(Models, ExactTest,
                         testing::Values(Case{"V3", TinyV3, RowFormat::kFp32, 5e-5},
                                         Case{"V3Fp8", TinyV3Fp8, RowFormat::kFp32, 5e-5},
                                         Case{"V2Lite", TinyV2Lite, RowFormat::kFp32, 5e-5},
                                         Case{"V2", TinyV2, RowFormat::kFp32, 5e-5},
                                         Case{"V3Bf16Rows", TinyV3, RowFormat::kBf16, 5e-2}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace strait
