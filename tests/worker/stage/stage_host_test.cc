// SPDX-License-Identifier: Apache-2.0
//
// Defends: a block that leaves for host memory is free for plans at once and for rows when its copy has ended; what
// comes back is used when it is there; plans that contradict what is where are refused with a sentence.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "proto/model/content_key.h"
#include "tests/worker/stage/fake_model.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint32_t kLayers = 2;

class StageHostTest : public testing::Test {
 protected:
  StageHostTest() { EXPECT_TRUE(f_.stage->Activate({1, 1}, 0, 1, false, 2).ok()); }

  static ContentKey Key(uint64_t n) { return {n, 1}; }
  static std::string Keys(std::vector<uint64_t> numbers) {
    std::string packed;
    for (const uint64_t n : numbers) AppendTo(Key(n), &packed);
    return packed;
  }
  static std::vector<TokenId> Tokens(uint32_t count, uint32_t seed = 0) {
    std::vector<TokenId> tokens(count);
    for (uint32_t i = 0; i < count; ++i) tokens[i] = (i * 7 + seed) % kFakeVocab;
    return tokens;
  }
  void Accept(const v1::StepPlan& plan) {
    const absl::Status status = f_.stage->AcceptPlan(plan, 0);
    ASSERT_TRUE(status.ok()) << status;
  }
  std::string Refusal(const v1::StepPlan& plan) {
    return std::string(f_.stage->AcceptPlan(plan, 0).message());
  }
  HostMoves Poll() {
    HostMoves moves;
    f_.stage->PollCopies(++now_us_, &moves);
    const absl::Status sound = f_.stage->CheckIntegrity();
    EXPECT_TRUE(sound.ok()) << sound;
    return moves;
  }
  HostMoves Drain() {
    HostMoves all;
    while (f_.stage->CopiesRows()) {
      const HostMoves moves = Poll();
      all.returned.insert(all.returned.end(), moves.returned.begin(), moves.returned.end());
      all.lost.insert(all.lost.end(), moves.lost.begin(), moves.lost.end());
    }
    return all;
  }
  // Sequence 7 has 130 rows, of which two prefix blocks, 1 and 2, stay.
  void LeaveTwo() {
    v1::StepPlan plan = f_.Plan(1);
    AddOpen(&plan, 7);
    AddRows(&plan, 7, 0, Tokens(130));
    Accept(plan);
    f_.Run();
    plan = f_.Plan(2);
    v1::KeepPrefix* keep = plan.add_cache_ops()->mutable_keep_prefix();
    keep->set_sequence_id(7);
    keep->set_keys(Keys({1, 2}));
    AddClose(&plan, 7);
    Accept(plan);
    f_.Run();
    EXPECT_EQ(f_.stage->blocks_used(), 4u);
  }
  v1::StepPlan Offload(uint64_t step, std::vector<uint64_t> keys) {
    v1::StepPlan plan = f_.Plan(step);
    plan.add_cache_ops()->mutable_offload_prefix()->set_keys(Keys(keys));
    plan.add_cache_ops()->mutable_drop_prefix()->set_keys(Keys(keys));
    return plan;
  }
  // Sequence `id` begins with both blocks and has 100 rows more.
  v1::StepPlan Begin(uint64_t step, uint64_t id) {
    v1::StepPlan plan = f_.Plan(step);
    AddOpen(&plan, id);
    v1::OpenSequence* open = plan.mutable_cache_ops(0)->mutable_open();
    open->set_prefix_keys(Keys({1, 2}));
    for (const TokenId token : Tokens(128)) open->mutable_prefix_tokens()->add_ids(token);
    const std::vector<TokenId> all = Tokens(228);
    WantScore(AddRows(&plan, id, 128, {all.begin() + 128, all.end()}), 99, 3);
    return plan;
  }

  FakeStage f_{{0, kLayers}, kLayers, 8};
  uint64_t now_us_ = 0;
};

TEST_F(StageHostTest, WhatTakesTheirPlaceWaitsForTheCopy) {
  LeaveTwo();
  f_.model->copy_faults.delay_polls = 3;
  v1::StepPlan plan = Offload(3, {1, 2});
  AddOpen(&plan, 8);
  AddRows(&plan, 8, 0, Tokens(200, 5));  // all of the eight blocks
  Accept(plan);
  EXPECT_EQ(f_.stage->blocks_used(), 0u);
  EXPECT_EQ(f_.stage->cache().num_pinned(), 4u);
  EXPECT_EQ(f_.stage->peak_blocks(), 8u);
  while (f_.stage->CopiesRows()) {
    EXPECT_FALSE(f_.stage->Ready());
    Poll();
  }
  ASSERT_TRUE(f_.stage->Ready());
  EXPECT_EQ(BlocksHeld(f_.Run().report), 8u);
  EXPECT_EQ(f_.stage->tier().num_blocks(), 2u);

  // A step that needs no more than there is does not wait, and others begin with what came back.
  plan = f_.Plan(4);
  AddClose(&plan, 8);
  plan.add_cache_ops()->mutable_return_prefix()->set_keys(Keys({1, 2}));
  Accept(plan);
  EXPECT_EQ(f_.stage->blocks_used(), 4u);
  EXPECT_EQ(BlocksHeld(f_.Run().report), 4u);
  EXPECT_THAT(Refusal(Begin(5, 9)), HasSubstr("is on its way back from host memory"));
  const HostMoves moves = Drain();
  EXPECT_EQ(moves.returned.size(), 2u);
  Accept(Begin(5, 9));
  const StepOutput out = f_.Run();
  // Its score is of all rows: those that came back are what they were.
  uint64_t hash = FakeHash({0, kLayers}, Tokens(228));
  ASSERT_EQ(out.report.results_size(), 1);
  EXPECT_EQ(out.report.results(0).scored(0).logprob(), -static_cast<float>(hash % 4096));
}

TEST_F(StageHostTest, ABlockThatChangedIsLostAndItsPlaceStaysTaken) {
  LeaveTwo();
  Accept(Offload(3, {1, 2}));
  f_.Run();
  Drain();
  f_.model->copy_faults.taken.begin()->first[5] ^= std::byte{4};
  v1::StepPlan plan = f_.Plan(4);
  plan.add_cache_ops()->mutable_return_prefix()->set_keys(Keys({1, 2}));
  Accept(plan);
  f_.Run();
  const HostMoves moves = Drain();
  EXPECT_EQ(moves.returned.size(), 1u);
  EXPECT_EQ(moves.lost.size(), 1u);
  EXPECT_EQ(f_.stage->blocks_used(), 4u);
  EXPECT_THAT(Refusal(Begin(5, 9)), HasSubstr("is on its way back"));
  plan = f_.Plan(5);
  plan.add_cache_ops()->mutable_drop_prefix()->set_keys(Keys({1, 2}));
  plan.add_cache_ops()->mutable_forget_prefix()->set_keys(Keys({1, 2}));
  Accept(plan);
  f_.Run();
  EXPECT_EQ(f_.stage->blocks_used(), 0u);
  EXPECT_EQ(f_.stage->tier().num_blocks(), 0u);
}

// A block was dropped while it came back, in a plan without any other move. Its blocks were counted as free while
// the copy still wrote them, and the step behind found none.
TEST_F(StageHostTest, WhatIsDroppedOnItsWayBackIsFreeWhenTheCopyHasEnded) {
  LeaveTwo();
  Accept(Offload(3, {1, 2}));
  f_.Run();
  Drain();
  f_.model->copy_faults.delay_polls = 3;
  v1::StepPlan plan = f_.Plan(4);
  plan.add_cache_ops()->mutable_return_prefix()->set_keys(Keys({1, 2}));
  Accept(plan);
  f_.Run();
  plan = f_.Plan(5);
  plan.add_cache_ops()->mutable_drop_prefix()->set_keys(Keys({1, 2}));
  AddOpen(&plan, 8);
  AddRows(&plan, 8, 0, Tokens(200, 5));
  Accept(plan);
  EXPECT_FALSE(f_.stage->Ready());
  EXPECT_EQ(f_.stage->cache().num_pinned(), 4u);
  const HostMoves moves = Drain();
  EXPECT_EQ(moves.returned.size() + moves.lost.size(), 2u) << "each is answered";
  EXPECT_EQ(BlocksHeld(f_.Run().report), 8u);
}

TEST_F(StageHostTest, AnEpochEndsWithEmptyHostMemory) {
  LeaveTwo();
  f_.model->copy_faults.delay_polls = 3;
  Accept(Offload(3, {1, 2}));
  ASSERT_TRUE(f_.stage->Activate({1, 2}, 0, 1, false, 2).ok());
  EXPECT_FALSE(f_.stage->CopiesRows());
  EXPECT_EQ(f_.stage->tier().num_blocks(), 0u);
  EXPECT_EQ(f_.stage->peak_blocks(), 0u);
  EXPECT_TRUE(f_.stage->CheckIntegrity().ok());
}

TEST_F(StageHostTest, ContradictionsAreRefused) {
  v1::StepPlan plan = f_.Plan(1);
  plan.add_cache_ops()->mutable_forget_prefix()->set_keys(Keys({1}));
  EXPECT_THAT(Refusal(plan), HasSubstr("its first plan moves no prefix blocks"));
  LeaveTwo();
  const auto refusal = [&](auto add) {
    v1::StepPlan wrong = f_.Plan(3);
    add(&wrong);
    return Refusal(wrong);
  };
  EXPECT_THAT(
      refusal([](auto* p) { p->add_cache_ops()->mutable_offload_prefix()->set_keys(Keys({5})); }),
      HasSubstr("is not here"));
  EXPECT_THAT(
      refusal([](auto* p) { p->add_cache_ops()->mutable_return_prefix()->set_keys(Keys({1})); }),
      HasSubstr("is not in host memory"));
  EXPECT_THAT(
      refusal([](auto* p) { p->add_cache_ops()->mutable_forget_prefix()->set_keys(Keys({1})); }),
      HasSubstr("is not in host memory"));
  EXPECT_THAT(
      refusal([](auto* p) { p->add_cache_ops()->mutable_offload_prefix()->set_keys("short"); }),
      HasSubstr("16"));
  EXPECT_THAT(refusal([](auto* p) {
                p->add_cache_ops()->mutable_offload_prefix()->set_keys(Keys({1}));
                p->add_cache_ops()->mutable_offload_prefix()->set_keys(Keys({1}));
              }),
              HasSubstr("is in host memory already"));
  EXPECT_THAT(refusal([](auto* p) {
                p->add_cache_ops()->mutable_offload_prefix()->set_keys(Keys({1}));
                p->add_cache_ops()->mutable_return_prefix()->set_keys(Keys({1}));
              }),
              HasSubstr("is here already"));
  // A third one is more than its share.
  v1::StepPlan more = Offload(3, {1, 2});
  AddOpen(&more, 8);
  AddRows(&more, 8, 0, Tokens(64, 9));
  Accept(more);
  Drain();
  f_.Run();
  plan = f_.Plan(4);
  v1::KeepPrefix* keep = plan.add_cache_ops()->mutable_keep_prefix();
  keep->set_sequence_id(8);
  keep->set_keys(Keys({3}));
  plan.add_cache_ops()->mutable_offload_prefix()->set_keys(Keys({3}));
  EXPECT_THAT(Refusal(plan), HasSubstr("the stage's share of it is 2"));
}

}  // namespace
}  // namespace strait
