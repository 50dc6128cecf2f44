// SPDX-License-Identifier: Apache-2.0
//
// Defends: stages that take the place of others on the same worker have exactly the rows that every one of
// their layers had, whatever the cut; those that are followed do nothing any more; no block is lost.
#include "worker/stage/take_over.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "tests/worker/stage/take_over_fixture.h"

namespace strait {
namespace {

TEST_F(TakeOverTest, OneStageBecomesTwo) {
  Hosted& one = Stage1Of1();
  one.Run(Rows(one, 1, 7, 0, 100));
  one.Run(Rows(one, 2, 8, 0, 64));
  // Begun, and accepted: these rows go.
  one.Accept(Rows(one, 3, 7, 100, 30));
  one.Accept(Rows(one, 4, 9, 0, 5));
  one.Begin();
  Hosted& first = Add(2, {0, 2});
  Hosted& last = Add(3, {2, kLayers});
  Follow(first, 0, 2, {1});
  EXPECT_EQ(one.model->num_begun(), 0u);
  EXPECT_EQ(one.stage->num_begun(), 0u);
  EXPECT_FALSE(one.stage->Ready());
  EXPECT_EQ(first.stage->blocks_used(), BlocksOfSequence(100, 2) + BlocksOfSequence(64, 2));
  Follow(last, 1, 2, {1});
  EXPECT_EQ(one.stage->blocks_used(), 0u);
  EXPECT_EQ(first.Held(), (Held{{7, 100}, {8, 64}}));
  EXPECT_EQ(last.Held(), (Held{{7, 100}, {8, 64}}));

  // Who is followed refuses everything, whatever it is asked.
  EXPECT_EQ(one.stage->AcceptPlan(Rows(one, 3, 7, 100, 1), 0).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(one.stage->AcceptPlan(Rows(one, 5, 7, 100, 1), 0).code(), absl::StatusCode::kAborted);
  const absl::Status entered = one.stage->Activate({1, 3}, 0, 1);
  EXPECT_EQ(entered.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(entered.message().find("stage 1"), std::string::npos) << entered;
  CheckIntegrity();
  stages_.erase(1);
  CheckIntegrity();

  for (Hosted* hosted : {&first, &last}) {
    hosted->Run(Keep(*hosted, {{7, 100}, {8, 0}}, 2));
    hosted->ExpectRows(7, 100);
  }
  first.Run(Rows(first, 2, 7, 100, 29));
  v1::StepPlan scored = Rows(last, 2, 7, 100, 29);
  WantScore(scored.mutable_sequences(0), 28, 5);
  const StepOutput out = last.Run(scored);
  ASSERT_EQ(out.report.results_size(), 1);
  EXPECT_EQ(out.report.results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash({2, kLayers}, Tokens(7, 0, 129)) % 4096));
  first.ExpectRows(7, 129);
  CheckIntegrity();
}

TEST_F(TakeOverTest, TwoStagesBecomeOne) {
  Hosted& first = Add(1, {0, 3});
  Hosted& last = Add(2, {3, kLayers});
  ASSERT_TRUE(first.stage->Activate({1, 1}, 0, 2).ok());
  ASSERT_TRUE(last.stage->Activate({1, 1}, 1, 2).ok());
  first.Run(Rows(first, 1, 7, 0, 64));
  first.Run(Rows(first, 2, 7, 64, 70));  // the last is two steps behind
  first.Run(Rows(first, 3, 8, 0, 10));
  last.Run(Rows(last, 1, 7, 0, 64));
  Hosted& one = Add(3, {0, kLayers});
  Follow(one, 0, 1, {1, 2});
  EXPECT_EQ(one.Held(), (Held{{7, 64}}));
  EXPECT_EQ(one.stage->blocks_used(), BlocksOfSequence(64, kLayers));
  EXPECT_EQ(pool_.used(), BlocksOfSequence(64, kLayers));
  stages_.erase(1);
  stages_.erase(2);
  one.Run(Keep(one, {{7, 64}}, 1));
  v1::StepPlan scored = Rows(one, 2, 7, 64, 1);
  WantScore(scored.mutable_sequences(0), 0, 5);
  EXPECT_EQ(one.Run(scored).report.results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash({0, kLayers}, Tokens(7, 0, 65)) % 4096));
  one.ExpectRows(7, 65);
}

TEST_F(TakeOverTest, TwoStagesAreCutElsewhere) {
  Hosted& first = Add(1, {0, 2});
  Hosted& last = Add(2, {2, kLayers});
  ASSERT_TRUE(first.stage->Activate({1, 1}, 0, 2).ok());
  ASSERT_TRUE(last.stage->Activate({1, 1}, 1, 2).ok());
  first.Run(Rows(first, 1, 7, 0, 130));
  first.Run(Rows(first, 2, 7, 130, 1));
  last.Run(Rows(last, 1, 7, 0, 130));
  // The last one takes over first: from one, for its layers are all there.
  Hosted& new_last = Add(4, {4, kLayers});
  Follow(new_last, 1, 2, {2});
  Hosted& new_first = Add(3, {0, 4});
  Follow(new_first, 0, 2, {1, 2});
  EXPECT_EQ(new_first.Held(), (Held{{7, 130}}));
  EXPECT_EQ(new_last.Held(), (Held{{7, 130}}));
  stages_.erase(1);
  stages_.erase(2);
  for (Hosted* hosted : {&new_first, &new_last}) {
    hosted->Run(Keep(*hosted, {{7, 130}}, 2));
    hosted->ExpectRows(7, 130);
    hosted->Run(Rows(*hosted, 2, 7, 130, 90));
    hosted->ExpectRows(7, 220);
  }
}

TEST_F(TakeOverTest, RowsThatALayerLacksGo) {
  Hosted& first = Add(1, {0, 3});
  Hosted& last = Add(2, {3, kLayers});
  ASSERT_TRUE(first.stage->Activate({1, 1}, 0, 2).ok());
  ASSERT_TRUE(last.stage->Activate({1, 1}, 1, 2).ok());
  first.Run(Rows(first, 1, 7, 0, 70));
  first.Run(Rows(first, 2, 8, 0, 70));
  last.Run(Rows(last, 1, 7, 0, 70));
  last.Accept(Rows(last, 2, 8, 0, 70));  // opened, and nothing of it finished
  last.Begin();
  first.Run(Rows(first, 3, 9, 0, 70));  // unknown to the last
  Hosted& one = Add(3, {0, kLayers});
  Follow(one, 0, 1, {1, 2});
  EXPECT_EQ(one.Held(), (Held{{7, 70}}));
  EXPECT_EQ(pool_.used(), BlocksOfSequence(70, kLayers));
}

// Of layers that nobody here had there are no rows, so none are taken; what lies in others goes.
TEST_F(TakeOverTest, LayersThatNobodyHadLeaveNothing) {
  Hosted& first = Add(1, {0, 3});
  ASSERT_TRUE(first.stage->Activate({1, 1}, 0, 2).ok());
  first.Run(Rows(first, 1, 7, 0, 70));
  Hosted& middle = Add(2, {1, 4});
  Follow(middle, 1, 3, {1});
  EXPECT_TRUE(middle.Held().empty());
  EXPECT_EQ(middle.stage->blocks_used(), 0u);
  EXPECT_EQ(first.stage->blocks_used(), BlocksOfSequence(70, 1));
  // Its first layer is there for another one.
  Hosted& lower = Add(3, {0, 1});
  Follow(lower, 0, 3, {1});
  EXPECT_EQ(lower.Held(), (Held{{7, 70}}));
  EXPECT_EQ(first.stage->blocks_used(), 0u);
}

// A successor may hold less than what its predecessor had in its layers. It took all of it, and so took
// what another stage was promised.
TEST_F(TakeOverTest, NoMoreIsTakenThanItMayHold) {
  Hosted& one = Stage1Of1();
  one.Run(Rows(one, 1, 7, 0, 65));   // 8 blocks of 4 layers
  one.Run(Rows(one, 2, 8, 0, 129));  // 12
  one.Run(Rows(one, 3, 9, 0, 20));   // 4
  Hosted& first = Add(2, {0, 4}, 13);
  Follow(first, 0, 2, {1});
  EXPECT_EQ(first.Held(), (Held{{7, 65}, {9, 20}}));
  EXPECT_EQ(first.stage->blocks_used(), 12u);
  EXPECT_EQ(pool_.used(), 12 + one.stage->blocks_used());
}

TEST_F(TakeOverTest, AFailedPredecessorLeavesWhatItFinished) {
  Hosted& one = Stage1Of1();
  one.Run(Rows(one, 1, 7, 0, 65));
  one.model->fail_next = true;
  one.Accept(Rows(one, 2, 7, 65, 200));
  one.Begin();
  EXPECT_NE(one.stage->FinishNext([] { return 0; }).report.error_code(), 0u);
  Hosted& other = Add(2, {0, kLayers});
  Follow(other, 0, 1, {1});
  EXPECT_EQ(other.Held(), (Held{{7, 65}}));
  EXPECT_EQ(pool_.used(), BlocksOfSequence(65, kLayers));
  other.Run(Keep(other, {{7, 65}}, 1));
  other.ExpectRows(7, 65);
}

// What was taken over and not spoken of yet is taken over again.
TEST_F(TakeOverTest, ASuccessorIsFollowedItself) {
  Hosted& one = Stage1Of1();
  one.Run(Rows(one, 1, 7, 0, 65));
  Hosted& two = Add(2, {0, kLayers});
  Follow(two, 0, 1, {1});
  stages_.erase(1);
  Hosted& three = Add(3, {0, 3});
  Follow(three, 0, 2, {2});
  Hosted& four = Add(4, {3, kLayers});
  Follow(four, 1, 2, {2});
  for (Hosted* hosted : {&three, &four}) {
    EXPECT_EQ(hosted->Held(), (Held{{7, 65}}));
    hosted->ExpectRows(7, 65);
  }
}

using TakeOverDeathTest = TakeOverTest;

TEST_F(TakeOverDeathTest, ChecksItsCaller) {
  Hosted& one = Stage1Of1();
  one.Run(Rows(one, 1, 7, 0, 65));
  Hosted& two = Add(2, {0, kLayers});
  Follow(two, 0, 1, {1});
  Stage* const before[] = {one.stage.get()};
  EXPECT_DEATH(two.stage->TakeOver(before), "");  // it has rows
  Hosted& three = Add(3, {0, kLayers});
  ASSERT_TRUE(three.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_DEATH(three.stage->TakeOver(before), "a layer is given once");
}

// Stages in the middle know no token that was sampled: what they have can be rows of a first or a last stage
// only as far as another predecessor knows them.
TEST(TakeOverRowsTest, OnlyKnownTokensCountWhereTheyAreNeeded) {
  struct Case {
    std::vector<TokenId> lower, upper;  // tokens of 65 rows, that two predecessors know
    bool needs_tokens;
    uint32_t rows;
    uint32_t num_known;
  };
  const std::vector<TokenId> all = Tokens(7, 0, 65);
  std::vector<TokenId> middle = all, gap = all;
  std::fill(middle.begin() + 60, middle.end(), kUnknownToken);
  gap[3] = kUnknownToken;
  const Case cases[] = {
      {all, middle, true, 65, 65},  // the lower one knows them
      {middle, all, true, 65, 65}, {middle, middle, true, 60, 60},  {gap, middle, true, 60, 60},
      {gap, gap, true, 3, 3},      {middle, middle, false, 65, 60}, {gap, middle, false, 65, 60},
  };
  for (const Case& c : cases) {
    BlockPool pool(50);
    Residents lower(1, &pool), upper(2, &pool), to(3, &pool);
    const auto fill = [&pool](Residents* residents, uint32_t layers,
                              const std::vector<TokenId>& tokens) {
      std::vector<std::vector<BlockId>> tables(layers);
      for (auto& table : tables) table = {pool.Take(), pool.Take()};
      residents->AdoptLeft({7}, tokens, {}, std::move(tables));
    };
    fill(&lower, 1, c.lower);
    fill(&upper, 2, c.upper);
    const Predecessor before[] = {{{3, 4}, &lower}, {{4, 6}, &upper}};
    TakeOverRows(before, {3, 6}, c.needs_tokens, 50, &pool, &to);
    ASSERT_EQ(to.left().size(), 1u);
    EXPECT_EQ(to.left()[0].rows, c.rows);
    const absl::Span<const TokenId> tokens = to.TokensLeft({7});
    ASSERT_EQ(tokens.size(), c.rows);
    for (uint32_t p = 0; p < c.rows; ++p) {
      EXPECT_EQ(tokens[p], p < c.num_known ? all[p] : kUnknownToken) << p;
    }
    EXPECT_EQ(pool.used(), BlocksOfSequence(c.rows, 3));
    EXPECT_TRUE(to.CheckIntegrity(true).ok()) << to.CheckIntegrity(true);
  }
}

}  // namespace
}  // namespace strait
