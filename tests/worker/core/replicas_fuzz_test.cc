// SPDX-License-Identifier: Apache-2.0
//
// Defends: a pipeline that takes the place of a dead one begins with the rows that were replicated, exactly them, whatever
// its layer ranges and whatever the network loses, damages, doubles and delays; sequences then go on at their first
// missing row. Each key is told once, and what was told to be there can be had.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tests/worker/core/replicas_fixture.h"

namespace strait {
namespace {

std::vector<LayerRange> AnySplit(std::mt19937* rng) {
  std::vector<LayerRange> split;
  for (LayerIndex at = 0; at < ManyStages::kLayers;) {
    const LayerIndex end = std::min<LayerIndex>(ManyStages::kLayers, at + 1 + (*rng)() % 4);
    split.push_back({at, end});
    at = end;
  }
  return split;
}

using Sequences = std::map<uint64_t, std::vector<TokenId>>;

class Life {
 public:
  explicit Life(uint32_t seed)
      : p_(seed, seed % 5 == 0 ? 40 : 2'000), gentle_(seed % 3 == 0), full_(seed % 5 == 0) {
    if (!gentle_) {
      p_.network.faults = {.lost = p_.Below(15),
                           .damaged = p_.Below(6),
                           .foreign = p_.Below(6),
                           .twice = p_.Below(30),
                           .silent = p_.Below(10)};
    }
    at_ = p_.Make(AnySplit(&p_.rng));
    p_.Activate(at_);
    EXPECT_TRUE(p_.AllActive(at_));
    at_->worker.Told();
  }

  void Round() {
    Grow();
    if (::testing::Test::HasFailure()) return;
    ReplicateAll();
    if (::testing::Test::HasFailure()) return;
    Die();
  }

  int num_restored = 0;  // sequences, by stage
  int num_whole = 0;
  int num_failed() const { return p_.num_failed; }
  int num_faults() const { return p_.network.num_faults; }

 private:
  // Sequences grow; some begin with blocks of another. Their full blocks become prefix blocks.
  void Grow() {
    for (uint32_t i = 1 + p_.Below(3); i > 0 && sequences_.size() < 5; --i) {
      const uint64_t id = ++last_id_;
      std::vector<TokenId> tokens;
      v1::StepPlan plan = at_->Plan();
      AddOpen(&plan, id);
      if (!sequences_.empty() && p_.Below(2) == 0) {
        const auto& [other_id, other] =
            *std::next(sequences_.begin(), p_.Below(static_cast<uint32_t>(sequences_.size())));
        const uint32_t blocks = p_.Below(static_cast<uint32_t>(NumKept(other_id)) + 1);
        tokens.assign(other.begin(), other.begin() + blocks * limits::kBlockTokens);
        v1::OpenSequence* open = plan.mutable_cache_ops(0)->mutable_open();
        open->set_prefix_keys(Pack(KeysOfTokens(tokens)));
        open->mutable_prefix_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
      }
      sequences_[id] = tokens;
      AddMore(&plan, id, 1 + p_.Below(200));
      at_->Run(plan);
    }
    for (auto& [id, tokens] : sequences_) {
      if (tokens.size() > 500 || p_.Below(3) == 0) continue;
      v1::StepPlan plan = at_->Plan();
      AddMore(&plan, id, 1 + p_.Below(70));
      at_->Run(plan);
    }
    v1::StepPlan plan = at_->Plan();
    std::set<ContentKey> named;
    for (const auto& [id, tokens] : sequences_) {
      const size_t num_kept = NumKept(id);
      std::vector<ContentKey> keys = KeysOfTokens(tokens);
      // What another sequence has by then was computed twice, and stays this one's own.
      const LatentCache& cache = Cache();
      const auto taken = std::find_if(keys.begin() + static_cast<ptrdiff_t>(num_kept), keys.end(),
                                      [&](const ContentKey& key) {
                                        return cache.has_prefix(key) || !named.insert(key).second;
                                      });
      keys.erase(taken, keys.end());
      if (keys.size() == num_kept) continue;
      v1::KeepPrefix* keep = plan.add_cache_ops()->mutable_keep_prefix();
      keep->set_sequence_id(id);
      keep->set_first_block(static_cast<uint32_t>(num_kept));
      keep->set_keys(Pack(absl::MakeConstSpan(keys).subspan(num_kept)));
    }
    at_->Run(plan);
  }
  const LatentCache& Cache() const { return at_->worker.core.FindStage(at_->stages[0])->cache(); }
  size_t NumKept(uint64_t id) const {
    return Cache().resident(SequenceId{id}) ? Cache().prefix(SequenceId{id}).size() : 0;
  }
  void AddMore(v1::StepPlan* plan, uint64_t id, uint32_t count) {
    std::vector<TokenId>& tokens = sequences_.at(id);
    const auto first = static_cast<uint32_t>(tokens.size());
    for (uint32_t i = 0; i < count; ++i) tokens.push_back(p_.Below(kFakeVocab));
    v1::SequenceStep* step = AddRows(plan, id, first, {tokens.begin() + first, tokens.end()});
    WantScore(step, count - 1, 1);
  }

  std::vector<ContentKey> AllKeys() const {
    std::set<ContentKey> keys;
    for (const auto& [id, tokens] : sequences_) {
      for (const ContentKey& key : KeysOfTokens(tokens)) keys.insert(key);
    }
    return {keys.begin(), keys.end()};
  }

  void ReplicateAll() {
    p_.ServePrefixes(at_);
    std::vector<ContentKey> keys = AllKeys();
    std::shuffle(keys.begin(), keys.end(), p_.rng);
    if (p_.Below(4) == 0) keys.push_back({12345, 6789});  // none here: it alone fails
    for (size_t i = 0; i < at_->stages.size(); ++i) {
      const size_t half = p_.Below(static_cast<uint32_t>(keys.size()) + 1);
      const std::vector<ContentKey> first(keys.begin(), keys.begin() + half);
      const std::vector<ContentKey> second(keys.begin() + half, keys.end());
      p_.Replicate(*at_, i, first, p_.Below(3) == 0 ? 1'000'000 : 0);
      for (uint32_t turns = p_.Below(10); turns > 0; --turns) p_.Turn();
      p_.Replicate(*at_, i, second);
    }
    if (p_.Below(4) == 0 && !keys.empty()) {
      forgotten_ = {keys[0]};
      p_.Forget({keys[0]}, {0, ManyStages::kLayers});
    } else {
      forgotten_.clear();
    }
    ASSERT_TRUE(p_.TurnUntil([&] { return p_.pending.empty(); }));
    for (const ContentKey& key : forgotten_) {
      for (LayerIndex layer = 0; layer < ManyStages::kLayers; ++layer) {
        EXPECT_FALSE(p_.buddy.core.replicas().has(key, layer));
      }
    }
  }

  // Whole blocks of it that the buddy has in these layers.
  uint32_t RowsAtBuddy(const std::vector<TokenId>& tokens, LayerRange layers) const {
    uint32_t rows = 0;
    for (const ContentKey& key : KeysOfTokens(tokens)) {
      for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
        if (!p_.buddy.core.replicas().has(key, layer)) return rows;
      }
      rows += limits::kBlockTokens;
    }
    return rows;
  }

  void Die() {
    at_->worker.core.DropStages();
    at_->worker.Told();
    p_.ServeReplicas();
    // Sometimes with less room than is needed.
    at_ = p_.Make(AnySplit(&p_.rng), p_.Below(5) == 0 ? 4 : 40);
    for (auto& [id, model] : at_->worker.models) model->copy_faults.delay_polls = p_.Below(4);
    const bool is_short = p_.Below(6) == 0;
    p_.Activate(at_, sequences_, is_short ? 1 + p_.Below(20) : 100'000);
    if (p_.Below(5) == 0) {  // a newer epoch drops all of it
      for (uint32_t turns = p_.Below(30); turns > 0; --turns) p_.Turn();
      at_->worker.Told();
      p_.Activate(at_, sequences_, 100'000);
      // What was there when it came is told as failed, or as active of the older one.
      std::erase_if(at_->worker.ports.messages, [](const v1::FromWorker& message) {
        return message.stage_state().state() == v1::StageState::FAILED;
      });
    }
    ASSERT_TRUE(p_.TurnUntil([&] { return p_.AllActive(at_); }));
    const auto active = at_->Active();
    at_->worker.Told();
    std::map<uint64_t, uint32_t> kept;
    for (const auto& [id, tokens] : sequences_) kept[id] = ~0u;
    for (size_t i = 0; i < at_->stages.size(); ++i) {
      const auto& held = active.at(at_->stages[i]);
      for (const auto& [id, tokens] : sequences_) {
        const uint32_t rows = held.contains(id) ? held.at(id) : 0;
        const uint32_t there = RowsAtBuddy(tokens, at_->layers[i]);
        ASSERT_LE(rows, there);
        if (gentle_ && !is_short &&
            at_->worker.core.FindStage(at_->stages[i])->capacity_blocks() > 5 * 6) {
          ASSERT_EQ(rows, there);
        }
        if (rows > 0) {
          at_->ExpectRows(i, id, tokens, rows);
          ++num_restored;
          num_whole += rows == tokens.size() / limits::kBlockTokens * limits::kBlockTokens;
        }
        kept[id] = std::min(kept[id], rows);
      }
    }
    if (::testing::Test::HasFailure()) return;
    GoOn(kept);
    for (size_t i = 0; i < at_->stages.size(); ++i) {
      at_->worker.ResizeBlocks(at_->stages[i], 40 * at_->layers[i].size());
    }
    at_->worker.Told();
  }

  void GoOn(const std::map<uint64_t, uint32_t>& kept) {
    v1::StepPlan plan = at_->Plan();
    uint64_t blocks = 0;
    for (auto it = sequences_.begin(); it != sequences_.end();) {
      auto& [id, tokens] = *it;
      blocks += tokens.size() / limits::kBlockTokens + 2;
      if (p_.Below(4) == 0 ||
          blocks > at_->worker.core.FindStage(at_->stages[0])->capacity_blocks() /
                       at_->layers[0].size()) {
        AddClose(&plan, id);
        it = sequences_.erase(it);
        continue;
      }
      AddOpen(&plan, id);
      v1::OpenSequence* open = plan.mutable_cache_ops(plan.cache_ops_size() - 1)->mutable_open();
      for (size_t i = 0; i < at_->stages.size(); ++i) open->add_kept_rows(kept.at(id));
      const std::vector<TokenId> missing(tokens.begin() + kept.at(id), tokens.end());
      if (missing.empty()) {
        tokens.push_back(7);
        WantScore(AddRows(&plan, id, kept.at(id), {7}), 0, 1);
      } else {
        WantScore(AddRows(&plan, id, kept.at(id), missing),
                  static_cast<uint32_t>(missing.size()) - 1, 1);
      }
      ++it;
    }
    at_->Run(plan);
    if (::testing::Test::HasFailure()) return;
    int i = 0;
    for (const auto& [id, tokens] : sequences_) {
      const uint64_t hash = FakeHash(at_->layers.back(), tokens);
      ASSERT_LT(i, at_->last_report.results_size());
      EXPECT_EQ(at_->last_report.results(i++).scored(0).logprob(),
                -static_cast<float>(hash % 4096));
      for (size_t s = 0; s < at_->stages.size(); ++s) {
        at_->ExpectRows(s, id, tokens, static_cast<uint32_t>(tokens.size()));
      }
    }
  }

  ReplicatedPipelines p_;
  const bool gentle_;  // without faults
  const bool full_;    // the buddy has little memory
  ReplicatedPipeline* at_ = nullptr;
  Sequences sequences_;
  std::vector<ContentKey> forgotten_;
  uint64_t last_id_ = 0;
};

TEST(ReplicasFuzzTest, APipelineBeginsWithTheRowsOfADeadOne) {
  int num_restored = 0;
  int num_whole = 0;
  int num_failed = 0;
  int num_faults = 0;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Life life(seed);
    for (int round = 0; round < 6; ++round) {
      life.Round();
      ASSERT_FALSE(HasFailure());
    }
    num_restored += life.num_restored;
    num_whole += life.num_whole;
    num_failed += life.num_failed();
    num_faults += life.num_faults();
  }
  std::printf("restored %d, whole %d, keys failed %d, faults %d\n", num_restored, num_whole,
              num_failed, num_faults);
  EXPECT_GT(num_restored, 1'000);
  EXPECT_GT(num_whole, 500);
  EXPECT_GT(num_failed, 100);
  EXPECT_GT(num_faults, 1'000);
}

}  // namespace
}  // namespace strait
