// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage is loaded only if it fits, takes no more memory than it says, and its sampler
// obeys the request's parameters.
#include "worker/model/cpu_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "tests/worker/model/load_with_cache.h"
#include "tests/worker/model/test_pipeline.h"
#include "tests/worker/model/tiny_models.h"
#include "worker/model/cpu_workspace.h"

namespace strait {
namespace {

using testing::HasSubstr;

std::unique_ptr<CpuBackend> MakeBackend(const ModelConfig& config, uint64_t memory_bytes) {
  CpuBackendOptions options;
  options.memory_bytes = memory_bytes;
  auto backend = CpuBackend::Create(options, MakeRandomWeights(config, 1, 1));
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

uint64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  uint64_t size = 0;
  uint64_t resident = 0;
  statm >> size >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

TEST(CpuBackendTest, SaysWhatItIs) {
  const auto backend = MakeBackend(TinyV3(), 1 << 30);
  EXPECT_EQ(backend->hidden_row_bytes(), 88u * 4);
  EXPECT_EQ(backend->num_layers(), 5u);
  EXPECT_EQ(backend->vocab_size(), 211u);
  EXPECT_EQ(backend->max_positions(), 1024u);
  EXPECT_EQ(backend->block_bytes(), BlockBytes(RowFormat::kFp32, 36, 24));
  EXPECT_EQ(backend->numerics_id(), "cpu/1/fp32");
}

TEST(CpuBackendTest, RefusesAnImpossibleNumberOfThreads) {
  CpuBackendOptions options;
  options.num_threads = 0;
  EXPECT_EQ(CpuBackend::Create(options, MakeRandomWeights(TinyV3(), 1, 1)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CpuBackendTest, RefusesFp8RowsAndNamesTheBackendThatHasThem) {
  CpuBackendOptions options;
  options.row_format = RowFormat::kFp8;
  const auto backend = CpuBackend::Create(options, MakeRandomWeights(TinyV3(), 1, 1));
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(backend.status().message().find("--cache-format fp8 needs --backend cuda"),
            std::string::npos)
      << backend.status();
}

TEST(CpuBackendTest, RefusesInt4Rows) {
  CpuBackendOptions options;
  options.row_format = RowFormat::kInt4;
  const auto backend = CpuBackend::Create(options, MakeRandomWeights(TinyV3(), 1, 1));
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(backend.status().message().find("not int4"), std::string::npos) << backend.status();
}

TEST(CpuBackendTest, LoadsWhatFitsAndGivesItBack) {
  const ModelConfig config = TinyV3();
  uint64_t layer_bytes = LayerWeightBytes(config, 1);
  const uint64_t block_bytes = BlockBytes(RowFormat::kFp32, 36, 24);
  const std::vector<uint64_t> workspaces = WorkspaceSizes(config);
  const uint64_t fixed_bytes = layer_bytes + workspaces[ChooseWorkspace(workspaces, layer_bytes)];
  const auto backend = MakeBackend(config, 2 * (fixed_bytes + 10 * block_bytes));
  auto first = LoadWithCache(backend.get(), {{1, 2}, 10});
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ((*first)->weight_bytes(), layer_bytes);
  auto second = LoadWithCache(backend.get(), {{2, 3}, 10});
  ASSERT_TRUE(second.ok()) << second.status();
  const absl::Status more = backend->cache().Resize(21, {});
  ASSERT_EQ(more.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(more.message()),
              HasSubstr(std::to_string(block_bytes) + " bytes, available are 0"));
  auto third = backend->Load({{3, 4}, 1}, {});
  ASSERT_EQ(third.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(third.status().message()),
              HasSubstr(std::to_string(fixed_bytes) + " bytes, available are 0"));
  second->reset();
  EXPECT_TRUE(backend->Load({{3, 4}, 10}, {}).ok());
  // What another stage has is there once.
  third = backend->Load({{1, 2}, 10}, {});
  ASSERT_EQ(third.status().code(), absl::StatusCode::kOk) << third.status();
  EXPECT_EQ((*third)->weight_bytes(), layer_bytes);
}

TEST(CpuBackendTest, RefusesLayersThatTheModelDoesNotHave) {
  const auto backend = MakeBackend(TinyV3(), 1 << 30);
  for (const LayerRange layers : {LayerRange{0, 0}, LayerRange{3, 2}, LayerRange{0, 6}}) {
    EXPECT_EQ(backend->Load({layers, 10}, {}).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(backend->Load({{0, 1}, 0}, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CpuBackendTest, AStageOutlivesItsBackend) {
  auto backend = MakeBackend(TinyV3(), 1 << 30);
  auto model = LoadWithCache(backend.get(), {{0, 5}, 10});
  ASSERT_TRUE(model.ok());
  backend.reset();
  const std::vector<TokenId> tokens = {1, 2, 3};
  std::vector<std::vector<BlockId>> tables;
  for (BlockId block = 0; block < 5; ++block) tables.push_back({block});
  const std::vector<absl::Span<const BlockId>> views(tables.begin(), tables.end());
  SamplingParams sampling;
  BatchSequence sequence{{1}, 0, 3, tokens, views, 0, 3, &sampling};
  LogitsRequest request;
  request.row = 2;
  request.sample = true;
  std::vector<LogitsResult> results;
  ASSERT_TRUE(
      (*model)
          ->Begin({absl::MakeConstSpan(&sequence, 1), 3, absl::MakeConstSpan(&request, 1)}, {}, {})
          .ok());
  ASSERT_TRUE((*model)->Finish(&results).ok());
  ASSERT_EQ(results.size(), 1u);
  EXPECT_LT(results[0].token, 211u);
}

TEST(CpuBackendTest, APoolCostsNothingBeforeItIsUsed) {
  const auto backend = MakeBackend(TinyV3(), uint64_t{8} << 30);
  const uint64_t before = ResidentBytes();
  const auto pool_blocks =
      static_cast<uint32_t>((uint64_t{4} << 30) / BlockBytes(RowFormat::kFp32, 36, 24));
  auto model = LoadWithCache(backend.get(), {{0, 5}, pool_blocks});
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(backend->cache().num_blocks(), pool_blocks);
  EXPECT_LT(ResidentBytes(), before + (uint64_t{64} << 20));
}

TEST(WorkspaceTest, IsASmallPartOfTheWeights) {
  ModelConfig config = TinyV3();  // DeepSeek-V2-Lite's sizes
  config.hidden_size = 2048;
  config.num_attention_heads = 16;
  config.q_lora_rank = 0;
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  config.intermediate_size = 10944;
  config.moe_intermediate_size = 1408;
  config.n_routed_experts = 64;
  config.num_experts_per_tok = 6;
  config.vocab_size = 102400;
  for (const uint64_t weight_bytes : {uint64_t{600} << 20, uint64_t{1} << 30, uint64_t{30} << 30}) {
    const auto workspace = CreateCpuWorkspace(config, weight_bytes);
    ASSERT_TRUE(workspace.ok());
    EXPECT_LE(workspace->memory.bytes(), weight_bytes / 20) << weight_bytes;
    EXPECT_GE(workspace->tile_rows, kMinTileRows);
  }
  EXPECT_EQ(CreateCpuWorkspace(config, uint64_t{30} << 30)->tile_rows, kMaxTileRows);
  EXPECT_EQ(CreateCpuWorkspace(config, 1)->tile_rows, kMinTileRows);
}

// ---- Logits that are no numbers ----

// Random weights, but the embedding of one token is NaN.
class PoisonedWeights final : public WeightSource {
 public:
  PoisonedWeights(const ModelConfig& config, TokenId poisoned)
      : weights_(MakeRandomWeights(config, 1, 1)), poisoned_(poisoned) {}
  const ModelConfig& config() const override { return weights_->config(); }
  absl::StatusOr<LayerWeights> LoadLayer(LayerIndex layer) override {
    return weights_->LoadLayer(layer);
  }
  absl::StatusOr<EmbeddingWeights> LoadEmbedding() override {
    auto embedding = weights_->LoadEmbedding();
    EXPECT_TRUE(embedding.ok());
    WeightMatrix& table = embedding->embed_tokens;
    EXPECT_EQ(table.type, WeightType::kBf16);
    const auto* values = static_cast<const uint16_t*>(table.data);
    table_.assign(values, values + table.rows * table.cols);
    std::fill_n(table_.begin() + poisoned_ * table.cols, table.cols, uint16_t{0x7fc0});
    table.data = table_.data();
    return embedding;
  }
  absl::StatusOr<HeadWeights> LoadHead() override { return weights_->LoadHead(); }

 private:
  const std::unique_ptr<WeightSource> weights_;
  const TokenId poisoned_;
  std::vector<uint16_t> table_;
};

// Regression: a NaN was sampled from as if it were a number, and its log-probability reported.
TEST(NotFiniteTest, IsToldAndTouchesNoOtherSequence) {
  const std::vector<TokenId> well = {1, 2, 3};
  const std::vector<TokenId> bad = {4, 7, 5};
  for (const std::vector<LayerIndex>& ends : {std::vector<LayerIndex>{5}, {2, 5}}) {
    std::string alone;
    for (const bool together : {false, true}) {
      CpuBackendOptions options;
      options.memory_bytes = 1 << 30;
      TestPipeline pipeline(options, std::make_unique<PoisonedWeights>(TinyV3(), 7), ends);
      v1::StepPlan plan = pipeline.Plan();
      if (together) {
        AddOpen(&plan, 1, 3);
        v1::SequenceStep* rows = AddRows(&plan, 1, 0, bad);
        WantScore(rows, 0, 7);  // position 0 has seen no NaN
        WantScore(rows, 1, 5);
        WantSample(rows, 2);
      }
      AddOpen(&plan, 2, 3);
      v1::SequenceStep* rows = AddRows(&plan, 2, 0, well);
      WantScore(rows, 1, 3);
      WantSample(rows, 2, 5);
      const auto results = pipeline.Run(plan);
      ASSERT_EQ(results.size(), together ? 2u : 1u);
      const std::string got = results.back().SerializeAsString();
      EXPECT_EQ(results.back().error_code(), 0u);
      if (!together) {
        alone = got;
        continue;
      }
      EXPECT_EQ(got, alone);
      EXPECT_EQ(static_cast<absl::StatusCode>(results[0].error_code()),
                absl::StatusCode::kDataLoss);
      EXPECT_THAT(results[0].error_message(), HasSubstr("position 1 are not finite"));
      EXPECT_EQ(results[0].scored_size(), 0);
    }
  }
}

// ---- Sampling, through a stage ----

class SamplingTest : public testing::Test {
 protected:
  SamplingTest() : config_(TinyV3()) {
    CpuBackendOptions options;
    options.memory_bytes = 1 << 30;
    pipeline_ = std::make_unique<TestPipeline>(options, MakeRandomWeights(config_, 1, 1),
                                               std::vector<LayerIndex>{config_.num_hidden_layers});
  }

  // Generates `count` tokens after {1, 2, 3}; keeps each one's five best alternatives.
  std::vector<v1::TokenLogprob> Generate(const v1::SamplingParams& sampling, uint32_t count) {
    const uint64_t id = next_id_++;
    std::vector<TokenId> fresh = {1, 2, 3};
    std::vector<v1::TokenLogprob> out;
    uint32_t length = 0;
    while (out.size() < count) {
      v1::StepPlan plan = pipeline_->Plan();
      if (length == 0) {
        AddOpen(&plan, id, 3);
        *plan.mutable_cache_ops(0)->mutable_open()->mutable_sampling() = sampling;
      }
      WantSample(AddRows(&plan, id, length, fresh), static_cast<uint32_t>(fresh.size()) - 1, 5);
      length += static_cast<uint32_t>(fresh.size());
      out.push_back(pipeline_->Run(plan).at(0).sampled());
      fresh = {out.back().token_id()};
    }
    v1::StepPlan plan = pipeline_->Plan();
    AddClose(&plan, id);
    pipeline_->Run(plan);
    return out;
  }
  static std::vector<TokenId> Ids(const std::vector<v1::TokenLogprob>& tokens) {
    std::vector<TokenId> ids;
    for (const auto& token : tokens) ids.push_back(token.token_id());
    return ids;
  }
  static v1::SamplingParams Greedy() {
    v1::SamplingParams sampling;
    sampling.set_top_p(1);
    sampling.set_repetition_penalty(1);
    return sampling;
  }

  const ModelConfig config_;
  std::unique_ptr<TestPipeline> pipeline_;
  uint64_t next_id_ = 1;
};

TEST_F(SamplingTest, TemperatureZeroTakesTheBest) {
  for (const auto& token : Generate(Greedy(), 20)) {
    EXPECT_EQ(token.token_id(), token.top_ids(0));
    EXPECT_EQ(token.logprob(), token.top_logprobs(0));
    for (int i = 1; i < 5; ++i) EXPECT_GE(token.top_logprobs(i - 1), token.top_logprobs(i));
  }
}

TEST_F(SamplingTest, SeedAndChoiceDecideTheNoise) {
  v1::SamplingParams sampling = Greedy();
  sampling.set_temperature(1);
  sampling.set_seed(7);
  const auto ids = Ids(Generate(sampling, 30));
  EXPECT_EQ(Ids(Generate(sampling, 30)), ids);
  sampling.set_choice_index(1);
  EXPECT_NE(Ids(Generate(sampling, 30)), ids);
  sampling.set_choice_index(0);
  sampling.set_seed(8);
  EXPECT_NE(Ids(Generate(sampling, 30)), ids);
}

TEST_F(SamplingTest, BannedTokensWaitForMinTokens) {
  const auto free = Ids(Generate(Greedy(), 6));
  v1::SamplingParams sampling = Greedy();
  sampling.set_min_tokens(3);
  for (TokenId token : std::set<TokenId>(free.begin(), free.end())) sampling.add_banned_ids(token);
  const auto ids = Ids(Generate(sampling, 6));
  const std::set<TokenId> banned(free.begin(), free.end());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(banned.count(ids[i]), 0u) << i;
  // Free again from the fourth on: with all others banned by bias, one of them must come.
  for (TokenId token = 0; token < config_.vocab_size; ++token) {
    if (banned.count(token) == 0) sampling.add_bias_ids(token), sampling.add_bias_values(-1);
  }
  sampling.mutable_bias_values()->Set(0, -1);
  for (int i = 0; i < sampling.bias_values_size(); ++i) sampling.set_bias_values(i, -1e4f);
  const auto biased = Ids(Generate(sampling, 4));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(banned.count(biased[i]), 0u) << i;
  EXPECT_EQ(banned.count(biased[3]), 1u);
}

TEST_F(SamplingTest, PenaltiesCountPromptAndOutputApart) {
  // A presence penalty beyond all logits forbids what was generated, and only that.
  v1::SamplingParams sampling = Greedy();
  sampling.set_presence_penalty(1e6f);
  const auto ids = Ids(Generate(sampling, 60));
  EXPECT_EQ(std::set<TokenId>(ids.begin(), ids.end()).size(), ids.size());
  // With the three prompt tokens favoured, greedy takes them once each: the prompt does not count.
  for (TokenId token : {1, 2, 3}) sampling.add_bias_ids(token), sampling.add_bias_values(1000);
  const auto favoured = Ids(Generate(sampling, 4));
  EXPECT_EQ(std::set<TokenId>(favoured.begin(), favoured.begin() + 3),
            (std::set<TokenId>{1, 2, 3}));
  // A repetition penalty does count it.
  v1::SamplingParams repetition = Greedy();
  repetition.set_repetition_penalty(1e30f);
  for (const TokenId id : Ids(Generate(repetition, 20))) EXPECT_FALSE(id >= 1 && id <= 3);
}

}  // namespace
}  // namespace strait
