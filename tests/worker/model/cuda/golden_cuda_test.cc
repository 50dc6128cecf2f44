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

// What tests/golden/bf16_error.py finds when a float64 model rounds to bf16 where this backend does.
// Where two experts score nearer than rounding, the other one may be chosen, and that token moves
// by tenths or more: few tokens, other ones in each implementation, so the mean and the tail have
// wide margins and the worst none. The median knows nothing of it.
struct Bf16Error {
  const char* shape;
  double median, mean, most;  // most: of 99 in 100
};
constexpr Bf16Error kErrors[] = {{"v3-yarn", 0.0223, 0.0717, 1.311},
                                 {"v3-odd", 0.0123, 0.0438, 1.228},
                                 {"v2-lite", 0.0081, 0.0107, 0.043},
                                 {"v2", 0.0106, 0.0214, 0.172},
                                 {"v3-fp8", 0.0102, 0.0164, 0.071}};
constexpr double kMedianMargin = 1.5;
constexpr double kMeanMargin = 2;
constexpr double kMostMargin = 3;
// Where the reference prefers its first token by more than this, ours is the same, but for one in
// twenty.
constexpr double kDecidedGap = 0.5;

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
    int decided = 0;
    int others = 0;
    for (const GoldenScore& score : scores) {
      errors.push_back(std::abs(score.got - score.expected));
      ASSERT_TRUE(std::isfinite(errors.back())) << "position " << score.position;
      sum += errors.back();
      if (score.gap > kDecidedGap) {
        ++decided;
        others += !score.is_first;
      }
    }
    std::sort(errors.begin(), errors.end());
    const double median = errors[errors.size() / 2];
    const double mean = sum / static_cast<double>(errors.size());
    const double most = errors[errors.size() * 99 / 100];
    std::printf(
        "%s: %zu log-probabilities; difference: median %.2e, mean %.2e, 99 of 100 within %.2e, "
        "worst %.2e; %d of %d clear choices differ\n",
        GetParam(), errors.size(), median, mean, most, errors.back(), others, decided);
    EXPECT_GT(decided, 100);
    EXPECT_LE(others, decided / 20);
    for (const Bf16Error& expected : kErrors) {
      if (std::string(expected.shape) != GetParam()) continue;
      EXPECT_LT(median, expected.median * kMedianMargin);
      EXPECT_LT(mean, expected.mean * kMeanMargin);
      EXPECT_LT(most, expected.most * kMostMargin);
      return;
    }
    FAIL() << "no bound for this shape";
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
