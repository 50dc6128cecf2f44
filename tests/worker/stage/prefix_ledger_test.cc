// SPDX-License-Identifier: Apache-2.0
//
// Defends: plans about prefix blocks are taken or refused by what all plans before leave behind, each refusal by its
// sentence; what passes is what the stage's cache then has, block for block.
#include "worker/stage/prefix_ledger.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/stage/plans.h"
#include "worker/stage/plan_ledger.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint32_t kLayers = 2;
constexpr ContentKey kA{.low = 0xA, .high = 1}, kB{.low = 0xB, .high = 1},
    kC{.low = 0xC, .high = 1};
constexpr char kNameA[] = "prefix block 0000000000000001000000000000000a";

class PrefixPlansTest : public testing::Test {
 protected:
  // Sequence 1 has 130 rows, of which the first two blocks are prefix blocks: the plans of steps 1 and 2.
  PrefixPlansTest() {
    Begin();
    v1::StepPlan rows = Plan();
    AddOpen(&rows, 1);
    AddRows(&rows, 1, 0, std::vector<TokenId>(130, 5));
    Take(rows);
    v1::StepPlan keep = Plan();
    AddKeep(&keep, 1, 0, {kA, kB});
    Take(keep);
    EXPECT_EQ(ledger_->blocks(), 3 * kLayers);
  }
  void Begin(PlanLedger::LeftMap left = {}, PrefixLedger prefixes = {}) {
    ledger_ = std::make_unique<PlanLedger>(
        StageShape{
            .num_layers = kLayers, .pool_blocks = 20, .vocab_size = 50, .max_positions = 300},
        std::move(left), std::move(prefixes));
  }
  v1::StepPlan Plan() const {
    v1::StepPlan plan;
    plan.set_step_id(ledger_->next_step().value);
    return plan;
  }
  static void AddKeep(v1::StepPlan* plan, uint64_t id, uint32_t first,
                      const std::vector<ContentKey>& keys) {
    v1::KeepPrefix* keep = plan->add_cache_ops()->mutable_keep_prefix();
    keep->set_sequence_id(id);
    keep->set_first_block(first);
    keep->set_keys(Pack(keys));
  }
  static void AddDrop(v1::StepPlan* plan, const std::vector<ContentKey>& keys) {
    plan->add_cache_ops()->mutable_drop_prefix()->set_keys(Pack(keys));
  }
  static v1::OpenSequence* AddBegun(v1::StepPlan* plan, uint64_t id,
                                    const std::vector<ContentKey>& keys) {
    AddOpen(plan, id);
    v1::OpenSequence* open = plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open();
    open->set_prefix_keys(Pack(keys));
    for (size_t i = 0; i < keys.size() * 64; ++i) open->mutable_prefix_tokens()->add_ids(5);
    return open;
  }
  PlanLedger::CheckedPlan Take(const v1::StepPlan& plan) {
    auto checked = ledger_->Check(plan);
    EXPECT_TRUE(checked.ok()) << checked.status();
    if (!checked.ok()) return {};
    ledger_->Commit(*checked);
    return *std::move(checked);
  }
  void Refuse(const v1::StepPlan& plan, absl::StatusCode code, const std::string& why) {
    const uint64_t blocks = ledger_->blocks();
    const absl::Status status = ledger_->Check(plan).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
    EXPECT_EQ(ledger_->blocks(), blocks);
  }
  std::unique_ptr<PlanLedger> ledger_;
};

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
constexpr auto kExhausted = absl::StatusCode::kResourceExhausted;

TEST_F(PrefixPlansTest, BlocksCountOnceAndStayUntilTheyAreDropped) {
  v1::StepPlan plan = Plan();
  AddBegun(&plan, 2, {kA, kB});
  AddRows(&plan, 2, 128, {1, 2});
  EXPECT_EQ(Take(plan).num_prefix_tokens, 128u);
  EXPECT_EQ(ledger_->blocks(), (2 + 1 + 1) * kLayers);
  plan = Plan();
  AddClose(&plan, 1);
  AddClose(&plan, 2);
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), 2 * kLayers);
  plan = Plan();
  AddDrop(&plan, {kB});
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), 1 * kLayers);
}

TEST_F(PrefixPlansTest, OnePlanKeepsClosesOpensAndDrops) {
  v1::StepPlan plan = Plan();
  AddRows(&plan, 1, 130, std::vector<TokenId>(62, 5));
  Take(plan);
  plan = Plan();
  AddKeep(&plan, 1, 1, {kB, kC});  // the first of these is one
  AddClose(&plan, 1);
  AddBegun(&plan, 2, {kA, kB});
  AddDrop(&plan, {kC});
  AddRows(&plan, 2, 128, {7});
  const PlanLedger::CheckedPlan checked = Take(plan);
  ASSERT_EQ(checked.keys.size(), 3u);
  EXPECT_EQ(checked.keys[0], std::vector<ContentKey>{kC}) << "what the cache does not have yet";
  EXPECT_EQ(ledger_->blocks(), (2 + 1) * kLayers);
}

TEST_F(PrefixPlansTest, AKeyThatIsNotHereIsPassedOverByADrop) {
  v1::StepPlan plan = Plan();
  AddDrop(&plan, {kC});
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), 3 * kLayers);
}

// Before, a sequence whose tokens another had first could keep nothing from there on.
TEST_F(PrefixPlansTest, ABlockOfATwinIsHadInPlaceOfItsOwn) {
  v1::StepPlan rows = Plan();
  AddOpen(&rows, 2);
  AddRows(&rows, 2, 0, std::vector<TokenId>(130, 5));
  Take(rows);
  const uint64_t before = ledger_->blocks();
  v1::StepPlan plan = Plan();
  AddKeep(&plan, 2, 0, {kA, kC});
  const PlanLedger::CheckedPlan checked = Take(plan);
  EXPECT_EQ(checked.keys[0], (std::vector<ContentKey>{kA, kC}));
  EXPECT_TRUE(checked.frees_blocks);
  EXPECT_EQ(ledger_->blocks(), before - kLayers) << "of the first block there is one";
  v1::StepPlan drop = Plan();
  AddClose(&drop, 1);
  AddDrop(&drop, {kA});
  Refuse(drop, kPrecondition, "drop of " + std::string(kNameA) + ", which 1 sequences have");
}

TEST_F(PrefixPlansTest, WhatCannotBeKeptIsRefused) {
  const auto refuse = [&](uint64_t id, uint32_t first, const std::vector<ContentKey>& keys,
                          absl::StatusCode code, const std::string& why) {
    v1::StepPlan plan = Plan();
    AddKeep(&plan, id, first, keys);
    Refuse(plan, code, "keep of sequence " + std::to_string(id) + ": " + why);
  };
  refuse(9, 0, {kC}, kPrecondition, "it is not resident");
  refuse(1, 0, {}, kInvalid, "no keys");
  refuse(1, 2, {kC}, kPrecondition, "keeps blocks to row 192, it has 130");
  refuse(1, ~0u, {kC}, kPrecondition, "keeps blocks to row 274877906944, it has 130");
  refuse(1, 0, {kB}, kPrecondition, std::string("block 0 is ") + kNameA + ", not prefix block");
  v1::StepPlan rows = Plan();
  AddOpen(&rows, 2);
  AddRows(&rows, 2, 0, std::vector<TokenId>(128, 5));
  Take(rows);
  refuse(2, 1, {kC}, kPrecondition, "keeps blocks from 1 on, of which the first 0 are kept");
  refuse(2, 0, {kC, kC}, kPrecondition,
         "block 1 is prefix block 0000000000000001000000000000000c, which it has before");
  v1::StepPlan plan = Plan();
  AddKeep(&plan, 2, 0, {});
  plan.mutable_cache_ops(0)->mutable_keep_prefix()->set_keys("short");
  Refuse(plan, kInvalid, "5 bytes of content keys, each has 16");
}

TEST_F(PrefixPlansTest, WhatCannotBeBegunWithIsRefused) {
  v1::StepPlan plan = Plan();
  AddBegun(&plan, 2, {kA, kC});
  Refuse(plan, kPrecondition,
         "open of sequence 2: prefix block 0000000000000001000000000000000c is not here");
  plan = Plan();
  AddBegun(&plan, 2, {kA})->mutable_prefix_tokens()->mutable_ids()->RemoveLast();
  Refuse(plan, kInvalid, "63 tokens of 1 prefix blocks, which have 64");
  plan = Plan();
  AddBegun(&plan, 2, {kA})->mutable_prefix_tokens()->set_ids(3, 50);
  Refuse(plan, kInvalid, "token id 50, the vocabulary has 50");
  plan = Plan();
  AddBegun(&plan, 2, {kA, kB, kA, kB, kA});
  Refuse(plan, kInvalid, "320 rows of prefix blocks leave none of the model's 300");
  plan = Plan();
  AddBegun(&plan, 2, {kA})->add_kept_rows(0);
  EXPECT_EQ(ledger_->Check(plan).status().code(), kInvalid);
  plan = Plan();
  AddOpen(&plan, 2);
  plan.mutable_cache_ops(0)->mutable_open()->mutable_prefix_tokens()->add_ids(1);
  Refuse(plan, kInvalid, "1 tokens of 0 prefix blocks, which have 0");
}

TEST_F(PrefixPlansTest, WhatASequenceHasIsNotDropped) {
  v1::StepPlan plan = Plan();
  AddDrop(&plan, {kA});
  Refuse(plan, kPrecondition, std::string("drop of ") + kNameA + ", which 1 sequences have");
  plan = Plan();
  AddClose(&plan, 1);
  AddDrop(&plan, {kB});
  AddBegun(&plan, 2, {kA, kB});
  Refuse(plan, kPrecondition, "is not here");
}

TEST_F(PrefixPlansTest, BlocksThatAreSharedMakeRoomForOthers) {
  v1::StepPlan plan = Plan();
  for (uint64_t id = 2; id <= 8; ++id) {
    AddBegun(&plan, id, {kA, kB});
    AddRows(&plan, id, 128, {1});
  }
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), 20u) << "all of the pool";
  plan = Plan();
  AddOpen(&plan, 9);
  AddRows(&plan, 9, 0, {1});
  Refuse(plan, kExhausted, "needs 22 latent blocks, the stage has 20");
}

// ---------------------------------------------------------------- the first plan of an epoch

class PrefixLeftTest : public PrefixPlansTest {
 protected:
  // Sequences 1 and 2 of 140 and 200 rows share two prefix blocks; 2 has a third one.
  PrefixLeftTest() {
    PrefixLedger prefixes;
    prefixes.Left({1}, {kA, kB});
    prefixes.Left({2}, {kA, kB, kC});
    Begin({{SequenceId{1}, {140, 2}}, {SequenceId{2}, {200, 3}}}, std::move(prefixes));
    EXPECT_EQ(ledger_->blocks(), (3 + 1 + 1) * kLayers);
  }
  static v1::OpenSequence* AddKept(v1::StepPlan* plan, uint64_t id, uint32_t rows) {
    AddOpen(plan, id);
    v1::OpenSequence* open = plan->mutable_cache_ops(plan->cache_ops_size() - 1)->mutable_open();
    open->add_kept_rows(rows);
    return open;
  }
};

TEST_F(PrefixLeftTest, WhatNobodyHasAfterItIsGone) {
  v1::StepPlan plan = Plan();
  AddKept(&plan, 1, 140);
  AddClose(&plan, 2);
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), 3 * kLayers);
  plan = Plan();
  AddBegun(&plan, 3, {kC});
  Refuse(plan, kPrecondition, "is not here");
}

TEST_F(PrefixLeftTest, ACutLeavesOthersTheirBlocks) {
  v1::StepPlan plan = Plan();
  AddKept(&plan, 1, 64);
  AddKept(&plan, 2, 129);
  AddRows(&plan, 1, 64, {3});
  Refuse(plan, kPrecondition, "keeps 129 rows, which ends within one of its 3 prefix blocks");
  plan = Plan();
  AddKept(&plan, 1, 64);
  AddKept(&plan, 2, 128);
  AddRows(&plan, 1, 64, {3});
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), (2 + 1) * kLayers);
  plan = Plan();
  AddKeep(&plan, 2, 2, {kC});
  Refuse(plan, kPrecondition, "keeps blocks to row 192, it has 128");
}

TEST_F(PrefixLeftTest, WhatIsClosedAndBegunAnewHasThemStill) {
  v1::StepPlan plan = Plan();
  AddClose(&plan, 1);
  AddClose(&plan, 2);
  AddBegun(&plan, 1, {kA, kB});
  AddRows(&plan, 1, 128, {3});
  Take(plan);
  EXPECT_EQ(ledger_->blocks(), 3 * kLayers);
}

TEST_F(PrefixLeftTest, NobodyKeepsRowsAndBegins) {
  v1::StepPlan plan = Plan();
  AddBegun(&plan, 1, {kA})->add_kept_rows(64);
  AddClose(&plan, 2);
  Refuse(plan, kInvalid, "it keeps rows and begins with prefix blocks");
}

}  // namespace
}  // namespace strait
