// SPDX-License-Identifier: Apache-2.0
//
// Defends: who asks for a scale hears how it goes, what it would do, how long each sequence stood still, and why the
// pipeline has the layers that it has.
#include "coordinator/core/scale.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/scaling_fixture.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

class ScaleReportsTest : public ScalingTest {
 protected:
  const std::vector<ScaleReport>& Told(ScaleId id) { return h_->scale_told[id]; }
  std::vector<std::string> Phases(ScaleId id) {
    std::vector<std::string> phases;
    for (const ScaleReport& report : Told(id)) {
      if (phases.empty() || phases.back() != report.phase) phases.push_back(report.phase);
    }
    return phases;
  }
  std::string Status() { return h_->core.StatusJson(h_->now_us); }
};

TEST_F(ScaleReportsTest, EachPhaseIsToldWithItsFigures) {
  Start(Options(1), {kFixed + 20 * 512, 10'000});
  Serve();
  h_->answer_loads = h_->answer_fetches = h_->answer_links = false;
  const ScaleId id = h_->Scale(2);
  Rounds(2);
  ASSERT_FALSE(Told(id).empty());
  h_->Tick(300'000);
  EXPECT_EQ(Told(id).back().phase, "loading");
  EXPECT_EQ(Told(id).back().bytes_loaded, 0u);
  EXPECT_EQ(Told(id).back().bytes_to_load, 5000u) << "of all new stages, what is there included";
  h_->answer_loads = true;
  for (auto& [worker_id, worker] : h_->workers) {
    for (auto& [stage_id, stage] : worker.stages) {
      if (std::exchange(stage.loaded, true)) continue;
      v1::StageState state;
      state.set_stage_id(stage_id);
      state.set_state(v1::StageState::LOADED);
      state.set_cache_bytes(stage.load.cache_bytes());
      state.set_weight_bytes(7);
      h_->Answer(worker_id, state);
    }
  }
  h_->Pump();
  h_->Tick(300'000);
  const ScaleReport copying = Told(id).back();
  EXPECT_EQ(copying.phase, "copying");
  EXPECT_EQ(copying.pipeline, PipelineId{1});
  EXPECT_EQ(copying.pipelines_total, 1u);
  EXPECT_EQ(copying.bytes_loaded, 14u);
  EXPECT_EQ(copying.rows, 0u);
  EXPECT_GE(copying.rows_total, 130u);
  EXPECT_EQ(copying.edges_up, 0u);
  EXPECT_EQ(copying.edges_total, 1u);
  EXPECT_GE(copying.total_us, 300'000u);
  EXPECT_THAT(Status(), HasSubstr(R"("phase":"copying")"));
  h_->answer_fetches = true;
  for (auto& [worker_id, worker] : h_->workers) {
    std::vector<uint64_t> ids;
    for (const auto& [stage_id, stage] : worker.stages) ids.push_back(stage_id);
    for (const uint64_t stage_id : ids) h_->AnswerFetches(worker_id, worker.stages.at(stage_id));
  }
  h_->Tick(300'000);
  EXPECT_GE(Told(id).back().rows, 130u);
  EXPECT_GT(Told(id).back().moved_bytes, 0u);
  for (int i = 0; i < 4; ++i) {  // until the edges are given up
    h_->Tick(3'000'000);
    Rounds(3);
  }
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_THAT(Phases(id), ElementsAre("making room", "loading", "copying", "still", "switched",
                                      "growing", "waiting"));
  EXPECT_EQ(Told(id).back().pipelines_done, 1u);
  EXPECT_THAT(Status(), testing::Not(HasSubstr(R"("scale":{)")));
  ExpectAllTokens();
}

TEST_F(ScaleReportsTest, ADryRunTellsThePlanAndChangesNothing) {
  Start(Options(1), {kFixed + 20 * 512, 10'000});
  Serve();
  const ScaleId id = h_->Scale({2, /*dry_run=*/true});
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  ASSERT_THAT(Told(id), SizeIs(1));
  ASSERT_THAT(Told(id)[0].plans, SizeIs(1));
  const PlannedPipeline planned = Told(id)[0].plans[0];
  EXPECT_EQ(planned.pipeline, PipelineId{1});
  ASSERT_THAT(planned.stages, SizeIs(2));
  EXPECT_EQ(planned.stages[0].load_bytes, 0u) << "its worker has these layers";
  EXPECT_EQ(planned.stages[1].name, "w2");
  EXPECT_EQ(planned.stages[1].load_bytes, 1500u) << "a layer and the head";
  EXPECT_GT(planned.stages[1].rows_bytes, 0u);
  EXPECT_EQ(planned.why.moved_bytes, planned.stages[1].load_bytes + planned.stages[1].rows_bytes);
  EXPECT_FALSE(planned.why.text.empty());
  EXPECT_EQ(NumStages(workers_[0]), 1u);
  EXPECT_EQ(NumStages(workers_[1]), 0u);
  EXPECT_FALSE(h_->core.StatusJson(h_->now_us).find(R"("last_scale")") != std::string::npos);
  // What it says comes about.
  const ScaleId real = h_->Scale(2);
  Rounds(6);
  ASSERT_TRUE(StatusOf(real).ok()) << StatusOf(real);
  EXPECT_THAT(Layers(workers_[1]),
              ElementsAre(LayerRange{planned.stages[1].layer_begin, planned.stages[1].layer_end}));
  EXPECT_THAT(Status(), HasSubstr(planned.why.text)) << "and the pipeline's status says why";
  ExpectAllTokens();
}

TEST_F(ScaleReportsTest, ADryRunIsRefusedAsTheChangeWouldBe) {
  Start(Options(1), {kFixed + 10 * 512});
  requests_.push_back(h_->Submit(OneSequence(600, 40)));
  const ScaleId large = h_->Scale({2, true});
  EXPECT_EQ(StatusOf(large).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(StatusOf(large).message()), HasSubstr("639"));
  EXPECT_THAT(Told(large), IsEmpty());
  const ScaleId same = h_->Scale({1, true});
  ASSERT_TRUE(StatusOf(same).ok());
  EXPECT_THAT(Told(same).at(0).plans.at(0).stages, IsEmpty()) << "it has one";
  EXPECT_EQ(StatusOf(h_->Scale({5, true})).code(), absl::StatusCode::kInvalidArgument);
  h_->Run();
  EXPECT_EQ(h_->tokens[requests_[0]].size(), 40u);
}

// Two pipelines cannot both have the one spare.
TEST_F(ScaleReportsTest, ADryRunGivesASpareToOnePipeline) {
  Start(Options(1, 2), {20'000, 20'000, 20'000});
  const ScaleId id = h_->Scale({2, true});
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  std::map<uint64_t, int> pipelines_of;
  for (const PlannedPipeline& planned : Told(id).at(0).plans) {
    std::set<uint64_t> workers;
    for (const PlannedStage& stage : planned.stages) workers.insert(stage.worker.value);
    for (const uint64_t worker : workers) ++pipelines_of[worker];
  }
  for (const auto& [worker, count] : pipelines_of) EXPECT_EQ(count, 1) << "worker " << worker;
}

TEST_F(ScaleReportsTest, EveryResidentsPauseIsTold) {
  Start(Options(1), {20'000});
  Serve();
  const ScaleId id = ScaleToTwo(/*still_us=*/300'000);
  // One of the two gets its token later.
  for (int i = 0; i < 4 && !h_->scaled.contains(id); ++i) {
    Rounds(1);
    h_->Tick(50'000);
  }
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  const v1::ScaleReply& reply = h_->scaled.at(id).reply;
  EXPECT_EQ(reply.residents(), 2u);
  EXPECT_GE(reply.resident_pause_min_us(), 300'000u);
  EXPECT_LE(reply.resident_pause_min_us(), reply.resident_pause_p50_us());
  EXPECT_LE(reply.resident_pause_p50_us(), reply.resident_pause_max_us());
  EXPECT_THAT(Status(), HasSubstr(R"("residents":{"count":2)"));
  EXPECT_THAT(Status(), HasSubstr(R"("longest":[{"sequence":)"));
  ExpectAllTokens();
}

// The pause ran on until the caches had grown.
TEST_F(ScaleReportsTest, APauseEndsWithTheFirstToken) {
  Start(Options(1), {kFixed + 20 * 512, 10'000});
  Serve();
  h_->before_active = [this](WorkerId, v1::StageState*) { h_->answer_resizes = false; };
  const ScaleId id = h_->Scale(2);
  for (int i = 0; i < 12; ++i) {
    Rounds(1);
    h_->Tick(100'000);
  }
  ASSERT_FALSE(h_->scaled.contains(id)) << "its caches have not grown";
  h_->before_active = {};
  h_->answer_resizes = true;
  for (auto& [worker_id, worker] : h_->workers) {
    for (auto& [stage_id, stage] : worker.stages) h_->AnswerResize(worker_id, stage);
  }
  h_->Pump();
  Rounds(2);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_EQ(h_->scaled.at(id).reply.residents(), 2u);
  EXPECT_LE(h_->scaled.at(id).reply.resident_pause_max_us(), 400'000u);
  ExpectAllTokens();
}

// It would have been waited for as long as it waits for room.
TEST_F(ScaleReportsTest, WhoGetsNoTokenIsWaitedForNoLonger) {
  Start(Options(1), {20'000});
  Serve();
  const ScaleId id = h_->Scale(2);
  Rounds(1);
  // No stage reports any more.
  h_->Tick(2'500'000);
  EXPECT_FALSE(h_->scaled.contains(id)) << "not one step";
  Rounds(2);
  h_->Tick(2'500'000);
  EXPECT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  ExpectAllTokens();
}

TEST(SumPausesTest, OfAllAndTheLongestByName) {
  std::map<SequenceId, uint64_t> pauses;
  v1::ScaleReply reply;
  EXPECT_THAT(SumPauses(pauses, &reply), IsEmpty());
  EXPECT_EQ(reply.residents(), 0u);
  for (uint64_t i = 1; i <= 101; ++i) pauses[SequenceId{i}] = i * 10;
  const auto longest = SumPauses(pauses, &reply);
  EXPECT_EQ(reply.residents(), 101u);
  EXPECT_EQ(reply.resident_pause_min_us(), 10u);
  EXPECT_EQ(reply.resident_pause_p50_us(), 510u);
  EXPECT_EQ(reply.resident_pause_max_us(), 1010u);
  ASSERT_EQ(longest.size(), kMaxListedPauses);
  EXPECT_EQ(longest[0].first, SequenceId{101});
}

}  // namespace
}  // namespace strait
