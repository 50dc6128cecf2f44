// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever plans arrive, a stage refuses or runs them; it never ends the process, never
// loses a block, and a refused plan changes nothing that later steps compute.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "proto/model/reservation.h"
#include "tests/worker/stage/fake_model.h"
#include "worker/stage/stage.h"

namespace strait {
namespace {

constexpr uint32_t kLayers = 3;
constexpr uint32_t kPoolBlocks = 60;

class StageFuzzTest : public testing::TestWithParam<uint32_t> {
 protected:
  StageFuzzTest() : rng_(GetParam()), f_({0, kLayers}, kLayers, kPoolBlocks) {
    EXPECT_TRUE(f_.stage->Activate({1, 1}, 0, 1).ok());
  }
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(rng_() % n); }

  // A plan that agrees with journal_, which it advances to what the plan leaves behind.
  v1::StepPlan GoodPlan() {
    v1::StepPlan plan = f_.Plan(next_step_);
    uint64_t blocks = 0;
    for (auto it = journal_.begin(); it != journal_.end();) {
      if (Below(12) == 0) {
        AddClose(&plan, it->first);
        it = journal_.erase(it);
      } else {
        blocks += BlocksOfSequence(static_cast<uint32_t>(it->second.size()), kLayers);
        ++it;
      }
    }
    if (Below(3) == 0) {
      AddOpen(&plan, next_id_, 1 + Below(50));
      journal_[next_id_++];
    }
    for (auto& [id, tokens] : journal_) {
      if (Below(3) == 0) continue;
      const auto before = static_cast<uint32_t>(tokens.size());
      const uint32_t count = Below(4) == 0 ? 1 + Below(150) : 1;
      const uint64_t more =
          BlocksOfSequence(before + count, kLayers) - BlocksOfSequence(before, kLayers);
      if (blocks + more > kPoolBlocks || before + count > FakeStage::kMaxPositions) continue;
      blocks += more;
      std::vector<TokenId> fresh;
      for (uint32_t i = 0; i < count; ++i) fresh.push_back(Below(kFakeVocab));
      tokens.insert(tokens.end(), fresh.begin(), fresh.end());
      v1::SequenceStep* rows = AddRows(&plan, id, before, fresh);
      if (Below(2) == 0) WantSample(rows, count - 1, Below(3));
    }
    return plan;
  }

  // Runs all that waits; every sampled token must be the hash of its whole sequence.
  void RunAndCheck(const v1::StepPlan& plan) {
    ASSERT_TRUE(f_.stage->Ready());
    const StepOutput out = f_.Run();
    ASSERT_EQ(out.report.error_code(), 0u);
    int index = 0;
    for (const v1::SequenceStep& step : plan.sequences()) {
      if (step.logits().empty()) continue;
      ASSERT_EQ(out.report.results(index).sampled().token_id(),
                FakeHash({0, kLayers}, journal_.at(step.sequence_id())) % kFakeVocab);
      ++index;
    }
    uint64_t blocks = 0;
    for (const auto& [id, tokens] : journal_) {
      blocks += BlocksOfSequence(static_cast<uint32_t>(tokens.size()), kLayers);
    }
    ASSERT_EQ(BlocksHeld(out.report), blocks);
    ASSERT_TRUE(f_.stage->CheckIntegrity().ok()) << f_.stage->CheckIntegrity();
  }

  std::mt19937_64 rng_;
  FakeStage f_;
  std::map<uint64_t, std::vector<TokenId>> journal_;
  uint64_t next_id_ = 1;
  uint64_t next_step_ = 1;
};

// Spoils one thing that makes a plan wrong whatever else it says.
void Spoil(v1::StepPlan* plan, uint32_t how, uint32_t salt) {
  v1::SequenceStep* rows =
      plan->sequences_size() > 0 ? plan->mutable_sequences(salt % plan->sequences_size()) : nullptr;
  if (rows == nullptr && how > 4) how %= 5;
  switch (how) {
    case 0:
      plan->set_step_id(plan->step_id() + 1 + salt % 9);
      break;
    case 1:
      // In the first plan of an epoch this is what a stage may not have.
      if (plan->step_id() == 1) return plan->set_step_id(2);
      AddClose(plan, 1'000'000 + salt);
      break;
    case 2:
      plan->mutable_epoch()->set_counter(salt % 2 == 0 ? 0 : 7);
      break;
    case 3:
      AddRows(plan, 1'000'000 + salt, 0, {1});
      break;
    case 4:
      plan->add_cache_ops();
      break;
    case 5:
      rows->set_first_position(rows->first_position() + 1 + salt % 3);
      break;
    case 6:
      rows->mutable_literals()->add_ids(kFakeVocab + salt % 100);
      break;
    case 7:
      rows->mutable_literals()->clear_ids();
      break;
    case 8:
      rows->mutable_sampled()->set_step_id(plan->step_id());
      break;
    case 9:
      *plan->add_sequences() = *rows;
      break;
    default:
      WantSample(rows, rows->literals().ids_size() + salt % 5);
      break;
  }
}

TEST_P(StageFuzzTest, ASpoiledPlanLeavesNoTrace) {
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " step " << i);
    const v1::StepPlan plan = GoodPlan();
    for (int k = 0; k < 3; ++k) {
      v1::StepPlan spoiled = plan;
      Spoil(&spoiled, Below(11), Below(1000));
      ASSERT_FALSE(f_.stage->AcceptPlan(spoiled, 0).ok()) << spoiled.ShortDebugString();
      ASSERT_FALSE(f_.stage->Ready());
    }
    const absl::Status status = f_.stage->AcceptPlan(plan, 0);
    ASSERT_TRUE(status.ok()) << status;
    ++next_step_;
    RunAndCheck(plan);
    if (HasFatalFailure()) return;
  }
}

TEST_P(StageFuzzTest, RandomBytesNeverEndTheProcess) {
  int num_accepted = 0;
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " step " << i);
    const auto saved = journal_;
    const uint64_t saved_id = next_id_;
    const v1::StepPlan plan = GoodPlan();
    std::string bytes = plan.SerializeAsString();
    for (uint32_t k = 1 + Below(4); k > 0 && !bytes.empty(); --k) {
      bytes[Below(static_cast<uint32_t>(bytes.size()))] = static_cast<char>(rng_());
    }
    journal_ = saved;
    next_id_ = saved_id;
    v1::StepPlan mutated;
    if (mutated.ParseFromString(bytes) && f_.stage->AcceptPlan(mutated, 0).ok()) {
      // It may say something else now, but what it says is consistent: it must run.
      ++num_accepted;
      ASSERT_TRUE(f_.stage->Ready());
      ASSERT_EQ(f_.Run().report.error_code(), 0u);
      ASSERT_TRUE(f_.stage->CheckIntegrity().ok()) << f_.stage->CheckIntegrity();
      for (const v1::CacheOp& op : mutated.cache_ops()) {
        if (op.has_open()) {
          journal_[op.open().sequence_id()];
          next_id_ = std::max(next_id_, op.open().sequence_id() % 1'000'000 + 1);
        } else {
          journal_.erase(op.close().sequence_id());
        }
      }
      for (const v1::SequenceStep& step : mutated.sequences()) {
        auto& tokens = journal_.at(step.sequence_id());
        const auto& ids = step.literals().ids();
        if (step.has_literals()) tokens.insert(tokens.end(), ids.begin(), ids.end());
        if (step.has_sampled()) tokens.push_back(0);
      }
      ++next_step_;
    }
  }
  EXPECT_GT(num_accepted, 20) << "the fuzz reached too little";
}

INSTANTIATE_TEST_SUITE_P(Seeds, StageFuzzTest, testing::Range(1u, 21u));

}  // namespace
}  // namespace strait
