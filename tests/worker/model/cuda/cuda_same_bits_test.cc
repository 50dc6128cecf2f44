// SPDX-License-Identifier: Apache-2.0
//
// Defends: with --deterministic, the bits of a sequence's log-probabilities and its tokens depend
// on the sequence alone, not on chunks, the rest of the batch, stages, graphs, or where in the pool
// its blocks lie. Contexts cross the 1,024-row spans that attention is cut at, some more than four
// of them, and some steps need several launches of attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/cuda/hopper_models.h"
#include "tests/worker/model/test_pipeline.h"
#include "worker/model/cuda/stage_layout.h"

namespace strait {
namespace {

constexpr uint64_t kSeed = 3;
constexpr uint32_t kTop = limits::kMaxTopLogprobs;

std::vector<TokenId> RandomTokens(uint32_t count, uint32_t vocab, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < count; ++i) tokens.push_back(rng() % vocab);
  return tokens;
}

// Every number of a sequence's results.
struct Trace {
  std::vector<uint32_t> words;
  friend bool operator==(const Trace&, const Trace&) = default;

  void Append(const v1::TokenLogprob& token) {
    words.push_back(token.token_id());
    words.push_back(std::bit_cast<uint32_t>(token.logprob()));
    for (const uint32_t id : token.top_ids()) words.push_back(id);
    for (const float logprob : token.top_logprobs()) {
      words.push_back(std::bit_cast<uint32_t>(logprob));
    }
  }
};

struct Way {
  std::string name;
  uint32_t prompt = 1100;
  uint32_t chunk = 1000;
  std::vector<LayerIndex> ends;  // empty: one stage
  uint32_t num_others = 0;       // sequences beside it in every step
  bool deterministic = true;
  bool fp8_activations = false;
};

struct Model {
  const char* name;
  ModelConfig (*config)();
  RowFormat rows = RowFormat::kBf16;
};

class CudaSameBitsTest : public CudaTestWithParam<Model> {
 protected:
  static constexpr uint32_t kGenerated = 12;
  static constexpr uint32_t kScored = 200;  // the last rows of the prompt

  Trace Run(const Way& way) {
    const ModelConfig config = GetParam().config();
    CudaBackendOptions options;
    options.memory_bytes = uint64_t{16} << 30;
    options.deterministic = way.deterministic;
    options.row_format = GetParam().rows;
    options.fp8_activations = way.fp8_activations;
    const std::vector<LayerIndex> ends =
        way.ends.empty() ? std::vector<LayerIndex>{config.num_hidden_layers} : way.ends;
    TestPipeline pipeline(MakeCuda(config, options, kSeed), ends, 64 * 1024);

    std::vector<TokenId> tokens = RandomTokens(way.prompt, config.vocab_size, 1);
    std::mt19937 rng(way.num_others + 77);
    std::vector<uint32_t> other_lengths(way.num_others, 0);
    Trace trace;
    bool open = false;
    uint32_t done = 0;
    while (tokens.size() < way.prompt + kGenerated) {
      v1::StepPlan plan = pipeline.Plan();
      if (!open) {
        // The others first, so that the sequence's blocks lie elsewhere.
        for (uint32_t i = 0; i < way.num_others; ++i) AddOpen(&plan, 100 + i);
        AddOpen(&plan, 50, way.prompt);
        auto* sampling =
            plan.mutable_cache_ops(plan.cache_ops_size() - 1)->mutable_open()->mutable_sampling();
        sampling->set_seed(99);
        sampling->set_temperature(0.8f);
        sampling->set_top_p(0.95f);
        sampling->set_top_k(50);
        sampling->set_repetition_penalty(1.1f);
        sampling->set_frequency_penalty(0.2f);
        open = true;
      }
      // In a prompt's steps others have chunks, too; beside its decode steps all decode, so that
      // the step is a graph.
      const auto add_other = [&](uint32_t i) {
        const bool decodes = done >= way.prompt;
        const uint32_t count = !decodes && rng() % 3 == 0 ? 1 + rng() % 60 : 1;
        if (other_lengths[i] + count > 1200) return;
        AddRows(&plan, 100 + i, other_lengths[i], RandomTokens(count, config.vocab_size, rng()));
        other_lengths[i] += count;
      };
      for (uint32_t i = 0; i < way.num_others / 2; ++i) add_other(i);
      const uint32_t end =
          std::min<uint32_t>(done + way.chunk, static_cast<uint32_t>(tokens.size()));
      v1::SequenceStep* rows =
          AddRows(&plan, 50, done, {tokens.begin() + done, tokens.begin() + end});
      for (uint32_t i = done; i < end; ++i) {
        if (i + kScored < way.prompt) continue;
        if (i + 1 < tokens.size()) {
          WantScore(rows, i - done, tokens[i + 1]);
        } else {
          WantSample(rows, i - done);
        }
        rows->mutable_logits(rows->logits_size() - 1)->set_num_top(kTop);
      }
      for (uint32_t i = way.num_others / 2; i < way.num_others; ++i) add_other(i);
      done = end;
      for (const v1::SequenceResult& result : pipeline.Run(plan)) {
        if (result.sequence_id() != 50) continue;
        for (const auto& scored : result.scored()) trace.Append(scored);
        if (result.has_sampled()) {
          trace.Append(result.sampled());
          tokens.push_back(result.sampled().token_id());
        }
      }
    }
    return trace;
  }

  void Compare(const Way& plain, const std::vector<Way>& ways) {
    const Trace expected = Run(plain);
    ASSERT_EQ(expected.words.size(),
              (std::min(kScored, plain.prompt) - 1 + kGenerated) * (2 + 2 * kTop));
    EXPECT_TRUE(Run(plain) == expected) << "the same again";
    for (const Way& way : ways) {
      const Trace got = Run(way);
      ASSERT_EQ(got.words.size(), expected.words.size()) << way.name;
      const auto [a, b] =
          std::mismatch(expected.words.begin(), expected.words.end(), got.words.begin());
      EXPECT_TRUE(got == expected) << way.name << ": first at word " << a - expected.words.begin()
                                   << " of " << expected.words.size();
    }
  }
};

TEST_P(CudaSameBitsTest, HoweverItIsRun) {
  const LayerIndex n = GetParam().config().num_hidden_layers;
  Compare({.name = "in two chunks, alone"},
          {{.name = "chunks of 1", .chunk = 1},
           {.name = "chunks of 7", .chunk = 7},
           {.name = "chunks of 64", .chunk = 64},
           {.name = "whole", .chunk = 5000},
           {.name = "two stages", .ends = {1, n}},
           {.name = "three stages, chunks of 64", .chunk = 64, .ends = {1, 2, n}},
           {.name = "batch of 16", .num_others = 15},
           {.name = "batch of 16, chunks of 7, two stages",
            .chunk = 7,
            .ends = {2, n},
            .num_others = 15},
           {.name = "batch of 40, chunks of 333", .chunk = 333, .num_others = 39}});
}

// Small enough for the emulator.
TEST_P(CudaSameBitsTest, AShortContext) {
  const LayerIndex n = GetParam().config().num_hidden_layers;
  Compare({.name = "", .prompt = 70},
          {{.name = "chunks of 1", .prompt = 70, .chunk = 1},
           {.name = "chunks of 7, two stages", .prompt = 70, .chunk = 7, .ends = {1, n}},
           {.name = "batch of 16, chunks of 33", .prompt = 70, .chunk = 33, .num_others = 15}});
}

TEST_P(CudaSameBitsTest, ALongContext) {
  const LayerIndex n = GetParam().config().num_hidden_layers;
  Compare({.name = "", .prompt = 5300, .chunk = 5000},
          {{.name = "chunks of 64", .prompt = 5300, .chunk = 64},
           {.name = "batch of 16, chunks of 777, two stages",
            .prompt = 5300,
            .chunk = 777,
            .ends = {1, n},
            .num_others = 15}});
}

// With fp8 activations: other bits than without, but the sequence's alone.
class CudaFp8ActivationsTest : public CudaSameBitsTest {
 protected:
  void CompareFp8(Way plain, std::vector<Way> ways) {
    const Trace bf16 = Run(plain);
    plain.fp8_activations = true;
    for (Way& way : ways) way.fp8_activations = true;
    EXPECT_FALSE(Run(plain) == bf16);
    Compare(plain, ways);
  }
};

TEST_P(CudaFp8ActivationsTest, HoweverItIsRun) {
  const LayerIndex n = GetParam().config().num_hidden_layers;
  CompareFp8({.name = "in two chunks, alone"},
             {{.name = "chunks of 1", .chunk = 1},
              {.name = "chunks of 7, three stages", .chunk = 7, .ends = {1, 2, n}},
              {.name = "whole", .chunk = 5000},
              {.name = "batch of 16", .num_others = 15},
              {.name = "batch of 40, chunks of 333", .chunk = 333, .num_others = 39}});
}

// Small enough for the emulator.
TEST_P(CudaFp8ActivationsTest, AShortContext) {
  const LayerIndex n = GetParam().config().num_hidden_layers;
  CompareFp8({.name = "", .prompt = 40},
             {{.name = "chunks of 7, two stages", .prompt = 40, .chunk = 7, .ends = {1, n}},
              {.name = "batch of 16, chunks of 33", .prompt = 40, .chunk = 33, .num_others = 15}});
}

// If the plain mode gave the same bits, the tests above would show nothing.
TEST_P(CudaSameBitsTest, WithoutTheFlagTheWayShows) {
  const Way whole = {.name = "", .deterministic = false};
  Way chunks = whole;
  chunks.chunk = 64;
  chunks.num_others = 15;
  EXPECT_FALSE(Run(chunks) == Run(whole));
}

INSTANTIATE_TEST_SUITE_P(Models, CudaSameBitsTest,
                         testing::Values(Model{"V3", V3}, Model{"V3Fp8", V3Fp8},
                                         Model{"V2Lite", V2Lite}, Model{"V2", V2},
                                         Model{"Lite512", Lite512}, Model{"Heads256", Heads256},
                                         Model{"V3Fp8Rows", V3, RowFormat::kFp8},
                                         Model{"Lite512Fp8Rows", Lite512, RowFormat::kFp8},
                                         Model{"Heads256Fp8Rows", Heads256, RowFormat::kFp8}),
                         [](const auto& info) { return std::string(info.param.name); });

INSTANTIATE_TEST_SUITE_P(Models, CudaFp8ActivationsTest,
                         testing::Values(Model{"V3Fp8", V3Fp8}, Model{"Heads256", Heads256},
                                         Model{"V3Fp8Fp8Rows", V3Fp8, RowFormat::kFp8}),
                         [](const auto& info) { return std::string(info.param.name); });

// Needs no GPU: the case that needs several launches is one.
TEST(CudaSameBitsCaseTest, AStepOf256HeadsIsMoreThanOneLaunch) {
  const ModelConfig config = Heads256();
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 100;
  const StepLimits limits = LayOutStage(config, spec, {132, true}, nullptr).limits;
  cuda::MlaSequence chunk;
  chunk.num_tokens = static_cast<int32_t>(limits.tile_rows);
  chunk.first_position = 5000;
  cuda::MlaParts parts;
  cuda::CutMlaBatch(&chunk, 1, {.num_heads = 256, .deterministic = true}, limits.mla, &parts);
  EXPECT_GE(parts.begin.size(), 3u) << limits.tile_rows << " rows, " << limits.mla.max_partials;
}

}  // namespace
}  // namespace strait
