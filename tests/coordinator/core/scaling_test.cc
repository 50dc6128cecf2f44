// SPDX-License-Identifier: Apache-2.0
//
// A pipeline gets other stages while it serves: no token is lost, doubled or changed, rows stay where their
// layers stay, memory is never booked twice, and whatever fails on the way leaves a pipeline that serves.
// The harness' workers object to what an honest worker would refuse.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
constexpr uint64_t kFixed = 5050;

CoreOptions Options(uint32_t num_stages, uint32_t num_pipelines = 1) {
  CoreOptions options;
  options.num_stages = num_stages;
  options.num_pipelines = num_pipelines;
  return options;
}

class ScalingTest : public testing::Test {
 protected:
  void Start(CoreOptions options, std::vector<uint64_t> memory) {
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (const uint64_t bytes : memory) workers_.push_back(h_->Attach(bytes));
    ASSERT_TRUE(h_->core.Ready());
  }
  void TearDown() override {
    ASSERT_NE(h_, nullptr);
    EXPECT_THAT(h_->problems, IsEmpty());
  }
  // Two sequences some tokens along.
  void Serve() {
    for (const uint32_t prompt : {100u, 30u}) {
      requests_.push_back(h_->Submit(OneSequence(prompt, 60)));
    }
    Rounds(5);
  }
  // Every stage reports what it has.
  void Rounds(int rounds) {
    for (int i = 0; i < rounds; ++i) {
      for (auto& [id, worker] : h_->workers) {
        std::vector<uint64_t> ids;
        for (const auto& [stage_id, stage] : worker.stages) ids.push_back(stage_id);
        for (const uint64_t stage_id : ids) {
          const auto it = worker.stages.find(stage_id);
          if (it != worker.stages.end() && !it->second.plans.empty()) h_->Report(id, it->second);
        }
      }
    }
  }
  // All of it, each once and in order.
  void ExpectAllTokens() {
    h_->Run();
    for (const RequestId id : requests_) {
      ASSERT_TRUE(h_->ended.contains(id)) << h_->core.StatusJson(h_->now_us);
      EXPECT_EQ(h_->ended.at(id).reason, FinishReason::kLength) << h_->ended.at(id).status;
      const std::vector<TokenInfo>& tokens = h_->tokens[id];
      ASSERT_EQ(tokens.size(), 60u);
      for (size_t i = 1; i < tokens.size(); ++i) {
        EXPECT_EQ(tokens[i].position, tokens[i - 1].position + 1);
      }
    }
  }
  size_t NumStages(WorkerId id) const { return h_->workers.at(id).stages.size(); }
  absl::Status StatusOf(ScaleId id) const {
    return h_->scaled.contains(id) ? h_->scaled.at(id).status : absl::UnknownError("no answer");
  }
  std::vector<LayerRange> Layers(WorkerId id) const {
    std::vector<LayerRange> layers;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) {
      layers.push_back(stage.layers());
    }
    return layers;
  }
  uint64_t CacheBytes(WorkerId id) const {
    uint64_t bytes = 0;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) bytes += stage.cache_bytes;
    return bytes;
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> workers_;
  std::vector<RequestId> requests_;
};

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
  h_->answer_activations = false;
  const ScaleId id = h_->Scale(2);
  Rounds(3);  // until nothing is under way
  h_->Tick(300'000);
  for (auto& [stage_id, stage] : h_->workers.at(workers_[0]).stages) {
    if (!stage.load.successor_of().empty()) h_->AnswerActivation(workers_[0], stage);
  }
  h_->answer_activations = true;
  h_->Pump();
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

// ---------------------------------------------------------------- rows that go to other workers

class CopyAheadTest : public ScalingTest {
 protected:
  static CoreOptions Sharing(uint32_t num_stages) {
    CoreOptions options = Options(num_stages);
    options.prefix_cache = true;
    return options;
  }
  uint64_t Recomputed() const { return h_->core.Stats().recomputed_rows; }
};

TEST_F(CopyAheadTest, OneTwoFourTwoStagesLoseNoRow) {
  Start(Sharing(1), {30'000, 30'000, 30'000, 30'000});
  Serve();
  for (const uint32_t num_stages : {2u, 4u, 2u}) {
    const ScaleId id = h_->Scale(num_stages);
    Rounds(6);
    ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
    EXPECT_EQ(h_->scaled.at(id).reply.rows_lost(), 0u) << num_stages;
    EXPECT_GT(h_->scaled.at(id).reply.moved_bytes(), 0u);
  }
  EXPECT_EQ(Recomputed(), 0u);
  ExpectAllTokens();
}

TEST_F(CopyAheadTest, WhatSequencesShareIsSharedAfterwards) {
  Start(Sharing(1), {30'000, 30'000});
  Serve();
  Rounds(3);
  // The same first tokens as the first sequence's.
  for (int i = 0; i < 3; ++i) requests_.push_back(h_->Submit(OneSequence(100, 60)));
  Rounds(4);
  const ScaleId id = h_->Scale(2);
  Rounds(8);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_EQ(h_->scaled.at(id).reply.rows_lost(), 0u);
  EXPECT_EQ(Recomputed(), 0u);
  ExpectAllTokens();
}

TEST_F(CopyAheadTest, WhoComesAndWhoGoesMeanwhileDoesNotHarm) {
  Start(Sharing(1), {30'000, 30'000});
  Serve();
  h_->answer_fetches = false;
  const ScaleId id = h_->Scale(2);
  Rounds(4);
  EXPECT_FALSE(h_->scaled.contains(id)) << "rows have not come";
  h_->core.OnCancel(requests_[1], std::nullopt, h_->now_us);
  requests_.pop_back();
  requests_.push_back(h_->Submit(OneSequence(50, 60)));
  Rounds(4);
  h_->answer_fetches = true;
  for (auto& [stage_id, stage] : h_->workers.at(workers_[1]).stages) {
    h_->AnswerFetches(workers_[1], stage);
  }
  h_->Pump();
  Rounds(8);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_EQ(h_->scaled.at(id).reply.rows_lost(), 0u);
  EXPECT_EQ(Recomputed(), 0u);
  ExpectAllTokens();
}

TEST_F(CopyAheadTest, RowsThatDoNotComeAreComputedAgainAndTheScaleIsDone) {
  Start(Sharing(1), {30'000, 30'000});
  Serve();
  h_->answer_fetches = false;
  const ScaleId id = h_->Scale(2);
  for (int i = 0; i < 20 && !h_->scaled.contains(id); ++i) {
    Rounds(1);
    h_->Tick(1'000'000);
  }
  Rounds(6);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_GT(h_->scaled.at(id).reply.rows_lost(), 0u);
  ExpectAllTokens();
}

TEST_F(CopyAheadTest, ALandingThatHasNoRoomComputesThoseRowsAgain) {
  Start(Sharing(1), {30'000, 30'000});
  Serve();
  h_->answer_fetches = false;
  const ScaleId id = h_->Scale(2);
  auto& stages = h_->workers.at(workers_[1]).stages;
  ASSERT_FALSE(stages.begin()->second.moves.fetches.empty());
  v1::FromWorker refusal;
  refusal.mutable_rows_fetched()->set_stage_id(stages.begin()->first);
  refusal.mutable_rows_fetched()->set_sequence_id(1);
  *refusal.mutable_rows_fetched()->mutable_placement() =
      stages.begin()->second.moves.fetches.front().placement();
  refusal.mutable_rows_fetched()->set_error_code(8);
  h_->core.OnWorkerMessage(workers_[1], refusal, h_->now_us);
  stages.begin()->second.moves.fetches.pop_front();
  h_->answer_fetches = true;
  h_->AnswerFetches(workers_[1], stages.begin()->second);
  h_->Pump();
  Rounds(8);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_GT(h_->scaled.at(id).reply.rows_lost(), 0u);
  // Through both stages, for the sake of the second one. The other sequence's came.
  EXPECT_GT(Recomputed(), 2 * 100u);
  EXPECT_LT(Recomputed(), 2 * 130u);
  ExpectAllTokens();
}

TEST_F(CopyAheadTest, ALandingThatLiesIsEvicted) {
  Start(Sharing(1), {30'000, 30'000});
  Serve();
  h_->answer_fetches = false;
  const ScaleId id = h_->Scale(2);
  auto& stage = h_->workers.at(workers_[1]).stages.begin()->second;
  v1::FromWorker lie;
  lie.mutable_rows_fetched()->set_stage_id(stage.load.stage_id());
  lie.mutable_rows_fetched()->set_sequence_id(1);
  *lie.mutable_rows_fetched()->mutable_placement() = stage.moves.fetches.front().placement();
  lie.mutable_rows_fetched()->set_rows(100'000);
  h_->core.OnWorkerMessage(workers_[1], lie, h_->now_us);
  h_->Pump();
  EXPECT_TRUE(h_->workers.at(workers_[1]).evicted);
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  EXPECT_THAT(Layers(workers_[0]), ElementsAre(LayerRange{0, 4}));
  EXPECT_EQ(Recomputed(), 0u);
  ExpectAllTokens();
}

// A step that does not end holds the pipeline up for --migrate-pause at most, twice.
TEST_F(CopyAheadTest, APipelineStandsStillNoLongerThanItMay) {
  CoreOptions options = Sharing(1);
  options.migrate_pause_us = 500'000;
  Start(options, {30'000, 30'000});
  Serve();
  const ScaleId id = h_->Scale(2);
  ASSERT_FALSE(h_->scaled.contains(id));
  h_->Tick(700'000);
  EXPECT_FALSE(h_->scaled.contains(id));
  h_->Tick(1'000'000);
  Rounds(8);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_GT(h_->scaled.at(id).reply.rows_lost(), 0u) << "rows of the step that was under way";
  ExpectAllTokens();
}

}  // namespace
}  // namespace strait
