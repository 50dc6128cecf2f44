// SPDX-License-Identifier: Apache-2.0
//
// A stage is lost and no spare comes: after spare_wait_us workers that are left have its layers, beside what they have
// or all anew, where everything that was admitted has room there; else its place waits on. Rows come from copies.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::IsEmpty;

constexpr uint64_t kWaitUs = 20'000'000;

class SpareWaitTest : public testing::Test {
 protected:
  // One layer has 1,000 bytes, embedding and head 500, a workspace 50, a block of all layers 512.
  void Start(uint64_t memory_bytes, uint64_t cache_bytes = 0, uint32_t num_workers = 2) {
    CoreOptions options;
    options.num_stages = num_workers;
    options.max_step_tokens = 256;
    options.max_cache_bytes_per_stage = cache_bytes;
    options.spare_wait_us = kWaitUs;
    options.no_pipeline_grace_us = 600'000'000;
    h_ = std::make_unique<Harness>(options, SmallModel());
    h_->replica_bytes = 100'000;
    h_->token_at = [](uint64_t sequence, uint32_t position) {
      return static_cast<uint32_t>(10 + (sequence * 31 + position * 7) % 83);
    };
    for (uint32_t i = 0; i < num_workers; ++i) w_.push_back(h_->Attach(memory_bytes));
    ASSERT_EQ(h_->core.Stats().pipelines_active, 1u);
    request_ = h_->Submit(OneSequence(300, 60));
    for (int i = 0; i < 8; ++i) {
      for (auto& [id, worker] : h_->workers) {
        if (!h_->StageOf(id).plans.empty()) h_->Report(id);
      }
    }
    ASSERT_GT(h_->tokens[request_].size(), 1u);
  }
  void TearDown() override { EXPECT_THAT(h_->problems, IsEmpty()); }
  bool Serves() const { return h_->core.Stats().pipelines_active == 1; }
  void ExpectWhole() {
    h_->Run();
    ASSERT_TRUE(h_->ended.contains(request_)) << h_->core.StatusJson(h_->now_us);
    EXPECT_TRUE(h_->ended.at(request_).status.ok()) << h_->ended.at(request_).status;
    ASSERT_EQ(h_->tokens[request_].size(), 60u);
    for (uint32_t i = 0; i < 60; ++i) {
      EXPECT_EQ(h_->tokens[request_][i].id, h_->token_at(1, 300 + i));
    }
  }

  std::unique_ptr<Harness> h_;
  std::vector<WorkerId> w_;
  RequestId request_;
};

TEST_F(SpareWaitTest, OneWithRoomTakesTheLayersBesideItsOwn) {
  Start(100'000, 20 * 256);
  const uint64_t own = h_->StageOf(w_[1]).load.stage_id();
  h_->Lose(w_[0]);
  h_->Tick(kWaitUs - 1'000'000);
  EXPECT_FALSE(Serves()) << "who is restarted may still come";
  h_->Tick(2'000'000);
  ASSERT_TRUE(Serves());
  EXPECT_EQ(h_->workers.at(w_[1]).stages.size(), 2u);
  EXPECT_TRUE(h_->workers.at(w_[1]).stages.contains(own)) << "it kept its stage";
  EXPECT_EQ(h_->rows_restored, 256u) << "of the lost one, from copies";
  EXPECT_LE(h_->core.Stats().replayed_tokens, 127u);
  ExpectWhole();
}

TEST_F(SpareWaitTest, TheNeighbourTakesThem) {
  Start(100'000, 20 * 128, 4);
  h_->Lose(w_[0]);
  h_->Tick(kWaitUs + 1'000'000);
  ASSERT_TRUE(Serves());
  EXPECT_EQ(h_->workers.at(w_[1]).stages.size(), 2u);
  ExpectWhole();
}

TEST_F(SpareWaitTest, WithoutRoomBesideThePipelineIsFormedAnewOnThem) {
  Start(20'000);  // which the cache fills
  h_->Lose(w_[1]);
  h_->Tick(kWaitUs + 1'000'000);
  ASSERT_TRUE(Serves());
  EXPECT_EQ(h_->workers.at(w_[0]).stages.size(), 2u);
  EXPECT_EQ(h_->rows_restored, 256u)
      << "of the lost stage; those of its own were with the lost one";
  ExpectWhole();
  // Whoever comes is a spare, and the next death finds it.
  const WorkerId spare = h_->Attach(20'000);
  EXPECT_THAT(h_->workers.at(spare).stages, IsEmpty());
}

TEST_F(SpareWaitTest, WhereTheModelDoesNotFitThePlaceWaits) {
  Start(5'100);  // the model takes 5,000, two workspaces 100
  h_->Lose(w_[1]);
  h_->Tick(2 * kWaitUs);
  EXPECT_FALSE(Serves());
  h_->Attach(5'100);
  ASSERT_TRUE(Serves());
  ExpectWhole();
}

TEST_F(SpareWaitTest, WhereWhatWasAdmittedDoesNotFitThePlaceWaits) {
  // Five blocks of four layers beside the model; the sequence needs six.
  Start(5'100 + 5 * 512);
  h_->Lose(w_[1]);
  h_->Tick(2 * kWaitUs);
  EXPECT_FALSE(Serves());
  h_->ComeBack(w_[1]);
  ASSERT_TRUE(Serves());
  ExpectWhole();
}

TEST_F(SpareWaitTest, WhereAllAreLostTheFirstThatComesWaitsForTheOthers) {
  Start(20'000);
  h_->Lose(w_[0]);
  h_->Lose(w_[1]);
  h_->Tick(2 * kWaitUs);
  EXPECT_FALSE(Serves());
  h_->Attach(20'000);
  h_->Tick(kWaitUs - 1'000'000);
  EXPECT_FALSE(Serves());
  h_->Tick(2'000'000);
  ASSERT_TRUE(Serves()) << "one is enough";
  ExpectWhole();
}

}  // namespace
}  // namespace strait
