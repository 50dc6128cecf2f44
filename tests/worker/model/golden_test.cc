// SPDX-License-Identifier: Apache-2.0
//
// Defends: the backend gives Hugging Face transformers' log-probabilities for the checkpoints of
// tests/golden. (The same numbers over HTTP are the end-to-end suite's; here a failure is nearer
// its cause.)
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/worker/model/golden_scores.h"

namespace strait {
namespace {

// What the issue promises of every prompt token's log-probability. The files' own error is ten
// times less.
constexpr double kTolerance = 1e-3;
// Where the reference prefers its first token by more than this, ours must be the same.
constexpr double kDecidedGap = 2e-3;

class GoldenTest : public testing::TestWithParam<const char*> {
 protected:
  // Largest difference over all prompts and continuations.
  void Compare(std::vector<LayerIndex> ends_before_last, uint32_t chunk) {
    auto source = OpenCheckpointWeights(GoldenDir(GetParam()));
    ASSERT_TRUE(source.ok()) << source.status();
    ends_before_last.push_back((*source)->config().num_hidden_layers);
    CpuBackendOptions options;
    options.memory_bytes = 1 << 30;
    TestPipeline pipeline(options, *std::move(source), ends_before_last);
    double worst = 0;
    const std::vector<GoldenScore> scores = GoldenScores(GetParam(), &pipeline, chunk);
    for (const GoldenScore& score : scores) {
      worst = std::max(worst, std::abs(score.got - score.expected));
      ASSERT_NEAR(score.got, score.expected, kTolerance)
          << "prompt of " << score.prompt_tokens << " tokens, position " << score.position;
      if (score.gap > kDecidedGap) {
        ASSERT_TRUE(score.is_first)
            << "prompt of " << score.prompt_tokens << " tokens, position " << score.position;
      }
    }
    EXPECT_GT(scores.size(), 1000u);
    std::printf("%s: %zu log-probabilities, worst difference %.2e\n", GetParam(), scores.size(),
                worst);
  }
};

TEST_P(GoldenTest, OneStageWholePrompts) { Compare({}, limits::kMaxStepTokens); }
TEST_P(GoldenTest, TwoStagesInChunks) { Compare({1}, 100); }

std::string ShapeName(const testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
}

INSTANTIATE_TEST_SUITE_P(Shapes, GoldenTest,
                         testing::Values("v3-yarn", "v3-odd", "v2-lite", "v2", "v3-fp8"),
                         ShapeName);

}  // namespace
}  // namespace strait
