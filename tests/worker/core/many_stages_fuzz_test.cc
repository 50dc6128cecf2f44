// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever a coordinator asks of a worker's stages, in whatever order, every block has one holder, the
// cache has what accepted plans need, rows stay what they were, and in the end all memory is back.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/worker/core/many_stages.h"

namespace strait {
namespace {

TokenId Token(uint64_t id, uint32_t position) { return (id * 31 + position * 7) % kFakeVocab; }

// Each stage is one in the middle of a pipeline of its own; the test is its coordinator and its neighbours.
class Chaos {
 public:
  explicit Chaos(uint32_t seed) : rng_(seed) {}

  void Step() {
    const uint32_t what = Below(30);
    if (what == 0) {
      w_.Load(next_stage_++, AnyLayers(), 1 + Below(150));
    } else if (what <= 2) {
      std::set<uint64_t> before{AnyStage(), AnyStage()};
      const Stage* const one = w_.core.FindStage(*before.begin());
      // Often what can be taken over.
      w_.Load(next_stage_++,
              one == nullptr || Below(4) == 0 ? AnyLayers() : one->model().spec().layers,
              1 + Below(100), {before.begin(), before.end()});
    } else if (what <= 4) {
      w_.FinishLoads();
    } else if (what <= 6) {
      Activate(AnyStage());
    } else if (what == 7) {
      w_.ResizeBlocks(AnyStage(), 1 + Below(250));
    } else if (what == 8) {
      const uint64_t id = AnyStage();
      w_.Unload(id);
      stages_.erase(id);
    } else if (what == 9 && Below(10) == 0) {
      Detach();
    } else if (what <= 17) {
      Plan(AnyStage());
    } else if (what <= 23) {
      if (w_.Begin()) ++num_begun;
    } else {
      FailSometimes();
      w_.Finish();
    }
    w_.transport.sent.clear();
    Read();
  }

  void Check() const {
    ASSERT_TRUE(w_.core.CheckIntegrity().ok()) << w_.core.CheckIntegrity();
    ASSERT_EQ(w_.taken, w_.cache.num_blocks());
    for (const uint64_t id : w_.core.stage_ids()) {
      const Stage* const stage = w_.core.FindStage(id);
      if (stage != nullptr && stage->num_begun() == 0) CheckRows(*stage);
    }
  }

  void End() {
    w_.core.DropStages();
    EXPECT_EQ(w_.taken, 0);
    EXPECT_EQ(w_.core.BlocksHeld(), 0u);
    w_.ExpectSound();
  }

  int num_begun = 0;
  int num_resized = 0;
  uint64_t num_taken_over = 0;  // rows that a first activation told

 private:
  // What its coordinator knows of a stage.
  struct Known {
    uint64_t step = 0;  // of the last plan of the epoch
    bool is_active = false;
    bool is_stuck = false;
    bool was_active = false;
    std::map<uint64_t, uint32_t> rows;  // of sequences, after all plans
    std::map<uint64_t, uint32_t> held;  // told by ACTIVE, not yet spoken of
  };

  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(rng_() % end); }
  uint64_t AnyStage() {
    const std::vector<uint64_t> ids = w_.core.stage_ids();
    if (ids.empty() || Below(50) == 0) return Below(static_cast<uint32_t>(next_stage_)) + 1;
    return ids[Below(static_cast<uint32_t>(ids.size()))];
  }
  LayerRange AnyLayers() {
    const LayerIndex begin = 1 + Below(3);
    return {begin, begin + 1 + Below(ManyStages::kLayers - 2 - begin)};
  }

  void Activate(uint64_t id) {
    w_.behind[id] = 901;
    v1::ToWorker message;
    v1::ActivateStage& activate = *message.mutable_activate_stage();
    activate.set_stage_id(id);
    activate.mutable_epoch()->set_term(1);
    activate.mutable_epoch()->set_counter(++epoch_);
    activate.set_stage_index(Below(12) == 0 ? 2 : 1);
    activate.set_num_stages(activate.stage_index() + 2);
    if (Below(12) == 0) activate.set_num_stages(2);  // it is not the last one
    activate.set_previous_stage_id(900);
    activate.set_edge_id(1000 + id);
    activate.set_edge_nonce(1);
    if (activate.stage_index() + 1 < activate.num_stages()) {
      activate.set_next_stage_id(901);
      activate.set_next_edge_id(2000 + id);
      activate.set_next_edge_nonce(1);
      activate.set_next_data_address("127.0.0.1:9");
    }
    num_stages_[id] = activate.num_stages();
    w_.core.OnMessage(std::move(message), 0);
    w_.core.OnEdgeUp({.id = 2000 + id, .from_stage_id = id, .to_stage_id = 901}, {});
  }

  void Plan(uint64_t id) {
    const auto it = stages_.find(id);
    if (it == stages_.end() || w_.core.FindStage(id) == nullptr) return;
    Known& known = it->second;
    if (!known.is_active || known.is_stuck) return;
    v1::StepPlan plan = w_.Plan(id, known.step + 1);
    std::map<uint64_t, uint32_t> rows = known.rows;
    if (known.step == 0) {
      for (const auto& [sequence, held] : known.held) {
        const uint32_t kept = Below(3) == 0 ? 0 : held - Below(std::min(held + 1, 80u));
        WithKeptRows(&plan, sequence, kept, num_stages_.at(id));
        if (kept > 0) rows[sequence] = kept;
      }
    }
    uint32_t num_rows = 0;
    if (!rows.empty() && Below(3) == 0) {
      const auto gone = std::next(rows.begin(), Below(static_cast<uint32_t>(rows.size())));
      if (known.step > 0) {
        AddClose(&plan, gone->first);
        rows.erase(gone);
      }
    }
    if (Below(4) > 0) {
      uint64_t sequence = next_sequence_;
      if (rows.empty() || Below(3) == 0) {
        ++next_sequence_;
        AddOpen(&plan, sequence);
      } else {
        sequence = std::next(rows.begin(), Below(static_cast<uint32_t>(rows.size())))->first;
      }
      uint32_t& length = rows[sequence];
      num_rows = 1 + Below(Below(3) == 0 ? 600 : 100);
      num_rows = std::min(num_rows, 1999 - std::min(length, 1998u));
      std::vector<TokenId> tokens;
      for (uint32_t p = length; p < length + num_rows; ++p) tokens.push_back(Token(sequence, p));
      AddRows(&plan, sequence, length, tokens);
      length += num_rows;
    }
    if (plan.cache_ops_size() + plan.sequences_size() == 0) return;
    const PipelineEpoch epoch = w_.core.FindStage(id)->epoch();
    const size_t before = w_.ports.messages.size();
    w_.Send(plan);
    if (w_.ports.messages.size() > before) return;  // refused: Read says so
    known.rows = std::move(rows);
    ++known.step;
    if (num_rows == 0) return;
    w_.core.OnHidden(id,
                     {epoch, StepId{known.step}, num_rows,
                      std::vector<std::byte>(size_t{num_rows} * kFakeHiddenRowBytes)},
                     0);
  }
  static void WithKeptRows(v1::StepPlan* plan, uint64_t sequence, uint32_t kept,
                           uint32_t num_stages) {
    if (kept == 0) return AddClose(plan, sequence);
    *plan = WithKept(std::move(*plan), sequence, kept, static_cast<int>(num_stages));
  }

  void FailSometimes() {
    for (const uint64_t id : w_.core.stage_ids()) {
      if (w_.core.FindStage(id) != nullptr) w_.models.at(id)->fail_next = Below(40) == 0;
    }
  }

  void Detach() {
    w_.core.OnDetached(0);
    v1::Welcome welcome;
    welcome.set_term(1);
    w_.core.OnWelcome(welcome);
  }

  // What was told.
  void Read() {
    for (const v1::FromWorker& message : w_.ports.messages) {
      if (message.has_cache_resized()) {
        num_resized += message.cache_resized().error_code() == 0;
      } else if (message.has_report()) {
        if (message.report().error_code() != 0)
          stages_[message.report().stage_id()].is_stuck = true;
      } else if (message.stage_state().state() == v1::StageState::ACTIVE) {
        Known& known = stages_[message.stage_state().stage_id()];
        const bool was_active = known.was_active;
        known = {.is_active = true, .was_active = true};
        for (const auto& held : message.stage_state().held()) {
          known.held[held.sequence_id()] = held.rows();
          if (!was_active) num_taken_over += held.rows();
        }
      }
    }
    w_.Told();
  }

  void CheckRows(const Stage& stage) const {
    const LatentCache& cache = stage.cache();
    const LayerRange layers = stage.model().spec().layers;
    if (w_.core.StateOf(stage.stage_id()) == WorkerCore::HostedState::kStuck) return;
    for (uint64_t sequence = 1; sequence < next_sequence_; ++sequence) {
      if (!cache.resident({sequence})) continue;
      const auto tables = cache.PageTables({sequence});
      for (uint32_t layer = 0; layer < layers.size(); ++layer) {
        if (cache.given(layer)) continue;
        // The ends of each block: it is moved as a whole.
        const uint32_t length = cache.length({sequence});
        for (uint32_t p = 0; p < length; p += p % 64 == 0 && p + 63 < length ? 63 : 1) {
          ASSERT_EQ(w_.cache.Peek(tables[layer][p / 64], p % 64),
                    FakeRow(layers.begin + layer, Token(sequence, p), p))
              << "stage " << stage.stage_id() << ", sequence " << sequence << ", position " << p;
        }
      }
    }
  }

  std::mt19937 rng_;
  ManyStages w_{600};
  std::map<uint64_t, Known> stages_;
  std::map<uint64_t, uint32_t> num_stages_;  // of its pipeline
  uint64_t next_stage_ = 1;
  uint64_t next_sequence_ = 1;
  uint64_t epoch_ = 0;
};

class ManyStagesFuzzTest : public testing::TestWithParam<uint32_t> {};

TEST_P(ManyStagesFuzzTest, NothingIsLostWhateverIsAsked) {
  Chaos chaos(GetParam());
  for (int i = 0; i < 10'000; ++i) {
    SCOPED_TRACE(testing::Message() << "seed " << GetParam() << " step " << i);
    chaos.Step();
    chaos.Check();
    if (testing::Test::HasFailure()) return;
  }
  chaos.End();
  EXPECT_GT(chaos.num_begun, 200);
  EXPECT_GT(chaos.num_resized, 20);
  EXPECT_GT(chaos.num_taken_over, 1000u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, ManyStagesFuzzTest, testing::Range(1u, 9u));

}  // namespace
}  // namespace strait
