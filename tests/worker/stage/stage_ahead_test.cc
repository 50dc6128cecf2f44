// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage that begins a step while the one before it computes says and computes the same as
// one that does not; what fails, ends or is dropped meanwhile costs no other step, and no memory goes
// while the model may still use it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "proto/model/reservation.h"
#include "tests/worker/stage/fake_model.h"
#include "tests/worker/stage/plans.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr PipelineEpoch kEpoch{1, 1};
constexpr LayerRange kAll{0, 2};

FakeStage OneStage() {
  FakeStage f(kAll, 2, 200);
  EXPECT_TRUE(f.stage->Activate(kEpoch, 0, 1).ok());
  return f;
}

void Accept(FakeStage& f, const v1::StepPlan& plan) {
  const absl::Status accepted = f.stage->AcceptPlan(plan, 0);
  ASSERT_TRUE(accepted.ok()) << accepted;
}

// Step 1 opens sequence 1 with tokens 7, 8, 9; those after it feed what the one before samples.
v1::StepPlan DecodePlan(const FakeStage& f, uint64_t step) {
  v1::StepPlan plan = f.Plan(step);
  if (step == 1) {
    AddOpen(&plan, 1, 3);
    WantSample(AddRows(&plan, 1, 0, {7, 8, 9}), 2);
  } else {
    WantSample(AddGrant(&plan, 1, static_cast<uint32_t>(step) + 1, step - 1), 0);
  }
  return plan;
}

TokenId Next(const std::vector<TokenId>& tokens) {
  return static_cast<TokenId>(FakeHash(kAll, tokens) % kFakeVocab);
}

TEST(StageAheadTest, AStepFeedsWhatTheOneUnderWaySamples) {
  FakeStage f = OneStage();
  for (uint64_t step = 1; step <= 6; ++step) Accept(f, DecodePlan(f, step));
  std::vector<TokenId> tokens = {7, 8, 9};
  f.Begin();
  for (uint64_t step = 1; step <= 6; ++step) {
    if (step < 6) {
      ASSERT_TRUE(f.stage->Ready()) << step;
      f.Begin();
      EXPECT_FALSE(f.stage->Ready()) << "two steps are begun";
      EXPECT_EQ(f.model->num_steps, static_cast<int>(step) - 1) << "none of the two is computed";
    }
    const StepOutput out = f.Finish();
    if (step > 1) {
      EXPECT_THAT(out.report.granted_ids(), ElementsAre(tokens.back()));
    }
    tokens.push_back(Next(tokens));
    EXPECT_EQ(out.report.results(0).sampled().token_id(), tokens.back()) << step;
    EXPECT_EQ(out.report.step_id(), step);
    EXPECT_TRUE(f.stage->CheckIntegrity().ok());
  }
  EXPECT_EQ(f.stage->num_begun(), 0u);
}

// Random plans: a stage that begins ahead whenever it may, and one that never does, tell the same.
class StageAheadRandomTest : public testing::TestWithParam<uint32_t> {};

TEST_P(StageAheadRandomTest, TheSameReportsAsOneStepAtATime) {
  std::mt19937_64 rng(GetParam());
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(rng() % n); };
  FakeStage ahead = OneStage();
  FakeStage serial = OneStage();
  serial.model->takes_ahead = false;
  ahead.model->rows_ahead = 20;
  ahead.model->bad_sequence = serial.model->bad_sequence = SequenceId{3};
  struct Open {
    uint32_t length = 0;
    uint64_t sampled_by = 0;
  };
  std::map<uint64_t, Open> open;
  std::vector<std::string> expected;
  std::vector<std::string> got;
  const auto keep = [](StepOutput out, std::vector<std::string>* to) {
    out.report.clear_compute_us();
    to->push_back(out.report.ShortDebugString());
  };
  int num_ahead = 0;
  int num_late = 0;
  for (uint64_t step = 1; step <= 400; ++step) {
    v1::StepPlan plan = ahead.Plan(step);
    for (uint64_t id = 1; id <= 6; ++id) {
      if (open.contains(id) && below(15) == 0) {
        AddClose(&plan, id);
        open.erase(id);
      }
      if (!open.contains(id) && below(4) == 0) {  // also one that this very plan closes
        AddOpen(&plan, id, 1 + below(5));
        if (below(3) == 0) {
          const auto op = plan.mutable_cache_ops(plan.cache_ops_size() - 1);
          op->mutable_open()->mutable_sampling()->set_presence_penalty(0.5f);
        }
        open[id];
      }
      if (!open.contains(id) || below(4) == 0 || open[id].length > 300) continue;
      Open& one = open[id];
      v1::SequenceStep* rows = nullptr;
      const uint32_t count = 1 + below(below(3) == 0 ? 30 : 3);
      if (one.sampled_by != 0 && below(5) > 0) {
        num_late += one.sampled_by + 1 == step;
        rows = AddGrant(&plan, id, one.length, one.sampled_by);
        one.length += 1;
      } else {
        rows = AddRows(&plan, id, one.length, std::vector<TokenId>(count, below(kFakeVocab)));
        one.length += count;
      }
      one.sampled_by = 0;
      if (below(6) == 0) continue;
      WantSample(rows, rows->has_sampled() ? 0 : count - 1, below(3));
      one.sampled_by = step;
    }
    ASSERT_TRUE(serial.stage->AcceptPlan(plan, 0).ok());
    keep(serial.Run(), &expected);
    ASSERT_TRUE(ahead.stage->AcceptPlan(plan, 0).ok());
    // Begins and ends as they fall, a few steps behind.
    do {
      while (ahead.stage->Ready() && (ahead.stage->num_begun() == 0 || below(4) > 0)) {
        num_ahead += ahead.stage->num_begun() > 0;
        ahead.Begin();
        ASSERT_TRUE(ahead.stage->CheckIntegrity().ok()) << ahead.stage->CheckIntegrity();
      }
      if (below(3) > 0) keep(ahead.Finish(), &got);
    } while (got.size() + 4 < step || (ahead.stage->num_begun() == 0 && ahead.stage->Ready()));
  }
  while (got.size() < expected.size()) {
    if (ahead.stage->Ready()) ahead.Begin();
    keep(ahead.Finish(), &got);
  }
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(got[i], expected[i]) << "step " << i + 1;
  EXPECT_EQ(ahead.model->last_tokens, serial.model->last_tokens);
  EXPECT_GT(num_ahead, 50);
  EXPECT_GT(num_late, 50);
}

INSTANTIATE_TEST_SUITE_P(Seeds, StageAheadRandomTest, testing::Range(1u, 31u));

TEST(StageAheadTest, PenaltiesWaitForTheId) {
  FakeStage f = OneStage();
  v1::StepPlan first = DecodePlan(f, 1);
  first.mutable_cache_ops(0)->mutable_open()->mutable_sampling()->set_repetition_penalty(1.5f);
  Accept(f, first);
  Accept(f, DecodePlan(f, 2));
  f.Begin();
  EXPECT_FALSE(f.stage->Ready());
  f.Finish();
  ASSERT_TRUE(f.stage->Ready());
  EXPECT_EQ(f.Run().report.results(0).sampled().token_id(), Next({7, 8, 9, Next({7, 8, 9})}));
}

TEST(StageAheadTest, OnlyWhatTheModelTakesAhead) {
  FakeStage f = OneStage();
  f.model->rows_ahead = 2;
  v1::StepPlan plan = f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, {1, 2, 3});
  Accept(f, plan);
  plan = f.Plan(2);
  AddRows(&plan, 1, 3, {1, 2, 3});
  Accept(f, plan);
  plan = f.Plan(3);
  AddRows(&plan, 1, 6, {1});
  Accept(f, plan);
  f.Begin();
  EXPECT_FALSE(f.stage->Ready()) << "three rows";
  f.Finish();
  ASSERT_TRUE(f.stage->Ready());
  f.Begin();
  EXPECT_TRUE(f.stage->Ready()) << "one row";
  f.Finish();
}

TEST(StageAheadTest, AStepWithoutRowsIsDoneWhenItIsTheOldest) {
  FakeStage f = OneStage();
  f.model->done = false;
  Accept(f, DecodePlan(f, 1));
  v1::StepPlan plan = f.Plan(2);
  AddClose(&plan, 1);
  Accept(f, plan);
  f.Begin();
  ASSERT_TRUE(f.stage->Ready());
  f.Begin();
  EXPECT_FALSE(f.stage->Done()) << "the model computes";
  const StepOutput first = f.Finish();
  EXPECT_TRUE(f.stage->Done());
  const StepOutput second = f.Finish();
  // Each tells what was held after it, though the second was begun before the first ended.
  EXPECT_EQ(BlocksHeld(first.report), BlocksOfSequence(3, 2));
  EXPECT_EQ(BlocksHeld(second.report), 0u);
  EXPECT_NE(first.report.tables_digest(), second.report.tables_digest());
  EXPECT_EQ(first.report.results_size(), 1) << "of a sequence that is closed by now";
}

TEST(StageAheadTest, TimeCountsOnce) {
  FakeStage f = OneStage();
  Accept(f, DecodePlan(f, 1));
  Accept(f, DecodePlan(f, 2));
  f.Begin();  // at 10
  f.Begin();  // at 20
  EXPECT_EQ(f.Finish().report.compute_us(), 20u) << "at 30";
  EXPECT_EQ(f.Finish().report.compute_us(), 10u) << "at 40, it was alone from 30";
}

TEST(StageAheadTest, AFailedStepTakesTheOneBehindItAlong) {
  FakeStage f = OneStage();
  for (uint64_t step = 1; step <= 3; ++step) Accept(f, DecodePlan(f, step));
  f.Begin();
  f.Begin();
  f.model->fail_next = true;
  const StepOutput out = f.Finish();
  EXPECT_EQ(out.report.step_id(), 1u);
  EXPECT_EQ(out.report.error_code(), static_cast<uint32_t>(absl::StatusCode::kDataLoss));
  EXPECT_EQ(out.report.results_size(), 0);
  EXPECT_EQ(f.stage->num_begun(), 0u);
  EXPECT_EQ(f.model->num_begun(), 0u) << "the model has let go of it";
  EXPECT_FALSE(f.stage->Ready());
  EXPECT_TRUE(f.stage->CheckIntegrity().ok());
  f.model->fail_next = false;
  ASSERT_TRUE(f.stage->Activate({1, 2}, 0, 1).ok());
  Accept(f, DecodePlan(f, 1));
  EXPECT_EQ(f.Run().report.results(0).sampled().token_id(), Next({7, 8, 9}));
}

TEST(StageAheadTest, AStepThatCannotBeBegunCostsNoneBeforeIt) {
  FakeStage f = OneStage();
  for (uint64_t step = 1; step <= 3; ++step) Accept(f, DecodePlan(f, step));
  f.Begin();
  f.model->fail_begin = true;
  f.Begin();
  EXPECT_FALSE(f.stage->Ready());
  EXPECT_EQ(f.stage->AcceptPlan(f.Plan(4), 0).code(), absl::StatusCode::kAborted);
  const StepOutput first = f.Finish();
  EXPECT_EQ(first.report.error_code(), 0u) << first.report.error_message();
  EXPECT_EQ(first.report.results(0).sampled().token_id(), Next({7, 8, 9}));
  ASSERT_EQ(f.stage->num_begun(), 1u);
  EXPECT_TRUE(f.stage->Done());
  const StepOutput second = f.Finish();
  EXPECT_EQ(second.report.step_id(), 2u);
  EXPECT_THAT(second.report.error_message(), HasSubstr("told not to begin"));
  EXPECT_EQ(second.report.granted_ids_size(), 0);
}

// A middle stage whose hidden states lie where the caller says; each place goes back once, and none
// while the model has a step.
struct Placed {
  Placed() : f({1, 3}, 5, 20) {
    EXPECT_TRUE(f.stage->Activate(kEpoch, 1, 3).ok());
    for (uint64_t step = 1; step <= 2; ++step) {
      v1::StepPlan plan = f.Plan(step);
      if (step == 1) AddOpen(&plan, 1);
      AddRows(&plan, 1, static_cast<uint32_t>(step) - 1, {5});
      EXPECT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
      EXPECT_TRUE(
          f.stage->AcceptHidden({kEpoch, StepId{step}, 1, Place(kFakeHiddenRowBytes)}, 0).ok());
      f.Begin([this](size_t bytes) { return Place(bytes); });
    }
    EXPECT_EQ(given_back, 0);
  }
  HiddenBuffer Place(size_t bytes) {
    EXPECT_EQ(bytes, kFakeHiddenRowBytes);
    return HiddenBuffer(memory.data() + bytes * places++, bytes, [this] {
      EXPECT_EQ(f.model->num_begun(), 0u) << "the model may still read or write it";
      ++given_back;
    });
  }

  std::vector<std::byte> memory = std::vector<std::byte>(4 * kFakeHiddenRowBytes);
  size_t places = 0;
  int given_back = 0;
  FakeStage f;
};

TEST(StageAheadTest, ANewEpochDropsWhatIsBegunOnceTheModelHasDoneWithIt) {
  Placed p;
  ASSERT_TRUE(p.f.stage->Activate({1, 2}, 1, 3).ok());
  EXPECT_EQ(p.given_back, 4);
  EXPECT_EQ(p.f.stage->num_begun(), 0u);
  EXPECT_FALSE(p.f.stage->Ready());
  EXPECT_EQ(p.f.stage->blocks_used(), 0u);
  // It goes on from step 1.
  v1::StepPlan plan = p.f.Plan(1);
  AddOpen(&plan, 1);
  AddRows(&plan, 1, 0, {5});
  Accept(p.f, plan);
  ASSERT_TRUE(p.f.stage->AcceptHidden(p.f.Hidden(1, 1), 0).ok());
  EXPECT_TRUE(p.f.Run().hidden.has_value());
}

TEST(StageAheadTest, AnOldEpochDropsNothing) {
  Placed p;
  EXPECT_EQ(p.f.stage->Activate({1, 1}, 1, 3).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(p.f.stage->num_begun(), 2u);
  p.f.stage.reset();  // neither does the end of the stage let go too early
  EXPECT_EQ(p.given_back, 4);
}

TEST(StageAheadTest, AFailedStepLetsGoOfTheOneBehindItAfterTheModel) {
  Placed p;
  p.f.model->fail_next = true;
  {
    const StepOutput out = p.f.Finish();
    EXPECT_NE(out.report.error_code(), 0u);
    EXPECT_FALSE(out.hidden.has_value());
  }
  EXPECT_EQ(p.given_back, 4);
}

// A revoked row does not wait at the first stage, so at the last it may begin before its id is there.
TEST(StageAheadTest, ARevokedRowAtTheLastOfSeveralStages) {
  FakeStage last({2, 4}, 4, 64);
  ASSERT_TRUE(last.stage->Activate(kEpoch, 1, 2, true).ok());
  Accept(last, DecodePlan(last, 1));
  Accept(last, DecodePlan(last, 2));
  ASSERT_TRUE(last.stage->AcceptHidden(last.Hidden(1, 3), 0).ok());
  ASSERT_TRUE(last.stage->AcceptHidden(last.Hidden(2, 1), 0).ok());
  last.Begin();
  ASSERT_TRUE(last.stage->Ready());
  last.Begin();
  const StepOutput first = last.Finish();
  const TokenId token = first.report.results(0).sampled().token_id();
  ASSERT_TRUE(first.sampled.has_value());
  EXPECT_THAT(first.sampled->tokens, ElementsAre(token));
  EXPECT_THAT(last.Finish().report.granted_ids(), ElementsAre(token));
  EXPECT_THAT(last.model->last_tokens, ElementsAre(7, 8, 9, token));
}

// Steps of other sequences go on at the first stage while ids are on their way.
TEST(StageAheadTest, TheFirstOfSeveralStagesBeginsWhatNeedsNoId) {
  FakeStage first({0, 2}, 4, 64);
  ASSERT_TRUE(first.stage->Activate(kEpoch, 0, 2, true).ok());
  Accept(first, DecodePlan(first, 1));
  v1::StepPlan plan = first.Plan(2);
  AddOpen(&plan, 2);
  WantSample(AddRows(&plan, 2, 0, {4}), 0);
  Accept(first, plan);
  plan = first.Plan(3);
  WantSample(AddGrant(&plan, 1, 3, 1), 0);
  Accept(first, plan);
  first.Begin();
  ASSERT_TRUE(first.stage->Ready());
  first.Begin();
  EXPECT_EQ(first.Finish().hidden->num_tokens, 3u);
  EXPECT_FALSE(first.stage->Ready()) << "the id of step 1 is on its way";
  ASSERT_TRUE(first.stage->AcceptSampled({kEpoch, StepId{1}, {77}}).ok());
  ASSERT_TRUE(first.stage->Ready());
  first.Begin();
  EXPECT_EQ(first.Finish().hidden->num_tokens, 1u);
  EXPECT_THAT(first.Finish().report.granted_ids(), ElementsAre(77));
}

}  // namespace
}  // namespace strait
