// SPDX-License-Identifier: Apache-2.0
//
// Prefix blocks get copies on other workers, and who takes a dead worker's place begins with them: each copy
// where it outlives its stage, asked for once, within its keeper's memory, and shown as what it is. The harness'
// workers object to what an honest worker would refuse.
#include "coordinator/core/replicas.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/replicas_fixture.h"

namespace strait {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

TEST_F(ReplicasTest, FullBlocksGetACopyOfEveryStageOnAnotherWorker) {
  Start(Options(2), {kRoomy, kRoomy, 0});
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  EXPECT_EQ(ProtectedRows(), 256u);
  EXPECT_FALSE(IsUnprotected());
  EXPECT_EQ(h_->copies_made, 8u);
  EXPECT_EQ(h_->core.Stats().replicas_made, 8u);
  EXPECT_EQ(h_->copies_failed, 0u);
  h_->Run();
  ExpectWhole(request, 1, 300, 60);
}

TEST_F(ReplicasTest, ABuddyIsOnAnotherHostWhereThereIsOne) {
  h_ = std::make_unique<Harness>(Options(1), SmallModel());
  h_->token_at = [](uint64_t, uint32_t) { return 50; };
  const auto attach = [&](const std::string& host) {
    v1::Hello hello = h_->MakeHello(kRoomy);
    hello.set_replica_bytes(kRoomy);
    hello.set_host_id(host);
    hello.set_data_address("10.0.0." + std::to_string(h_->last_worker + 1) + ":1");
    return h_->Attach(hello);
  };
  attach("a");
  const WorkerId same = attach("a");
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 3);
  EXPECT_THAT(h_->workers.at(same).replicas.blocks, Not(IsEmpty())) << "addresses do not count";
  EXPECT_THAT(h_->core.StatusJson(h_->now_us), HasSubstr("\"buddy_on_other_host\":false"));
  const WorkerId other = attach("b");
  Until(request, 6);
  EXPECT_THAT(h_->workers.at(other).replicas.blocks, Not(IsEmpty())) << "it came later";
  EXPECT_THAT(h_->core.StatusJson(h_->now_us), HasSubstr("\"buddy_on_other_host\":true"));
  attach("c");
  EXPECT_THAT(h_->core.StatusJson(h_->now_us),
              HasSubstr("\"buddy_worker_id\":" + std::to_string(other.value)))
      << "no better one";
}

TEST_F(ReplicasTest, ADeathCostsTheTailAlone) {
  Start(Options(2), {kRoomy, kRoomy, 0});
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  const uint64_t computed = h_->core.Stats().replayed_tokens;
  h_->Lose(HostOf(0));
  EXPECT_EQ(h_->rows_restored, 256u);
  Until(request, 11);
  EXPECT_LE(h_->core.Stats().replayed_tokens - computed, 127u);
  h_->Run();
  ExpectWhole(request, 1, 300, 60);
}

TEST_F(ReplicasTest, WhatDoesNotComeInTimeIsComputed) {
  Start(Options(2), {kRoomy, kRoomy, 0});
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  h_->most_restored = 2;
  h_->Lose(HostOf(2));
  EXPECT_EQ(h_->rows_restored, 128u);
  h_->Run();
  ExpectWhole(request, 1, 300, 60);
}

TEST_F(ReplicasTest, WhoTellsMoreThanThereWereCopiesOfLies) {
  Start(Options(2), {kRoomy, kRoomy, 0});
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  h_->before_active = [&](WorkerId id, v1::StageState* state) {
    if (id != w_[2]) return;
    ASSERT_GT(state->held_size(), 0);
    state->mutable_held(0)->set_rows(320);
    state->mutable_held(0)->set_prefix_blocks(5);
  };
  h_->Lose(HostOf(0));
  EXPECT_TRUE(h_->workers.at(w_[2]).evicted);
  EXPECT_THAT(h_->workers.at(w_[2]).why.ToString(), HasSubstr("256 were planned"));
}

TEST_F(ReplicasTest, WhoTellsOfACopyThatNobodyAskedForLies) {
  Start(Options(1), {kRoomy, kRoomy});
  const RequestId request = h_->Submit(OneSequence(100, 60));
  Until(request, 3);
  const WorkerId buddy = HostOf(0) == w_[0] ? w_[1] : w_[0];
  v1::FromWorker lie;
  lie.mutable_replicated()->set_stage_id(1);
  AppendTo(ContentKey{1, 2}, lie.mutable_replicated()->mutable_keys());
  h_->core.OnWorkerMessage(buddy, lie, h_->now_us);
  h_->Pump();
  EXPECT_TRUE(h_->workers.at(buddy).evicted);
  h_->Run();
  ExpectWhole(request, 1, 100, 60);
}

TEST_F(ReplicasTest, OneThatEndedMeanwhileIsClosedWhereItWasRestored) {
  Start(Options(2), {kRoomy, kRoomy, 0});
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  h_->answer_activations = false;
  h_->Lose(HostOf(0));
  h_->core.OnCancel(request, std::nullopt, h_->now_us);
  h_->Pump();
  h_->answer_activations = true;
  for (auto& [id, worker] : h_->workers) {
    for (auto& [stage_id, stage] : worker.stages) h_->AnswerActivation(id, stage);
  }
  h_->Pump();
  EXPECT_EQ(h_->rows_restored, 256u);
  h_->Run();
  EXPECT_EQ(h_->core.Stats().cache_bytes_used, 0u);
}

TEST_F(ReplicasTest, MemoryOfABuddyIsNeverExceededAndTheHeldStay) {
  // Five blocks of four layers.
  Start(Options(1), {0, 5 * 512});
  const RequestId first = h_->Submit(OneSequence(200, 40));
  h_->Run();
  ExpectWhole(first, 1, 200, 40);
  RequestSpec spec = OneSequence(260, 300);
  spec.sequences[0].cache_salt = "other";
  const RequestId second = h_->Submit(std::move(spec));
  Until(second, 10);
  EXPECT_EQ(ProtectedRows(), 256u) << "what nobody has gave way";
  Until(second, 290);
  EXPECT_EQ(ProtectedRows(), 320u) << "what it has did not";
  EXPECT_TRUE(IsUnprotected());
  EXPECT_GT(h_->core.Stats().replicas_refused, 0u);
  h_->Run();
  ExpectWhole(second, 2, 260, 300);
}

// A flush left the copies of all that it gave up, for as long as nobody else needed the room.
TEST_F(ReplicasTest, AFlushGivesUpCopiesThatNobodyHas) {
  Start(Options(2), {kRoomy, kRoomy, kRoomy});
  const RequestId first = h_->Submit(OneSequence(200, 40));
  h_->Run();
  ExpectWhole(first, 1, 200, 40);
  RequestSpec spec = OneSequence(130, 60);
  spec.sequences[0].cache_salt = "other";
  const RequestId second = h_->Submit(std::move(spec));
  Until(second, 10);
  h_->core.OnFlush(h_->now_us);
  h_->Pump();
  size_t num_blocks = 0;
  for (const auto& [id, worker] : h_->workers) num_blocks += worker.replicas.blocks.size();
  EXPECT_EQ(num_blocks, 2u * 4) << "two blocks of four layers, of the one that runs";
  EXPECT_EQ(ProtectedRows(), 128u);
  h_->Run();
  ExpectWhole(second, 2, 130, 60);
  h_->core.OnFlush(h_->now_us);
  h_->Pump();
  for (const auto& [id, worker] : h_->workers) EXPECT_TRUE(worker.replicas.blocks.empty());
}

TEST_F(ReplicasTest, WithoutSharingASequenceHasItsCopiesAllTheSame) {
  CoreOptions options = Options(2);
  options.prefix_cache = false;
  Start(options, {kRoomy, kRoomy, kRoomy});
  RequestSpec spec = OneSequence(300, 60);
  spec.sequences.push_back(spec.sequences[0]);
  spec.sequences[1].choice_index = 1;
  const RequestId request = h_->Submit(std::move(spec));
  Until(request, 20);
  h_->Lose(HostOf(0));
  EXPECT_EQ(h_->rows_restored, 512u);
  h_->Run();
  EXPECT_TRUE(h_->ended.contains(request));
  h_->core.OnFlush(h_->now_us);
  h_->Pump();
  h_->Run();
  EXPECT_EQ(h_->core.Stats().cache_bytes_used, 0u);
}

// Rows of other numerics are no rows of this pipeline's.
TEST_F(ReplicasTest, CopiesOfOtherNumericsAreNotUsed) {
  Start(Options(2), {kRoomy, kRoomy});
  v1::Hello other = h_->MakeHello(kRoomy);
  other.set_numerics_id("other");
  h_->Attach(other);
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  h_->Lose(HostOf(0));
  h_->Run();
  ExpectWhole(request, 1, 300, 60);
  EXPECT_GE(h_->core.Stats().replayed_tokens, 300u);
}

// The copies that the dead buddy was to make do not count as under way with the next one.
TEST_F(ReplicasTest, ABuddyThatDiesWhileCopiesComeHasASuccessor) {
  Start(Options(1), {0, kRoomy, kRoomy});
  h_->answer_replicas = false;
  // More than a buddy is told at once.
  for (int i = 0; i < 9; ++i) {
    RequestSpec spec = OneSequence(900, 100);
    spec.sequences[0].cache_salt = std::to_string(i);
    h_->Submit(std::move(spec));
  }
  Until(RequestId{9}, 2);
  EXPECT_TRUE(IsUnprotected());
  WorkerId buddy;
  for (const auto& [id, worker] : h_->workers) {
    if (!worker.replicas.asked.empty()) buddy = id;
  }
  ASSERT_NE(buddy.value, 0u);
  h_->answer_replicas = true;
  h_->Lose(buddy);
  Rounds(2);
  EXPECT_GE(ProtectedRows(), 896u);
  EXPECT_FALSE(IsUnprotected());
  h_->Run();
}

// Steps are counted anew in each epoch: what waited for one of the last epoch's holds nothing up.
TEST_F(ReplicasTest, AnEpochLeavesNothingInTheQueue) {
  Start(Options(2), {0, kRoomy, kRoomy});
  const RequestId request = h_->Submit(OneSequence(250, 200));
  Until(request, 120);
  // A plan that keeps a block is out, and one stage has not reported it.
  const WorkerId last = HostOf(2);
  for (int i = 0; i < 200; ++i) {
    bool keeps = false;
    for (const v1::StepPlan& plan : h_->StageOf(last).plans) {
      for (const v1::CacheOp& op : plan.cache_ops()) keeps = keeps || op.has_keep_prefix();
    }
    if (keeps) break;
    Rounds(1);
  }
  h_->Lose(HostOf(0));
  Until(request, 195);
  EXPECT_GE(ProtectedRows(), 384u);
  EXPECT_FALSE(IsUnprotected());
  h_->Run();
  ExpectWhole(request, 1, 250, 200);
}

// Its place was taken by the keeper of its copies: a copy beside the rows protects nothing.
TEST_F(ReplicasTest, WhoTakesThePlaceOfTheDeadIsNoBuddyOfIt) {
  Start(Options(1), {0, kRoomy});
  const RequestId request = h_->Submit(OneSequence(300, 200));
  Until(request, 10);
  EXPECT_GE(ProtectedRows(), 256u);
  h_->Lose(w_[0]);
  Until(request, 20);
  EXPECT_EQ(h_->rows_restored, 256u);
  EXPECT_EQ(ProtectedRows(), 0u);
  EXPECT_TRUE(IsUnprotected());
  const WorkerId third = Attach(kRoomy);
  Rounds(2);
  EXPECT_GE(ProtectedRows(), 256u) << "there is a buddy again";
  h_->Lose(w_[1]);
  EXPECT_EQ(h_->rows_restored, 512u);
  EXPECT_FALSE(h_->workers.at(third).evicted);
  h_->Run();
  ExpectWhole(request, 1, 300, 200);
}

// What is shown as protected comes back, also of one whose blocks were made in two pipelines.
TEST_F(ReplicasTest, AMovedSequenceIsRestoredWithAllItsBlocks) {
  Start(Options(1, 2), {0, 0, kRoomy, kRoomy});
  const RequestId request = h_->Submit(OneSequence(300, 300));
  Until(request, 10);
  uint64_t at = 0;
  for (const auto& [id, worker] : h_->workers) {
    for (const auto& [stage_id, stage] : worker.stages) {
      if (stage.lengths.contains(SequenceId{1})) at = stage.activate.pipeline_id();
    }
  }
  ASSERT_NE(at, 0u);
  const VerbId verb = h_->Migrate(1, PipelineId{3 - at});
  Until(request, 200);
  ASSERT_TRUE(h_->verbs.contains(verb));
  ASSERT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  const uint32_t rows = ProtectedRows();
  EXPECT_GE(rows, 384u);
  const uint64_t replayed = h_->core.Stats().replayed_tokens;
  // Where it was first it could go, too, and begin anew.
  h_->answer_loads = false;
  h_->Lose(HostOf(0, at));
  h_->answer_loads = true;
  h_->Lose(HostOf(0, 3 - at));
  Until(request, 201);
  EXPECT_LE(h_->core.Stats().replayed_tokens - replayed, 127u);
  EXPECT_GE(h_->rows_restored, rows);
  h_->Run();
  ExpectWhole(request, 1, 300, 300);
}

// The first activation fails, for another stage's sake: the rows are asked for again with the next.
TEST_F(ReplicasTest, AnActivationThatFailsCostsNoRestore) {
  Start(Options(2), {kRoomy, kRoomy, kRoomy});
  const RequestId request = h_->Submit(OneSequence(300, 60));
  Until(request, 10);
  const WorkerId survivor = HostOf(2);
  h_->answer_activations = false;
  h_->Lose(HostOf(0));
  Harness::FakeStage& stage = h_->StageOf(survivor);
  v1::StageState failed;
  failed.set_stage_id(stage.load.stage_id());
  failed.set_state(v1::StageState::FAILED);
  *failed.mutable_epoch() = stage.activate.epoch();
  failed.set_error_code(14);
  h_->answer_activations = true;
  h_->Answer(survivor, failed);
  h_->Pump();
  h_->Tick(5'000'000);
  EXPECT_EQ(h_->rows_restored, 256u);
  h_->Run();
  ExpectWhole(request, 1, 300, 60);
}

TEST_F(ReplicasTest, AFailedCopyIsMadeLater) {
  Start(Options(1), {kRoomy, kRoomy});
  h_->fail_copies = true;
  const RequestId request = h_->Submit(OneSequence(300, 200));
  Until(request, 10);
  EXPECT_EQ(ProtectedRows(), 0u);
  EXPECT_TRUE(IsUnprotected());
  EXPECT_LE(h_->copies_failed, 8u) << "not at once again and again";
  h_->fail_copies = false;
  h_->Tick(3'000'000);
  Until(request, 20);
  EXPECT_GE(ProtectedRows(), 256u);
  h_->Run();
  ExpectWhole(request, 1, 300, 200);
}

// It waits for its own, which is about to begin with copies of its rows; but not for long.
TEST_F(ReplicasTest, AnotherPipelineIsNoReasonToComputeAllAgain) {
  Start(Options(1, 2), {0, 0, kRoomy, kRoomy});
  const RequestId request = h_->Submit(OneSequence(300, 200));
  Until(request, 10);
  EXPECT_FALSE(IsUnprotected());
  const WorkerId host = h_->StageOf(w_[0]).lengths.empty() ? w_[1] : w_[0];
  h_->Lose(host);
  Until(request, 11);
  EXPECT_LE(h_->core.Stats().replayed_tokens, 127u);
  h_->Run();
  ExpectWhole(request, 1, 300, 200);
}

}  // namespace
}  // namespace strait
