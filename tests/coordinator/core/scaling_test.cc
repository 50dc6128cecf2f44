// SPDX-License-Identifier: Apache-2.0
//
// A pipeline gets other stages while it serves: no token is lost, doubled or changed, rows stay where their
// layers stay, memory is never booked twice, and whatever fails on the way leaves a pipeline that serves.
// The harness' workers object to what an honest worker would refuse.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/scaling_fixture.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST_F(ScalingTest, OneStageBecomesTwoOnAFullWorkerAndKeepsItsRows) {
  Start(Options(1), {kFixed + 10 * 512});
  Serve();
  const ScaleId id = h_->Scale(2);
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kUnknown) << "until the first step";
  Rounds(3);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 2}, LayerRange{2, 4}));
  EXPECT_EQ(CacheBytes(workers_[0]), 9 * 512u) << "a second workspace takes a block";
  const v1::ScaleReply& reply = h_->scaled.at(id).reply;
  EXPECT_EQ(reply.pipelines(), 1u);
  EXPECT_GT(reply.rows_kept(), 4 * 130u);
  EXPECT_EQ(reply.rows_lost(), 0u) << "no step was under way";
  EXPECT_EQ(reply.moved_bytes(), 0u);
  EXPECT_EQ(h_->core.Stats().recoveries, 0u);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, TwoStagesOfOneWorkerBecomeOne) {
  Start(Options(1), {kFixed + 20 * 512});
  h_->Scale(2);
  Serve();
  const ScaleId id = h_->Scale(1);
  Rounds(3);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 4}));
  EXPECT_EQ(CacheBytes(workers_[0]), 20 * 512u);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, TwoWorkersBecomeOneAndTheOtherASpare) {
  Start(Options(2), {30'000, 20'000});
  Serve();
  const ScaleId id = h_->Scale(1);
  Rounds(6);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 4}));
  EXPECT_EQ(NumStages(workers_[1]), 0u);
  const v1::ScaleReply& reply = h_->scaled.at(id).reply;
  EXPECT_GT(reply.rows_kept(), 4 * 130u) << "rows of two layers came from the other one";
  EXPECT_EQ(reply.rows_lost(), 0u);
  EXPECT_EQ(reply.moved_bytes(), h_->rows_landed) << "a byte a row and layer";
  EXPECT_GT(h_->rows_landed, 2 * 130u);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectAllTokens();
  // A place for the spare again.
  const ScaleId back = h_->Scale(2);
  ASSERT_TRUE(StatusOf(back).ok()) << StatusOf(back);
  EXPECT_EQ(NumStages(workers_[1]), 1u);
}

TEST_F(ScalingTest, ASpareTakesASecondStage) {
  Start(Options(1), {kFixed + 20 * 512, 10'000});
  Serve();
  const ScaleId id = h_->Scale(2);
  Rounds(6);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 3}));
  EXPECT_THAT(Layers(workers_[1]), ElementsAre(LayerRange{3, 4}));
  const v1::ScaleReply& reply = h_->scaled.at(id).reply;
  EXPECT_GT(reply.rows_kept(), 4 * 130u);
  EXPECT_EQ(reply.rows_lost(), 0u);
  EXPECT_GT(h_->rows_landed, 130u);
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, PipelinesTakeTurnsAndLaterOnesHaveAsManyStages) {
  Start(Options(1, 2), {20'000, 20'000});
  Serve();
  const ScaleId id = h_->Scale(2);
  Rounds(12);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_EQ(h_->scaled.at(id).reply.pipelines(), 2u);
  EXPECT_EQ(NumStages(workers_[0]), 2u);
  EXPECT_EQ(NumStages(workers_[1]), 2u);
  EXPECT_THAT(h_->core.StatusJson(h_->now_us), HasSubstr(R"("wanted":{"pipelines":2,"stages":2})"));
  ExpectAllTokens();
}

TEST_F(ScalingTest, WhatCannotBeIsRefusedWithTheReason) {
  Start(Options(1), {kFixed + 10 * 512});
  EXPECT_EQ(StatusOf(h_->Scale(0)).code(), absl::StatusCode::kInvalidArgument);
  const ScaleId many = h_->Scale(5);
  EXPECT_EQ(StatusOf(many).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(StatusOf(many).message()), HasSubstr("1 to 4"));
  requests_.push_back(h_->Submit(OneSequence(600, 40)));
  const ScaleId large = h_->Scale(2);
  EXPECT_EQ(StatusOf(large).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(StatusOf(large).message()), HasSubstr("639"));
  EXPECT_TRUE(StatusOf(h_->Scale(1)).ok()) << "it has one";
  h_->Run();
  EXPECT_EQ(h_->tokens[requests_[0]].size(), 40u);

  h_->answer_loads = false;
  const ScaleId first = h_->Scale(2);
  const ScaleId second = h_->Scale(2);
  EXPECT_FALSE(h_->scaled.contains(first));
  EXPECT_EQ(StatusOf(second).code(), absl::StatusCode::kFailedPrecondition);

  Harness none(Options(1), SmallModel());
  none.Scale(2);
  EXPECT_EQ(none.scaled.at(ScaleId{1}).status.code(), absl::StatusCode::kFailedPrecondition);
}

// A sequence that the pipeline may be asked to hold must fit before, while and after.
TEST_F(ScalingTest, WhatIsAdmittedMeanwhileFitsAfterwards) {
  Start(Options(1), {kFixed + 10 * 512});
  h_->answer_loads = false;
  const ScaleId id = h_->Scale(2);
  const RequestId too_long = h_->Submit(OneSequence(600, 40));
  EXPECT_TRUE(h_->refused.contains(too_long)) << "576 rows in the end";
  requests_.push_back(h_->Submit(OneSequence(517, 60)));
  h_->answer_loads = true;
  for (const auto& [stage_id, stage] : h_->workers.at(workers_[0]).stages) {
    if (stage.load.successor_of().empty()) continue;
    v1::StageState state;
    state.set_stage_id(stage_id);
    state.set_state(v1::StageState::LOADED);
    state.set_cache_bytes(stage.load.cache_bytes());
    h_->Answer(workers_[0], state);
  }
  h_->Pump();
  Rounds(8);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  ExpectAllTokens();
}

TEST_F(ScalingTest, PausesAreTold) {
  Start(Options(1), {20'000});
  Serve();
  const ScaleId id = ScaleToTwo(/*still_us=*/300'000);
  Rounds(3);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_EQ(h_->scaled.at(id).reply.pause_us(), 300'000u);
  ExpectAllTokens();
}

// ---------------------------------------------------------------- failures before the switch

TEST_F(ScalingTest, ALoadThatFailsLeavesThePipelineAsItWas) {
  Start(Options(1), {kFixed + 10 * 512});
  Serve();
  h_->answer_loads = false;
  const ScaleId id = h_->Scale(2);
  Rounds(3);
  ASSERT_EQ(NumStages(workers_[0]), 3u);
  EXPECT_EQ(h_->StageOf(workers_[0]).cache_bytes, 9 * 512u);
  const uint64_t failed = h_->workers.at(workers_[0]).stages.rbegin()->first;
  h_->workers.at(workers_[0]).stages.erase(failed);
  v1::StageState state;
  state.set_stage_id(failed);
  state.set_state(v1::StageState::FAILED);
  state.set_error_code(13);
  state.set_error_message("disk on fire");
  h_->Answer(workers_[0], state);
  h_->Pump();
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(StatusOf(id).message()), HasSubstr("disk on fire"));
  h_->Pump();
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 4}));
  EXPECT_EQ(h_->StageOf(workers_[0]).cache_bytes, 10 * 512u) << "it grew back";
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, ASpareLostWhileItLoadsLeavesThePipelineAsItWas) {
  Start(Options(1), {kFixed + 20 * 512, 10'000});
  Serve();
  h_->answer_loads = false;
  const ScaleId id = h_->Scale(2);
  ASSERT_EQ(NumStages(workers_[1]), 1u);
  h_->Lose(workers_[1]);
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 4}));
  EXPECT_EQ(h_->core.Stats().recoveries, 0u);
  ExpectAllTokens();
  // It may come back, and is told to drop what it had.
  const WorkerId back = h_->ComeBack(workers_[1]);
  EXPECT_EQ(NumStages(back), 0u);
}

TEST_F(ScalingTest, AWorkerOfThePipelineLostMeanwhileIsAnOrdinaryFailure) {
  for (const bool loading : {false, true}) {
    h_.reset();
    workers_.clear();
    requests_.clear();
    Start(Options(2), {kFixed - 2500 + 10 * 256, kFixed - 2500 + 10 * 256});
    Serve();
    h_->answer_loads = !loading;
    h_->answer_resizes = false;
    const ScaleId id = h_->Scale(3);
    if (loading) {
      for (const WorkerId worker : workers_) h_->AnswerResize(worker, h_->StageOf(worker));
      h_->Pump();
      Rounds(1);
    }
    EXPECT_FALSE(h_->scaled.contains(id)) << StatusOf(id);
    h_->Lose(workers_[0]);
    EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted) << StatusOf(id);
    h_->answer_loads = h_->answer_resizes = true;
    for (auto& [stage_id, stage] : h_->workers.at(workers_[1]).stages) {
      h_->AnswerResize(workers_[1], stage);
    }
    h_->Attach(20'000);
    ASSERT_TRUE(h_->core.Ready()) << h_->core.StatusJson(h_->now_us);
    ExpectAllTokens();
    EXPECT_THAT(h_->problems, IsEmpty());
  }
}

TEST_F(ScalingTest, AResizeThatIsRefusedEndsTheScale) {
  Start(Options(1), {kFixed + 10 * 512});
  Serve();
  h_->answer_resizes = false;
  const ScaleId id = h_->Scale(2);
  ASSERT_TRUE(h_->StageOf(workers_[0]).resize_due.has_value());
  h_->RefuseResize(workers_[0], h_->StageOf(workers_[0]));
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kResourceExhausted) << StatusOf(id);
  EXPECT_THAT(std::string(StatusOf(id).message()), HasSubstr("could not resize"));
  EXPECT_EQ(NumStages(workers_[0]), 1u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, AWorkerThatLoadsForeverIsEvicted) {
  Start(Options(1), {20'000, 10'000});
  Serve();
  h_->answer_loads = false;
  const ScaleId id = h_->Scale(2);
  h_->StageOf(workers_[1]);
  v1::StageState state;
  for (int i = 0; i < 302 && !h_->scaled.contains(id); ++i) {
    Rounds(1);
    h_->Tick(1'000'000);
  }
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(StatusOf(id).message()), HasSubstr("loading stands still"));
}

// ---------------------------------------------------------------- failures after the switch

TEST_F(ScalingTest, AWorkerLostAfterTheSwitchIsReplacedInTheNewStages) {
  Start(Options(1), {kFixed + 20 * 512, 10'000});
  Serve();
  h_->answer_activations = false;
  const ScaleId id = h_->Scale(2);
  Rounds(3);
  ASSERT_EQ(NumStages(workers_[0]), 2u) << "the old one is followed";
  h_->Lose(workers_[1]);
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(StatusOf(id).message()), HasSubstr("recovers"));
  h_->answer_activations = true;
  const WorkerId other = h_->Attach(10'000);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 3}));
  EXPECT_THAT(Layers(other), ElementsAre(LayerRange{3, 4}));
  EXPECT_GT(h_->core.Stats().kept_rows, 0u) << "the first one has rows of the stage before it";
  ExpectAllTokens();
}

TEST_F(ScalingTest, TheOnlyWorkerLostAfterTheSwitchIsReplacedByOneForBothStages) {
  Start(Options(1), {20'000});
  Serve();
  h_->answer_activations = false;
  const ScaleId id = h_->Scale(2);
  Rounds(3);
  h_->Lose(workers_[0]);
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  h_->answer_activations = true;
  const WorkerId other = h_->Attach(20'000);
  EXPECT_EQ(NumStages(other), 2u);
  ASSERT_TRUE(h_->core.Ready()) << h_->core.StatusJson(h_->now_us);
  ExpectAllTokens();
}

TEST_F(ScalingTest, AWorkerThatHasTwoStagesComesBackWithBothAndTheirRows) {
  Start(Options(1), {20'000});
  h_->Scale(2);
  Serve();
  h_->Lose(workers_[0]);
  const WorkerId back = h_->ComeBack(workers_[0]);
  EXPECT_EQ(NumStages(back), 2u);
  ASSERT_TRUE(h_->core.Ready());
  EXPECT_GT(h_->core.Stats().kept_rows, 100u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, AWorkerLostInTheMiddleOfTheSwitchComesBackToNothing) {
  Start(Options(1), {20'000});
  Serve();
  h_->answer_activations = false;
  h_->Scale(2);
  Rounds(3);
  h_->Lose(workers_[0]);
  h_->answer_activations = true;
  const WorkerId back = h_->ComeBack(workers_[0]);
  ASSERT_TRUE(h_->core.Ready()) << h_->core.StatusJson(h_->now_us);
  EXPECT_EQ(NumStages(back), 2u);
  ExpectAllTokens();
}

TEST_F(ScalingTest, ALinkThatFailsAfterTheSwitchDelaysIt) {
  Start(Options(1), {20'000});
  Serve();
  h_->answer_activations = false;
  const ScaleId id = h_->Scale(2);
  Rounds(3);
  v1::StageState state;
  const auto& stage = h_->workers.at(workers_[0]).stages.rbegin()->second;
  state.set_stage_id(stage.load.stage_id());
  state.set_state(v1::StageState::FAILED);
  *state.mutable_epoch() = stage.activate.epoch();
  state.set_error_code(14);
  h_->Answer(workers_[0], state);
  h_->answer_activations = true;
  h_->Tick(200'000);
  Rounds(3);
  EXPECT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_GT(h_->core.Stats().kept_rows, 100u) << "what was taken over is there in the next epoch";
  ExpectAllTokens();
}

TEST_F(ScalingTest, CachesGrowOnlyWhenTheOldStagesAreGone) {
  // Meanwhile there are two workspaces more, which take a block.
  Start(Options(2), {kFixed + 20 * 512, 10'000});
  Serve();
  h_->answer_unloads = false;
  const ScaleId id = h_->Scale(1);
  Rounds(6);
  EXPECT_FALSE(h_->scaled.contains(id));
  const uint64_t before = h_->workers.at(workers_[0]).stages.rbegin()->second.cache_bytes;
  h_->AnswerUnloads();
  Rounds(2);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_GT(CacheBytes(workers_[0]), before);
  ExpectAllTokens();
}

}  // namespace
}  // namespace strait
