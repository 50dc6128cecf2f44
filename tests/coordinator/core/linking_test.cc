// SPDX-License-Identifier: Apache-2.0
//
// Defends: a change of stages waits until the edges between the new ones are up, takes them over, and loses no more than
// that where one fails: then it makes its edges in the new epoch.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/scaling_fixture.h"

namespace strait {
namespace {

using testing::HasSubstr;
using testing::Not;

class LinkingTest : public ScalingTest {
 protected:
  // Workers that have NCCL, all or none. The first has one stage; the others are spares.
  void StartSpares(bool nccl, size_t num_spares) {
    h_ = std::make_unique<Harness>(Options(1), SmallModel());
    for (size_t i = 0; i <= num_spares; ++i) {
      v1::Hello hello = h_->MakeHello(i == 0 ? kFixed + 20 * 512 : 10'000);
      hello.set_nccl_version(nccl ? 22809 : 0);
      workers_.push_back(h_->Attach(hello));
    }
    ASSERT_TRUE(h_->core.Ready());
    Serve();
  }
  // Of the pipeline to come, by layers.
  std::vector<std::pair<WorkerId, FakeStage*>> Next() {
    std::vector<std::pair<WorkerId, FakeStage*>> next;
    for (auto& [id, worker] : h_->workers) {
      for (auto& [stage_id, stage] : worker.stages) {
        if (stage.link) next.emplace_back(id, &stage);
      }
    }
    std::sort(next.begin(), next.end(), [](const auto& a, const auto& b) {
      return a.second->layers().begin < b.second->layers().begin;
    });
    return next;
  }
  void Tell(WorkerId id, const FakeStage& stage, uint32_t error = 0, uint64_t failed_nccl = 0) {
    v1::FromWorker message;
    message.mutable_stage_linked()->set_stage_id(stage.load.stage_id());
    message.mutable_stage_linked()->set_error_code(error);
    message.mutable_stage_linked()->set_error_message(error == 0 ? "" : "no way");
    message.mutable_stage_linked()->set_failed_nccl_edge(failed_nccl);
    h_->core.OnWorkerMessage(id, message, h_->now_us);
    h_->Pump();
  }
  void TellId(WorkerId id, const FakeStage& stage) {
    v1::FromWorker message;
    message.mutable_edge_id()->set_stage_id(stage.load.stage_id());
    message.mutable_edge_id()->set_nccl_id(Harness::NcclId(stage.load.stage_id()));
    h_->core.OnWorkerMessage(id, message, h_->now_us);
    h_->Pump();
  }
  bool Entered() {
    for (const auto& [id, stage] : Next()) {
      if (stage->epoch.counter() > 0) return true;
    }
    return false;
  }
};

TEST_F(LinkingTest, TheSwitchWaitsForTheEdgesAndTakesThemOver) {
  StartSpares(/*nccl=*/true, 1);
  h_->answer_links = false;
  const ScaleId id = h_->Scale(2);
  Rounds(6);
  auto next = Next();
  ASSERT_EQ(next.size(), 1u) << "the stage before needs the id that this one makes";
  EXPECT_TRUE(next[0].second->link->edge_over_nccl());
  EXPECT_FALSE(Entered());
  TellId(next[0].first, *next[0].second);
  next = Next();
  ASSERT_EQ(next.size(), 2u);
  EXPECT_EQ(next[0].second->link->next_nccl_id(), Harness::NcclId(next[1].second->load.stage_id()));
  // The pipeline serves, however long it takes.
  const size_t before = h_->tokens[requests_[0]].size();
  Tell(next[0].first, *next[0].second);
  Rounds(4);
  EXPECT_GT(h_->tokens[requests_[0]].size(), before);
  EXPECT_FALSE(Entered());
  Tell(next[1].first, *next[1].second);
  Rounds(3);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  for (const auto& [worker, stage] : Next()) {
    const bool is_first = stage->activate.stage_index() == 0;
    EXPECT_EQ(stage->activate.edge_made(), !is_first);
    EXPECT_EQ(stage->activate.next_edge_made(), is_first);
    EXPECT_EQ(stage->activate.edge_id(), stage->link->edge_id());
    EXPECT_EQ(stage->activate.sampled_edge_id(), stage->link->sampled_edge_id());
    EXPECT_NE(stage->activate.sampled_edge_id(), 0u);
  }
  ExpectAllTokens();
}

TEST_F(LinkingTest, AnEdgeThatBreaksCostsTheHeadStartAlone) {
  for (const bool late : {false, true}) {
    SCOPED_TRACE(late);
    h_.reset();
    workers_.clear();
    requests_.clear();
    StartSpares(/*nccl=*/true, 1);
    h_->answer_links = late;
    h_->answer_fetches = !late;  // so that it copies still when the edges are up
    const ScaleId id = h_->Scale(2);
    Rounds(6);
    auto next = Next();
    Tell(next.back().first, *next.back().second, 14, next.back().second->load.stage_id());
    EXPECT_FALSE(h_->workers.at(next.back().first).evicted);
    h_->answer_fetches = true;
    h_->Tick(1'000);
    for (const auto& [worker, stage] : Next()) h_->AnswerFetches(worker, *stage);
    Rounds(6);
    ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
    EXPECT_THAT(h_->core.StatusJson(h_->now_us), HasSubstr("no way")) << "the pair takes gRPC";
    for (const auto& [worker, stage] : Next()) {
      EXPECT_FALSE(stage->activate.edge_over_nccl());
      EXPECT_FALSE(stage->activate.edge_made() || stage->activate.next_edge_made());
      if (stage->activate.edge_id() != 0) {
        EXPECT_NE(stage->activate.edge_id(), stage->link->edge_id());
      }
    }
    EXPECT_EQ(h_->core.Stats().recoveries, 0u);
    // What comes of them later is nobody's business.
    Tell(next.back().first, *next.back().second);
    EXPECT_FALSE(h_->workers.at(next.back().first).evicted);
    ExpectAllTokens();
    EXPECT_THAT(h_->problems, testing::IsEmpty());
  }
}

TEST_F(LinkingTest, EdgesThatDoNotComeAreNotWaitedForLonger) {
  StartSpares(/*nccl=*/false, 1);
  h_->answer_links = false;
  const ScaleId id = h_->Scale(2);
  Rounds(6);
  h_->Tick(9'000'000);
  Rounds(2);
  EXPECT_FALSE(Entered());
  h_->Tick(1'100'000);
  Rounds(3);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_THAT(h_->core.StatusJson(h_->now_us), Not(HasSubstr("failed_links")));
  ExpectAllTokens();
}

TEST_F(LinkingTest, AScaleThatIsGivenUpLeavesNoEdge) {
  StartSpares(/*nccl=*/true, 2);
  h_->answer_links = false;
  const ScaleId id = h_->Scale(3);
  Rounds(6);
  const auto next = Next();
  ASSERT_FALSE(next.empty());
  const WorkerId first = next[0].first;
  h_->Lose(workers_[2] == first ? workers_[1] : workers_[2]);
  EXPECT_EQ(StatusOf(id).code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(Next().empty());
  ExpectAllTokens();
}

TEST_F(LinkingTest, WhatNobodyAskedForEvicts) {
  StartSpares(/*nccl=*/true, 1);
  Tell(workers_[0], h_->StageOf(workers_[0]));
  EXPECT_FALSE(h_->workers.at(workers_[0]).evicted) << "it may be late";
  h_->answer_loads = false;
  h_->Scale(2);
  const FakeStage& loading = h_->StageOf(workers_[1]);
  TellId(workers_[1], loading);
  EXPECT_TRUE(h_->workers.at(workers_[1]).evicted);
  EXPECT_THAT(std::string(h_->workers.at(workers_[1]).why.message()), HasSubstr("not asked for"));
}

}  // namespace
}  // namespace strait
