// SPDX-License-Identifier: Apache-2.0
//
// Defends: what sequences share outlives an epoch as far as their rows do, and the books of both sides agree whatever
// happens between the begin of an epoch and its first plan.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/prefix_fixture.h"

namespace strait {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

CoreOptions Options(uint32_t num_stages = 1) {
  CoreOptions options = PrefixOptions(num_stages);
  options.grant_depth = 1;
  return options;
}

class PrefixEpochsTest : public PrefixFixture {
 protected:
  // A new epoch that costs nobody anything; stages answer when told to.
  void FailEpoch() {
    h_->answer_activations = false;
    v1::StageReport error;
    error.set_stage_id(h_->StageOf(w_[0]).load.stage_id());
    *error.mutable_epoch() = h_->StageOf(w_[0]).epoch;
    error.set_error_code(13);
    h_->Send(w_[0], error);
    h_->Tick(1'000'000);
    h_->answer_activations = true;
    ASSERT_FALSE(h_->core.Ready());
  }
  // All stages answer; what comes next is before the epoch's first plan.
  void Activate() {
    for (const WorkerId id : w_) h_->AnswerActivation(id);
    ASSERT_TRUE(h_->core.Ready());
  }
  void Cancel(RequestId id) { h_->core.OnCancel(id, std::nullopt, h_->now_us); }
  uint64_t Used() const { return h_->core.Stats().cache_bytes_used; }
};

TEST_F(PrefixEpochsTest, SurvivorsShareAfterAnEpochAndWhatNobodyHasIsGone) {
  Start(Options(2), {100'000, 100'000});
  h_->Submit(Prompt(0, 200, 2));
  h_->Run();
  const RequestId first = h_->Submit(Prompt(1, 200, 40));
  Rounds(*h_, w_, 4);
  const RequestId second = h_->Submit(Prompt(1, 200, 40));
  Rounds(*h_, w_, 4);
  ASSERT_EQ(Used(), (3 + 3 + 1 + 1) * 512u);
  FailEpoch();
  Activate();
  h_->Pump();
  Rounds(*h_, w_, 2);
  EXPECT_EQ(Used(), (3 + 1 + 1) * 512u);
  EXPECT_EQ(h_->core.Stats().prefix_blocks_survived, 2 * 3u);
  EXPECT_LT(h_->core.Stats().recomputed_rows, 10u);
  h_->Run();
  EXPECT_EQ(h_->tokens[first].size(), 40u);
  EXPECT_EQ(h_->tokens[second].size(), 40u);
}

TEST_F(PrefixEpochsTest, WhereAStageWasReplacedTheyAreMended) {
  for (const uint32_t lost : {0, 1}) {
    w_.clear();
    Start(Options(2), {100'000, 100'000});
    h_->Submit(Prompt(1, 200, 40));
    Rounds(*h_, w_, 4);
    h_->Submit(Prompt(1, 200, 40));
    Rounds(*h_, w_, 4);
    h_->Lose(w_[lost]);
    w_[lost] = h_->Attach(100'000);
    ASSERT_TRUE(h_->core.Ready());
    const RequestId third = h_->Submit(Prompt(1, 200, 4));
    EXPECT_THAT(h_->cached[third], IsEmpty()) << "nobody begins with what a stage lacks";
    h_->Run();
    EXPECT_THAT(h_->cached[third], testing::ElementsAre(192));
    EXPECT_EQ(h_->core.Stats().prefix_blocks_mended, 3u);
    EXPECT_THAT(h_->problems, IsEmpty());
  }
}

// The second one has its own blocks at the new stage, beside the prefix blocks that the first one mended. Alone, it
// would need more than there is.
TEST_F(PrefixEpochsTest, WhoHasBlocksTwiceGivesWayToItself) {
  Start(Options(2), {2550 + 10 * 256, 2550 + 10 * 256});
  const RequestId first = h_->Submit(Prompt(1, 200, 60));
  Rounds(*h_, w_, 4);
  const RequestId second = h_->Submit(Prompt(1, 200, 400));
  Rounds(*h_, w_, 4);
  ASSERT_EQ(h_->core.Stats().running, 2u);
  h_->Lose(w_[1]);
  w_[1] = h_->Attach(2550 + 10 * 256);
  ASSERT_TRUE(h_->core.Ready());
  h_->Run();
  EXPECT_EQ(h_->core.Stats().prefix_blocks_mended, 3u);
  EXPECT_EQ(h_->tokens[first].size(), 60u);
  EXPECT_EQ(h_->tokens[second].size(), 400u);
}

// With the first plan stages drop what no sequence has there. Nobody may count on that.
TEST_F(PrefixEpochsTest, NobodyBeginsBeforeTheFirstPlanWithWhatGoesWithIt) {
  CoreOptions options = Options();
  options.max_step_tokens = 64;
  options.max_running = 2;
  Start(options, {100'000});
  const RequestId busy = h_->Submit(Prompt(0, 500, 40));
  const RequestId gone = h_->Submit(Prompt(1, 200, 200));
  const RequestId next = h_->Submit(Prompt(1, 200, 20));
  for (int i = 0; i < 14; ++i) h_->Report(w_[0]);
  ASSERT_GE(h_->core.Stats().prefix_blocks_made, 10u);
  // It comes back without the first one's rows: they are computed again, and fill the first plan.
  FailEpoch();
  h_->StageOf(w_[0]).lengths.erase(SequenceId{1});
  h_->StageOf(w_[0]).told.erase(SequenceId{1});
  h_->StageOf(w_[0]).fed.erase(SequenceId{1});
  h_->StageOf(w_[0]).prefixes.Leave(SequenceId{1}, 0);
  Activate();
  Cancel(gone);
  h_->Pump();
  h_->Run();
  EXPECT_EQ(h_->tokens[busy].size(), 40u);
  EXPECT_EQ(h_->tokens[next].size(), 20u);
}

// One of its two sequences has a prefix block at the first stage alone, the other one the same at the second.
TEST_F(PrefixEpochsTest, WhatAStageHasForOneThatEndsIsGoneThere) {
  Start(Options(2), {100'000, 100'000});
  const RequestId first = h_->Submit(Prompt(1, 100, 40));
  Rounds(*h_, w_, 4);
  const RequestId second = h_->Submit(Prompt(1, 100, 40));
  Rounds(*h_, w_, 4);
  FailEpoch();
  // They have it as their own where they do not tell it.
  const auto own = [&](WorkerId worker, uint64_t sequence) {
    h_->StageOf(worker).prefixes.Leave(SequenceId{sequence}, 0);
  };
  own(w_[0], 1);
  own(w_[1], 2);
  Activate();
  Cancel(first);
  h_->Pump();
  h_->Run();
  EXPECT_EQ(h_->tokens[second].size(), 40u);
}

// Blocks that were full when the epoch began, and no prefix blocks yet, become such with the next rows.
TEST_F(PrefixEpochsTest, WhoeverWaitsForRowsThatWereKeptGetsThem) {
  Start(Options(), {100'000});
  h_->Submit(Prompt(1, 200, 50));
  // Computed; the report is lost.
  h_->MakeReport(w_[0]);
  FailEpoch();
  const RequestId second = h_->Submit(Prompt(1, 200, 50));
  Activate();
  h_->Pump();
  ASSERT_EQ(h_->core.Stats().kept_rows, 199u);
  ASSERT_EQ(h_->core.Stats().running, 1u);
  h_->Report(w_[0]);
  EXPECT_EQ(h_->core.Stats().running, 2u);
  EXPECT_THAT(h_->cached[second], testing::ElementsAre(192));
  h_->Run();
}

// How many stages and workers there are is no matter of rows.
TEST_F(PrefixEpochsTest, AScaleKeepsThemWhereTheirLayersStay) {
  Start(Options(), {Memory(20), 10'000});
  const RequestId id = h_->Submit(Prompt(1, 200, 60));
  for (int i = 0; i < 5; ++i) h_->Report(w_[0]);
  ASSERT_EQ(h_->core.Stats().prefix_blocks_made, 3u);
  h_->Scale(2);
  h_->Run();
  ASSERT_TRUE(h_->scaled.contains(ScaleId{1}));
  EXPECT_GT(h_->scaled.at(ScaleId{1}).reply.rows_kept(), 3 * 192u);
  EXPECT_EQ(h_->core.Stats().prefix_blocks_survived, 3u);
  EXPECT_EQ(h_->tokens[id].size(), 60u);
}

TEST(PrefixEpochsLiesTest, WhoTellsMoreThanCanBeIsEvictedByName) {
  struct Lie {
    uint32_t rows;
    uint32_t prefix_blocks;
    const char* what;
  };
  for (const Lie& lie :
       {Lie{200, 4, "tells 4 prefix blocks of sequence 1 with 200 rows, at most 3 can be"},
        Lie{130, 3, "tells 3 prefix blocks of sequence 1 with 130 rows, at most 2 can be"}}) {
    SCOPED_TRACE(lie.what);
    Harness h(Options(2), SmallModel());
    const std::vector<WorkerId> w = AttachAll(h, 2);
    const RequestId id = h.Submit(OneSequence(200, 30));
    Rounds(h, w, 4);
    h.before_active = [&](WorkerId worker, v1::StageState* state) {
      if (worker != w[0] || state->held().empty()) return;
      state->mutable_held(0)->set_rows(lie.rows);
      state->mutable_held(0)->set_prefix_blocks(lie.prefix_blocks);
    };
    v1::StageReport error;
    error.set_stage_id(h.StageOf(w[1]).load.stage_id());
    *error.mutable_epoch() = h.StageOf(w[1]).epoch;
    error.set_error_code(13);
    h.Send(w[1], error);
    h.Tick(1'000'000);
    ASSERT_TRUE(h.workers.at(w[0]).evicted);
    EXPECT_THAT(h.workers.at(w[0]).why.ToString(),
                testing::AllOf(HasSubstr("of worker w1 "), HasSubstr(lie.what)));
    EXPECT_FALSE(h.workers.at(w[1]).evicted);
    h.before_active = nullptr;
    h.Attach(100'000);
    h.Run();
    EXPECT_EQ(h.tokens[id].size(), 30u);
    EXPECT_THAT(h.problems, IsEmpty());
  }
}

}  // namespace
}  // namespace strait
