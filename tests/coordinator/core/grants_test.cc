// SPDX-License-Identifier: Apache-2.0
//
// Defends: decode steps are planned ahead of their tokens, never further than grant_depth or
// max_tokens, and never so that they hold up others needlessly; what was planned in vain is dropped
// and accounted to the last block; ids that went another way than the coordinator's are compared.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

CoreOptions Options(uint32_t num_stages, uint32_t grant_depth) {
  CoreOptions options;
  options.num_stages = num_stages;
  options.grant_depth = grant_depth;
  options.max_step_tokens = 64;
  options.prefill_chunk = 32;
  options.max_running = 16;
  options.edge_secret = 5;
  return options;
}

// One stage of 4 layers: weights 5000, workspace 50; `columns` blocks a layer of 128 bytes each.
uint64_t MemoryFor(uint32_t columns) { return 5050 + uint64_t{columns} * 4 * 128; }

TEST(GrantsTest, StepsAreGrantedAsDeepAsAskedAndNoDeeper) {
  for (const uint32_t depth : {1, 2, 3, 5}) {
    Harness h(Options(1, depth), SmallModel());
    const WorkerId worker = h.Attach(1'000'000);
    const RequestId id = h.Submit(OneSequence(4, 20));
    const auto& plans = h.StageOf(worker).plans;
    for (uint64_t step = 1; step <= 10; ++step) {
      ASSERT_EQ(plans.size(), depth) << "before report " << step;
      for (size_t i = 1; i < plans.size(); ++i) {
        ASSERT_TRUE(plans[i].sequences(0).has_sampled());
        EXPECT_EQ(plans[i].sequences(0).sampled().step_id(), plans[i].step_id() - 1);
        EXPECT_EQ(plans[i].sequences(0).first_position(), plans[i].step_id() + 2);
      }
      h.next_token = 50 + step % 20;
      h.Report(worker);
    }
    h.Run();
    ASSERT_EQ(h.tokens[id].size(), 20u);
    for (uint32_t i = 0; i < 20; ++i) EXPECT_EQ(h.tokens[id][i].position, 4 + i);
    EXPECT_EQ(h.tokens[id][4].id, 55u);
    EXPECT_EQ(h.ended.at(id).reason, FinishReason::kLength);
    const CoreStats stats = h.core.Stats();
    EXPECT_EQ(stats.granted_tokens, depth > 1 ? 19 : 0);
    EXPECT_EQ(stats.surplus_tokens, 0u) << "nothing is granted beyond max_tokens";
    EXPECT_EQ(stats.cache_bytes_used, 0u);
    EXPECT_THAT(h.problems, ElementsAre());
  }
}

TEST(GrantsTest, AStopTokenInsideAGrantEndsItAndTheRestIsDropped) {
  Harness h(Options(1, 4), SmallModel());
  const WorkerId worker = h.Attach(MemoryFor(8));
  RequestSpec spec = OneSequence(62, 40);
  spec.sequences[0].ignore_eos = false;
  const RequestId id = h.Submit(spec);
  h.Report(worker);
  h.Report(worker);
  h.Report(worker);
  h.next_token = 2;  // end of sequence
  h.Report(worker);
  EXPECT_EQ(h.tokens[id].size(), 3u);
  EXPECT_EQ(h.ended.at(id).reason, FinishReason::kStop);
  const v1::StepPlan& last = h.StageOf(worker).plans.back();
  ASSERT_EQ(last.cache_ops_size(), 1);
  EXPECT_TRUE(last.cache_ops(0).close().ended());
  EXPECT_EQ(last.sequences_size(), 0);
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 3u);
  EXPECT_EQ(h.core.Stats().surplus_tokens, 3u);
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(GrantsTest, VoidLogitsInsideAGrantEndTheirSequenceAlone) {
  Harness h(Options(1, 3), SmallModel());
  const WorkerId worker = h.Attach(MemoryFor(8));
  const RequestId bad = h.Submit(OneSequence(4, 20));
  const RequestId well = h.Submit(OneSequence(4, 20));
  while (h.StageOf(worker).plans.front().sequences_size() < 2 ||
         !h.StageOf(worker).plans.front().sequences(1).has_sampled()) {
    h.Report(worker);
  }
  v1::StageReport report = h.MakeReport(worker);
  ASSERT_EQ(report.results_size(), 2);
  report.mutable_results(0)->clear_sampled();
  report.mutable_results(0)->set_error_code(15);
  h.Send(worker, report);
  EXPECT_EQ(h.ended.at(bad).status.code(), absl::StatusCode::kInternal);
  h.Run();
  EXPECT_EQ(h.tokens[well].size(), 20u);
  EXPECT_FALSE(h.workers.at(worker).evicted) << h.workers.at(worker).why;
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(GrantsTest, InAFullPipelineAGrantedRowHoldsUpNothing) {
  for (const uint32_t stages : {2, 3}) {
    Harness h(Options(stages, 2), SmallModel());
    std::vector<WorkerId> workers;
    for (uint32_t i = 0; i < stages; ++i) workers.push_back(h.Attach(1'000'000));
    for (int i = 0; i < 6; ++i) h.Submit(OneSequence(4, 60));
    uint64_t granted = 0;
    for (int round = 0; round < 80; ++round) {
      for (const WorkerId id : workers) {
        if (!h.StageOf(id).plans.empty()) h.Report(id);
      }
      if (round < 10 || h.StageOf(workers.back()).plans.empty()) continue;
      const v1::StepPlan& plan = h.StageOf(workers.back()).plans.back();
      EXPECT_LE(plan.sequences_size(), 6 / static_cast<int>(stages));
      for (const v1::SequenceStep& step : plan.sequences()) {
        if (!step.has_sampled()) continue;
        ++granted;
        EXPECT_GE(plan.step_id() - step.sampled().step_id(), stages);
      }
    }
    EXPECT_GT(granted, 50u);
    h.Run();
    for (uint64_t id = 1; id <= 6; ++id) EXPECT_EQ(h.tokens[RequestId{id}].size(), 60u);
    EXPECT_THAT(h.problems, ElementsAre());
  }
}

TEST(GrantsTest, APromptIsPlannedBehindOneGrantAtMost) {
  Harness h(Options(2, 2), SmallModel());
  const WorkerId first = h.Attach(1'000'000);
  const WorkerId last = h.Attach(1'000'000);
  h.Submit(OneSequence(4, 60));
  for (int i = 0; i < 3; ++i) {
    h.Report(first);
    h.Report(last);
  }
  ASSERT_EQ(h.StageOf(first).plans.size(), 2u);
  EXPECT_TRUE(h.StageOf(first).plans.back().sequences(0).has_sampled());
  h.Submit(OneSequence(20, 4));
  ASSERT_EQ(h.StageOf(first).plans.size(), 3u);
  EXPECT_EQ(h.StageOf(first).plans.back().sequences(0).sequence_id(), 2u);
}

// Revocation: the end of a sequence whose granted row waits for an id is told at once, though no
// further step has room in the pipeline.
TEST(GrantsTest, ACancelledGrantIsRevokedAtOnce) {
  CoreOptions options = Options(2, 2);
  options.steps_in_flight = 2;
  Harness h(options, SmallModel());
  const WorkerId first = h.Attach(1'000'000);
  h.Attach(1'000'000);
  const RequestId id = h.Submit(OneSequence(4, 60));
  ASSERT_EQ(h.StageOf(first).plans.size(), 2u);
  h.Submit(OneSequence(4, 60));
  ASSERT_EQ(h.StageOf(first).plans.size(), 2u) << "the pipeline is full";
  h.core.OnCancel(id, std::nullopt, h.now_us);
  h.Pump();
  ASSERT_EQ(h.StageOf(first).plans.size(), 3u);
  const v1::StepPlan& close = h.StageOf(first).plans.back();
  EXPECT_EQ(close.sequences_size(), 0);
  ASSERT_EQ(close.cache_ops_size(), 1);
  EXPECT_TRUE(close.cache_ops(0).close().ended());
  h.Run();
  EXPECT_EQ(h.tokens[RequestId{2}].size(), 60u);
  EXPECT_EQ(h.core.Stats().surplus_tokens, 2u);
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(GrantsTest, PreemptedWithTokensUnderWayItGetsThemAll) {
  Harness h(Options(1, 3), SmallModel());
  const WorkerId worker = h.Attach(MemoryFor(5));
  const RequestId old = h.Submit(OneSequence(120, 100));
  const RequestId young = h.Submit(OneSequence(120, 100));
  bool closed = false;
  for (int i = 0; i < 2000 && !h.StageOf(worker).plans.empty(); ++i) {
    for (const v1::CacheOp& op : h.StageOf(worker).plans.back().cache_ops()) {
      if (!op.has_close() || h.ended.contains(young)) continue;
      closed = true;
      EXPECT_EQ(op.close().ended(), h.ended.contains(old) && op.close().sequence_id() == 1);
    }
    h.next_token = 50 + i % 40;
    h.Report(worker);
  }
  EXPECT_TRUE(closed);
  EXPECT_GE(h.core.Stats().preemptions, 1u);
  for (const RequestId id : {old, young}) {
    ASSERT_EQ(h.tokens[id].size(), 100u);
    for (uint32_t i = 0; i < 100; ++i) EXPECT_EQ(h.tokens[id][i].position, 120 + i);
  }
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_THAT(h.problems, ElementsAre());
}

TEST(GrantsTest, AWorkersDeathInTheMiddleOfAGrantReplaysFromTheJournal) {
  Harness h(Options(1, 4), SmallModel());
  const WorkerId worker = h.Attach(1'000'000);
  const RequestId id = h.Submit(OneSequence(4, 20));
  h.Report(worker);
  h.Report(worker);
  h.Lose(worker);
  const WorkerId next = h.Attach(1'000'000);
  const v1::SequenceStep& replay = h.StageOf(next).plans.front().sequences(0);
  EXPECT_EQ(replay.literals().ids_size(), 6) << "prompt and the two tokens that came";
  h.Run();
  EXPECT_EQ(h.tokens[id].size(), 20u);
  EXPECT_EQ(h.core.Stats().cache_bytes_used, 0u);
  EXPECT_THAT(h.problems, ElementsAre());
}

// A last stage that hands the first one another id than it reports would give tokens of another
// text: it is found at the very step that was fed with it.
TEST(GrantsTest, IdsThatWereFedAreComparedWithTheJournal) {
  Harness h(Options(2, 2), SmallModel());
  const WorkerId first = h.Attach(1'000'000);
  const WorkerId last = h.Attach(1'000'000);
  const RequestId id = h.Submit(OneSequence(4, 20));
  h.Report(first);
  v1::StageReport one = h.MakeReport(last);
  h.last_sampled[1] = 51;  // handed back; 50 is reported
  // The first stage tells before the last has: nothing to compare with yet.
  h.Report(first);
  EXPECT_FALSE(h.workers.at(first).evicted);
  h.Send(last, one);
  EXPECT_EQ(h.tokens[id].size(), 1u);
  h.last_sampled[1] = 50;
  h.Report(last);
  EXPECT_EQ(h.tokens[id].size(), 1u);
  EXPECT_TRUE(h.workers.at(last).evicted);
  EXPECT_THAT(h.workers.at(last).why.ToString(),
              HasSubstr("was fed token id 51 in step 2, step 1 reported 50"));
}

TEST(GrantsTest, AStageThatFedAnotherIdThanWasSampledIsEvicted) {
  for (const bool wrong_count : {false, true}) {
    Harness h(Options(1, 2), SmallModel());
    const WorkerId worker = h.Attach(1'000'000);
    h.Submit(OneSequence(4, 20));
    h.Report(worker);
    v1::StageReport report = h.MakeReport(worker);
    ASSERT_EQ(report.granted_ids_size(), 1);
    if (wrong_count) {
      report.add_granted_ids(50);
    } else {
      report.set_granted_ids(0, 49);
    }
    h.Send(worker, report);
    EXPECT_TRUE(h.workers.at(worker).evicted);
    EXPECT_THAT(h.workers.at(worker).why.ToString(),
                HasSubstr(wrong_count ? "2 granted ids, the plan has 1"
                                      : "was fed token id 49 in step 2, step 1 reported 50"));
  }
}

TEST(GrantsTest, BothEndsOfTheIdsEdgeAreTold) {
  Harness h(Options(3, 2), SmallModel());
  std::vector<v1::ActivateStage> stages;
  std::vector<WorkerId> workers;
  for (int i = 0; i < 3; ++i) workers.push_back(h.Attach(1'000'000));
  for (const WorkerId id : workers) stages.push_back(h.StageOf(id).activate);
  std::sort(stages.begin(), stages.end(),
            [](const auto& a, const auto& b) { return a.stage_index() < b.stage_index(); });
  for (const v1::ActivateStage& stage : stages) EXPECT_TRUE(stage.grants());
  EXPECT_EQ(stages[0].last_stage_id(), stages[2].stage_id());
  EXPECT_EQ(stages[2].first_stage_id(), stages[0].stage_id());
  EXPECT_THAT(stages[2].first_data_address(), HasSubstr("host:"));
  EXPECT_NE(stages[0].sampled_edge_nonce(), 0u);
  EXPECT_EQ(stages[0].sampled_edge_nonce(), stages[2].sampled_edge_nonce());
  EXPECT_NE(stages[0].sampled_edge_nonce(), stages[1].edge_nonce());
  EXPECT_EQ(stages[1].sampled_edge_nonce(), 0u);
  EXPECT_TRUE(stages[1].first_data_address().empty());

  CoreOptions options = Options(3, 2);
  options.steps_in_flight = 1;
  Harness without(options, SmallModel());
  for (int i = 0; i < 3; ++i) workers[i] = without.Attach(1'000'000);
  for (const WorkerId id : workers) {
    EXPECT_FALSE(without.StageOf(id).activate.grants());
    EXPECT_EQ(without.StageOf(id).activate.sampled_edge_nonce(), 0u);
  }
}

}  // namespace
}  // namespace strait
