// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage that is to begin with rows says ACTIVE once, when they are here or given up, and tells exactly what came;
// it takes no more than it may hold; whatever ends its wait leaves nothing behind.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "tests/worker/core/replicas_fixture.h"

namespace strait {
namespace {

using Sequences = std::map<uint64_t, std::vector<TokenId>>;

constexpr uint32_t kLong = 100'000;

class RestoresTest : public testing::Test {
 protected:
  RestoresTest() {
    std::vector<TokenId> first(200);
    for (uint32_t i = 0; i < first.size(); ++i) first[i] = i * 7 % kFakeVocab;
    std::vector<TokenId> second(first.begin(), first.begin() + 128);
    for (uint32_t i = 0; i < 64; ++i) second.push_back(i);
    sequences_ = {{1, first}, {2, second}};
    from_ = p_.Make({{0, 6}});
    p_.Activate(from_);
    v1::StepPlan plan = from_->Plan();
    AddOpen(&plan, 1);
    AddRows(&plan, 1, 0, first);
    from_->Run(plan);
    const std::vector<ContentKey> keys = KeysOfTokens(first);
    plan = from_->Plan();
    AddKeep(&plan, 1, 0, keys);
    AddOpen(&plan, 2);
    v1::OpenSequence* open = plan.mutable_cache_ops(1)->mutable_open();
    open->set_prefix_keys(Pack({keys[0], keys[1]}));
    open->mutable_prefix_tokens()->mutable_ids()->Add(second.begin(), second.begin() + 128);
    AddRows(&plan, 2, 128, {second.begin() + 128, second.end()});
    from_->Run(plan);
    plan = from_->Plan();
    AddKeep(&plan, 2, 2, {KeysOfTokens(second)[2]});
    from_->Run(plan);
    p_.ServePrefixes(from_);
    p_.Replicate(*from_, 0, {keys[0], keys[1], keys[2], KeysOfTokens(second)[2]});
    EXPECT_TRUE(p_.TurnUntil([&] { return p_.pending.empty(); }));
    EXPECT_EQ(p_.buddy.core.replicas().num_blocks(), 24u);
    p_.ServeReplicas();
    from_->worker.core.DropStages();
    from_->worker.Told();
  }
  static void AddKeep(v1::StepPlan* plan, uint64_t id, uint32_t first,
                      const std::vector<ContentKey>& keys) {
    v1::KeepPrefix* keep = plan->add_cache_ops()->mutable_keep_prefix();
    keep->set_sequence_id(id);
    keep->set_first_block(first);
    keep->set_keys(Pack(keys));
  }
  std::map<uint64_t, uint32_t> Held(ReplicatedPipeline* pipeline, size_t index = 0) {
    EXPECT_TRUE(p_.TurnUntil([&] { return p_.AllActive(pipeline); }));
    const auto active = pipeline->Active();
    const auto it = active.find(pipeline->stages[index]);
    return it == active.end() ? std::map<uint64_t, uint32_t>() : it->second;
  }
  using Rows = std::map<uint64_t, uint32_t>;
  WorkerCore::HostedState State(const ReplicatedPipeline* pipeline) const {
    return pipeline->worker.core.StateOf(pipeline->stages[0]);
  }
  // Nothing is delivered.
  void Pass(ReplicatedPipeline* pipeline, uint64_t us) {
    p_.now_us += us;
    pipeline->worker.core.PollCopies(p_.now_us);
    pipeline->worker.ExpectSound();
  }

  ReplicatedPipelines p_{7, 100};
  Sequences sequences_;
  ReplicatedPipeline* from_;
};

TEST_F(RestoresTest, BothSequencesAreThereAndShareWhatTheyBeginWith) {
  ReplicatedPipeline* to = p_.Make({{0, 4}, {4, 6}});
  const uint64_t frames = p_.network.num_frames;
  p_.Activate(to, sequences_, kLong);
  EXPECT_EQ(State(to), WorkerCore::HostedState::kActivating);
  EXPECT_EQ(Held(to), (Rows{{1, 192}, {2, 192}}));
  EXPECT_EQ(Held(to, 1), (Rows{{1, 192}, {2, 192}}));
  EXPECT_GT(p_.network.num_frames, frames);
  to->ExpectRows(0, 1, sequences_[1], 192);
  to->ExpectRows(1, 2, sequences_[2], 192);
  // Four blocks of four layers, not six.
  EXPECT_EQ(to->worker.core.FindStage(to->stages[0])->blocks_used(), 16u);
  // The first plan goes on where rows are missing.
  to->worker.Told();
  v1::StepPlan plan = to->Plan();
  for (const uint64_t id : {1, 2}) {
    AddOpen(&plan, id);
    v1::OpenSequence* open = plan.mutable_cache_ops(plan.cache_ops_size() - 1)->mutable_open();
    open->add_kept_rows(192);
    open->add_kept_rows(192);
  }
  WantScore(AddRows(&plan, 1, 192, {sequences_[1].begin() + 192, sequences_[1].end()}), 7, 3);
  to->Run(plan);
  ASSERT_EQ(to->last_report.results_size(), 1);
  EXPECT_EQ(to->last_report.results(0).scored(0).logprob(),
            -static_cast<float>(FakeHash({4, 6}, sequences_[1]) % 4096));
}

TEST_F(RestoresTest, ItWaitsNoLongerThanItIsTold) {
  p_.network.faults.lost = 100;
  ReplicatedPipeline* to = p_.Make({{0, 6}});
  p_.Activate(to, sequences_, 500);
  Pass(to, 499'999);
  EXPECT_EQ(State(to), WorkerCore::HostedState::kActivating);
  Pass(to, 1);
  EXPECT_EQ(Held(to), Rows{});
  EXPECT_EQ(to->worker.core.FindStage(to->stages[0])->blocks_used(), 0u);
  EXPECT_FALSE(to->worker.core.CopiesRows());
  // Without time it does not wait.
  p_.Activate(to, sequences_, 0);
  to->worker.core.PollCopies(p_.now_us);
  EXPECT_EQ(State(to), WorkerCore::HostedState::kActive);
}

TEST_F(RestoresTest, WhatIsNotThereEndsASequenceThere) {
  // Of the blocks that both begin with, the second is damaged in a layer.
  const std::vector<ContentKey> keys = KeysOfTokens(sequences_[1]);
  p_.Forget({keys[1]}, {3, 4});
  ReplicatedPipeline* to = p_.Make({{0, 3}, {3, 6}});
  p_.Activate(to, sequences_, kLong);
  EXPECT_EQ(Held(to, 0), (Rows{{1, 192}, {2, 192}}));
  EXPECT_EQ(Held(to, 1), (Rows{{1, 64}, {2, 64}}));
  EXPECT_EQ(to->worker.core.FindStage(to->stages[1])->blocks_used(), 3u);
  to->ExpectRows(1, 2, sequences_[2], 64);
}

TEST_F(RestoresTest, ItHoldsNoMoreThanItMay) {
  ReplicatedPipeline* to = p_.Make({{0, 6}}, 2);
  p_.Activate(to, sequences_, kLong);
  EXPECT_EQ(Held(to), (Rows{{1, 128}, {2, 128}}));
  EXPECT_EQ(to->worker.core.FindStage(to->stages[0])->blocks_used(), 12u);
}

TEST_F(RestoresTest, ANewerEpochDropsAllOfIt) {
  p_.network.faults.lost = 0;
  ReplicatedPipeline* to = p_.Make({{0, 6}});
  to->worker.models.begin()->second->copy_faults.delay_polls = 5;
  p_.Activate(to, sequences_, kLong);
  for (int i = 0; i < 10; ++i) p_.Turn();
  EXPECT_EQ(State(to), WorkerCore::HostedState::kActivating);
  to->worker.Told();
  p_.Activate(to);
  EXPECT_EQ(to->worker.ports.told, "FAILED 10, ACTIVE");
  EXPECT_EQ(to->worker.core.FindStage(to->stages[0])->blocks_used(), 0u);
  EXPECT_EQ(to->worker.ports.messages.back().stage_state().held_size(), 0);
  p_.network.DeliverAll(p_.now_us);
  to->worker.ExpectSound();
  EXPECT_FALSE(to->worker.core.CopiesRows());
}

TEST_F(RestoresTest, ALostCoordinatorEndsTheWaitAndKeepsWhatCame) {
  ReplicatedPipeline* to = p_.Make({{0, 6}});
  p_.Activate(to, sequences_, kLong);
  for (int i = 0; i < 15; ++i) p_.Turn();
  to->worker.core.OnDetached(p_.now_us);
  to->worker.ExpectSound();
  EXPECT_FALSE(to->worker.core.FindStage(to->stages[0])->restoring());
  p_.network.DeliverAll(p_.now_us);
  p_.buddy.core.OnDetached(p_.now_us);
  EXPECT_EQ(p_.buddy.core.replicas().num_blocks(), 24u);
  // Both come back: what it has is told, the rest fetched.
  v1::Welcome welcome;
  welcome.set_term(1);
  to->worker.core.OnWelcome(welcome);
  p_.buddy.core.OnWelcome(welcome);
  p_.ServeReplicas();
  to->worker.Told();
  p_.Activate(to, sequences_, kLong);
  const Rows held = Held(to);
  for (const auto& [id, rows] : held) to->ExpectRows(0, id, sequences_[id], rows);
  // Another term's knows nothing of copies.
  welcome.set_term(2);
  p_.buddy.core.OnWelcome(welcome);
  EXPECT_EQ(p_.buddy.core.replicas().num_blocks(), 0u);
}

TEST_F(RestoresTest, ABuddyThatHearsOfItLaterServesAllTheSame) {
  v1::ToWorker message;
  message.mutable_serve_rows()->set_secret(ReplicatedPipelines::kReplicaSecret);
  message.mutable_serve_rows()->set_end(true);
  p_.buddy.core.OnMessage(message, p_.now_us);
  ReplicatedPipeline* to = p_.Make({{0, 6}});
  p_.Activate(to, sequences_, kLong);
  p_.network.DeliverAll(p_.now_us);
  p_.ServeReplicas();
  EXPECT_EQ(Held(to), (Rows{{1, 192}, {2, 192}}));
}

TEST_F(RestoresTest, WhatIsMalformedIsRefused) {
  ReplicatedPipeline* to = p_.Make({{0, 6}});
  const std::vector<std::function<void(v1::ActivateStage*)>> wrongs = {
      [](auto* a) { a->mutable_restores(0)->set_stage_id(99); },
      [](auto* a) { a->mutable_restores(0)->mutable_epoch()->set_counter(99); },
      [](auto* a) { a->mutable_restores(1)->set_sequence_id(1); },
      [](auto* a) { a->mutable_restores(0)->set_begin_row(64); },
      [](auto* a) { a->mutable_restores(0)->set_end_row(191); },
      [](auto* a) { a->mutable_restores(0)->mutable_keys()->pop_back(); },
      [](auto* a) { a->mutable_restores(0)->clear_keys(); },
      [](auto* a) { a->mutable_restores(0)->mutable_tokens()->add_ids(1); },
      [](auto* a) { a->mutable_restores(0)->mutable_tokens()->set_ids(0, kFakeVocab); },
      [](auto* a) { a->mutable_restores(0)->clear_sources(); },
      [](auto* a) { a->mutable_restores(0)->mutable_sources(0)->set_layer_begin(1); },
      [](auto* a) { a->mutable_restores(0)->mutable_sources(0)->set_secret(0); },
  };
  for (const auto& wrong : wrongs) {
    ++to->epoch;
    to->worker.Activate(to->stages, 0, to->epoch, [&](v1::ActivateStage* activate) {
      p_.AddRestores(activate, {0, 6}, sequences_, kLong);
      wrong(activate);
    });
    to->worker.ExpectError("FAILED 3", {"restore of sequence"});
  }
  // A chain that is none is passed over, and so are rows of a sequence that is here.
  ++to->epoch;
  to->worker.Activate(to->stages, 0, to->epoch, [&](v1::ActivateStage* activate) {
    p_.AddRestores(activate, {0, 6}, sequences_, kLong);
    std::vector<ContentKey> keys = KeysOfTokens(sequences_[1]);
    keys[1] = keys[0];
    activate->mutable_restores(0)->set_keys(Pack(keys));
  });
  EXPECT_EQ(Held(to), (Rows{{2, 192}}));
  to->worker.Told();
  p_.Activate(to, sequences_, kLong);
  EXPECT_EQ(Held(to), (Rows{{1, 192}, {2, 192}}));
}

TEST_F(RestoresTest, NoPlanComesBefore) {
  ReplicatedPipeline* to = p_.Make({{0, 6}});
  p_.Activate(to, sequences_, kLong);
  to->worker.Told();
  to->worker.SendAll(to->stages, to->Plan());
  to->worker.ExpectError("report 9", {"not active yet"});
  // Nor does it become smaller than what it takes.
  to->worker.ResizeBlocks(to->stages[0], 6);
  to->worker.ExpectError("resized 0 9", {"24"});
  to->worker.ResizeBlocks(to->stages[0], 24);
  EXPECT_EQ(to->worker.Told(), "resized 24");
}

TEST(RestoresAloneTest, AWorkerThatMovesNoRowsIsActiveAtOnce) {
  ManyStages worker;
  worker.Load(1, {0, 6}, 60);
  worker.FinishLoads();
  worker.Told();
  ReplicatedPipelines p(1, 10);
  worker.Activate({1}, 0, 1, [&](v1::ActivateStage* activate) {
    p.AddRestores(activate, {0, 6}, {{1, std::vector<TokenId>(64, 5)}}, kLong);
  });
  EXPECT_EQ(worker.Told(), "ACTIVE");
  worker.ExpectSound();
  v1::Hello hello;
  p.buddy.core.FillHello(&hello);
  EXPECT_EQ(hello.replica_bytes(), 10 * limits::kBlockTokens * kHashRowBytes);
}

}  // namespace
}  // namespace strait
