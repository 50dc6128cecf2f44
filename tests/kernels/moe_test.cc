// SPDX-License-Identifier: Apache-2.0
//
// Defends: experts are chosen and weighed as transformers' DeepseekV2 and DeepseekV3 do, ties go to
// the lower id, and a token's choice does not depend on other tokens.
#include "kernels/moe.h"

#include "kernels/reference/kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using kernel_test::kEps;
using kernel_test::MakeContext;
using kernel_test::RandomFloats;

struct Routed {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Routed Route(cpu::Context* context, RouterParams p) {
  Routed out;
  out.ids.resize(static_cast<size_t>(p.num_tokens * p.num_experts_per_tok));
  out.weights.resize(out.ids.size());
  p.expert_ids = out.ids.data();
  p.expert_weights = out.weights.data();
  if (context) {
    cpu::Router(*context, p);
  } else {
    reference::Router(p);
  }
  return out;
}

class RouterTest : public kernel_test::LevelTest {};
STRAIT_FOR_EACH_LEVEL(RouterTest);

TEST_P(RouterTest, MatchesReferenceAlone) {
  // A fixed seed: of random scores one pair in some ten thousand is closer than fp32 can tell.
  kernel_test::Rng rng(20241226);
  auto one = MakeContext(GetParam(), 1);
  auto three = MakeContext(GetParam(), 3);
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  constexpr int64_t kTokens = 67;
  struct Config {
    RouterScoring scoring;
    RouterMethod method;
    int32_t experts, chosen, groups, topk_groups;
    bool norm;
  };
  for (const Config c :
       {Config{RouterScoring::kSoftmax, RouterMethod::kGreedy, 64, 6, 1, 1, false},
        {RouterScoring::kSoftmax, RouterMethod::kGroupLimitedGreedy, 160, 6, 8, 3, false},
        {RouterScoring::kSigmoid, RouterMethod::kNoauxTc, 256, 8, 8, 4, true},
        {RouterScoring::kSigmoid, RouterMethod::kNoauxTc, 12, 3, 4, 2, true},
        {RouterScoring::kSigmoid, RouterMethod::kNoauxTc, 5, 5, 5, 5, false}}) {
    const std::vector<float> logits = RandomFloats(rng, kTokens * c.experts, 2.0f);
    const std::vector<float> bias = RandomFloats(rng, c.experts, 0.1f);
    RouterParams p = {.logits = logits.data(),
                      .scoring = c.scoring,
                      .method = c.method,
                      .n_routed_experts = c.experts,
                      .num_experts_per_tok = c.chosen,
                      .n_group = c.groups,
                      .topk_group = c.topk_groups,
                      .norm_topk_prob = c.norm,
                      .routed_scaling_factor = 2.5f,
                      .num_tokens = kTokens};
    if (c.scoring == RouterScoring::kSigmoid) p.correction_bias = bias.data();
    const Routed expected = Route(nullptr, p);
    const Routed all = Route(one.get(), p);
    // Weights: exp, a sum, a quotient and two products.
    EXPECT_EQ(all.ids, expected.ids);
    EXPECT_TRUE(kernel_test::Within(all.weights, expected.weights, 2.5 * 16 * kEps));
    for (cpu::Context* context : {three.get(), portable.get()}) {
      const Routed again = Route(context, p);
      EXPECT_EQ(again.ids, all.ids);
      EXPECT_TRUE(kernel_test::SameBits(again.weights, all.weights));
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      RouterParams single = p;
      single.logits += t * c.experts;
      single.num_tokens = 1;
      const Routed alone = Route(one.get(), single);
      EXPECT_TRUE(std::equal(alone.ids.begin(), alone.ids.end(), all.ids.begin() + t * c.chosen));
      EXPECT_TRUE(
          kernel_test::SameBits(alone.weights.data(), &all.weights[t * c.chosen], c.chosen));
    }
  }
}

TEST_P(RouterTest, TiesGoToTheLowerId) {
  auto context = MakeContext(GetParam());
  const std::vector<float> equal(16, 0.25f);
  RouterParams p = {
      .logits = equal.data(), .n_routed_experts = 16, .num_experts_per_tok = 4, .num_tokens = 1};
  EXPECT_EQ(Route(context.get(), p).ids, (std::vector<int32_t>{0, 1, 2, 3}));
  p.scoring = RouterScoring::kSigmoid;
  p.method = RouterMethod::kNoauxTc;
  p.n_group = 4;
  p.topk_group = 2;
  EXPECT_EQ(Route(context.get(), p).ids, (std::vector<int32_t>{0, 1, 2, 3}));
  std::vector<float> logits = equal;
  logits[9] = 1.0f;  // brings group 2 in before group 1
  p.logits = logits.data();
  EXPECT_EQ(Route(context.get(), p).ids, (std::vector<int32_t>{0, 1, 2, 9}));
}

// V3 chooses by biased scores, all below zero here: experts outside the groups must still lose.
TEST_P(RouterTest, NegativeBiasedScoresStayInTheirGroups) {
  auto context = MakeContext(GetParam());
  const std::vector<float> logits = {0, 0, 3, 3, 0, 0, 1, 1};
  const std::vector<float> bias(8, -5.0f);
  const RouterParams p = {.logits = logits.data(),
                          .correction_bias = bias.data(),
                          .scoring = RouterScoring::kSigmoid,
                          .method = RouterMethod::kNoauxTc,
                          .n_routed_experts = 8,
                          .num_experts_per_tok = 4,
                          .n_group = 4,
                          .topk_group = 2,
                          .norm_topk_prob = true,
                          .num_tokens = 1};
  EXPECT_EQ(Route(context.get(), p).ids, (std::vector<int32_t>{2, 3, 6, 7}));
}

TEST(GroupByExpertTest, ListsEveryChoiceOnceInOrder) {
  const std::vector<int32_t> ids = {1, 4, 0, 4, 1, 2, 1, 4};
  std::vector<int32_t> begin(7), token_of(8), row_of(8);
  GroupByExpert({.expert_ids = ids.data(),
                 .num_tokens = 4,
                 .num_experts_per_tok = 2,
                 .n_routed_experts = 6,
                 .group_begin = begin.data(),
                 .token_of = token_of.data(),
                 .row_of = row_of.data()});
  EXPECT_EQ(begin, (std::vector<int32_t>{0, 1, 4, 5, 5, 8, 8}));
  EXPECT_EQ(token_of, (std::vector<int32_t>{1, 0, 2, 3, 2, 0, 1, 3}));
  EXPECT_EQ(row_of, (std::vector<int32_t>{1, 5, 0, 6, 2, 4, 3, 7}));
}

}  // namespace
}  // namespace strait
