// SPDX-License-Identifier: Apache-2.0
//
// Defends: the CUDA backend gives Hugging Face transformers' log-probabilities for the checkpoints
// of tests/golden within what bf16 activations allow, in one stage and in several, whole prompts
// and chunks; both ways of cutting give nearly the same numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/worker/model/golden_scores.h"
#include "worker/model/cuda/cuda_backend.h"

namespace strait {
namespace {

// The reference computes in fp32. Activations rounded to bf16 at every product (2^-9 each, some
// twenty in a row through three or four layers) move a log-probability by a few 1e-2; where two
// experts score within that of each other the other one is chosen, which moves that token, and a
// little those after it, by more. So the bulk is bounded tightly, the few loosely.
constexpr double kMeanTolerance = 0.02;
constexpr double kMostTolerance = 0.06;  // of all but one in a hundred
constexpr double kWorstTolerance = 0.5;
// Where the reference prefers its first token by more than this, ours must be the same.
constexpr double kDecidedGap = 0.25;

class GoldenCudaTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (const auto device = OpenCudaDevice(0); !device.ok()) {
      GTEST_SKIP() << "SKIPPED, no GPU test ran: " << device.status().message();
    }
  }

  std::vector<GoldenScore> Scores(std::vector<LayerIndex> ends_before_last, uint32_t chunk) {
    auto source = OpenCheckpointWeights(GoldenDir(GetParam()));
    EXPECT_TRUE(source.ok()) << source.status();
    ends_before_last.push_back((*source)->config().num_hidden_layers);
    CudaBackendOptions options;
    options.memory_bytes = 1 << 30;
    auto backend = CudaBackend::Create(options, *std::move(source));
    EXPECT_TRUE(backend.ok()) << backend.status();
    TestPipeline pipeline(*std::move(backend), ends_before_last);
    return GoldenScores(GetParam(), &pipeline, chunk);
  }

  void Compare(std::vector<LayerIndex> ends_before_last, uint32_t chunk) {
    const std::vector<GoldenScore> scores = Scores(std::move(ends_before_last), chunk);
    ASSERT_GT(scores.size(), 1000u);
    std::vector<double> errors;
    double sum = 0;
    for (const GoldenScore& score : scores) {
      errors.push_back(std::abs(score.got - score.expected));
      ASSERT_TRUE(std::isfinite(errors.back())) << "position " << score.position;
      sum += errors.back();
      if (score.gap > kDecidedGap) {
        EXPECT_TRUE(score.is_first)
            << "prompt of " << score.prompt_tokens << " tokens, position " << score.position;
      }
    }
    std::sort(errors.begin(), errors.end());
    const double mean = sum / static_cast<double>(errors.size());
    const double most = errors[errors.size() - 1 - errors.size() / 100];
    std::printf("%s: %zu log-probabilities; difference: mean %.2e, 99 of 100 within %.2e, worst %.2e\n",
                GetParam(), errors.size(), mean, most, errors.back());
    EXPECT_LT(mean, kMeanTolerance);
    EXPECT_LT(most, kMostTolerance);
    EXPECT_LT(errors.back(), kWorstTolerance);
  }
};

TEST_P(GoldenCudaTest, OneStageWholePrompts) { Compare({}, limits::kMaxStepTokens); }
TEST_P(GoldenCudaTest, TwoStagesInChunks) { Compare({1}, 100); }
TEST_P(GoldenCudaTest, TokenByToken) { Compare({1, 2}, 1); }

std::string ShapeName(const testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
}

INSTANTIATE_TEST_SUITE_P(Shapes, GoldenCudaTest,
                         testing::Values("v3-yarn", "v3-odd", "v2-lite", "v2", "v3-fp8"),
                         ShapeName);

}  // namespace
}  // namespace strait
