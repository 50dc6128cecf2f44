// SPDX-License-Identifier: Apache-2.0
//
// Rows of layers that change their worker come to the stages that take others' places while these serve: none is
// computed again, and what does not come in time is replayed, and holds nobody up.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/scaling_fixture.h"

namespace strait {
namespace {

using testing::ElementsAre;

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

// Last rows that do not come hold the pipeline up for --migrate-pause at most, twice.
TEST_F(CopyAheadTest, APipelineStandsStillNoLongerThanItMay) {
  CoreOptions options = Sharing(1);
  options.migrate_pause_us = 500'000;
  Start(options, {30'000, 30'000});
  Serve();
  const ScaleId id = h_->Scale(2);
  h_->answer_fetches = false;
  Rounds(4);  // it stands still, and the rows since the first round are asked for
  ASSERT_FALSE(h_->scaled.contains(id));
  const size_t tokens = h_->tokens[requests_[0]].size();
  h_->Tick(400'000);
  Rounds(2);
  EXPECT_EQ(h_->tokens[requests_[0]].size(), tokens);
  h_->Tick(200'000);
  Rounds(2);
  EXPECT_GT(h_->tokens[requests_[0]].size(), tokens) << "it serves on";
  h_->Tick(700'000);
  h_->answer_fetches = true;
  Rounds(8);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  ExpectAllTokens();
}

// Prompts that come all the time are no reason to wait.
TEST_F(CopyAheadTest, NewPromptsDoNotPutItOff) {
  Start(Sharing(1), {60'000, 60'000});
  Serve();
  h_->answer_fetches = false;
  const ScaleId id = h_->Scale(2);
  Rounds(2);
  h_->answer_fetches = true;
  for (auto& [stage_id, stage] : h_->workers.at(workers_[1]).stages) {
    h_->AnswerFetches(workers_[1], stage);
  }
  for (int i = 0; i < 12 && !h_->scaled.contains(id); ++i) {
    requests_.push_back(h_->Submit(OneSequence(300 + i, 60)));
    Rounds(1);
  }
  Rounds(4);
  ASSERT_TRUE(StatusOf(id).ok()) << StatusOf(id);
  EXPECT_EQ(h_->scaled.at(id).reply.rows_lost(), 0u);
  ExpectAllTokens();
}

}  // namespace
}  // namespace strait
