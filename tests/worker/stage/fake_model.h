// SPDX-License-Identifier: Apache-2.0
//
// FakeModel writes a number per layer and position into cache rows and checks, whenever it runs,
// that it reads back through the page tables what every earlier step wrote there. Its tokens are a
// hash of what it read, so a lost, foreign or overwritten row changes them. It computes a step when
// it is finished, as late as it may.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "proto/base/limits.h"
#include "strait/v1/cluster.pb.h"
#include "tests/worker/polled_copies.h"
#include "tests/worker/stage/held_batch.h"
#include "tests/worker/stage/plans.h"
#include "worker/stage/stage.h"

namespace strait {

inline constexpr uint32_t kFakeVocab = 1000;
inline constexpr uint32_t kFakeHiddenRowBytes = 8;

inline uint64_t FakeMix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9E3779B97F4A7C15u + b + 1;
  x ^= x >> 31;
  x *= 0xBF58476D1CE4E5B9u;
  return x ^ (x >> 29);
}

// What the fake writes for a token, and what all rows up to a position hash to.
inline uint64_t FakeRow(uint64_t layer, TokenId token, uint32_t position) {
  return FakeMix(FakeMix(layer, token), position);
}
inline uint64_t FakeHash(LayerRange layers, absl::Span<const TokenId> tokens) {
  uint64_t hash = 0;
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
    for (uint32_t p = 0; p < tokens.size(); ++p) hash = FakeMix(hash, FakeRow(layer, tokens[p], p));
  }
  return hash;
}

class FakeModel : public StageModel {
 public:
  FakeModel(LayerRange layers, uint32_t pool_blocks, uint32_t num_layers, NumberCache* cache)
      : spec_{layers, pool_blocks},
        last_(layers.end == num_layers),
        cache_(cache),
        copies_(spec_.layers.size(), cache, &copy_faults) {}

  absl::Status Begin(const StageBatch& batch, HiddenIn in, HiddenOut out) override {
    EXPECT_LT(begun_.size(), takes_ahead ? kMaxStepsBegun : 1);
    if (fail_begin) return absl::DataLossError("the fake was told not to begin");
    copies_.StepBegun(batch);
    begun_.emplace_back(batch, in, out);
    return absl::OkStatus();
  }
  bool TakesAhead(uint32_t num_rows, uint32_t) const override {
    return takes_ahead && num_rows <= rows_ahead;
  }
  bool Done() const override { return done; }
  absl::Status Finish(std::vector<LogitsResult>* results) override {
    HeldBatch step = std::move(begun_.front());
    begun_.pop_front();
    copies_.StepFinished();
    if (fail_next) {
      before_.assign(limits::kMaxStepTokens, {});  // what a step behind it may feed is void
      return absl::DataLossError("the fake was told to fail");
    }
    Compute(step.With(before_), step.hidden_in.bytes, step.hidden_out.bytes, results);
    before_ = *results;
    return absl::OkStatus();
  }

  void Compute(const StageBatch& batch, absl::Span<const std::byte> hidden_in,
               absl::Span<std::byte> hidden_out, std::vector<LogitsResult>* results) {
    EXPECT_EQ(hidden_in.size(),
              spec_.layers.begin == 0 ? 0 : batch.num_tokens * kFakeHiddenRowBytes);
    EXPECT_EQ(hidden_out.size(), last_ ? 0 : batch.num_tokens * kFakeHiddenRowBytes);
    uint32_t num_rows = 0;
    std::vector<uint32_t> first_row;
    for (const BatchSequence& sequence : batch.sequences) {
      EXPECT_EQ(sequence.tokens.size(), sequence.first_position + sequence.num_tokens);
      EXPECT_EQ(sequence.page_tables.size(), spec_.layers.size());
      first_row.push_back(num_rows);
      num_rows += sequence.num_tokens;
      for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer) {
        for (uint32_t p = sequence.first_position; p < sequence.tokens.size(); ++p) {
          const uint64_t row = FakeRow(spec_.layers.begin + layer, sequence.tokens[p], p);
          if (sequence.is_cached) {
            EXPECT_EQ(Row(sequence, layer, p), row) << "a row that was kept is another one";
          } else {
            Row(sequence, layer, p) = row;
          }
        }
      }
    }
    EXPECT_EQ(num_rows, batch.num_tokens);
    const absl::Span<const TokenId> tokens = batch.sequences.back().tokens;
    last_tokens.assign(tokens.begin(), tokens.end());
    for (const LogitsRequest& request : batch.logits) {
      const BatchSequence& sequence = batch.sequences[request.sequence_index];
      const uint32_t length =
          sequence.first_position + request.row - first_row[request.sequence_index] + 1;
      uint64_t hash = 0;
      for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer) {
        for (uint32_t p = 0; p < length; ++p) hash = FakeMix(hash, Row(sequence, layer, p));
      }
      LogitsResult result;
      result.token = request.sample ? static_cast<TokenId>(hash % kFakeVocab) : request.token;
      result.logprob = -static_cast<float>(hash % 4096);
      for (uint32_t i = 0; i < request.num_top; ++i) result.top.emplace_back(i, -1.0f - i);
      if (sequence.id == bad_sequence) result.status = absl::DataLossError("no numbers");
      results->push_back(result);
    }
    if (!last_) std::memset(hidden_out.data(), 1, hidden_out.size());
    ++num_steps;
  }

  BlockCopies& copies() override { return copies_; }
  absl::Status SetCapacity(uint32_t pool_blocks) override {
    if (!capacity_status.ok()) return capacity_status;
    spec_.pool_blocks = pool_blocks;
    return absl::OkStatus();
  }
  const StageSpec& spec() const override { return spec_; }
  uint64_t weight_bytes() const override { return 0; }

  bool takes_ahead = true;
  uint32_t rows_ahead = 1000;
  bool done = true;
  CopyFaults copy_faults;
  absl::Status capacity_status;
  bool fail_begin = false;
  bool fail_next = false;
  SequenceId bad_sequence{0};  // its logits are no numbers
  int num_steps = 0;
  size_t num_begun() const { return begun_.size(); }
  std::vector<TokenId> last_tokens;  // of the last sequence that ran

 private:
  uint64_t& Row(const BatchSequence& sequence, uint32_t layer, uint32_t position) {
    const BlockId block = sequence.page_tables[layer].at(position / limits::kBlockTokens);
    return cache_->Row(block, position % limits::kBlockTokens);
  }

  StageSpec spec_;
  const bool last_;
  NumberCache* const cache_;
  PolledCopies copies_;
  std::deque<HeldBatch> begun_;
  std::vector<LogitsResult> before_;  // of the last step that is done
};

// Of a latent block, as a fake stage counts it; and how many a report tells of.
inline constexpr uint64_t kFakeBlockBytes = 1000;
inline uint64_t BlocksHeld(const v1::StageReport& report) {
  EXPECT_EQ(report.cache_bytes() % kFakeBlockBytes, 0u);
  return report.cache_bytes() / kFakeBlockBytes;
}

// A stage with its fake.
struct FakeStage {
  static constexpr uint64_t kStageId = 5;
  static constexpr uint32_t kMaxPositions = 2000;

  FakeStage(LayerRange layers, uint32_t num_layers, uint32_t pool_blocks) {
    EXPECT_TRUE(cache.Resize(pool_blocks, {}).ok());
    pool.Grow(pool_blocks);
    auto owned = std::make_unique<FakeModel>(layers, pool_blocks, num_layers, &cache);
    model = owned.get();
    stage = std::make_unique<Stage>(kStageId, std::move(owned),
                                    StageTraits{.num_layers = num_layers,
                                                .hidden_row_bytes = kFakeHiddenRowBytes,
                                                .vocab_size = kFakeVocab,
                                                .max_positions = kMaxPositions,
                                                .block_bytes = kFakeBlockBytes,
                                                .row_shape = kHashRowShape},
                                    &pool, &host_budget, &transfer);
  }

  v1::StepPlan Plan(uint64_t step) const {
    v1::StepPlan plan;
    plan.set_stage_id(kStageId);
    plan.set_step_id(step);
    plan.mutable_epoch()->set_term(stage->epoch().term);
    plan.mutable_epoch()->set_counter(stage->epoch().counter);
    return plan;
  }
  HiddenStep Hidden(uint64_t step, uint32_t num_tokens) const {
    return {stage->epoch(), StepId{step}, num_tokens,
            std::vector<std::byte>(size_t{num_tokens} * kFakeHiddenRowBytes)};
  }
  void Begin(const HiddenMemory& memory = {}) {
    stage->BeginNext([this] { return now_us += 10; }, memory);
  }
  StepOutput Finish() {
    return stage->FinishNext([this] { return now_us += 10; });
  }
  StepOutput Run() {
    Begin();
    EXPECT_EQ(stage->num_begun(), 1u);
    return Finish();
  }

  NumberCache cache;
  BlockPool pool;
  HostBudget host_budget{.limit_bytes = 1 << 20};
  TransferShare transfer;
  FakeModel* model;
  std::unique_ptr<Stage> stage;
  uint64_t now_us = 0;
};

}  // namespace strait
