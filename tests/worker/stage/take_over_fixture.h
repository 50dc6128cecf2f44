// SPDX-License-Identifier: Apache-2.0
//
// Stages of one worker, with fakes that share its cache, of which some follow others.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/worker/stage/fake_model.h"
#include "tests/worker/stage/plans.h"

namespace strait {

inline constexpr uint32_t kLayers = 6;
inline constexpr uint32_t kPool = 400;

inline TokenId Token(uint64_t id, uint32_t position) {
  return (id * 31 + position * 7) % kFakeVocab;
}
inline std::vector<TokenId> Tokens(uint64_t id, uint32_t first, uint32_t count) {
  std::vector<TokenId> tokens;
  for (uint32_t p = first; p < first + count; ++p) tokens.push_back(Token(id, p));
  return tokens;
}

// A stage of a worker whose cache others share.
struct Hosted {
  Hosted(uint64_t id, LayerRange layers, uint32_t capacity, NumberCache* cache, BlockPool* pool)
      : cache(cache) {
    auto owned = std::make_unique<FakeModel>(layers, capacity, kLayers, cache);
    model = owned.get();
    stage = std::make_unique<Stage>(id, std::move(owned),
                                    StageTraits{.num_layers = kLayers,
                                                .hidden_row_bytes = kFakeHiddenRowBytes,
                                                .vocab_size = kFakeVocab,
                                                .max_positions = 2000,
                                                .block_bytes = kFakeBlockBytes},
                                    pool);
  }

  LayerRange layers() const { return model->spec().layers; }
  v1::StepPlan Plan(uint64_t step) const {
    v1::StepPlan plan;
    plan.set_stage_id(stage->stage_id());
    plan.set_step_id(step);
    plan.mutable_epoch()->set_term(stage->epoch().term);
    plan.mutable_epoch()->set_counter(stage->epoch().counter);
    return plan;
  }
  // With the hidden states that it needs.
  void Accept(v1::StepPlan plan) {
    plan.set_stage_id(stage->stage_id());
    const uint64_t step = plan.step_id();
    uint32_t num_rows = 0;
    const absl::Status accepted = stage->AcceptPlan(std::move(plan), 0, &num_rows);
    ASSERT_TRUE(accepted.ok()) << accepted;
    if (stage->is_first() || num_rows == 0) return;
    HiddenStep hidden{stage->epoch(), StepId{step}, num_rows,
                      std::vector<std::byte>(size_t{num_rows} * kFakeHiddenRowBytes)};
    ASSERT_TRUE(stage->AcceptHidden(std::move(hidden), 0).ok());
  }
  void Begin() {
    stage->BeginNext([] { return 0; });
  }
  StepOutput Run(v1::StepPlan plan) {
    Accept(std::move(plan));
    Begin();
    StepOutput out = stage->FinishNext([] { return 0; });
    EXPECT_EQ(out.report.error_code(), 0u) << out.report.error_message();
    return out;
  }
  std::map<uint64_t, uint32_t> Held() const {
    std::map<uint64_t, uint32_t> held;
    for (const HeldRows& rows : stage->held()) held[rows.id.value] = rows.rows;
    return held;
  }
  // All rows of a sequence are what a stage of its layers wrote for its tokens.
  void ExpectRows(uint64_t id, uint32_t rows) const {
    ASSERT_TRUE(stage->cache().resident({id}));
    ASSERT_EQ(stage->cache().length({id}), rows);
    const auto tables = stage->cache().PageTables({id});
    for (uint32_t layer = 0; layer < layers().size(); ++layer) {
      for (uint32_t p = 0; p < rows; ++p) {
        ASSERT_EQ(cache->Row(tables[layer][p / limits::kBlockTokens], p % limits::kBlockTokens),
                  FakeRow(layers().begin + layer, Token(id, p), p))
            << "layer " << layers().begin + layer << ", position " << p;
      }
    }
  }

  NumberCache* const cache;
  FakeModel* model;
  std::unique_ptr<Stage> stage;
};

// Stages of one worker that are pipelines one after the other.
class TakeOverTest : public testing::Test {
 protected:
  TakeOverTest() {
    EXPECT_TRUE(cache_.Resize(kPool, {}).ok());
    pool_.Grow(kPool);
  }
  ~TakeOverTest() override {
    stages_.clear();
    EXPECT_EQ(pool_.used(), 0u) << "blocks were lost";
    EXPECT_TRUE(pool_.CheckIntegrity().ok()) << pool_.CheckIntegrity();
  }

  Hosted& Add(uint64_t id, LayerRange layers, uint32_t capacity = kPool) {
    return stages_.try_emplace(id, id, layers, capacity, &cache_, &pool_).first->second;
  }
  Hosted& Stage1Of1() {
    Hosted& one = Add(1, {0, kLayers});
    EXPECT_TRUE(one.stage->Activate({1, 1}, 0, 1).ok());
    return one;
  }
  // Enters epoch 1.2 and takes over from these.
  void Follow(Hosted& successor, uint32_t index, uint32_t num_stages,
              std::initializer_list<uint64_t> before) {
    ASSERT_TRUE(successor.stage->Activate({1, 2}, index, num_stages).ok());
    std::vector<Stage*> stages;
    for (const uint64_t id : before) stages.push_back(stages_.at(id).stage.get());
    successor.stage->TakeOver(stages);
    CheckIntegrity();
  }
  void CheckIntegrity() const {
    uint32_t used = 0;
    for (const auto& [id, hosted] : stages_) {
      EXPECT_TRUE(hosted.stage->CheckIntegrity().ok()) << hosted.stage->CheckIntegrity();
      used += hosted.stage->cache().blocks_taken();
    }
    EXPECT_EQ(used, pool_.used());
  }
  // `rows` more rows of a sequence, from its first one on.
  static v1::StepPlan Rows(const Hosted& hosted, uint64_t step, uint64_t id, uint32_t first,
                           uint32_t rows) {
    v1::StepPlan plan = hosted.Plan(step);
    if (first == 0) AddOpen(&plan, id);
    if (rows > 0) AddRows(&plan, id, first, Tokens(id, first, rows));
    return plan;
  }
  // The first plan of an epoch: what every stage keeps of each sequence. Closed: 0.
  static v1::StepPlan Keep(const Hosted& hosted, const std::map<uint64_t, uint32_t>& kept,
                           int num_stages) {
    v1::StepPlan plan = hosted.Plan(1);
    for (const auto& [id, rows] : kept) {
      if (rows == 0) {
        AddClose(&plan, id);
        continue;
      }
      AddOpen(&plan, id);
      v1::OpenSequence* open = plan.mutable_cache_ops(plan.cache_ops_size() - 1)->mutable_open();
      for (int s = 0; s < num_stages; ++s) open->add_kept_rows(rows);
    }
    return plan;
  }

  NumberCache cache_;
  BlockPool pool_;
  std::map<uint64_t, Hosted> stages_;
};

using Held = std::map<uint64_t, uint32_t>;

}  // namespace strait
