// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever a worker does (dies, falls silent, fails, contradicts the plans), the pipeline
// comes back with a new epoch and clients get every token once; who contradicts is named and
// evicted; who serves nobody says so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kMemory = 100'000;

CoreOptions Options(uint32_t num_stages) {
  CoreOptions options;
  options.grant_depth = 1;
  options.num_stages = num_stages;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  return options;
}

TEST(RecoveryTest, SurvivorsKeepTheirWeightsAndSequencesAreReplayed) {
  Harness h(Options(2), SmallModel());
  h.tell_rows = false;
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 5));
  for (int i = 0; i < 3; ++i) {
    h.Report(first);
    h.Report(last);
  }
  ASSERT_EQ(h.tokens[id].size(), 3u);
  const v1::StageReport late = h.MakeReport(first);
  const uint64_t survivor_stage = h.StageOf(first).load.stage_id();
  h.Lose(last);
  EXPECT_FALSE(h.core.Ready());
  h.Send(first, late);  // of the old epoch: ignored
  const WorkerId spare = h.Attach(kMemory);
  ASSERT_TRUE(h.core.Ready());
  EXPECT_EQ(h.StageOf(first).load.stage_id(), survivor_stage) << "loaded once";
  EXPECT_EQ(h.StageOf(spare).load.layer_begin(), h.StageOf(first).load.layer_end());
  // Prompt and the three tokens, as literals; the fourth is sampled.
  const v1::StepPlan& replay = h.StageOf(spare).plans.front();
  EXPECT_EQ(replay.step_id(), 1u);
  ASSERT_EQ(replay.sequences_size(), 1);
  EXPECT_EQ(replay.sequences(0).literals().ids_size(), 13);
  h.Run();
  ASSERT_EQ(h.tokens[id].size(), 5u);
  for (uint32_t i = 0; i < 5; ++i) EXPECT_EQ(h.tokens[id][i].position, 10 + i);
  EXPECT_EQ(h.core.Stats().recoveries, 1u);
  EXPECT_EQ(h.core.Stats().sequences_interrupted, 1u);
  EXPECT_FALSE(h.workers.at(first).evicted);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(RecoveryTest, ScoresAlreadyGivenAreNotGivenAgain) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(kMemory);
  RequestSpec spec = OneSequence(80, 2);
  spec.sequences[0].score_prompt = true;
  const RequestId id = h.Submit(spec);
  h.Report(worker);
  ASSERT_EQ(h.scores[id].size(), 32u);
  h.Lose(worker);
  h.Attach(kMemory);
  h.Run();
  ASSERT_EQ(h.scores[id].size(), 79u);
  for (uint32_t i = 0; i < 79; ++i) EXPECT_EQ(h.scores[id][i].position, i + 1);
  EXPECT_EQ(h.tokens[id].size(), 2u);
}

TEST(RecoveryTest, AReplacementWithTooLittleMemoryMeansOtherLayerRanges) {
  ModelShape model = SmallModel(8);
  Harness h(Options(2), model);
  // 4 layers each; the replacement can hold one or two.
  h.Attach(20'000);
  const WorkerId last = h.Attach(20'000);
  ASSERT_TRUE(h.core.Ready());
  const RequestId id = h.Submit(OneSequence(10, 5));
  h.Lose(last);
  const WorkerId small = h.Attach(3'500);
  ASSERT_TRUE(h.core.Ready()) << h.core.StatusJson(h.now_us);
  const v1::LoadStage& load = h.StageOf(small).load;
  EXPECT_LT(load.layer_end() - load.layer_begin(), 4u);
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 5u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(RecoveryTest, TheOtherPipelineTakesOver) {
  CoreOptions options = Options(1);
  options.num_pipelines = 2;
  Harness h(options, SmallModel());
  const WorkerId a = h.Attach(kMemory);
  h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 5));
  h.Report(a);
  ASSERT_EQ(h.tokens[id].size(), 1u);
  h.Lose(a);
  EXPECT_TRUE(h.core.Ready());
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 5u);
}

TEST(RecoveryTest, SilenceEvicts) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(kMemory);
  h.TickInSilence(4'999'000);
  EXPECT_FALSE(h.workers.at(worker).evicted);
  h.TickInSilence(10'000);
  EXPECT_TRUE(h.workers.at(worker).evicted);
  EXPECT_EQ(h.workers.at(worker).why.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(h.core.Ready());
}

TEST(RecoveryTest, WhoContradictsThePlansIsEvictedAndNamed) {
  const std::vector<std::pair<std::string, std::function<void(v1::StageReport*)>>> lies = {
      {"bytes of latent blocks",
       [](v1::StageReport* r) { r->set_cache_bytes(r->cache_bytes() + 4); }},
      {"other sequences or lengths", [](v1::StageReport* r) { r->set_tables_digest(1); }},
      {"due is step 1", [](v1::StageReport* r) { r->set_step_id(2); }},
      {"token id 100, the vocabulary has 100",
       [](v1::StageReport* r) { r->mutable_results(0)->mutable_sampled()->set_token_id(100); }},
      {"log-probability nan",
       [](v1::StageReport* r) { r->mutable_results(0)->mutable_sampled()->set_logprob(NAN); }},
      {"0 results, 1 sequences", [](v1::StageReport* r) { r->clear_results(); }},
      {"sequence 9 where that of 1",
       [](v1::StageReport* r) { r->mutable_results(0)->set_sequence_id(9); }},
      {"no sample", [](v1::StageReport* r) { r->mutable_results(0)->clear_sampled(); }},
      {"alternatives",
       [](v1::StageReport* r) { r->mutable_results(0)->mutable_sampled()->add_top_ids(3); }},
      {"reports in epoch", [](v1::StageReport* r) { r->mutable_epoch()->set_counter(99); }},
      {"stage 77, which there never was", [](v1::StageReport* r) { r->set_stage_id(77); }},
  };
  for (const auto& [what, lie] : lies) {
    SCOPED_TRACE(what);
    Harness h(Options(1), SmallModel());
    const WorkerId worker = h.Attach(kMemory);
    const RequestId id = h.Submit(OneSequence(10, 3));
    v1::StageReport report = h.MakeReport(worker);
    lie(&report);
    h.Send(worker, report);
    ASSERT_TRUE(h.workers.at(worker).evicted);
    EXPECT_THAT(h.workers.at(worker).why.ToString(), HasSubstr(what));
    EXPECT_EQ(h.tokens[id].size(), 0u) << "nothing of a false report is applied";
    h.Attach(kMemory);
    h.Run();
    EXPECT_EQ(h.tokens[id].size(), 3u);
    EXPECT_THAT(h.problems, ElementsAre());
  }
}

v1::StageReport Error(Harness& h, WorkerId worker, absl::StatusCode code) {
  v1::StageReport report;
  report.set_stage_id(h.StageOf(worker).load.stage_id());
  *report.mutable_epoch() = h.StageOf(worker).epoch;
  report.set_error_code(static_cast<uint32_t>(code));
  report.set_error_message("broken");
  return report;
}

TEST(RecoveryTest, AnErrorCostsAnEpochTheThirdTheWorker) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  uint64_t counter = h.StageOf(first).epoch.counter();
  for (int i = 0; i < 2; ++i) {
    h.Send(last, Error(h, last, absl::StatusCode::kInternal));
    EXPECT_FALSE(h.core.Ready()) << "a pause comes first";
    h.Tick(1'000'000);
    ASSERT_TRUE(h.core.Ready());
    EXPECT_GT(h.StageOf(first).epoch.counter(), counter);
    EXPECT_EQ(h.StageOf(first).epoch.counter(), h.StageOf(last).epoch.counter());
    counter = h.StageOf(first).epoch.counter();
  }
  h.Send(last, Error(h, last, absl::StatusCode::kInternal));
  EXPECT_TRUE(h.workers.at(last).evicted);
  EXPECT_FALSE(h.workers.at(first).evicted);
}

// The bug: whoever told of a broken link twelve times was evicted, though mostly the other end was to blame.
TEST(RecoveryTest, ABrokenLinkEvictsNobody) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  const uint64_t begin_us = h.now_us;
  while (h.now_us < begin_us + 200'000'000) {
    h.Send(first, Error(h, first, absl::StatusCode::kUnavailable));
    for (int i = 0; i < 30 && !h.core.Ready(); ++i) h.Tick(100'000);
    ASSERT_TRUE(h.core.Ready());
  }
  EXPECT_FALSE(h.workers.at(first).evicted);
  EXPECT_FALSE(h.workers.at(last).evicted);
}

TEST(RecoveryTest, AStageThatSitsOnAStepIsEvicted) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  h.Submit(OneSequence(10, 5));
  h.Report(first);
  h.Tick(CoreOptions().step_timeout_us - 100'000);
  EXPECT_FALSE(h.workers.at(last).evicted);
  h.Tick(300'000);
  EXPECT_FALSE(h.workers.at(first).evicted);
  EXPECT_TRUE(h.workers.at(last).evicted);
  EXPECT_THAT(h.workers.at(last).why.ToString(), HasSubstr("step 1 not reported"));
}

// The bug: nine workers died of it.
TEST(RecoveryTest, ASequenceThatKillsWorkersEndsAtLast) {
  Harness h(Options(1), SmallModel());
  WorkerId worker = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 5));
  for (int i = 0; i < 3; ++i) {
    EXPECT_FALSE(h.ended.contains(id));
    h.Lose(worker);
    worker = h.Attach(kMemory);
  }
  ASSERT_TRUE(h.ended.contains(id));
  EXPECT_EQ(h.ended.at(id).reason, FinishReason::kError);
  EXPECT_EQ(h.ended.at(id).status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(h.ended.at(id).status.ToString(),
              HasSubstr("in the unfinished step of 3 workers that died"));
}

// Of two sequences one kills its workers. The other is beside it at first, and must not end with it.
TEST(RecoveryTest, WhoWasInTwoDeathsReplaysAloneAndOthersGoOn) {
  for (const uint32_t grant_depth : {1, 3}) {
    CoreOptions options = Options(1);
    options.grant_depth = grant_depth;
    options.steps_in_flight = 4;
    Harness h(options, SmallModel());
    WorkerId worker = h.Attach(kMemory);
    const RequestId deadly = h.Submit(OneSequence(40, 5));
    const RequestId other = h.Submit(OneSequence(41, 5));
    const auto has_deadly = [](const v1::StepPlan& plan) {
      return std::any_of(plan.sequences().begin(), plan.sequences().end(),
                         [](const v1::SequenceStep& step) { return step.sequence_id() == 1; });
    };
    int deaths = 0;
    for (int round = 0; round < 50 && !h.ended.contains(other); ++round) {
      // Those that are granted, too.
      for (const v1::StepPlan& plan : h.StageOf(worker).plans) {
        EXPECT_TRUE(deaths < 2 || !has_deadly(plan) || plan.sequences_size() == 1)
            << plan.ShortDebugString();
      }
      if (!has_deadly(h.StageOf(worker).plans.front())) {
        h.Report(worker);
        continue;
      }
      ++deaths;
      h.Lose(worker);
      worker = h.Attach(kMemory);
    }
    EXPECT_EQ(deaths, 3);
    ASSERT_TRUE(h.ended.contains(deadly));
    EXPECT_EQ(h.ended.at(deadly).status.code(), absl::StatusCode::kInternal);
    h.Run();
    EXPECT_EQ(h.tokens[other].size(), 5u);
    EXPECT_THAT(h.problems, ElementsAre());
  }
}

TEST(RecoveryTest, DeathsWithTokensInBetweenCountForNobody) {
  Harness h(Options(1), SmallModel());
  WorkerId worker = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 20));
  for (int i = 0; i < 12; ++i) {
    h.Report(worker);
    h.Lose(worker);
    worker = h.Attach(kMemory);
  }
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 20u);
}

// The same process on a new stream has not died.
TEST(RecoveryTest, AWorkerThatComesBackHasNotDied) {
  Harness h(Options(1), SmallModel());
  WorkerId worker = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 5));
  for (int i = 0; i < 12; ++i) {
    h.Lose(worker);
    worker = h.ComeBack(worker);
  }
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 5u);
}

// The bug: each of those that wait for a place began its own two minutes when the one before it had ended.
TEST(RecoveryTest, WhoWaitsBehindAFailingLinkEndsWithTheOthers) {
  CoreOptions options = Options(2);
  options.max_running = 1;
  Harness h(options, SmallModel());
  const WorkerId first = h.Attach(kMemory);
  h.Attach(kMemory);
  for (int i = 0; i < 3; ++i) h.Submit(OneSequence(10, 5));
  const uint64_t end_us = h.now_us + options.replay_timeout_us + 10'000'000;
  while (h.ended.size() < 3 && h.now_us < end_us) {
    h.Send(first, Error(h, first, absl::StatusCode::kUnavailable));
    for (int i = 0; i < 30 && !h.core.Ready(); ++i) h.Tick(100'000);
  }
  EXPECT_EQ(h.ended.size(), 3u);
}

// A long replay is no fault of links that failed before it and after it.
TEST(RecoveryTest, TimeInWhichLinksCarryStepsCountsForNobody) {
  CoreOptions options = Options(2);
  options.max_step_tokens = options.prefill_chunk = 10;
  Harness h(options, SmallModel());
  const WorkerId first = h.Attach(kMemory);
  const WorkerId last = h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(500, 5));
  for (int round = 0; round < 6; ++round) {
    h.Send(first, Error(h, first, absl::StatusCode::kUnavailable));
    while (!h.core.Ready()) h.Tick(100'000);
    // Rows, and no token.
    for (int i = 0; i < 3; ++i) {
      h.Report(first);
      h.Report(last);
      h.Tick(9'000'000);
    }
  }
  EXPECT_TRUE(h.tokens[id].empty());
  EXPECT_FALSE(h.ended.contains(id)) << h.ended.at(id).status;
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 5u);
}

// Links may fail for as long as --replay-timeout says, and not a number of times.
TEST(RecoveryTest, WhoGetsNoTokenBecauseOfLinksEndsInTime) {
  Harness h(Options(2), SmallModel());
  const WorkerId first = h.Attach(kMemory);
  h.Attach(kMemory);
  const RequestId id = h.Submit(OneSequence(10, 5));
  const uint64_t begin_us = h.now_us;
  int failures = 0;
  for (; !h.ended.contains(id) && failures < 1000; ++failures) {
    h.Send(first, Error(h, first, absl::StatusCode::kUnavailable));
    for (int i = 0; i < 30 && !h.core.Ready(); ++i) h.Tick(100'000);
  }
  EXPECT_GT(failures, 9);
  ASSERT_TRUE(h.ended.contains(id));
  EXPECT_EQ(h.ended.at(id).status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(h.ended.at(id).status.ToString(), HasSubstr("--replay-timeout"));
  EXPECT_GE(h.now_us - begin_us, CoreOptions().replay_timeout_us);
  EXPECT_LT(h.now_us - begin_us, CoreOptions().replay_timeout_us + 10'000'000);
}

TEST(RecoveryTest, WithoutAPipelineRequestsWaitForTheGraceThenFail) {
  CoreOptions options = Options(2);
  options.spare_wait_us = 3'600'000'000;  // else the other worker takes the place first
  Harness h(options, SmallModel());
  // Nobody at all: refused at once, and the answer says what is missing.
  const RequestId at_once = h.Submit(OneSequence(10, 5));
  EXPECT_EQ(h.refused.at(at_once).code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(h.refused.at(at_once).ToString(), HasSubstr("a pipeline needs 2"));
  const WorkerId first = h.Attach(kMemory);
  h.Attach(kMemory);
  const RequestId running = h.Submit(OneSequence(10, 5));
  h.Lose(first);
  const RequestId waits = h.Submit(OneSequence(10, 5));
  EXPECT_FALSE(h.refused.contains(waits));
  h.Tick(29'000'000);
  EXPECT_TRUE(h.ended.empty());
  h.Tick(1'000'001);
  for (const RequestId id : {running, waits}) {
    ASSERT_TRUE(h.ended.contains(id));
    EXPECT_EQ(h.ended.at(id).status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(h.ended.at(id).status.ToString(), HasSubstr("lacks 1 worker(s) of 2"));
  }
  const RequestId after = h.Submit(OneSequence(10, 5));
  EXPECT_EQ(h.refused.at(after).code(), absl::StatusCode::kUnavailable);
}

TEST(RecoveryTest, DeadlinesEndRequests) {
  Harness h(Options(1), SmallModel());
  const WorkerId worker = h.Attach(kMemory);
  RequestSpec spec = OneSequence(10, 500);
  spec.timeout_us = 1'000'000;
  const RequestId id = h.Submit(spec);
  h.Tick(999'999);
  EXPECT_TRUE(h.ended.empty());
  h.Tick(1);
  ASSERT_TRUE(h.ended.contains(id));
  EXPECT_EQ(h.ended.at(id).status.code(), absl::StatusCode::kDeadlineExceeded);
  h.Run();
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_FALSE(h.workers.at(worker).evicted);
}

TEST(RecoveryTest, AnotherModelOrVersionIsRefused) {
  Harness h(Options(1), SmallModel());
  v1::Hello version = h.MakeHello(kMemory);
  version.set_wire_version(kWireVersion + 1);
  v1::Hello model = h.MakeHello(kMemory);
  model.set_model_fingerprint(8);
  for (const v1::Hello& hello : {version, model}) {
    EXPECT_EQ(h.workers.at(h.Attach(hello)).why.code(), absl::StatusCode::kFailedPrecondition);
  }
}

TEST(RecoveryTest, AWorkerThatAttachesAgainReplacesItself) {
  Harness h(Options(1), SmallModel());
  const WorkerId old = h.Attach(kMemory);
  v1::Hello hello = h.MakeHello(kMemory);
  hello.set_instance(old.value);
  h.Attach(hello);
  EXPECT_TRUE(h.workers.at(old).evicted);
  EXPECT_TRUE(h.core.Ready());
}

}  // namespace
}  // namespace strait
