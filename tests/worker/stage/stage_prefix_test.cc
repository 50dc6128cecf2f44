// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage reads through prefix blocks what their first sequence wrote, tells them with its rows, drops those
// that nobody has with an epoch, and hands them to stages that follow it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/stage/take_over_fixture.h"
#include "worker/stage/take_over.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr ContentKey kA{.low = 1, .high = 9}, kB{.low = 2, .high = 9};

void AddKeep(v1::StepPlan* plan, uint64_t id, uint32_t first, const std::vector<ContentKey>& keys) {
  v1::KeepPrefix* keep = plan->add_cache_ops()->mutable_keep_prefix();
  keep->set_sequence_id(id);
  keep->set_first_block(first);
  keep->set_keys(Pack(keys));
}
// Begins with blocks of sequence 7's tokens.
void AddBegun(v1::StepPlan* plan, uint64_t id, const std::vector<ContentKey>& keys) {
  AddOpen(plan, id);
  v1::OpenSequence* open = plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open();
  open->set_prefix_keys(Pack(keys));
  const auto rows = static_cast<uint32_t>(keys.size()) * limits::kBlockTokens;
  for (const TokenId token : Tokens(7, 0, rows)) open->mutable_prefix_tokens()->add_ids(token);
}

class StagePrefixTest : public TakeOverTest {
 protected:
  // Sequence 7 of 140 rows, two blocks of which are kept; 8 begins with them and has 130 rows.
  static void Share(Hosted* hosted, bool is_kept = true) {
    hosted->Run(Rows(*hosted, 1, 7, 0, 140));
    v1::StepPlan plan = hosted->Plan(2);
    if (is_kept) {
      AddKeep(&plan, 7, 0, {kA, kB});
      AddBegun(&plan, 8, {kA, kB});
    } else {
      AddOpen(&plan, 8);
      AddRows(&plan, 8, 0, Tokens(7, 0, 130));
    }
    hosted->Run(plan);
    if (!is_kept) return;
    v1::StepPlan rows = hosted->Plan(3);
    AddRows(&rows, 8, 128, Tokens(7, 128, 2));
    hosted->Run(rows);
  }
  static std::map<uint64_t, uint32_t> PrefixOf(const Hosted& hosted) {
    std::map<uint64_t, uint32_t> prefix;
    for (const HeldRows& rows : hosted.stage->held()) prefix[rows.id.value] = rows.prefix_blocks;
    return prefix;
  }
};

TEST_F(StagePrefixTest, RowsAreReadThroughThem) {
  Hosted& one = Stage1Of1();
  Share(&one);
  EXPECT_EQ(one.stage->blocks_used(), (2 + 1 + 1) * kLayers);
  v1::StepPlan scored = one.Plan(4);
  AddClose(&scored, 7);
  WantScore(AddRows(&scored, 8, 130, Tokens(7, 130, 1)), 0, 5);
  const StepOutput out = one.Run(scored);
  EXPECT_EQ(out.report.results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash({0, kLayers}, Tokens(7, 0, 131)) % 4096));
  EXPECT_EQ(BlocksHeld(out.report), (2 + 1) * kLayers);
  EXPECT_EQ(out.report.rows_stored(), 1u);
  CheckIntegrity();
}

// A sequence that computed the same tokens as another beside it has that one's blocks from then on, and reads them.
TEST_F(StagePrefixTest, ATwinReadsTheBlocksOfTheFirst) {
  Hosted& one = Stage1Of1();
  Share(&one, false);
  const uint64_t before = one.stage->blocks_used();
  v1::StepPlan first = one.Plan(3);
  AddKeep(&first, 7, 0, {kA, kB});
  AddKeep(&first, 8, 0, {kA, kB});
  AddClose(&first, 7);
  one.Run(first);
  EXPECT_EQ(one.stage->blocks_used(), before - (2 + 1) * kLayers)
      << "its own two; the other's third";
  CheckIntegrity();
  v1::StepPlan scored = one.Plan(4);
  WantScore(AddRows(&scored, 8, 130, Tokens(7, 130, 1)), 0, 5);
  EXPECT_EQ(one.Run(scored).report.results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash({0, kLayers}, Tokens(7, 0, 131)) % 4096));
  ASSERT_TRUE(one.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_EQ(PrefixOf(one), (Held{{8, 2}}));
  CheckIntegrity();
}

TEST_F(StagePrefixTest, RowsThatAreNotFinishedAreNotKept) {
  Hosted& one = Stage1Of1();
  one.Run(Rows(one, 1, 7, 0, 100));
  one.Accept(Rows(one, 2, 7, 100, 60));
  one.Begin();
  v1::StepPlan plan = one.Plan(3);
  AddKeep(&plan, 7, 0, {kA, kB});
  const absl::Status refused = one.stage->AcceptPlan(plan, 0);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("keep of sequence 7 to row 128, of which 100 are finished here"));
  (void)one.stage->FinishNext([] { return 0; });
  EXPECT_TRUE(one.stage->AcceptPlan(plan, 0).ok());
}

TEST_F(StagePrefixTest, AStepThatFailsCostsItsOwnRowsAlone) {
  Hosted& one = Stage1Of1();
  Share(&one);
  one.model->fail_next = true;
  v1::StepPlan plan = one.Plan(4);
  AddBegun(&plan, 9, {kA});
  AddRows(&plan, 9, 64, Tokens(7, 64, 80));
  one.Accept(plan);
  one.Begin();
  EXPECT_NE(one.stage->FinishNext([] { return 0; }).report.error_code(), 0u);
  one.model->fail_next = false;
  ASSERT_TRUE(one.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_EQ(one.Held(), (Held{{7, 140}, {8, 130}, {9, 64}}));
  EXPECT_EQ(PrefixOf(one), (Held{{7, 2}, {8, 2}, {9, 1}}));
  CheckIntegrity();
}

TEST_F(StagePrefixTest, WithAnEpochThoseGoThatNobodyHas) {
  Hosted& one = Stage1Of1();
  Share(&one);
  v1::StepPlan plan = one.Plan(4);
  AddClose(&plan, 7);
  AddClose(&plan, 8);
  AddBegun(&plan, 9, {kA});
  one.Run(plan);
  EXPECT_EQ(one.stage->blocks_used(), 2 * kLayers);
  ASSERT_TRUE(one.stage->Activate({1, 2}, 0, 1).ok());
  EXPECT_EQ(one.stage->blocks_used(), 1 * kLayers);
  EXPECT_EQ(PrefixOf(one), (Held{{9, 1}}));
  v1::StepPlan first = one.Plan(1);
  AddClose(&first, 9);
  EXPECT_EQ(BlocksHeld(one.Run(first).report), 0u) << "nor after its first plan";
}

TEST_F(StagePrefixTest, AFirstPlanCutsThemAndSharesThem) {
  Hosted& one = Stage1Of1();
  Share(&one);
  ASSERT_TRUE(one.stage->Activate({1, 2}, 0, 1).ok());
  v1::StepPlan plan = Keep(one, {{7, 64}, {8, 130}}, 1);
  AddBegun(&plan, 9, {kA, kB});
  AddRows(&plan, 7, 64, Tokens(7, 64, 70));
  EXPECT_EQ(BlocksHeld(one.Run(plan).report), (2 + 2 + 1) * kLayers);
  one.ExpectRows(7, 134);
  EXPECT_NE(one.stage->cache().PageTables({7})[0][1], one.stage->cache().PageTables({8})[0][1]);
  CheckIntegrity();
}

TEST_F(StagePrefixTest, AStageBecomesTwoWithThem) {
  Hosted& one = Stage1Of1();
  Share(&one);
  v1::StepPlan unheld = Rows(one, 4, 9, 0, 64);
  one.Run(unheld);
  v1::StepPlan keep = one.Plan(5);
  AddKeep(&keep, 9, 0, {{.low = 3, .high = 3}});
  AddClose(&keep, 9);
  one.Run(keep);
  Hosted& first = Add(2, {0, 2});
  Hosted& last = Add(3, {2, kLayers});
  Follow(first, 0, 2, {1});
  Follow(last, 1, 2, {1});
  stages_.erase(1);
  for (Hosted* hosted : {&first, &last}) {
    EXPECT_EQ(PrefixOf(*hosted), (Held{{7, 2}, {8, 2}}));
    EXPECT_EQ(hosted->stage->blocks_used(), (2 + 1 + 1) * hosted->layers().size());
    hosted->Run(Keep(*hosted, {{7, 140}, {8, 0}}, 2));
    hosted->ExpectRows(7, 140);
    EXPECT_EQ(hosted->stage->blocks_used(), 3 * hosted->layers().size());
  }
  CheckIntegrity();
}

// One stage did what the last plan says, the other did not. A block that is a prefix block in some layers and a
// sequence's own in others is no more than what all layers have.
TEST_F(StagePrefixTest, WhatIsKeptInSomeLayersIsCut) {
  for (const bool first_keeps : {true, false}) {
    Hosted& first = Add(1, {0, 3});
    Hosted& last = Add(2, {3, kLayers});
    ASSERT_TRUE(first.stage->Activate({1, 1}, 0, 2).ok());
    ASSERT_TRUE(last.stage->Activate({1, 1}, 1, 2).ok());
    Share(&first, first_keeps);
    Share(&last, !first_keeps);
    v1::StepPlan some = (first_keeps ? last : first).Plan(3);
    AddKeep(&some, 7, 0, {kA});
    (first_keeps ? last : first).Run(some);
    Hosted& one = Add(3, {0, kLayers});
    Follow(one, 0, 1, {1, 2});
    EXPECT_EQ(one.Held(), (Held{{7, 64}}));
    EXPECT_EQ(PrefixOf(one), (Held{{7, 1}}));
    EXPECT_EQ(pool_.used(), 1 * kLayers);
    stages_.erase(1);
    stages_.erase(2);
    one.Run(Keep(one, {{7, 64}, {8, 0}}, 1));
    one.ExpectRows(7, 64);
    stages_.clear();
  }
}

// Two stages give way to one. While the first of them is unloaded, the cache of the worker gets smaller.
TEST_F(StagePrefixTest, ACacheIsCompactedWhileOneThatIsFollowedIsThere) {
  Hosted& first = Add(1, {0, 3});
  Hosted& last = Add(2, {3, kLayers});
  ASSERT_TRUE(first.stage->Activate({1, 1}, 0, 2).ok());
  ASSERT_TRUE(last.stage->Activate({1, 1}, 1, 2).ok());
  Share(&first);
  Share(&last);
  Hosted& one = Add(3, {0, kLayers});
  Follow(one, 0, 1, {1, 2});
  stages_.erase(1);
  const uint32_t end = pool_.used();
  pool_.Narrow(end);
  std::vector<BlockMove> moves;
  for (auto& [id, hosted] : stages_) hosted.stage->Compact(end, &moves);
  for (const BlockMove& move : moves) EXPECT_LT(move.to, end);
  ASSERT_TRUE(cache_.Resize(end, moves).ok());
  pool_.DropNarrowed();
  CheckIntegrity();
  one.ExpectRows(7, 140);
}

}  // namespace
}  // namespace strait
