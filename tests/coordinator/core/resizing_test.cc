// SPDX-License-Identifier: Apache-2.0
//
// What caches of other sizes mean for plans: a smaller one holds from the plan before it, a larger one from the
// worker's word on; and a worker that says what it was not asked for is evicted by name.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kTenBlocks = 5050 + 10 * 512;

v1::FromWorker Resized(uint64_t stage_id, uint64_t cache_bytes) {
  v1::FromWorker message;
  message.mutable_cache_resized()->set_stage_id(stage_id);
  message.mutable_cache_resized()->set_cache_bytes(cache_bytes);
  return message;
}

// Nine of ten blocks are left while old and new stages are there; all ten are in use.
TEST(ResizingTest, TheYoungestGiveWayToASmallerCacheAndComeBack) {
  Harness h({}, SmallModel());
  const WorkerId worker = h.Attach(kTenBlocks);
  std::vector<RequestId> requests;
  for (int i = 0; i < 5; ++i) requests.push_back(h.Submit(OneSequence(60, 30)));
  Rounds(h, {worker}, 12);
  ASSERT_EQ(h.core.Stats().cache_bytes_used, 10 * 512u);
  const uint64_t preempted = h.core.Stats().preemptions;
  h.answer_loads = h.answer_resizes = false;
  h.Scale(2);
  EXPECT_EQ(h.core.Stats().preemptions, preempted + 1);
  EXPECT_EQ(h.core.Stats().running, 4u);
  Harness::FakeStage& stage = h.StageOf(worker);
  ASSERT_TRUE(stage.resize_due.has_value());
  // What was planned before may still use ten; the worker answers when it does not.
  h.AnswerResize(worker, stage);
  EXPECT_TRUE(stage.resize_due.has_value());
  h.answer_resizes = true;
  h.Run();
  EXPECT_FALSE(stage.resize_due.has_value());
  for (const RequestId id : requests) EXPECT_EQ(h.tokens[id].size(), 30u);
  EXPECT_THAT(h.problems, IsEmpty());
}

TEST(ResizingTest, WhoTellsAnotherSizeOrWasNotAskedIsEvictedByName) {
  struct Claim {
    const char* what;
    uint64_t stage_id;
    uint64_t cache_bytes;
    bool asked;
  };
  for (const Claim& claim : {Claim{"which was not asked for", 1, 5120, false},
                             Claim{"which was not asked for", 7, 5120, true},
                             Claim{"to 5120 bytes, not to the 4608 asked for", 1, 5120, true}}) {
    SCOPED_TRACE(claim.what);
    Harness h({}, SmallModel());
    const WorkerId worker = h.Attach(kTenBlocks);
    const RequestId id = h.Submit(OneSequence(100, 4));
    h.Report(worker);
    h.answer_loads = h.answer_resizes = false;
    if (claim.asked) h.Scale(2);
    h.core.OnWorkerMessage(worker, Resized(claim.stage_id, claim.cache_bytes), h.now_us);
    h.Pump();
    ASSERT_TRUE(h.workers.at(worker).evicted);
    EXPECT_THAT(std::string(h.workers.at(worker).why.message()), HasSubstr(claim.what));
    if (claim.asked) {
      EXPECT_EQ(h.scaled.at(ScaleId{1}).status.code(), absl::StatusCode::kAborted);
    }
    h.answer_loads = h.answer_resizes = true;
    h.Attach(kTenBlocks);
    h.Run();
    EXPECT_EQ(h.tokens[id].size(), 4u);
    EXPECT_THAT(h.problems, IsEmpty());
  }
}

TEST(ResizingTest, WhoDoesNotAnswerIsEvicted) {
  Harness h({}, SmallModel());
  const WorkerId worker = h.Attach(kTenBlocks);
  h.answer_resizes = false;
  h.Scale(2);
  h.Tick(301'000'000);
  EXPECT_TRUE(h.workers.at(worker).evicted);
  EXPECT_THAT(std::string(h.workers.at(worker).why.message()), HasSubstr("not resized for"));
}

// It may have done so before its stream ended, or not.
TEST(ResizingTest, AWorkerThatComesBackMayHaveEitherSize) {
  for (const bool done : {false, true}) {
    Harness h({}, SmallModel());
    const WorkerId worker = h.Attach(kTenBlocks);
    const RequestId id = h.Submit(OneSequence(100, 4));
    h.Report(worker);
    h.answer_resizes = false;
    h.Scale(2);
    Harness::FakeStage& stage = h.StageOf(worker);
    if (!done) stage.cache_bytes = stage.cache_before;
    h.Lose(worker);
    h.answer_resizes = true;
    const WorkerId back = h.ComeBack(worker);
    EXPECT_FALSE(h.workers.at(back).evicted) << h.workers.at(back).why;
    ASSERT_TRUE(h.core.Ready());
    EXPECT_GT(h.core.Stats().kept_rows, 0u);
    EXPECT_EQ(h.StageOf(back).cache_bytes, 5120u) << "it grows to what was planned";
    h.Run();
    EXPECT_EQ(h.tokens[id].size(), 4u);
    EXPECT_THAT(h.problems, IsEmpty());
  }
}

TEST(ResizingTest, AGrowthThatFailsLeavesTheSmallerCache) {
  Harness h({}, SmallModel());
  const WorkerId worker = h.Attach(kTenBlocks);
  h.answer_loads = h.answer_resizes = false;
  const ScaleId id = h.Scale(2);
  h.AnswerResize(worker, h.StageOf(worker));
  h.Pump();
  // The new stages never load: the old one is to grow again, and cannot.
  Harness::FakeWorker& fake = h.workers.at(worker);
  const uint64_t failed = fake.stages.rbegin()->first;
  fake.stages.erase(failed);
  v1::StageState state;
  state.set_stage_id(failed);
  state.set_state(v1::StageState::FAILED);
  state.set_error_code(13);
  h.Answer(worker, state);
  h.Pump();
  ASSERT_TRUE(h.scaled.contains(id));
  // What an edge had may come back late: it is asked again, each time later, and then no more.
  for (int refused = 0; refused < 6; ++refused) {
    ASSERT_TRUE(h.StageOf(worker).resize_due.has_value()) << refused;
    h.RefuseResize(worker, h.StageOf(worker));
    EXPECT_FALSE(h.StageOf(worker).resize_due.has_value()) << "not at once";
    h.Tick(4'000'000);
  }
  EXPECT_FALSE(h.StageOf(worker).resize_due.has_value()) << "it is not asked again";
  const RequestId large = h.Submit(OneSequence(600, 40));
  EXPECT_TRUE(h.refused.contains(large)) << "nine blocks hold 576 rows";
  EXPECT_THAT(h.problems, IsEmpty());
}

}  // namespace
}  // namespace strait
