// SPDX-License-Identifier: Apache-2.0
//
// Warm spares: they load what pipelines serve, within their memory; who takes a lost place has the weights and is told to
// load nothing; whatever else needs a spare gets it, and its memory is never booked twice. The harness' workers object
// where more is on them than they offer.
#include "coordinator/core/warm.h"

#include "coordinator/core/fault_policy.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
constexpr uint64_t kRoomy = 100'000;

class WarmTest : public testing::Test {
 protected:
  void Start(uint32_t warm_spares, uint32_t num_spares, uint32_t num_pipelines = 1,
             uint64_t spare_bytes = kRoomy) {
    CoreOptions options;
    options.num_stages = 2;
    options.num_pipelines = num_pipelines;
    options.max_step_tokens = 256;
    options.warm_spares = warm_spares;
    options.max_cache_bytes_per_stage = 20 * 256;  // 20 blocks of two layers
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (uint32_t i = 0; i < 2 * num_pipelines; ++i) serving_.push_back(h_->Attach(kRoomy));
    for (uint32_t i = 0; i < num_spares; ++i) spares_.push_back(h_->Attach(spare_bytes));
    ASSERT_EQ(h_->core.Stats().pipelines_active, num_pipelines);
  }
  void TearDown() override { EXPECT_THAT(h_->problems, IsEmpty()); }

  // First layers of the stages that the worker has.
  std::vector<uint32_t> LayersOf(WorkerId id) const {
    std::vector<uint32_t> layers;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) {
      layers.push_back(stage.load.layer_begin());
    }
    std::sort(layers.begin(), layers.end());
    return layers;
  }
  std::vector<uint64_t> StageIdsOf(WorkerId id) const {
    std::vector<uint64_t> ids;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) ids.push_back(stage_id);
    return ids;
  }
  void Fail(WorkerId id, uint64_t stage_id) {
    h_->workers.at(id).stages.erase(stage_id);
    v1::StageState state;
    state.set_stage_id(stage_id);
    state.set_state(v1::StageState::FAILED);
    state.set_error_code(14);
    state.set_error_message("the disk is gone");
    h_->Answer(id, state);
    h_->Pump();
  }
  void Loaded(WorkerId id) {
    for (auto& [stage_id, stage] : h_->workers.at(id).stages) {
      if (std::exchange(stage.loaded, true)) continue;
      v1::StageState state;
      state.set_stage_id(stage_id);
      state.set_state(v1::StageState::LOADED);
      state.set_cache_bytes(stage.cache_bytes);
      h_->Answer(id, state);
      break;
    }
    h_->Pump();
  }
  void ExpectServes(uint32_t prompt = 300) {
    const RequestId request = h_->Submit(OneSequence(prompt, 20));
    h_->Run();
    ASSERT_TRUE(h_->ended.contains(request)) << h_->core.StatusJson(h_->now_us);
    EXPECT_TRUE(h_->ended.at(request).status.ok()) << h_->ended.at(request).status;
    EXPECT_EQ(h_->tokens[request].size(), 20u);
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> serving_, spares_;
};

TEST_F(WarmTest, NobodyIsWarmUnlessItIsAskedFor) {
  Start(0, 1);
  EXPECT_THAT(LayersOf(spares_[0]), IsEmpty());
}

TEST_F(WarmTest, ASpareHoldsEveryRangeThatItHasMemoryForAndTakesAPlaceWithoutALoad) {
  Start(1, 2);
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0, 2));
  EXPECT_THAT(LayersOf(spares_[1]), IsEmpty()) << "one was asked for";
  const std::vector<uint64_t> ids = StageIdsOf(spares_[0]);
  const std::string status = h_->core.StatusJson(h_->now_us);
  EXPECT_THAT(status, HasSubstr("\"warm\":[{\"state\":\"warm\""));
  const RequestId request = h_->Submit(OneSequence(300, 60));
  for (int i = 0; i < 3; ++i) {
    for (const WorkerId id : serving_) h_->Report(id);
  }
  h_->Lose(serving_[1]);
  // A stage that it had; the other one gave way, and the next spare is warmed.
  ASSERT_EQ(h_->workers.at(spares_[0]).stages.size(), 1u);
  EXPECT_THAT(ids, testing::Contains(StageIdsOf(spares_[0])[0]));
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(2));
  EXPECT_EQ(h_->StageOf(spares_[0]).cache_bytes, h_->StageOf(serving_[0]).cache_bytes)
      << "it holds as much as the one that it follows";
  EXPECT_THAT(LayersOf(spares_[1]), ElementsAre(0, 2));
  EXPECT_EQ(h_->core.Stats().warm_stages_taken, 1u);
  h_->Run();
  ASSERT_TRUE(h_->ended.contains(request));
  for (uint32_t i = 0; i < 60; ++i)
    EXPECT_EQ(h_->tokens[request].at(i).id, h_->token_at(1, 300 + i));
}

TEST_F(WarmTest, TheOneWithTheRangeIsPreferred) {
  Start(1, 0);
  spares_.push_back(h_->Attach(kRoomy));
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0, 2));
  spares_.push_back(h_->Attach(4 * kRoomy));  // the roomiest would be taken first
  h_->Lose(serving_[0]);
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  EXPECT_EQ(h_->core.Stats().warm_stages_taken, 1u);
  ExpectServes();
}

TEST_F(WarmTest, LittleMemoryHoldsWhatItCanAndCoversWhatNobodyCovers) {
  // A range of two layers takes 2,000 bytes of weights, 500 of embedding or head, a workspace and two blocks; it must
  // be able to serve with half of the rows. Two ranges are 5,000 bytes of weights.
  Start(2, 2, 1, 5'400);
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  EXPECT_THAT(LayersOf(spares_[1]), ElementsAre(2));
  h_->Lose(serving_[0]);
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  EXPECT_THAT(LayersOf(spares_[1]), ElementsAre(2)) << "it was left to what it has ready";
  EXPECT_EQ(h_->core.Stats().warm_stages_taken, 1u);
}

TEST_F(WarmTest, ASpareThatCouldNotServeHoldsNothing) {
  Start(1, 1, 1, 2'700);
  EXPECT_THAT(LayersOf(spares_[0]), IsEmpty());
}

TEST_F(WarmTest, TwoStagesLostAtOnceTakeOneSpareEach) {
  Start(2, 2);
  h_->answer_activations = false;
  h_->Lose(serving_[0]);
  h_->Lose(serving_[1]);
  h_->answer_activations = true;
  for (const WorkerId id : spares_) {
    ASSERT_EQ(h_->workers.at(id).stages.size(), 1u);
    h_->AnswerActivation(id);
  }
  h_->Pump();
  EXPECT_EQ(h_->core.Stats().warm_stages_taken, 2u);
  ExpectServes();
}

TEST_F(WarmTest, ARangeThatStillLoadsIsTakenAsItIs) {
  Start(1, 0);
  h_->answer_loads = false;
  spares_.push_back(h_->Attach(kRoomy));
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0)) << "one loads at a time";
  h_->Lose(serving_[0]);
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  EXPECT_EQ(h_->core.Stats().pipelines_active, 0u);
  h_->answer_loads = true;
  Loaded(spares_[0]);
  EXPECT_EQ(h_->core.Stats().pipelines_active, 1u);
  ExpectServes();
}

// The bug: a worker died while the spare that had its range still loaded another one, which cannot be broken off. The
// place waited for its end, as long as loading takes, though there was memory for the cache beside it.
TEST_F(WarmTest, ARangeThatStillLoadsHoldsUpNobody) {
  for (const bool has_room : {true, false}) {
    serving_.clear();
    spares_.clear();
    Start(1, 0);
    h_->answer_loads = false;
    // 5,000 of weights, two workspaces, one block of each layer; and for the cache of one stage, or not.
    spares_.push_back(h_->Attach(5000 + 100 + 512 + (has_room ? 20 * 256 : 2 * 256)));
    Loaded(spares_[0]);
    ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0, 2)) << "one is loaded, one loads";
    const RequestId request = h_->Submit(OneSequence(300, 60));
    for (int i = 0; i < 3; ++i) {
      for (const WorkerId id : serving_) h_->Report(id);
    }
    h_->answer_unloads = false;
    h_->Lose(serving_[0]);
    ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0, 2));
    EXPECT_EQ(h_->core.Stats().pipelines_active, has_room ? 1u : 0u);
    h_->answer_unloads = true;
    h_->AnswerUnloads();
    EXPECT_EQ(h_->core.Stats().pipelines_active, 1u);
    EXPECT_EQ(h_->StageOf(spares_[0]).cache_bytes, (has_room ? 20u : 13u) * 256)
        << "all that there is memory for, in the end";
    h_->Run();
    ASSERT_TRUE(h_->ended.contains(request)) << h_->core.StatusJson(h_->now_us);
    EXPECT_EQ(h_->tokens[request].size(), 60u);
    EXPECT_THAT(h_->problems, IsEmpty());
  }
}

TEST_F(WarmTest, AnotherRangeGivesWayBeforeALoad) {
  Start(1, 0);
  h_->answer_loads = false;
  spares_.push_back(h_->Attach(kRoomy));
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  h_->answer_unloads = false;
  h_->Lose(serving_[1]);
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(0)) << "its memory is not free yet";
  h_->answer_unloads = h_->answer_loads = true;
  h_->AnswerUnloads();
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(2));
  EXPECT_EQ(h_->core.Stats().warm_stages_taken, 0u);
  ExpectServes();
}

TEST_F(WarmTest, WhatFailsIsLeftAloneForAWhile) {
  Start(1, 0);
  h_->answer_loads = false;
  spares_.push_back(h_->Attach(kRoomy));
  Fail(spares_[0], StageIdsOf(spares_[0])[0]);
  h_->Tick(kWarmBackoffUs - 1'000'000);
  EXPECT_THAT(LayersOf(spares_[0]), IsEmpty());
  EXPECT_THAT(h_->core.StatusJson(h_->now_us), HasSubstr("the disk is gone"));
  h_->Tick(2'000'000);
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  Fail(spares_[0], StageIdsOf(spares_[0])[0]);
  h_->Tick(kWarmBackoffUs + 1'000'000);
  EXPECT_THAT(LayersOf(spares_[0]), IsEmpty()) << "twice as long";
  // It may have a place meanwhile.
  h_->answer_loads = true;
  h_->Lose(serving_[0]);
  EXPECT_THAT(LayersOf(spares_[0]), ElementsAre(0));
  ExpectServes();
}

TEST_F(WarmTest, ALoadThatStandsStillEvicts) {
  Start(1, 0);
  h_->answer_loads = false;
  spares_.push_back(h_->Attach(kRoomy));
  h_->Tick(CoreOptions().load_timeout_us + 1'000'000);
  EXPECT_TRUE(h_->workers.at(spares_[0]).evicted);
  EXPECT_THAT(h_->workers.at(spares_[0]).why.ToString(), HasSubstr("loading stands still"));
}

TEST_F(WarmTest, ANewPipelineTakesThem) {
  Start(2, 0, 2);
  h_->Lose(serving_[3]);
  h_->Lose(serving_[2]);
  h_->Lose(serving_[1]);
  h_->Tick(12'000'000);  // those that lack workers give them to the older one
  for (int i = 0; i < 3; ++i) spares_.push_back(h_->Attach(kRoomy));
  EXPECT_EQ(h_->core.Stats().pipelines_active, 2u);
  ExpectServes();
}

TEST_F(WarmTest, AScaleTakesThem) {
  Start(2, 2);
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0, 2));
  const ScaleId scale = h_->Scale(4);
  ASSERT_TRUE(h_->scaled.contains(scale)) << h_->core.StatusJson(h_->now_us);
  EXPECT_TRUE(h_->scaled.at(scale).status.ok()) << h_->scaled.at(scale).status;
  for (const WorkerId id : spares_) EXPECT_EQ(h_->workers.at(id).stages.size(), 1u);
  ExpectServes();
}

TEST_F(WarmTest, WhatNobodyServesAnyMoreGoes) {
  Start(1, 1);
  ASSERT_THAT(LayersOf(spares_[0]), ElementsAre(0, 2));
  const ScaleId scale = h_->Scale(1);
  ASSERT_TRUE(h_->scaled.at(scale).status.ok()) << h_->scaled.at(scale).status;
  // The model on one worker: the other is a spare, too, and one of both is warm with all of it.
  std::vector<size_t> sizes;
  for (const auto& [id, worker] : h_->workers) {
    for (const auto& [stage_id, stage] : worker.stages) sizes.push_back(stage.layers().size());
  }
  EXPECT_THAT(sizes, ElementsAre(4, 4));
  ExpectServes();
}

TEST_F(WarmTest, ASpareThatIsDrainedHasNothing) {
  Start(1, 1);
  ASSERT_THAT(LayersOf(spares_[0]), Not(IsEmpty()));
  const VerbId drain = h_->Drain(spares_[0]);
  h_->Tick(200'000);
  ASSERT_TRUE(h_->verbs.contains(drain));
  EXPECT_TRUE(h_->verbs.at(drain).ok()) << h_->verbs.at(drain);
  EXPECT_THAT(LayersOf(spares_[0]), IsEmpty());
}

TEST_F(WarmTest, AWarmSpareThatComesBackIsWarm) {
  Start(1, 1);
  const std::vector<uint64_t> ids = StageIdsOf(spares_[0]);
  h_->Lose(spares_[0]);
  const WorkerId again = h_->ComeBack(spares_[0]);
  EXPECT_EQ(StageIdsOf(again), ids);
  h_->Lose(serving_[0]);
  EXPECT_EQ(h_->core.Stats().warm_stages_taken, 1u);
  EXPECT_THAT(LayersOf(again), ElementsAre(0));
  ExpectServes();
}

TEST_F(WarmTest, ACacheThatCannotGrowCostsThePlace) {
  Start(1, 1);
  h_->answer_resizes = false;
  h_->Lose(serving_[0]);
  for (int i = 0; i < 20; ++i) {
    for (auto& [id, stage] : h_->workers.at(spares_[0]).stages) {
      if (!stage.resize_due) continue;
      h_->RefuseResize(spares_[0], stage);
      break;
    }
    h_->Tick(500'000);
  }
  h_->answer_resizes = true;
  h_->Tick(kLoadBackoffMaxUs);
  EXPECT_EQ(h_->core.Stats().pipelines_active, 1u) << "then it was loaded as from a cold one";
  ExpectServes();
}

TEST_F(WarmTest, WhoTellsOfOtherCacheThanWasAskedForLies) {
  Start(1, 0);
  h_->answer_loads = false;
  spares_.push_back(h_->Attach(kRoomy));
  v1::StageState state;
  state.set_stage_id(StageIdsOf(spares_[0])[0]);
  state.set_state(v1::StageState::LOADED);
  state.set_cache_bytes(1 << 20);
  h_->Answer(spares_[0], state);
  h_->Pump();
  EXPECT_TRUE(h_->workers.at(spares_[0]).evicted);
}

TEST(NextWarm, TakesWhatFewestCoverThenWhatMostServeThenWhatIsHeaviest) {
  CoreOptions options;
  ModelShape model = SmallModel();
  std::vector<WarmRange> ranges = {{.layers = {0, 1}, .num_stages = 1, .num_covers = 1},
                                   {.layers = {1, 2}, .num_stages = 1},
                                   {.layers = {2, 3}, .num_stages = 2},
                                   {.layers = {0, 4}, .num_stages = 2}};
  EXPECT_EQ(NextWarm(options, model, kRoomy, {}, ranges), (LayerRange{0, 4}));
  EXPECT_EQ(NextWarm(options, model, 4'000, {}, ranges), (LayerRange{2, 3})) << "all do not fit";
  HostedStages warm;
  warm[7].layers = {2, 3};
  EXPECT_EQ(NextWarm(options, model, 4'000, warm, ranges), (LayerRange{1, 2}));
  EXPECT_EQ(NextWarm(options, model, 900, {}, ranges), std::nullopt);
}

}  // namespace
}  // namespace strait
