// SPDX-License-Identifier: Apache-2.0
//
// A worker is drained: its sequences go elsewhere with their rows, or its pipeline gets other stages, and no token is
// lost, doubled or changed; then it has no stage and gets none until that is undone. What cannot be is refused with the
// numbers, and the worker serves on. The harness' workers object to what an honest worker would refuse.
#include "coordinator/core/draining.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

// One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
constexpr uint64_t kRoomy = 100'000;
constexpr uint32_t kTokens = 60;

class DrainingTest : public testing::Test {
 protected:
  void Start(uint32_t num_pipelines, uint32_t num_stages, std::vector<uint64_t> memory) {
    CoreOptions options;
    options.num_pipelines = num_pipelines;
    options.num_stages = num_stages;
    options.max_step_tokens = 64;
    options.prefill_chunk = 32;
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (const uint64_t bytes : memory) workers_.push_back(h_->Attach(bytes));
    ASSERT_EQ(h_->core.Stats().pipelines_active, num_pipelines);
  }
  void TearDown() override {
    ASSERT_NE(h_, nullptr);
    EXPECT_THAT(h_->problems, IsEmpty());
  }
  void Serve(std::vector<uint32_t> prompts) {
    for (const uint32_t prompt : prompts) {
      requests_.emplace_back(h_->Submit(OneSequence(prompt, kTokens)), prompt);
    }
    Rounds(10);
  }
  void Rounds(int rounds) { h_->Rounds(rounds); }
  void ExpectAllTokens() {
    h_->Run();
    uint64_t sequence = 0;
    for (const auto& [request, prompt] : requests_) {
      ++sequence;
      ASSERT_TRUE(h_->ended.contains(request)) << h_->core.StatusJson(h_->now_us);
      EXPECT_EQ(h_->ended.at(request).reason, FinishReason::kLength)
          << h_->ended.at(request).status;
      const std::vector<TokenInfo>& tokens = h_->tokens[request];
      ASSERT_EQ(tokens.size(), kTokens);
      for (uint32_t i = 0; i < kTokens; ++i) {
        EXPECT_EQ(tokens[i].position, prompt + i);
        EXPECT_EQ(tokens[i].id, h_->token_at(sequence, prompt + i));
      }
    }
  }
  size_t NumStages(WorkerId id) const { return h_->workers.at(id).stages.size(); }
  std::string Status() const { return h_->core.StatusJson(h_->now_us); }
  absl::Status StatusOf(VerbId id) const {
    return h_->verbs.contains(id) ? h_->verbs.at(id) : absl::UnknownError("no answer");
  }
  // Whom residents have rows at.
  size_t NumResidentsAt(WorkerId id) const {
    size_t count = 0;
    for (const auto& [stage_id, stage] : h_->workers.at(id).stages) count += stage.lengths.size();
    return count;
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> workers_;
  std::vector<std::pair<RequestId, uint32_t>> requests_;
};

TEST_F(DrainingTest, SequencesMoveAndThePipelineGoes) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90, 40, 70, 33, 64});
  const size_t residents = NumResidentsAt(workers_[0]);
  ASSERT_GT(residents, 1u);
  const VerbId verb = h_->Drain(workers_[0]);
  EXPECT_THAT(Status(), HasSubstr("\"state\":\"draining\""));
  Rounds(25);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  const DrainReport report = h_->drains.at(verb).back();
  EXPECT_EQ(report.phase, "done");
  EXPECT_EQ(report.way, "move");
  EXPECT_EQ(report.sequences_moved, residents);
  EXPECT_GT(report.moved_bytes, 0u);
  EXPECT_EQ(report.sequences_left, 0u);
  EXPECT_EQ(NumStages(workers_[0]), 0u);
  EXPECT_THAT(Status(), HasSubstr("\"state\":\"drained\""));
  ExpectAllTokens();
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
  EXPECT_EQ(h_->core.Stats().migrations, residents);
  // It gets no place, whatever happens to the others.
  h_->Tick(1'000'000);
  EXPECT_EQ(NumStages(workers_[0]), 0u);
}

TEST_F(DrainingTest, ManySequencesGoFourAtATimeAndNewOnesElsewhere) {
  Start(2, 2, {kRoomy, kRoomy, kRoomy, kRoomy});
  Serve({100, 90, 40, 70, 33, 64, 50, 51, 52, 53, 54, 55});
  const VerbId verb = h_->Drain(workers_[0]);
  size_t most = 0;
  for (int i = 0; i < 60 && !h_->verbs.contains(verb); ++i) {
    if (i == 3) Serve({30});
    Rounds(1);
    size_t moves = 0;
    const std::string status = Status();
    for (size_t at = 0; (at = status.find("\"rounds\"", at)) != std::string::npos; ++at) ++moves;
    most = std::max(most, moves);
  }
  EXPECT_EQ(most, kDrainMoves);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  EXPECT_EQ(NumStages(workers_[0]), 0u);
  ExpectAllTokens();
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
}

TEST_F(DrainingTest, ASpareTakesThePlaceOfTheOnlyPipelinesWorker) {
  Start(1, 2, {kRoomy, kRoomy, kRoomy});
  Serve({100, 30});
  const VerbId verb = h_->Drain(workers_[0]);
  Rounds(8);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  const DrainReport report = h_->drains.at(verb).back();
  EXPECT_EQ(report.way, "replace");
  EXPECT_GT(report.rows_kept, 0u) << "the second stage's layers stay";
  EXPECT_EQ(NumStages(workers_[0]), 0u);
  EXPECT_EQ(NumStages(workers_[1]), 1u);
  EXPECT_EQ(NumStages(workers_[2]), 1u);
  EXPECT_EQ(h_->StageOf(workers_[2]).layers().begin, 0u) << "where the other one was";
  EXPECT_EQ(h_->core.Stats().recoveries, 0u);
  ExpectAllTokens();
}

TEST_F(DrainingTest, TheOtherWorkerTakesBothStages) {
  Start(1, 2, {kRoomy, kRoomy});
  Serve({100, 30});
  const VerbId verb = h_->Drain(workers_[1]);
  Rounds(8);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  EXPECT_EQ(NumStages(workers_[0]), 2u);
  EXPECT_EQ(NumStages(workers_[1]), 0u);
  ExpectAllTokens();
}

TEST_F(DrainingTest, WithoutRoomItIsRefusedAndServesOn) {
  Start(1, 1, {kRoomy});
  Serve({100});
  const VerbId verb = h_->Drain(workers_[0]);
  EXPECT_EQ(StatusOf(verb).code(), absl::StatusCode::kResourceExhausted) << StatusOf(verb);
  EXPECT_THAT(std::string(StatusOf(verb).message()), HasSubstr("no other worker"));
  EXPECT_THAT(Status(), HasSubstr("\"state\":\"serving\""));
  ExpectAllTokens();
  // Two that are too small for the other's layers.
  TearDown();
  workers_.clear();
  requests_.clear();
  Start(1, 2, {4'000, 4'000});
  Serve({100});
  const VerbId second = h_->Drain(workers_[0]);
  EXPECT_EQ(StatusOf(second).code(), absl::StatusCode::kResourceExhausted) << StatusOf(second);
  EXPECT_EQ(NumStages(workers_[0]), 1u);
  EXPECT_THAT(Status(), Not(HasSubstr("drain\"")));
  ExpectAllTokens();
}

TEST_F(DrainingTest, ADryRunSaysWhichWayAndChangesNothing) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90});
  DrainSpec spec;
  spec.worker = "w1";
  spec.dry_run = true;
  const VerbId verb = h_->Drain(spec);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  EXPECT_EQ(h_->drains.at(verb).back().way, "move");
  EXPECT_EQ(h_->drains.at(verb).back().sequences_left, 1u);
  EXPECT_THAT(Status(), Not(HasSubstr("\"state\":\"drain")));
  ExpectAllTokens();
  EXPECT_EQ(h_->core.Stats().migrations, 0u);
}

// A dry run compared the numerics of all stages' workers, and ended the coordinator where a place was vacant.
TEST_F(DrainingTest, ADryRunMayMeetAPipelineThatLostAnotherWorker) {
  Start(2, 2, {kRoomy, kRoomy, kRoomy, kRoomy});
  Serve({100, 90});
  DrainSpec spec;
  spec.worker = "w3";
  spec.dry_run = true;
  h_->Lose(workers_[3]);
  const VerbId by_move = h_->Drain(spec);
  ASSERT_TRUE(StatusOf(by_move).ok()) << StatusOf(by_move);
  EXPECT_EQ(h_->drains.at(by_move).back().way, "move");
  h_->Lose(workers_[1]);
  const VerbId nowhere = h_->Drain(spec);
  EXPECT_EQ(StatusOf(nowhere).code(), absl::StatusCode::kFailedPrecondition) << StatusOf(nowhere);
  EXPECT_THAT(Status(), Not(HasSubstr("\"state\":\"drain")));
  h_->Attach(kRoomy);
  h_->Attach(kRoomy);
  ExpectAllTokens();
}

TEST_F(DrainingTest, WhoDiesMeanwhileIsAnOrdinaryFailure) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90, 40, 70});
  const VerbId verb = h_->Drain(workers_[0]);
  Rounds(2);
  ASSERT_FALSE(h_->verbs.contains(verb));
  h_->Lose(workers_[0]);
  EXPECT_EQ(StatusOf(verb).code(), absl::StatusCode::kAborted) << StatusOf(verb);
  ExpectAllTokens();
}

TEST_F(DrainingTest, WhoIsUndoneGetsStagesAgain) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90});
  ASSERT_TRUE(StatusOf(h_->Drain(DrainSpec{.worker = "w1", .undo = true})).code() ==
              absl::StatusCode::kFailedPrecondition);
  const VerbId verb = h_->Drain(workers_[0]);
  Rounds(25);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  EXPECT_EQ(h_->core.Stats().pipelines_active, 1u);
  // Drained it stays when its stream comes back.
  h_->Lose(workers_[0]);
  const WorkerId again = h_->ComeBack(workers_[0]);
  EXPECT_EQ(NumStages(again), 0u);
  const VerbId undone = h_->Drain(DrainSpec{.worker = "w1", .undo = true});
  ASSERT_TRUE(StatusOf(undone).ok()) << StatusOf(undone);
  EXPECT_EQ(h_->core.Stats().pipelines_active, 2u);
  EXPECT_EQ(NumStages(again), 1u);
  ExpectAllTokens();
}

TEST_F(DrainingTest, UndoneWhileItMovesItServesOn) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90, 40, 70});
  const VerbId verb = h_->Drain(workers_[0]);
  Rounds(1);
  const VerbId undone = h_->Drain(DrainSpec{.worker = "w1", .undo = true});
  EXPECT_TRUE(StatusOf(undone).ok()) << StatusOf(undone);
  EXPECT_EQ(StatusOf(verb).code(), absl::StatusCode::kCancelled);
  ExpectAllTokens();
  EXPECT_EQ(h_->core.Stats().pipelines_active, 2u);
}

TEST_F(DrainingTest, WhoLeavesIsDrainedAndToldToStop) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90, 40, 70});
  h_->Leave(workers_[0]);
  EXPECT_THAT(h_->shut_down, IsEmpty());
  Rounds(25);
  EXPECT_TRUE(h_->shut_down.contains(workers_[0]));
  EXPECT_EQ(NumStages(workers_[0]), 0u);
  h_->Lose(workers_[0]);
  ExpectAllTokens();
  EXPECT_EQ(h_->core.Stats().recomputed_rows, 0u);
}

TEST_F(DrainingTest, WhoLeavesAndCannotBeDrainedIsToldAllTheSame) {
  Start(2, 1, {kRoomy, kRoomy});
  Serve({100, 90});
  // What has begun to move to the second one ends there; nobody is left to take more.
  h_->Leave(workers_[0]);
  h_->Leave(workers_[1]);
  Rounds(30);
  EXPECT_EQ(h_->shut_down.size(), 2u);
  h_->Lose(workers_[0]);
  h_->Lose(workers_[1]);
  h_->Attach(kRoomy);
  ExpectAllTokens();
}

TEST_F(DrainingTest, ASpareGoesAtOnce) {
  Start(1, 1, {kRoomy, kRoomy});
  const VerbId verb = h_->Drain(workers_[1]);
  ASSERT_TRUE(StatusOf(verb).ok()) << StatusOf(verb);
  EXPECT_EQ(h_->drains.at(verb).back().way, "none");
  h_->Lose(workers_[0]);
  h_->Tick(1'000'000);
  EXPECT_EQ(NumStages(workers_[1]), 0u) << "it takes no place";
  h_->Leave(workers_[1]);
  EXPECT_TRUE(h_->shut_down.contains(workers_[1]));
}

TEST_F(DrainingTest, WhatMakesNoSenseIsRefused) {
  Start(1, 1, {kRoomy, kRoomy});
  EXPECT_EQ(StatusOf(h_->Drain(DrainSpec{.worker = "nobody"})).code(), absl::StatusCode::kNotFound);
  v1::Hello twin = h_->MakeHello(kRoomy);
  twin.set_name("w1");
  h_->Attach(twin);
  EXPECT_EQ(StatusOf(h_->Drain(DrainSpec{.worker = "w1"})).code(),
            absl::StatusCode::kInvalidArgument);
  Serve({100});
  EXPECT_TRUE(StatusOf(h_->Drain(DrainSpec{.worker = "2"})).ok());
  h_->answer_loads = false;
  h_->Drain(workers_[0]);
  EXPECT_EQ(StatusOf(h_->Drain(workers_[0])).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(h_->scaled.at(h_->Scale(1)).status.code(), absl::StatusCode::kFailedPrecondition);
  const VerbId undone = h_->Drain(DrainSpec{.worker = "1", .undo = true});
  EXPECT_TRUE(StatusOf(undone).ok()) << StatusOf(undone);
  ExpectAllTokens();
}

}  // namespace
}  // namespace strait
