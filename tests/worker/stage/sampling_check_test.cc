// SPDX-License-Identifier: Apache-2.0
//
// Defends: no number of a client or coordinator reaches the sampler unchecked.
#include "worker/stage/sampling_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint32_t kVocab = 100;

v1::SamplingParams Valid() {
  v1::SamplingParams wire;
  wire.set_temperature(0.7f);
  wire.set_top_p(1);
  wire.set_repetition_penalty(1);
  return wire;
}

TEST(SamplingCheckTest, TakesEveryFieldOver) {
  v1::SamplingParams wire = Valid();
  wire.set_seed(~uint64_t{0});
  wire.set_choice_index(3);
  wire.set_top_k(40);
  wire.set_min_p(0.05f);
  wire.set_presence_penalty(-2);
  wire.set_frequency_penalty(2);
  wire.set_repetition_penalty(1.25f);
  wire.set_min_tokens(5);
  wire.add_bias_ids(99);
  wire.add_bias_values(-100);
  wire.add_banned_ids(0);
  const auto params = CheckSampling(wire, kVocab);
  ASSERT_TRUE(params.ok()) << params.status();
  EXPECT_EQ(params->seed, ~uint64_t{0});
  EXPECT_EQ(params->choice_index, 3u);
  EXPECT_EQ(params->temperature, 0.7f);
  EXPECT_EQ(params->top_k, 40u);
  EXPECT_EQ(params->top_p, 1);
  EXPECT_EQ(params->min_p, 0.05f);
  EXPECT_EQ(params->repetition_penalty, 1.25f);
  EXPECT_EQ(params->presence_penalty, -2);
  EXPECT_EQ(params->frequency_penalty, 2);
  EXPECT_EQ(params->min_tokens, 5u);
  ASSERT_EQ(params->logit_bias.size(), 1u);
  EXPECT_EQ(params->logit_bias[0], std::make_pair(TokenId{99}, -100.0f));
  EXPECT_EQ(params->banned_ids, std::vector<TokenId>{0});
}

struct Refusal {
  const char* field;
  absl::StatusCode code;
  std::function<void(v1::SamplingParams*)> spoil;
};

TEST(SamplingCheckTest, RefusesEachFieldOutsideItsRange) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto bad = absl::StatusCode::kInvalidArgument;
  const auto much = absl::StatusCode::kResourceExhausted;
  const std::vector<Refusal> refusals = {
      {"choice_index", bad, [](auto* w) { w->set_choice_index(limits::kMaxChoices); }},
      {"temperature", bad, [](auto* w) { w->set_temperature(-0.1f); }},
      {"temperature", bad, [=](auto* w) { w->set_temperature(kNan); }},
      {"temperature", bad, [=](auto* w) { w->set_temperature(kInf); }},
      {"top_p", bad, [](auto* w) { w->set_top_p(0); }},
      {"top_p", bad, [](auto* w) { w->set_top_p(1.01f); }},
      {"top_p", bad, [=](auto* w) { w->set_top_p(kNan); }},
      {"min_p", bad, [](auto* w) { w->set_min_p(-0.1f); }},
      {"min_p", bad, [](auto* w) { w->set_min_p(1.1f); }},
      {"repetition_penalty", bad, [](auto* w) { w->set_repetition_penalty(0); }},
      {"repetition_penalty", bad, [=](auto* w) { w->set_repetition_penalty(kInf); }},
      {"presence_penalty", bad, [=](auto* w) { w->set_presence_penalty(kNan); }},
      {"frequency_penalty", bad, [=](auto* w) { w->set_frequency_penalty(-kInf); }},
      {"bias_ids", bad, [](auto* w) { w->add_bias_ids(kVocab), w->add_bias_values(1); }},
      {"bias_values", bad, [](auto* w) { w->add_bias_ids(1); }},
      {"bias_values", bad, [=](auto* w) { w->add_bias_ids(1), w->add_bias_values(kNan); }},
      {"bias_ids", bad,
       [](auto* w) {
         w->add_bias_ids(1), w->add_bias_values(1), w->add_bias_ids(1), w->add_bias_values(2);
       }},
      {"bias_ids", much,
       [](auto* w) {
         for (uint32_t i = 0; i <= limits::kMaxLogitBias; ++i)
           w->add_bias_ids(i), w->add_bias_values(0);
       }},
      {"banned_ids", bad, [](auto* w) { w->add_banned_ids(kVocab); }},
      {"banned_ids", much,
       [](auto* w) {
         for (uint32_t i = 0; i <= kMaxBannedTokens; ++i) w->add_banned_ids(i);
       }},
  };
  for (size_t i = 0; i < refusals.size(); ++i) {
    v1::SamplingParams wire = Valid();
    refusals[i].spoil(&wire);
    const auto params = CheckSampling(wire, kVocab);
    EXPECT_EQ(params.status().code(), refusals[i].code) << i << " " << params.status();
    EXPECT_THAT(std::string(params.status().message()), HasSubstr(refusals[i].field)) << i;
  }
}

}  // namespace
}  // namespace strait
