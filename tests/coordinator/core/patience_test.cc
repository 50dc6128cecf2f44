// SPDX-License-Identifier: Apache-2.0
//
// Defends: who is blamed after how long. Every state that waits for a worker has a deadline, time
// in which the coordinator itself was stopped counts for none, blame ends with a step that went
// all the way, and a pipeline gets back what a small stand-in took from it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/core/cluster.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kMemory = 20'000;
constexpr uint64_t kHour = 3'600'000'000;

CoreOptions Options(uint32_t num_stages) {
  CoreOptions options;
  options.grant_depth = 1;
  options.num_stages = num_stages;
  return options;
}

void BreakLink(Harness* h, WorkerId worker) {
  v1::StageReport report;
  report.set_stage_id(h->StageOf(worker).load.stage_id());
  *report.mutable_epoch() = h->StageOf(worker).epoch;
  report.set_error_code(static_cast<uint32_t>(absl::StatusCode::kUnavailable));
  report.set_error_message("connection reset");
  h->Send(worker, report);
}

// The bug: the first stage's report of a step that got no further counted as progress, so a link
// that never worked was tried every 20 ms for ever.
TEST(PatienceTest, AStepThatEndsHalfWayIsNoProgress) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  h.Attach(kMemory);
  h.Submit(OneSequence(10, 5));
  uint64_t waited_us = 0;
  for (int round = 0; round < 12; ++round) {
    h.Report(first);
    BreakLink(&h, first);
    const uint64_t from_us = h.now_us;
    while (!h.core.Ready()) h.Tick(20'000);
    waited_us = h.now_us - from_us;
  }
  EXPECT_GE(waited_us, kActivateBackoffMaxUs);
}

TEST(PatienceTest, AFinishedStepForgivesEveryStage) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  h.Submit(OneSequence(10, 100));
  for (int round = 0; round < 30; ++round) {
    BreakLink(&h, first);
    while (!h.core.Ready()) h.Tick(100'000);
    h.Report(first);
    h.Report(last);
  }
  EXPECT_FALSE(h.workers.at(first).evicted);
  EXPECT_FALSE(h.workers.at(last).evicted);
}

// Columns of a pool that holds `layers` layers.
uint32_t Columns(const v1::LoadStage& load) {
  return load.cache_bytes() / SmallModel().block_bytes / (load.layer_end() - load.layer_begin());
}

// The bug: a stand-in's pool bounded all who came after it.
TEST(PatienceTest, WhoReplacesASmallStandInHoldsWhatWasPlanned) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  const uint32_t planned = Columns(h.StageOf(first).load);
  h.Lose(last);
  const WorkerId small = h.Attach(kMemory * 2 / 3);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_LT(Columns(h.StageOf(small).load), planned);
  // Neither does it bound its neighbour's successor.
  h.Lose(first);
  EXPECT_EQ(Columns(h.StageOf(h.Attach(kMemory)).load), planned);
  h.Lose(small);
  EXPECT_EQ(Columns(h.StageOf(h.Attach(kMemory)).load), planned);
  EXPECT_TRUE(h.core.Ready());
  EXPECT_THAT(h.core.StatusJson(h.now_us),
              HasSubstr("\"tokens_max\":" + std::to_string(planned * limits::kBlockTokens)));
}

TEST(PatienceTest, ARoomySpareReplacesATinyStandInWhenThePipelineIsPutTogetherAnew) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  const uint32_t planned = Columns(h.StageOf(first).load);
  h.Lose(last);
  const WorkerId tiny = h.Attach(4'000);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_LT(Columns(h.StageOf(tiny).load), planned / 3);
  // Spares, as long as the pipeline serves.
  for (int i = 0; i < 2; ++i) h.Attach(kMemory);
  EXPECT_FALSE(h.workers.at(tiny).stages.empty());
  h.Lose(first);
  h.Tick(100'000);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_TRUE(h.workers.at(tiny).stages.empty());
  EXPECT_THAT(h.core.StatusJson(h.now_us),
              HasSubstr("\"tokens_max\":" + std::to_string(planned * limits::kBlockTokens)));
  EXPECT_THAT(h.problems, ElementsAre());
}

// The bug: the time that a pipeline had spent loading counted as time without a worker, so the
// younger of two was dissolved at once though its worker was about to come back.
TEST(PatienceTest, AWorkerHasTimeToComeBackBeforeItsPipelineIsDissolved) {
  CoreOptions options = Options(2);
  options.num_pipelines = 2;
  Harness h(options, SmallModel());
  h.answer_loads = false;
  std::vector<WorkerId> workers;
  for (int i = 0; i < 4; ++i) workers.push_back(h.Attach(kMemory));
  h.Tick(20'000'000);
  h.Lose(workers[0]);
  h.Lose(workers[2]);
  h.Tick(kConsolidateAfterUs - 200'000);
  EXPECT_EQ(h.StageOf(workers[3]).load.stage_id(), 4u) << "as at first";
  h.Tick(400'000);
  EXPECT_GT(h.StageOf(workers[3]).load.stage_id(), 4u) << "it helps the older pipeline";
}

TEST(PatienceTest, ALoadThatStandsStillEndsTheWorkerOneThatAdvancesDoesNot) {
  Harness h(Options(1), SmallModel());
  h.answer_loads = false;
  const WorkerId worker = h.Attach(kMemory);
  v1::FromWorker progress;
  progress.mutable_load_progress()->set_stage_id(h.StageOf(worker).load.stage_id());
  for (int i = 1; i <= 3; ++i) {
    h.Tick(20'000'000);
    progress.mutable_load_progress()->set_bytes_loaded(i * 1000);
    h.core.OnWorkerMessage(worker, progress, h.now_us);
  }
  h.Tick(20'000'000);
  EXPECT_FALSE(h.workers.at(worker).evicted);
  h.core.OnWorkerMessage(worker, progress, h.now_us);  // no further than before
  h.Tick(11'000'000);
  ASSERT_TRUE(h.workers.at(worker).evicted);
  EXPECT_THAT(h.workers.at(worker).why.ToString(), HasSubstr("loading stands still at 3000"));
}

// Whoever loads several stages does it one after the other: those that wait stand still and are not to blame.
TEST(PatienceTest, AWorkerThatLoadsAnotherStageStandsNotStill) {
  Harness h(Options(2), SmallModel());
  WorkerId first = h.Attach(kMemory);
  h.Attach(kMemory);
  ASSERT_TRUE(h.core.Ready());
  h.answer_loads = false;
  h.Scale(4);
  ASSERT_EQ(h.workers.at(first).stages.size(), 3u);
  const uint64_t loads = std::next(h.workers.at(first).stages.begin())->first;
  for (int i = 1; i <= 2; ++i) {
    h.Tick(20'000'000);
    v1::FromWorker progress;
    progress.mutable_load_progress()->set_stage_id(loads);
    progress.mutable_load_progress()->set_bytes_loaded(i);
    h.core.OnWorkerMessage(first, progress, h.now_us);
  }
  EXPECT_FALSE(h.workers.at(first).evicted) << h.workers.at(first).why;
}

// A step may take long where steps do; where they are fast it hangs after ten seconds.
TEST(PatienceTest, AStepHangsByWhatStepsTook) {
  for (const uint64_t compute_us : {1'000u, 2'000'000u}) {
    Harness h(Options(1), SmallModel());
    const WorkerId worker = h.Attach(kMemory);
    h.Submit(OneSequence(1, 20));
    for (int i = 0; i < 5; ++i) {
      v1::StageReport report = h.MakeReport(worker);
      report.set_compute_us(compute_us);
      h.Send(worker, report);
    }
    const uint64_t patience_us = compute_us == 1'000 ? 10'000'000 : 40'000'000;
    h.Tick(patience_us - 100'000);
    EXPECT_FALSE(h.workers.at(worker).evicted) << h.workers.at(worker).why;
    h.Tick(300'000);
    ASSERT_TRUE(h.workers.at(worker).evicted);
    EXPECT_THAT(h.workers.at(worker).why.ToString(), HasSubstr("not reported for"));
  }
}

// The bug: after the coordinator had been stopped (SIGSTOP, a paused machine), it blamed workers
// for the time that it had slept.
TEST(PatienceTest, APauseOfTheCoordinatorBlamesNobody) {
  Harness h(Options(2), SmallModel());
  h.answer_loads = h.answer_activations = false;
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  h.Pause(kHour);  // while they load
  const auto say = [&h](WorkerId worker, v1::StageState::State what) {
    v1::FromWorker message;
    v1::StageState* state = message.mutable_stage_state();
    state->set_stage_id(h.StageOf(worker).load.stage_id());
    state->set_state(what);
    state->set_cache_bytes(h.StageOf(worker).load.cache_bytes());
    *state->mutable_epoch() = h.StageOf(worker).epoch;
    h.core.OnWorkerMessage(worker, message, h.now_us);
    h.Pump();
  };
  for (const WorkerId worker : {first, last}) say(worker, v1::StageState::LOADED);
  h.Pause(kHour);  // while they activate
  for (const WorkerId worker : {first, last}) say(worker, v1::StageState::ACTIVE);
  ASSERT_TRUE(h.core.Ready());
  const RequestId id = h.Submit(OneSequence(10, 5));
  h.Pause(kHour);  // while a step is under way
  h.Pause(kHour);
  EXPECT_FALSE(h.workers.at(first).evicted);
  EXPECT_FALSE(h.workers.at(last).evicted);
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 5u);
  EXPECT_EQ(h.core.Stats().recoveries, 0u);
}

// The bug: the stage before one that hangs waits to be let in, and was evicted with it.
TEST(PatienceTest, WhoWaitsForAnotherToActivateIsNotToBlame) {
  Harness h(Options(3), SmallModel());
  h.answer_activations = false;
  std::vector<WorkerId> w = AttachAll(h, 3, kMemory);
  h.AnswerActivation(w[2]);
  h.Pump();
  h.Tick(31'000'000);
  EXPECT_FALSE(h.workers.at(w[0]).evicted);
  EXPECT_TRUE(h.workers.at(w[1]).evicted);
  EXPECT_FALSE(h.workers.at(w[2]).evicted);
}

TEST(PatienceTest, AnActivationIsNotWaitedForForever) {
  Harness h(Options(1), SmallModel());
  h.answer_activations = false;
  const WorkerId worker = h.Attach(kMemory);
  h.Tick(29'000'000);
  EXPECT_FALSE(h.workers.at(worker).evicted);
  h.Tick(2'000'000);
  EXPECT_TRUE(h.workers.at(worker).evicted);
}

}  // namespace
}  // namespace strait
