// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a stage has finished outlives its epoch, nothing else does; the first plan of the next
// epoch says of every sequence what is kept; rows that a later stage lost go through the layers of those
// before it without being stored again, and not at all through those behind.
#include <gtest/gtest.h>

#include "tests/worker/stage/fake_model.h"
#include "tests/worker/stage/plans.h"

namespace strait {
namespace {

constexpr uint32_t kLayers = 2;  // of each of three stages

std::vector<TokenId> Tokens(uint32_t count) {
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < count; ++i) tokens.push_back(i % 50);
  return tokens;
}

// Stage `index` of three, in epoch 1.1.
FakeStage StageOfThree(uint32_t index) {
  FakeStage f({index * kLayers, (index + 1) * kLayers}, 3 * kLayers, 100);
  EXPECT_TRUE(f.stage->Activate({1, 1}, index, 3).ok());
  return f;
}

// One step with `rows` more rows of sequence `id`.
StepOutput RunRows(FakeStage* f, uint64_t step, uint64_t id, uint32_t first, uint32_t rows) {
  v1::StepPlan plan = f->Plan(step);
  if (first == 0) AddOpen(&plan, id);
  AddRows(&plan, id, first, Tokens(rows));
  EXPECT_TRUE(f->stage->AcceptPlan(plan, 0).ok());
  if (!f->stage->is_first()) {
    EXPECT_TRUE(f->stage->AcceptHidden(f->Hidden(step, rows), 0).ok());
  }
  return f->Run();
}

v1::OpenSequence* Keep(v1::StepPlan* plan, uint64_t id, const std::vector<uint32_t>& kept) {
  AddOpen(plan, id);
  v1::OpenSequence* open = plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open();
  for (const uint32_t rows : kept) open->add_kept_rows(rows);
  return open;
}

TEST(StageEpochsTest, RowsOfFinishedStepsStayAndAreTold) {
  FakeStage f = StageOfThree(0);
  RunRows(&f, 1, 7, 0, 100);
  RunRows(&f, 2, 3, 0, 64);
  RunRows(&f, 3, 7, 100, 1);
  // Begun and not finished, and accepted and not begun: these rows go.
  v1::StepPlan begun = f.Plan(4);
  AddRows(&begun, 7, 101, Tokens(30));
  ASSERT_TRUE(f.stage->AcceptPlan(begun, 0).ok());
  v1::StepPlan waits = f.Plan(5);
  AddOpen(&waits, 8);
  AddRows(&waits, 8, 0, Tokens(5));
  ASSERT_TRUE(f.stage->AcceptPlan(waits, 0).ok());
  f.Begin();
  EXPECT_TRUE(f.stage->held().empty());
  ASSERT_TRUE(f.stage->Activate({1, 2}, 0, 3).ok());
  const std::vector<HeldRows> held = f.stage->held();
  ASSERT_EQ(held.size(), 2u);
  EXPECT_EQ(held[0].id.value, 3u);
  EXPECT_EQ(held[0].rows, 64u);
  EXPECT_EQ(held[1].id.value, 7u);
  EXPECT_EQ(held[1].rows, 101u);
  EXPECT_EQ(f.stage->blocks_used(), BlocksOfSequence(101, kLayers) + BlocksOfSequence(64, kLayers));
  EXPECT_TRUE(f.stage->CheckIntegrity().ok()) << f.stage->CheckIntegrity();
  // Once more, before anybody said what becomes of them.
  ASSERT_TRUE(f.stage->Activate({1, 3}, 0, 3).ok());
  EXPECT_EQ(f.stage->held().size(), 2u);
}

TEST(StageEpochsTest, AFailedStepsRowsGo) {
  FakeStage f = StageOfThree(0);
  RunRows(&f, 1, 7, 0, 64);
  f.model->fail_next = true;
  v1::StepPlan plan = f.Plan(2);
  AddRows(&plan, 7, 64, Tokens(10));
  ASSERT_TRUE(f.stage->AcceptPlan(plan, 0).ok());
  EXPECT_NE(f.Run().report.error_code(), 0u);
  f.model->fail_next = false;
  ASSERT_TRUE(f.stage->Activate({1, 2}, 0, 3).ok());
  ASSERT_EQ(f.stage->held().size(), 1u);
  EXPECT_EQ(f.stage->held()[0].rows, 64u);
  EXPECT_EQ(f.stage->blocks_used(), BlocksOfSequence(64, kLayers));
}

TEST(StageEpochsTest, TheFirstPlanNamesEachOnce) {
  FakeStage f = StageOfThree(1);
  RunRows(&f, 1, 7, 0, 100);
  RunRows(&f, 2, 3, 0, 64);
  ASSERT_TRUE(f.stage->Activate({1, 2}, 1, 3).ok());
  const auto refused = [&](const v1::StepPlan& plan, absl::StatusCode code) {
    EXPECT_EQ(f.stage->AcceptPlan(plan, 0).code(), code) << plan.ShortDebugString();
  };
  v1::StepPlan one = f.Plan(1);
  Keep(&one, 7, {100, 100, 100});
  refused(one, absl::StatusCode::kFailedPrecondition);  // and what of 3?
  v1::StepPlan more = one;
  AddClose(&more, 3);
  more.mutable_cache_ops(0)->mutable_open()->set_kept_rows(1, 101);
  refused(more, absl::StatusCode::kFailedPrecondition);  // it has 100
  v1::StepPlan few = f.Plan(1);
  Keep(&few, 7, {100, 100});
  AddClose(&few, 3);
  refused(few, absl::StatusCode::kInvalidArgument);  // there are three stages
  v1::StepPlan never = one;
  AddClose(&never, 3);
  Keep(&never, 12, {0, 1, 0});
  refused(never, absl::StatusCode::kFailedPrecondition);  // it has none of 12
  // Close of what other stages have is no business of this one.
  v1::StepPlan good = one;
  AddClose(&good, 3);
  AddClose(&good, 99);
  good.mutable_cache_ops(0)->mutable_open()->set_kept_rows(1, 70);
  ASSERT_TRUE(f.stage->AcceptPlan(good, 0).ok());
  const StepOutput out = f.Run();
  EXPECT_EQ(BlocksHeld(out.report), BlocksOfSequence(70, kLayers));
  EXPECT_TRUE(f.stage->held().empty());
  v1::StepPlan later = f.Plan(2);
  Keep(&later, 15, {0, 0, 0});
  refused(later, absl::StatusCode::kInvalidArgument);  // only the first plan keeps
  v1::StepPlan unknown = f.Plan(2);
  AddClose(&unknown, 99);
  refused(unknown, absl::StatusCode::kFailedPrecondition);
  // It goes on from where it was cut.
  EXPECT_EQ(RunRows(&f, 2, 7, 70, 3).report.rows_stored(), 3u);
}

// The middle one of three was replaced: what it lost goes through the first again, and ends there.
TEST(StageEpochsTest, LostRowsGoThroughTheStagesUpToTheLastThatLacksThem) {
  FakeStage first = StageOfThree(0), middle = StageOfThree(1), last = StageOfThree(2);
  RunRows(&first, 1, 7, 0, 100);
  RunRows(&last, 1, 7, 0, 100);
  const auto replay = [&](FakeStage* f, uint32_t index) {
    EXPECT_TRUE(f->stage->Activate({1, 2}, index, 3).ok());
    v1::StepPlan plan = f->Plan(1);
    Keep(&plan, 7, {100, 0, 100});
    AddOpen(&plan, 8);
    AddRows(&plan, 8, 0, Tokens(4));  // through all stages: before those that end sooner
    AddRows(&plan, 7, 0, Tokens(100))->set_replay_stages(2);
    uint32_t num_rows = 0;
    const absl::Status accepted = f->stage->AcceptPlan(plan, 0, &num_rows);
    EXPECT_TRUE(accepted.ok()) << accepted;
    if (index > 0) {
      EXPECT_TRUE(f->stage->AcceptHidden(f->Hidden(1, num_rows), 0).ok());
    }
    StepOutput out = f->Run();
    EXPECT_TRUE(f->stage->CheckIntegrity().ok()) << f->stage->CheckIntegrity();
    EXPECT_EQ(BlocksHeld(out.report),
              BlocksOfSequence(100, kLayers) + BlocksOfSequence(4, kLayers));
    EXPECT_EQ(out.report.rows_computed(), num_rows);
    return out;
  };
  StepOutput out = replay(&first, 0);
  EXPECT_EQ(out.report.rows_computed(), 104u);
  EXPECT_EQ(out.report.rows_stored(), 4u);
  ASSERT_TRUE(out.hidden.has_value());
  EXPECT_EQ(out.hidden->num_tokens, 104u);
  out = replay(&middle, 1);
  EXPECT_EQ(out.report.rows_computed(), 104u);
  EXPECT_EQ(out.report.rows_stored(), 104u);
  ASSERT_TRUE(out.hidden.has_value());
  EXPECT_EQ(out.hidden->num_tokens, 4u);  // what leads the step
  EXPECT_EQ(out.hidden->data.size(), 4u * kFakeHiddenRowBytes);
  out = replay(&last, 2);
  EXPECT_EQ(out.report.rows_computed(), 4u);
  EXPECT_EQ(out.report.rows_stored(), 4u);
  // All have the same rows again, and go on together.
  for (FakeStage* f : {&first, &middle, &last}) {
    EXPECT_EQ(RunRows(f, 2, 7, 100, 1).report.rows_stored(), 1u);
  }
}

TEST(StageEpochsTest, AStepWithoutRowsForAStageWaitsForNone) {
  FakeStage last = StageOfThree(2);
  RunRows(&last, 1, 7, 0, 100);
  ASSERT_TRUE(last.stage->Activate({1, 2}, 2, 3).ok());
  v1::StepPlan plan = last.Plan(1);
  Keep(&plan, 7, {0, 0, 100});
  AddRows(&plan, 7, 0, Tokens(100))->set_replay_stages(2);
  ASSERT_TRUE(last.stage->AcceptPlan(plan, 0).ok());
  ASSERT_TRUE(last.stage->Ready());
  const StepOutput out = last.Run();
  EXPECT_EQ(out.report.error_code(), 0u);
  EXPECT_EQ(out.report.rows_computed(), 0u);
  EXPECT_EQ(BlocksHeld(out.report), BlocksOfSequence(100, kLayers));
}

TEST(StageEpochsTest, RepliesToWrongReplays) {
  FakeStage f = StageOfThree(1);
  RunRows(&f, 1, 7, 0, 100);
  ASSERT_TRUE(f.stage->Activate({1, 2}, 1, 3).ok());
  const auto refused = [&](const char* what, absl::StatusCode code, auto change) {
    v1::StepPlan plan = f.Plan(1);
    Keep(&plan, 7, {100, 100, 0});
    AddOpen(&plan, 8);
    AddRows(&plan, 7, 0, Tokens(100))->set_replay_stages(3);
    change(&plan);
    EXPECT_EQ(f.stage->AcceptPlan(plan, 0).code(), code) << what;
  };
  using Code = absl::StatusCode;
  refused("more stages than there are", Code::kInvalidArgument,
          [](v1::StepPlan* p) { p->mutable_sequences(0)->set_replay_stages(4); });
  refused("part of the rows is there", Code::kFailedPrecondition,
          [](v1::StepPlan* p) { p->mutable_cache_ops(0)->mutable_open()->set_kept_rows(1, 50); });
  refused("they end before this stage, which lacks them", Code::kFailedPrecondition,
          [](v1::StepPlan* p) {
            p->mutable_cache_ops(0)->mutable_open()->set_kept_rows(1, 99);
            p->mutable_sequences(0)->set_replay_stages(1);
          });
  refused("rows that are there, without a word of a replay", Code::kFailedPrecondition,
          [](v1::StepPlan* p) { p->mutable_sequences(0)->set_replay_stages(0); });
  refused("logits of rows that do not reach the last stage", Code::kInvalidArgument,
          [](v1::StepPlan* p) {
            p->mutable_sequences(0)->set_replay_stages(2);
            WantScore(p->mutable_sequences(0), 0, 1);
          });
  refused("a sample after rows that are computed again", Code::kInvalidArgument,
          [](v1::StepPlan* p) { WantSample(p->mutable_sequences(0), 99); });
  refused("those that go further come later", Code::kInvalidArgument, [](v1::StepPlan* p) {
    p->mutable_sequences(0)->set_replay_stages(2);
    AddRows(p, 8, 0, Tokens(1));
  });
  refused("nothing", Code::kOk, [](v1::StepPlan*) {});
}

}  // namespace
}  // namespace strait
