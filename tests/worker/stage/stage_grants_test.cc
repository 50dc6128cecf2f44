// SPDX-License-Identifier: Apache-2.0
//
// Defends: a granted step runs on the first of several stages when the ids that it refers to came
// back, and not before; what comes back is exactly what was asked for; stages in between know no
// ids and need none; a revoked grant holds up nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/worker/stage/fake_model.h"
#include "tests/worker/stage/plans.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr PipelineEpoch kEpoch{1, 1};
constexpr bool kGrants = true;

struct Pipeline {
  // Layers 0 to 6 on three stages.
  Pipeline() : first({0, 2}, 6, 64), middle({2, 4}, 6, 64), last({4, 6}, 6, 64) {
    EXPECT_TRUE(first.stage->Activate(kEpoch, 0, 3, kGrants).ok());
    EXPECT_TRUE(middle.stage->Activate(kEpoch, 1, 3, kGrants).ok());
    EXPECT_TRUE(last.stage->Activate(kEpoch, 2, 3, kGrants).ok());
  }
  void Plan(const v1::StepPlan& plan) {
    for (FakeStage* each : {&first, &middle, &last}) {
      const absl::Status accepted = each->stage->AcceptPlan(plan, 0);
      ASSERT_TRUE(accepted.ok()) << accepted;
    }
  }
  // The first stage has run a step: the others run it, too.
  StepOutput Follow(StepOutput out) {
    EXPECT_TRUE(middle.stage->AcceptHidden(*std::move(out.hidden), 0).ok());
    out = middle.Run();
    EXPECT_EQ(out.report.granted_ids_size(), 0);
    EXPECT_TRUE(last.stage->AcceptHidden(*std::move(out.hidden), 0).ok());
    return last.Run();
  }

  FakeStage first, middle, last;
};

// Step 1: sequences 1 and 2 with three tokens each; both are sampled after.
v1::StepPlan Prompts(const FakeStage& f) {
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddOpen(&plan, 2);
  WantSample(AddRows(&plan, 1, 0, {7, 8, 9}), 2);
  WantSample(AddRows(&plan, 2, 0, {4, 5, 6}), 2);
  return plan;
}

TEST(StageGrantsTest, TheFirstStageWaitsForIdsAndNobodyElseDoes) {
  Pipeline p;
  p.Plan(Prompts(p.first));
  for (uint64_t step = 2; step <= 4; ++step) {
    v1::StepPlan plan = p.first.Plan(step);
    for (const uint64_t id : {1, 2}) {
      WantSample(AddGrant(&plan, id, static_cast<uint32_t>(step) + 1, step - 1), 0);
    }
    p.Plan(plan);
  }
  std::vector<TokenId> one = {7, 8, 9};
  std::vector<TokenId> two = {4, 5, 6};
  for (uint64_t step = 1; step <= 4; ++step) {
    ASSERT_TRUE(p.first.stage->Ready()) << step;
    StepOutput out = p.first.Run();
    EXPECT_FALSE(out.sampled.has_value());
    EXPECT_FALSE(p.first.stage->Ready()) << "step " << step + 1 << " runs before its ids are there";
    if (step > 1) {
      EXPECT_THAT(out.report.granted_ids(), ElementsAre(one.back(), two.back()));
    }
    out = p.Follow(std::move(out));
    if (step > 1) {
      EXPECT_THAT(out.report.granted_ids(), ElementsAre(one.back(), two.back()));
    }
    ASSERT_TRUE(out.sampled.has_value());
    EXPECT_EQ(out.sampled->step.value, step);
    EXPECT_EQ(out.sampled->epoch, kEpoch);
    one.push_back(static_cast<TokenId>(FakeHash({4, 6}, one) % kFakeVocab));
    two.push_back(static_cast<TokenId>(FakeHash({4, 6}, two) % kFakeVocab));
    EXPECT_THAT(out.sampled->tokens, ElementsAre(one.back(), two.back()));
    ASSERT_TRUE(p.first.stage->AcceptSampled(*out.sampled).ok());
  }
  for (const FakeStage* each : {&p.first, &p.middle, &p.last}) {
    EXPECT_TRUE(each->stage->CheckIntegrity().ok());
    EXPECT_EQ(each->stage->blocks_used(), 4u);
  }
  EXPECT_THAT(p.middle.model->last_tokens,
              ElementsAre(4, 5, 6, kUnknownToken, kUnknownToken, kUnknownToken));
  two.pop_back();
  EXPECT_EQ(p.first.model->last_tokens, two);
  EXPECT_EQ(p.last.model->last_tokens, two);
}

TEST(StageGrantsTest, ASampleThatIsNoNumberComesBackAsTokenZero) {
  Pipeline p;
  p.Plan(Prompts(p.first));
  p.last.model->bad_sequence = SequenceId{2};
  const StepOutput out = p.Follow(p.first.Run());
  EXPECT_NE(out.report.results(1).error_code(), 0u);
  EXPECT_EQ(out.sampled->tokens.at(1), 0u);
  // The granted row runs all the same: blocks and lengths are as planned.
  v1::StepPlan plan = p.first.Plan(2);
  WantSample(AddGrant(&plan, 2, 3, 1), 0);
  p.Plan(plan);
  ASSERT_TRUE(p.first.stage->AcceptSampled(*out.sampled).ok());
  EXPECT_THAT(p.Follow(p.first.Run()).report.granted_ids(), ElementsAre(0));
}

TEST(StageGrantsTest, AClosedSequencesIdIsDropped) {
  Pipeline p;
  p.Plan(Prompts(p.first));
  v1::StepPlan plan = p.first.Plan(2);
  AddClose(&plan, 1);
  WantSample(AddGrant(&plan, 2, 3, 1), 0);
  p.Plan(plan);
  StepOutput out = p.first.Run();
  EXPECT_FALSE(p.first.stage->Ready());
  ASSERT_TRUE(p.first.stage->AcceptSampled(*p.Follow(std::move(out)).sampled).ok());
  ASSERT_TRUE(p.first.stage->Ready());
  out = p.Follow(p.first.Run());
  EXPECT_EQ(out.sampled->tokens.size(), 1u);
  ASSERT_TRUE(p.first.stage->AcceptSampled(*out.sampled).ok());
}

// The bug that this rules out: a cancelled sequence's granted step, and all that is behind it,
// stands at the first stage until an id comes that nobody wants.
TEST(StageGrantsTest, AnEndedSequenceHoldsUpNothing) {
  for (const bool ended : {true, false}) {
    Pipeline p;
    p.Plan(Prompts(p.first));
    v1::StepPlan plan = p.first.Plan(2);
    WantSample(AddGrant(&plan, 1, 3, 1), 0);
    p.Plan(plan);
    StepOutput out = p.first.Run();
    EXPECT_FALSE(p.first.stage->Ready());
    plan = p.first.Plan(3);
    AddClose(&plan, 1);
    plan.mutable_cache_ops(0)->mutable_close()->set_ended(ended);
    p.Plan(plan);
    // Preempted, its token is wanted: the row waits for the right id.
    ASSERT_EQ(p.first.stage->Ready(), ended);
    if (!ended) continue;
    StepOutput second = p.first.Run();
    EXPECT_THAT(second.report.granted_ids(), ElementsAre(0));
    ASSERT_TRUE(p.first.stage->Ready());
    const StepOutput third = p.first.Run();
    EXPECT_EQ(BlocksHeld(third.report), 2u);
    // The ids come late, of a sequence that is gone; the other's is kept.
    out = p.Follow(std::move(out));
    ASSERT_TRUE(p.first.stage->AcceptSampled(*out.sampled).ok());
    second = p.Follow(std::move(second));
    ASSERT_TRUE(p.first.stage->AcceptSampled(*second.sampled).ok());
    EXPECT_EQ(p.last.Run().report.tables_digest(), third.report.tables_digest());
    plan = p.first.Plan(4);
    WantSample(AddGrant(&plan, 2, 3, 1), 0);
    p.Plan(plan);
    ASSERT_TRUE(p.first.stage->Ready());
    EXPECT_THAT(p.first.Run().report.granted_ids(), ElementsAre(out.sampled->tokens[1]));
  }
}

TEST(StageGrantsTest, TheFirstStageRunsOnlySoFarAheadOfTheIds) {
  FakeStage f({0, 2}, 4, 1000);
  ASSERT_TRUE(f.stage->Activate(kEpoch, 0, 2, kGrants).ok());
  for (uint64_t step = 1; step <= limits::kMaxStepsInFlight + 1; ++step) {
    v1::StepPlan plan = f.Plan(step);
    AddOpen(&plan, step);
    WantSample(AddRows(&plan, step, 0, {1}), 0);
    ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
    ASSERT_EQ(f.stage->Ready(), step <= limits::kMaxStepsInFlight) << step;
    if (f.stage->Ready()) f.Run();
  }
  ASSERT_TRUE(f.stage->AcceptSampled({kEpoch, StepId{1}, {5}}).ok());
  EXPECT_TRUE(f.stage->Ready());
}

TEST(StageGrantsTest, RefusesIdsThatAreNotDue) {
  Pipeline p;
  p.Plan(Prompts(p.first));
  const auto refused = [](FakeStage& f, const SampledStep& sampled, absl::StatusCode code,
                          const char* says) {
    const absl::Status status = f.stage->AcceptSampled(sampled);
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(says));
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  refused(p.first, {kEpoch, StepId{1}, {1, 2}}, invalid, "due are none");
  p.first.Run();
  refused(p.first, {kEpoch, StepId{2}, {1, 2}}, invalid, "due are those of 1");
  refused(p.first, {kEpoch, StepId{1}, {1}}, invalid, "1 ids for 2 sequences");
  refused(p.first, {kEpoch, StepId{1}, {1, 2, 3}}, invalid, "3 ids for 2 sequences");
  refused(p.first, {kEpoch, StepId{1}, {1, kFakeVocab}}, invalid, "the vocabulary has 1000");
  refused(p.first, {{1, 0}, StepId{1}, {1, 2}}, absl::StatusCode::kAborted, "epoch");
  refused(p.first, {{1, 2}, StepId{1}, {1, 2}}, absl::StatusCode::kFailedPrecondition, "activate");
  refused(p.middle, {kEpoch, StepId{1}, {1, 2}}, invalid, "takes none");
  refused(p.last, {kEpoch, StepId{1}, {1, 2}}, invalid, "takes none");
  EXPECT_TRUE(p.first.stage->AcceptSampled({kEpoch, StepId{1}, {1, 2}}).ok());
  refused(p.first, {kEpoch, StepId{1}, {1, 2}}, invalid, "due are none");

  FakeStage without({0, 2}, 4, 64);
  ASSERT_TRUE(without.stage->Activate(kEpoch, 0, 2).ok());
  refused(without, {kEpoch, StepId{1}, {1}}, invalid, "takes none");
}

// Whatever is said about ids, only the truth is taken, and nothing of the rest is kept.
TEST(StageGrantsTest, RandomIdsAreTakenExactlyWhenTheyAreDue) {
  std::mt19937_64 random(20261124);
  Pipeline p;
  p.Plan(Prompts(p.first));
  p.first.Run();
  uint64_t due = 1;
  for (int i = 0; i < 20'000; ++i) {
    SampledStep sampled{
        {1, random() % 8 == 0 ? random() % 3 : 1}, StepId{random() % 4 + due - 1}, {}};
    sampled.tokens.resize(random() % 4);
    for (TokenId& token : sampled.tokens) {
      token = random() % 8 == 0 ? static_cast<TokenId>(random()) : random() % kFakeVocab;
    }
    const bool right = sampled.epoch == kEpoch && sampled.step.value == due &&
                       sampled.tokens.size() == 2 && sampled.tokens[0] < kFakeVocab &&
                       sampled.tokens[1] < kFakeVocab;
    ASSERT_EQ(p.first.stage->AcceptSampled(sampled).ok(), right) << i;
    if (!right) continue;
    if (due == 800) break;
    v1::StepPlan plan = p.first.Plan(++due);
    for (const uint64_t id : {1, 2}) {
      WantSample(AddGrant(&plan, id, static_cast<uint32_t>(due) + 1, due - 1), 0);
    }
    ASSERT_TRUE(p.first.stage->AcceptPlan(plan, 0).ok());
    EXPECT_THAT(p.first.Run().report.granted_ids(),
                ElementsAre(sampled.tokens[0], sampled.tokens[1]));
  }
  EXPECT_GT(due, 100u);
}

}  // namespace
}  // namespace strait
