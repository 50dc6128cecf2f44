// SPDX-License-Identifier: Apache-2.0
//
// Defends: a decode step over fp8 rows attends with the few-rows kernel where a token has at most 16
// heads, with that of half a tile where it has at most 32, and gives what the other kernel gives but for
// rounding; with --deterministic, of more heads, over bf16 rows or beside a sequence of more tokens it
// does not. Graphs replay it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/cuda/hopper_models.h"
#include "tests/worker/model/test_pipeline.h"

namespace strait {
namespace {

constexpr uint32_t kSequences = 6;
constexpr uint32_t kDecoded = 3;  // a sequence, after its prompt
// Of log-probabilities of -5 to -11. Rounding to bf16 alone moves the worst of them by 1.5e-2 to 2.1e-2
// where bf16 rows are decoded and where heads are more than 16, this kernel by up to 2.3e-2; other
// prompts move it by 2.3.
constexpr double kNear = 0.06;

// Rows of the Hopper kernels. One layer, and dense: a rounding may move a code of the next layer's cache
// by a sixteenth, or choose another expert.
ModelConfig Dense(uint32_t heads) {
  ModelConfig config = Lite512();
  config.num_attention_heads = heads;
  config.num_hidden_layers = 1;
  config.first_k_dense_replace = 1;
  return config;
}

TokenId Token(uint32_t sequence, uint32_t position, const ModelConfig& config) {
  return std::mt19937(sequence * 1000 + position)() % config.vocab_size;
}

struct Case {
  const char* name;
  uint32_t heads;
  RowFormat rows;
  bool deterministic;
  bool takes_it;
};

class CudaFewRowsTest : public CudaTestWithParam<Case> {
 protected:
  // A step: of sequence s the tokens [from[s], to[s]), each scored; log-probabilities, in order.
  static std::vector<float> Step(TestPipeline* pipeline, const std::vector<uint32_t>& from,
                                 const std::vector<uint32_t>& to) {
    v1::StepPlan plan = pipeline->Plan();
    const ModelConfig config = Dense(GetParam().heads);
    for (uint32_t s = 0; s < kSequences; ++s) {
      if (from[s] == 0) AddOpen(&plan, s + 1, to[s]);
    }
    for (uint32_t s = 0; s < kSequences; ++s) {
      std::vector<TokenId> tokens;
      for (uint32_t i = from[s]; i < to[s]; ++i) tokens.push_back(Token(s, i, config));
      v1::SequenceStep* const rows = AddRows(&plan, s + 1, from[s], tokens);
      for (uint32_t i = from[s]; i < to[s]; ++i) {
        WantScore(rows, i - from[s], Token(s, i + 1, config));
      }
    }
    std::vector<float> scores;
    for (const v1::SequenceResult& result : pipeline->Run(plan)) {
      for (const auto& scored : result.scored()) scores.push_back(scored.logprob());
    }
    return scores;
  }
  static TestPipeline Pipeline(bool deterministic) {
    const ModelConfig config = Dense(GetParam().heads);
    return TestPipeline(MakeCuda(config,
                                 {.memory_bytes = uint64_t{2} << 30,
                                  .deterministic = deterministic,
                                  .row_format = GetParam().rows},
                                 3),
                        {config.num_hidden_layers}, 8 * 1024);
  }
  static std::vector<uint32_t> Plus(std::vector<uint32_t> lengths, uint32_t more) {
    for (uint32_t& length : lengths) length += more;
    return lengths;
  }
  static double Worst(const std::vector<float>& a, const std::vector<float>& b) {
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(double{a[i]} - b[i]));
    return worst;
  }
};

// Of one block each, so that no plan cuts one, and at most eight rows: whatever the last sequence
// brings, all other kernels sum alike.
TEST_P(CudaFewRowsTest, TheKernelIsThatOfTheLargestTile) {
  const std::vector<uint32_t> prompts = {60, 1, 33, 17, 48, 20};
  std::vector<std::vector<float>> scores;
  for (const uint32_t last : {1, 3}) {
    TestPipeline pipeline = Pipeline(GetParam().deterministic);
    Step(&pipeline, std::vector<uint32_t>(kSequences, 0), prompts);
    std::vector<uint32_t> to = Plus(prompts, 1);
    to.back() += last - 1;
    scores.push_back(Step(&pipeline, prompts, to));
    ASSERT_EQ(scores.back().size(), kSequences - 1 + last);
    scores.back().resize(kSequences - 1);
  }
  const double worst = Worst(scores[0], scores[1]);
  std::printf("%s: %.2e\n", GetParam().name, worst);
  if (GetParam().takes_it) {
    EXPECT_GT(worst, 0) << "it rounds elsewhere: it did not run";
  } else {
    EXPECT_EQ(worst, 0) << "it rounds elsewhere: did it run?";
  }
  EXPECT_LT(worst, kNear);
}

// Against all in one chunk, with the other kernel. The first step is captured, others are replays.
TEST_P(CudaFewRowsTest, DecodingAgreesWithAChunk) {
  const std::vector<uint32_t> prompts = {200, 1, 63, 64, 130, 20};
  const std::vector<uint32_t> none(kSequences, 0);
  TestPipeline decoding = Pipeline(GetParam().deterministic);
  Step(&decoding, none, prompts);
  TestPipeline whole = Pipeline(true);
  const std::vector<float> expected = Step(&whole, none, Plus(prompts, kDecoded));
  double worst = 0;
  for (uint32_t i = 0; i < kDecoded; ++i) {
    const std::vector<float> scores = Step(&decoding, Plus(prompts, i), Plus(prompts, i + 1));
    ASSERT_EQ(scores.size(), kSequences);
    size_t at = 0;
    std::vector<float> same;
    for (uint32_t s = 0; s < kSequences; ++s) {
      same.push_back(expected.at(at + prompts[s] + i));
      at += prompts[s] + kDecoded;
    }
    worst = std::max(worst, Worst(scores, same));
  }
  std::printf("%s: %.2e\n", GetParam().name, worst);
  if (GetParam().deterministic) {
    EXPECT_EQ(worst, 0);
  } else {
    EXPECT_LT(worst, kNear);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, CudaFewRowsTest,
                         testing::Values(Case{"Heads16", 16, RowFormat::kFp8, false, true},
                                         Case{"Heads7", 7, RowFormat::kFp8, false, true},
                                         Case{"Heads32", 32, RowFormat::kFp8, false, true},
                                         Case{"Heads48", 48, RowFormat::kFp8, false, false},
                                         Case{"Bf16Rows", 16, RowFormat::kBf16, false, false},
                                         Case{"Deterministic", 16, RowFormat::kFp8, true, false}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace strait
