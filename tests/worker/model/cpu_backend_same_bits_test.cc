// SPDX-License-Identifier: Apache-2.0
//
// Defends: the bits of a sequence's log-probabilities depend on its tokens alone: not on chunks,
// the rest of the batch, threads, instruction sets, stages, or where in the pool its blocks lie.
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/model/test_pipeline.h"
#include "tests/worker/model/tiny_models.h"

namespace strait {
namespace {

constexpr uint64_t kSeed = 3;
constexpr uint32_t kTop = limits::kMaxTopLogprobs;

// Every float of a sequence's results, and the ids beside them.
struct Trace {
  std::vector<uint32_t> words;
  friend bool operator==(const Trace&, const Trace&) = default;

  void Append(const v1::TokenLogprob& token) {
    words.push_back(token.token_id());
    words.push_back(std::bit_cast<uint32_t>(token.logprob()));
    for (const uint32_t id : token.top_ids()) words.push_back(id);
    for (const float logprob : token.top_logprobs())
      words.push_back(std::bit_cast<uint32_t>(logprob));
  }
};

std::vector<TokenId> RandomTokens(uint32_t count, uint32_t vocab, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < count; ++i) tokens.push_back(rng() % vocab);
  return tokens;
}

struct Way {
  std::string name;
  uint32_t chunk = 1000;
  uint32_t threads = 1;
  std::vector<LayerIndex> ends;  // empty: one stage
  std::optional<cpu::SimdLevel> simd;
  uint32_t num_others = 0;  // sequences beside it in every step
};

class SameBitsTest : public testing::TestWithParam<ModelConfig (*)()> {
 protected:
  static constexpr uint32_t kPrompt = 150;
  static constexpr uint32_t kGenerated = 12;

  // Scores a prompt, then generates with a seeded sampler.
  Trace Run(const Way& way, RowFormat row_format = RowFormat::kFp32) {
    const ModelConfig config = GetParam()();
    CpuBackendOptions options;
    options.num_threads = way.threads;
    options.simd = way.simd;
    options.row_format = row_format;
    options.memory_bytes = 1 << 30;
    const std::vector<LayerIndex> ends =
        way.ends.empty() ? std::vector<LayerIndex>{config.num_hidden_layers} : way.ends;
    TestPipeline pipeline(options, MakeRandomWeights(config, kSeed, 1), ends, 8192);

    std::vector<TokenId> tokens = RandomTokens(kPrompt, config.vocab_size, 1);
    std::mt19937 rng(static_cast<uint32_t>(way.num_others) + 77);
    std::vector<uint32_t> other_lengths(way.num_others, 0);
    Trace trace;
    bool open = false;
    uint32_t done = 0;
    while (tokens.size() < kPrompt + kGenerated) {
      v1::StepPlan plan = pipeline.Plan();
      if (!open) {
        // The others first, so that the sequence's blocks lie elsewhere.
        for (uint32_t i = 0; i < way.num_others; ++i) AddOpen(&plan, 100 + i);
        AddOpen(&plan, 50, kPrompt);
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
      const auto add_other = [&](uint32_t i) {
        const uint32_t count = rng() % 3 == 0 ? 1 + rng() % 40 : 1;
        if (other_lengths[i] + count > 400) return;
        AddRows(&plan, 100 + i, other_lengths[i], RandomTokens(count, config.vocab_size, rng()));
        other_lengths[i] += count;
      };
      for (uint32_t i = 0; i < way.num_others / 2; ++i) add_other(i);
      const uint32_t end =
          std::min<uint32_t>(done + way.chunk, static_cast<uint32_t>(tokens.size()));
      v1::SequenceStep* rows =
          AddRows(&plan, 50, done, {tokens.begin() + done, tokens.begin() + end});
      for (uint32_t i = done; i < end; ++i) {
        if (i + 1 < tokens.size()) {
          WantScore(rows, i - done, tokens[i + 1]);
        } else {
          WantSample(rows, i - done);
        }
        rows->mutable_logits(static_cast<int>(i - done))->set_num_top(kTop);
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
};

TEST_P(SameBitsTest, HoweverItIsRun) {
  const ModelConfig config = GetParam()();
  const LayerIndex n = config.num_hidden_layers;
  const Trace expected = Run({"whole, alone"});
  ASSERT_EQ(expected.words.size(), (kPrompt - 1 + kGenerated) * (2 + 2 * kTop));
  std::vector<Way> ways = {
      {.name = "chunks of 1", .chunk = 1},
      {.name = "chunks of 7", .chunk = 7},
      {.name = "chunks of 64", .chunk = 64},
      {.name = "two threads", .threads = 2},
      {.name = "two stages", .ends = {1, n}},
      {.name = "three stages, chunks of 64", .chunk = 64, .ends = {1, 2, n}},
      {.name = "batch of 16", .num_others = 15},
      {.name = "batch of 16, chunks of 7, two threads, two stages",
       .chunk = 7,
       .threads = 2,
       .ends = {2, n},
       .num_others = 15},
  };
  for (const cpu::SimdLevel level :
       {cpu::SimdLevel::kPortable, cpu::SimdLevel::kAvx2, cpu::SimdLevel::kAvx512}) {
    if (!cpu::SimdLevelAvailable(level)) {
      std::printf("not on this machine: %s\n", std::string(cpu::SimdLevelName(level)).c_str());
      continue;
    }
    ways.push_back({.name = "forced " + std::string(cpu::SimdLevelName(level)),
                    .chunk = 64,
                    .simd = level,
                    .num_others = 3});
  }
  for (const Way& way : ways) EXPECT_TRUE(Run(way) == expected) << way.name;
}

TEST_P(SameBitsTest, WithBf16RowsToo) {
  const Trace expected = Run({"whole, alone"}, RowFormat::kBf16);
  EXPECT_FALSE(expected == Run({"fp32 rows"})) << "the row format changes nothing?";
  EXPECT_TRUE(Run({.name = "",
                   .chunk = 7,
                   .threads = 2,
                   .ends = {1, GetParam()().num_hidden_layers},
                   .num_others = 5},
                  RowFormat::kBf16) == expected);
}

std::string ModelName(const testing::TestParamInfo<ModelConfig (*)()>& info) {
  constexpr const char* kNames[] = {"V3", "V3Fp8", "V2Lite", "V2"};
  return kNames[info.index];
}

INSTANTIATE_TEST_SUITE_P(Models, SameBitsTest,
                         testing::Values(TinyV3, TinyV3Fp8, TinyV2Lite, TinyV2), ModelName);

}  // namespace
}  // namespace strait
