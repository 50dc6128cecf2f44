// SPDX-License-Identifier: Apache-2.0
//
// Defends: a failed link blames its pair; who fails with several is set aside, who works with another is not; blame
// ends; and how long a step may take follows from what steps took.
#include "coordinator/core/fault_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace strait {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;
using Standing = FaultPolicy::Standing;

constexpr WorkerId A{1}, B{2}, C{3}, D{4};
constexpr uint64_t kNow = 5'000'000;
constexpr bool kRing = true, kChain = false;
constexpr bool kAnswered = true;

TEST(FaultPolicyTest, ALinkThatDoesNotAnswerPartsItsPairAtOnce) {
  FaultPolicy policy;
  policy.OnLinkFailed(A, B, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.CostOfLink(A, B, kNow), 2u);
  EXPECT_EQ(policy.CostOfLink(B, A, kNow), 1u)
      << "better than what failed, worse than what did not";
  EXPECT_EQ(policy.CostOfLink(A, C, kNow), 0u);
  const std::vector<FaultPolicy::FailedLink> links = policy.FailedLinksOf(B, kNow);
  ASSERT_EQ(links.size(), 1u);
  EXPECT_EQ(links[0].from, A);
  EXPECT_EQ(links[0].to, B);
  EXPECT_EQ(links[0].why, "refused");
}

TEST(FaultPolicyTest, ALinkThatWorkedIsTriedOnceMore) {
  FaultPolicy policy;
  policy.OnLinkFailed(A, B, kAnswered, "reset", kNow);
  EXPECT_EQ(policy.CostOfLink(A, B, kNow), 0u);
  policy.OnLinkFailed(A, B, kAnswered, "reset", kNow + kBlameUs - 1);
  EXPECT_EQ(policy.CostOfLink(A, B, kNow + kBlameUs), 2u);
  EXPECT_EQ(policy.FailedLinksOf(A, kNow + kBlameUs)[0].times, 2u);
}

TEST(FaultPolicyTest, BlameEnds) {
  FaultPolicy policy;
  policy.OnLinkFailed(A, B, !kAnswered, "refused", kNow);
  policy.OnLinkFailed(A, C, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(A, kNow + kBlameUs - 1), Standing::kSetAside);
  EXPECT_EQ(policy.StandingOf(A, kNow + kBlameUs), Standing::kGood);
  EXPECT_EQ(policy.CostOfLink(A, B, kNow + kBlameUs), 0u);
  EXPECT_THAT(policy.FailedLinksOf(A, kNow + kBlameUs), IsEmpty());
  // What was before does not count for what comes.
  policy.OnLinkFailed(A, B, kAnswered, "reset", kNow + kBlameUs);
  EXPECT_EQ(policy.CostOfLink(A, B, kNow + kBlameUs), 0u);
}

// The bug: every healthy neighbour of one bad worker was blamed as much as that one, or more.
TEST(FaultPolicyTest, WhoFailsWithSeveralIsSetAsideAndTheyAreNot) {
  FaultPolicy policy;
  policy.OnLinkFailed(A, D, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(D, kNow), Standing::kGood);
  policy.OnLinkFailed(B, D, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(D, kNow), Standing::kSetAside);
  for (const WorkerId id : {A, B}) EXPECT_EQ(policy.StandingOf(id, kNow), Standing::kGood);
}

// A's partners are D, which is bad, and B. Only D's failures make A look bad, too.
TEST(FaultPolicyTest, WhomABadPartnerExplainsIsNotSetAside) {
  FaultPolicy policy;
  for (const WorkerId id : {A, B, C}) policy.OnLinkFailed(id, D, !kAnswered, "refused", kNow);
  policy.OnLinkFailed(A, B, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(D, kNow), Standing::kSetAside);
  EXPECT_EQ(policy.StandingOf(A, kNow), Standing::kGood);
  EXPECT_EQ(policy.StandingOf(B, kNow), Standing::kGood);
}

TEST(FaultPolicyTest, WhoseLinkToItselfFailsIsSetAside) {
  FaultPolicy policy;
  policy.OnLinkFailed(A, A, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(A, kNow), Standing::kSetAside);
}

TEST(FaultPolicyTest, APartnerThatWorksWithAnotherPointsAtTheOther) {
  FaultPolicy policy;
  policy.OnLinkWorked(A, C, kNow - 1);
  policy.OnLinkFailed(A, D, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(D, kNow), Standing::kGood) << "that was before";
  policy.OnLinkWorked(A, C, kNow + 1);
  EXPECT_EQ(policy.StandingOf(D, kNow + 1), Standing::kSuspect);
  EXPECT_EQ(policy.StandingOf(A, kNow + 1), Standing::kGood);
  // Both work with others: it is the path between them.
  policy.OnLinkWorked(B, D, kNow + 2);
  EXPECT_EQ(policy.StandingOf(D, kNow + 2), Standing::kGood);
  EXPECT_EQ(policy.CostOfLink(A, D, kNow + 2), 2u);
}

TEST(FaultPolicyTest, AnotherOrderPartsAPairWhereThereIsOne) {
  FaultPolicy policy;
  EXPECT_THAT(policy.BestOrder({A, B, C}, kRing, kNow), ElementsAre(A, B, C));
  policy.OnLinkFailed(B, C, !kAnswered, "no answer", kNow);
  EXPECT_EQ(policy.CostOf({{A, B, C}}, kChain, kNow), 2u);
  const std::vector<WorkerId> chain = policy.BestOrder({A, B, C}, kChain, kNow);
  EXPECT_EQ(policy.CostOf(chain, kChain, kNow), 0u);
  // Three in a ring are all neighbours: the other way round at least.
  const std::vector<WorkerId> ring = policy.BestOrder({A, B, C}, kRing, kNow);
  EXPECT_EQ(policy.CostOf(ring, kRing, kNow), 1u);
  const std::vector<WorkerId> four = policy.BestOrder({A, B, C, D}, kRing, kNow);
  EXPECT_EQ(policy.CostOf(four, kRing, kNow), 0u);
  // Two have no choice.
  EXPECT_EQ(policy.CostOf(policy.BestOrder({B, C}, kRing, kNow), kRing, kNow), 3u);
}

TEST(FaultPolicyTest, ACrewLeavesOutWhomItNeedNotHave) {
  FaultPolicy policy;
  EXPECT_THAT(policy.ChooseCrew({C, A, B}, 2, kRing, kNow), ElementsAre(A, C));
  policy.OnLinkFailed(A, C, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.CostOf(policy.ChooseCrew({C, A, B}, 2, kRing, kNow), kRing, kNow), 0u);
  EXPECT_THAT(policy.ChooseCrew({C, A}, 2, kRing, kNow), UnorderedElementsAre(A, C))
      << "both are needed";
}

TEST(FaultPolicyTest, AWorkerThatIsGoneExplainsItsLinks) {
  FaultPolicy policy;
  policy.OnLinkFailed(A, D, !kAnswered, "refused", kNow);
  policy.Forget(D);
  policy.OnLinkFailed(A, B, !kAnswered, "refused", kNow);
  EXPECT_EQ(policy.StandingOf(A, kNow), Standing::kGood) << "one partner, not two";
}

TEST(FaultPolicyTest, AStageIsForgivenByAFinishedStep) {
  FaultPolicy policy;
  for (int round = 0; round < 5; ++round) {
    for (uint32_t i = 1; i < kMaxStageErrors; ++i) EXPECT_FALSE(policy.OnStageError(7));
    policy.ForgiveStage(7);
  }
  for (uint32_t i = 1; i < kMaxStageErrors; ++i) EXPECT_FALSE(policy.OnStageError(7));
  EXPECT_FALSE(policy.OnStageError(8));
  EXPECT_TRUE(policy.OnStageError(7));
}

TEST(FaultPolicyTest, LoadsThatFailWaitLonger) {
  FaultPolicy policy;
  EXPECT_TRUE(policy.IsFit(A, kNow));
  policy.OnLoadFailed(A, kNow);
  EXPECT_FALSE(policy.IsFit(A, kNow + kLoadBackoffUs - 1));
  EXPECT_TRUE(policy.IsFit(A, kNow + kLoadBackoffUs));
  policy.OnLoadFailed(A, kNow);
  EXPECT_FALSE(policy.IsFit(A, kNow + 2 * kLoadBackoffUs - 1));
  for (int i = 0; i < 40; ++i) policy.OnLoadFailed(A, kNow);
  EXPECT_TRUE(policy.IsFit(A, kNow + kLoadBackoffMaxUs));
  policy.OnLoadFailed(A, kNow);
  policy.OnLoaded(A);
  EXPECT_TRUE(policy.IsFit(A, kNow));
}

TEST(FaultPolicyTest, WhoComesBackTellsForWhomItsDeathWasCounted) {
  FaultPolicy policy;
  policy.OnDied(77, {SequenceId{1}, SequenceId{2}});
  EXPECT_THAT(policy.OnReturned(78), IsEmpty());
  EXPECT_THAT(policy.OnReturned(77), ElementsAre(SequenceId{1}, SequenceId{2}));
  EXPECT_THAT(policy.OnReturned(77), IsEmpty()) << "once";
}

// ---------------------------------------------------------------- steps

StageTimes Times(double compute_us, double rows) {
  StageTimes times;
  times.steps = 20;
  times.compute_us = compute_us;
  times.rows = rows;
  return times;
}

TEST(FaultPolicyTest, AStepMayTakeAMultipleOfWhatStepsTook) {
  constexpr uint64_t kLeast = 10'000'000;
  // Fast ones have the least.
  EXPECT_EQ(StepPatienceUs(Times(20'000, 4), 4, 1, kLeast), kLeast);
  EXPECT_EQ(StepPatienceUs(Times(2'000'000, 256), 256, 1, kLeast), 40'000'000u);
  // More rows take longer, few ones read the weights all the same.
  EXPECT_EQ(StepPatienceUs(Times(2'000'000, 256), 512, 1, kLeast), 80'000'000u);
  EXPECT_EQ(StepPatienceUs(Times(80'000'000, 256), 1, 1, kLeast), 200'000'000u);
  EXPECT_DOUBLE_EQ(EstimateStepUs(Times(8'000, 8), 16, 1), 16'000);
}

TEST(FaultPolicyTest, AFirstStepIsJudgedByTheWeightsThatItReads) {
  constexpr uint64_t kLeast = 10'000'000;
  constexpr uint64_t kSmall = 1'000'000, kLarge = 16'000'000'000;
  EXPECT_EQ(StepPatienceUs({}, 512, kSmall, kLeast), kLeast);
  EXPECT_EQ(StepPatienceUs({}, 1, kLarge, kLeast), 16'000'000u);
  EXPECT_EQ(StepPatienceUs({}, 512, kLarge, kLeast), 128'000'000u);
  EXPECT_EQ(StepPatienceUs({}, 8192, kLarge, kLeast), kFirstStepMaxUs);
}

}  // namespace
}  // namespace strait
