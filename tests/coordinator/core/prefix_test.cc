// SPDX-License-Identifier: Apache-2.0
//
// Defends: sequences of the same first tokens share their rows, whether the first one ended, decodes or still has its
// prompt computed; salts keep them apart; what nobody has gives way before anybody is preempted. The harness' workers
// object to what an honest worker would refuse, and count bytes on their own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/coordinator/core/prefix_fixture.h"

namespace strait {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

CoreOptions Options(uint32_t num_stages = 1) { return PrefixOptions(num_stages); }

RequestSpec Salted(RequestSpec request, const std::string& salt) {
  request.sequences[0].cache_salt = salt;
  return request;
}

class PrefixTest : public PrefixFixture {
 protected:
  // Tokens that it began with; it ends.
  uint32_t Cached(RequestSpec spec) {
    const RequestId id = h_->Submit(std::move(spec));
    h_->Run();
    EXPECT_TRUE(h_->ended.contains(id));
    return h_->cached[id].empty() ? 0 : h_->cached[id][0];
  }
  std::vector<uint64_t> RowsComputed() {
    std::vector<uint64_t> rows;
    for (const WorkerId id : w_) rows.push_back(h_->StageOf(id).rows_computed);
    return rows;
  }
};

TEST_F(PrefixTest, ASequenceBeginsWithTheFullBlocksOfOneThatEnded) {
  Start(Options(2), {100'000, 100'000});
  EXPECT_EQ(Cached(Prompt(0, 200)), 0u);
  EXPECT_EQ(h_->core.Stats().prefix_blocks_made, 3u);
  EXPECT_EQ(h_->core.Stats().cache_bytes_used, 3 * 512u) << "they stay";
  const std::vector<uint64_t> before = RowsComputed();
  EXPECT_EQ(Cached(Prompt(0, 200)), 192u);
  EXPECT_THAT(RowsComputed(), ElementsAre(before[0] + 9, before[1] + 9));
  EXPECT_EQ(h_->core.Stats().cached_rows, 192u);
  // Two of three blocks are the same.
  RequestSpec other = Prompt(0, 200);
  other.sequences[0].prompt[130] = 99;
  EXPECT_EQ(Cached(other), 128u);
  EXPECT_EQ(Cached(Prompt(1, 200)), 0u);
}

// Never with the row that its first token is sampled from.
TEST_F(PrefixTest, OneRowIsLeftToCompute) {
  Start(Options(), {100'000});
  Cached(Prompt(0, 400));
  EXPECT_EQ(Cached(Prompt(0, 63)), 0u);
  EXPECT_EQ(Cached(Prompt(0, 64)), 0u);
  EXPECT_EQ(Cached(Prompt(0, 65)), 64u);
  EXPECT_EQ(Cached(Prompt(0, 128)), 64u);
  EXPECT_EQ(Cached(Prompt(0, 129)), 128u);
}

TEST_F(PrefixTest, WhatWasGeneratedIsSharedToo) {
  Start(Options(), {100'000});
  h_->token_at = [](uint64_t, uint32_t position) { return 10 + position % 80; };
  Cached(Prompt(0, 60, 80));  // its rows are of 139 tokens, as OneSequence has them
  EXPECT_EQ(Cached(Prompt(0, 200)), 128u);
}

TEST_F(PrefixTest, ASequenceBeginsWithBlocksOfOneThatDecodes) {
  Start(Options(2), {100'000, 100'000});
  h_->Submit(Prompt(0, 200, 60));
  Rounds(*h_, w_, 6);
  const RequestId second = h_->Submit(Prompt(0, 150, 60));
  EXPECT_THAT(h_->cached[second], ElementsAre(128));
  Rounds(*h_, w_, 3);
  // Three blocks of both, what is left of each its own.
  EXPECT_EQ(h_->core.Stats().cache_bytes_used, (3 + 1 + 1) * 512u);
  h_->Run();
}

TEST_F(PrefixTest, ChoicesOfOnePromptWaitForTheFirst) {
  Start(Options(), {100'000});
  RequestSpec request = Prompt(0, 200, 5);
  request.sequences.resize(4, request.sequences[0]);
  const RequestId id = h_->Submit(request);
  EXPECT_EQ(h_->core.Stats().running, 1u);
  // Somebody else need not wait.
  h_->Submit(Prompt(1, 30, 40));
  EXPECT_EQ(h_->core.Stats().running, 2u);
  h_->Report(w_[0]);
  EXPECT_EQ(h_->core.Stats().running, 5u);
  EXPECT_THAT(h_->cached[id], ElementsAre(192, 192, 192));
  h_->Run();
  EXPECT_EQ(h_->tokens[id].size(), 20u);
  EXPECT_EQ(h_->core.Stats().prompt_tokens, 200u + 3 * 8 + 30);
}

TEST_F(PrefixTest, WhoWaitsForOneThatIsCancelledComputesItself) {
  Start(Options(), {100'000});
  const RequestId first = h_->Submit(Prompt(0, 500));
  const RequestId second = h_->Submit(Prompt(0, 500));
  EXPECT_EQ(h_->core.Stats().waiting, 1u);
  h_->core.OnCancel(first, std::nullopt, h_->now_us);
  h_->Pump();
  EXPECT_EQ(h_->core.Stats().waiting, 0u);
  h_->Run();
  EXPECT_EQ(h_->tokens[second].size(), 2u);
}

TEST_F(PrefixTest, SaltsShareNothing) {
  Start(Options(), {100'000});
  Cached(Salted(Prompt(0, 200), "a"));
  EXPECT_EQ(Cached(Prompt(0, 200)), 0u);
  EXPECT_EQ(Cached(Salted(Prompt(0, 200), "b")), 0u);
  EXPECT_EQ(Cached(Salted(Prompt(0, 200), "a")), 192u);
}

TEST_F(PrefixTest, PromptsThatAreScoredAreComputedAndShared) {
  Start(Options(), {100'000});
  Cached(Prompt(0, 200));
  RequestSpec request = Prompt(0, 300);
  request.sequences[0].score_prompt = true;
  const RequestId scored = h_->Submit(request);
  h_->Run();
  EXPECT_THAT(h_->cached[scored], IsEmpty());
  EXPECT_EQ(h_->scores[scored].size(), 299u);
  EXPECT_EQ(Cached(Prompt(0, 300)), 256u) << "it has those that there were, and its own behind them";
}

TEST_F(PrefixTest, WithoutItNothingStays) {
  CoreOptions options = Options();
  options.prefix_cache = false;
  Start(options, {100'000});
  Cached(Prompt(0, 200));
  EXPECT_EQ(h_->core.Stats().cache_bytes_used, 0u);
  EXPECT_EQ(Cached(Prompt(0, 200)), 0u);
}

// ---------------------------------------------------------------- room

TEST_F(PrefixTest, TheOldestGoFirstAndLeavesBeforeWhatLeadsToThem) {
  Start(Options(), {Memory(9)});
  Cached(Prompt(0, 130));
  Cached(Prompt(1, 130));
  Cached(Prompt(2, 130));
  EXPECT_EQ(Cached(Prompt(0, 130)), 128u) << "used again: 1 is the oldest";
  ASSERT_EQ(h_->core.Stats().cache_bytes_used, 6 * 512u);
  const std::vector<ContentKey> none = h_->StageOf(w_[0]).prefixes.dropped;
  ASSERT_THAT(none, IsEmpty());
  Cached(Prompt(3, 250));  // four blocks
  ASSERT_EQ(h_->StageOf(w_[0]).prefixes.dropped.size(), 1u);
  EXPECT_EQ(Cached(Prompt(1, 130)), 64u) << "its second block went";
  EXPECT_EQ(h_->core.Stats().preemptions, 0u);
}

TEST_F(PrefixTest, TheyGiveWayBeforeAnybodyIsPreempted) {
  Start(Options(), {Memory(10)});
  Cached(Prompt(0, 500));
  ASSERT_EQ(h_->core.Stats().cache_bytes_used, 7 * 512u);
  for (uint32_t stem = 1; stem <= 4; ++stem) h_->Submit(Prompt(stem, 20, 100));
  h_->Run();
  EXPECT_EQ(h_->core.Stats().prefix_blocks_dropped, 5u);
  EXPECT_EQ(h_->core.Stats().preemptions, 0u);
}

TEST_F(PrefixTest, WhoIsPreemptedFindsItsBlocks) {
  Start(Options(), {Memory(6)});
  const RequestId first = h_->Submit(Prompt(0, 100, 200));
  const RequestId second = h_->Submit(Prompt(1, 100, 100));
  h_->Run();
  EXPECT_GT(h_->core.Stats().preemptions, 0u);
  EXPECT_EQ(h_->tokens[first].size(), 200u);
  EXPECT_EQ(h_->tokens[second].size(), 100u);
  EXPECT_GT(h_->core.Stats().cached_rows, 0u);
  EXPECT_THAT(h_->cached[second], IsEmpty()) << "that is no matter of its client";
}

// What the books dropped and no plan did yet is still at the stages.
TEST_F(PrefixTest, ACacheGetsSmallerAfterWhatGaveWay) {
  CoreOptions options = Options();
  options.steps_in_flight = 1;
  Start(options, {Memory(10)});
  Cached(Prompt(0, 577));  // nine blocks stay
  h_->Submit(Prompt(1, 60, 2));
  // A step is under way: this one is placed, makes room and goes again before there is another plan.
  const RequestId gone = h_->Submit(Prompt(2, 60, 2));
  ASSERT_EQ(h_->core.Stats().prefix_blocks_dropped, 1u);
  h_->core.OnCancel(gone, std::nullopt, h_->now_us);
  h_->Pump();
  Harness::FakeStage& stage = h_->StageOf(w_[0]);
  h_->answer_loads = h_->answer_resizes = false;
  h_->Scale(2);
  ASSERT_TRUE(stage.resize_due.has_value()) << "to nine";
  const v1::StepPlan& last = stage.plans.back();
  ASSERT_GT(last.cache_ops_size(), 0);
  EXPECT_TRUE(last.cache_ops(0).has_drop_prefix()) << "before the worker was told to shrink";
  h_->answer_resizes = true;
  h_->Run();
  EXPECT_FALSE(stage.resize_due.has_value());
}

// ---------------------------------------------------------------- reports

TEST_F(PrefixTest, LogitsThatAreNotFiniteLeaveNothing) {
  Start(Options(), {100'000});
  const RequestId id = h_->Submit(Prompt(0, 200));
  v1::StageReport report = h_->MakeReport(w_[0]);
  report.mutable_results(0)->Clear();
  report.mutable_results(0)->set_sequence_id(1);
  report.mutable_results(0)->set_error_code(13);
  h_->Send(w_[0], report);
  h_->Run();
  EXPECT_EQ(h_->ended.at(id).reason, FinishReason::kError);
  EXPECT_EQ(h_->core.Stats().cache_bytes_used, 0u);
}

TEST(PrefixLiesTest, WhoseBytesDifferIsEvictedByName) {
  Harness h(Options(2), SmallModel());
  const std::vector<WorkerId> w = AttachAll(h, 2);
  h.Submit(OneSequence(200, 60));
  Rounds(h, w, 3);
  h.Submit(OneSequence(200, 60));
  v1::StageReport report = h.MakeReport(w[0]);
  while (!h.StageOf(w[0]).lengths.contains(SequenceId{2})) {
    h.Send(w[0], report);
    ASSERT_FALSE(h.StageOf(w[0]).plans.empty());
    report = h.MakeReport(w[0]);
  }
  report.set_cache_bytes(report.cache_bytes() + 3 * 2 * 128);  // as if each had them
  h.Send(w[0], report);
  ASSERT_TRUE(h.workers.at(w[0]).evicted);
  EXPECT_THAT(h.workers.at(w[0]).why.ToString(), HasSubstr("of latent blocks after step"));
  EXPECT_FALSE(h.workers.at(w[1]).evicted);
}

}  // namespace
}  // namespace strait
