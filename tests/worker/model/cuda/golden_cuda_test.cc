// SPDX-License-Identifier: Apache-2.0
//
// Defends: the CUDA backend gives Hugging Face transformers' log-probabilities for the checkpoints
// of tests/golden within what bf16 or fp8 activations and cache rows allow, in one stage and in
// several, whole prompts and chunks; both ways of cutting give nearly the same numbers.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/golden_scores.h"

namespace strait {
namespace {

// What tests/golden/bf16_error.py finds when a float64 model rounds to bf16 where this backend does,
// with --rows fp8 in the rows' last lines: an e4m3 code is off by up to 1/16, and these models' ranks
// are small, so that little of it averages out.
// Where two experts score nearer than rounding, the other one may be chosen, and that token moves
// by tenths or more: few tokens, other ones in each implementation, so the mean and the tail have
// wide margins and the worst none. The median knows nothing of it.
struct Case {
  const char* shape;
  RowFormat rows;
  double median, mean, most;  // most: of 99 in 100
  int others;                 // clear choices that differ
  bool fp8_activations = false;
};
constexpr Case kCases[] = {{"v3-yarn", RowFormat::kBf16, 0.0223, 0.0717, 1.311, 2},
                           {"v3-odd", RowFormat::kBf16, 0.0123, 0.0438, 1.228, 1},
                           {"v2-lite", RowFormat::kBf16, 0.0081, 0.0107, 0.043, 0},
                           {"v2", RowFormat::kBf16, 0.0106, 0.0214, 0.172, 0},
                           {"v3-fp8", RowFormat::kBf16, 0.0102, 0.0164, 0.071, 0},
                           {"v3-yarn", RowFormat::kFp8, 0.0949, 0.2212, 2.170, 10},
                           {"v3-odd", RowFormat::kFp8, 0.0337, 0.1297, 2.128, 6},
                           {"v2-lite", RowFormat::kFp8, 0.0335, 0.0444, 0.180, 0},
                           {"v2", RowFormat::kFp8, 0.0384, 0.0703, 0.571, 1},
                           {"v3-fp8", RowFormat::kFp8, 0.0386, 0.0948, 1.483, 4}};
// Activations in fp8 where weights are: four bits instead of eight. Choices that differ come in clumps,
// where one token goes to another expert and what follows it with it: of the 127 that are clear the
// float64 model changes 5, the emulator 10 or 11, an H200 14 to 20 in three ways to run them. 13 is
// the middle of these.
constexpr Case kFp8ActivationCases[] = {
    {"v3-fp8", RowFormat::kBf16, 0.1556, 0.2974, 3.370, 13, true}};
constexpr double kMedianMargin = 1.5;
constexpr double kMeanMargin = 2;
constexpr double kMostMargin = 3;
// Where the reference prefers its first token by more than this, ours is the same, but for one in
// twenty, or twice as many as are expected.
constexpr double kDecidedGap = 0.5;

class GoldenCudaTest : public CudaTestWithParam<Case> {
 protected:
  std::vector<GoldenScore> Scores(std::vector<LayerIndex> ends_before_last, uint32_t chunk,
                                  bool deterministic) {
    auto source = OpenCheckpointWeights(GoldenDir(GetParam().shape));
    EXPECT_TRUE(source.ok()) << source.status();
    ends_before_last.push_back((*source)->config().num_hidden_layers);
    TestPipeline pipeline(MakeCuda({.memory_bytes = 1 << 30,
                                    .deterministic = deterministic,
                                    .row_format = GetParam().rows,
                                    .fp8_activations = GetParam().fp8_activations},
                                   *std::move(source)),
                          ends_before_last);
    return GoldenScores(GetParam().shape, &pipeline, chunk);
  }

  void Compare(std::vector<LayerIndex> ends_before_last, uint32_t chunk,
               bool deterministic = false) {
    const std::vector<GoldenScore> scores =
        Scores(std::move(ends_before_last), chunk, deterministic);
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
        "%s, %s rows%s: %zu log-probabilities; difference: median %.2e, mean %.2e, 99 of 100 "
        "within "
        "%.2e, worst %.2e; %d of %d clear choices differ\n",
        GetParam().shape, RowFormatName(GetParam().rows),
        GetParam().fp8_activations ? ", fp8 activations" : "", errors.size(), median, mean, most,
        errors.back(), others, decided);
    EXPECT_GT(decided, 100);
    EXPECT_LE(others, std::max(decided / 20, 2 * GetParam().others));
    EXPECT_LT(median, GetParam().median * kMedianMargin);
    EXPECT_LT(mean, GetParam().mean * kMeanMargin);
    EXPECT_LT(most, GetParam().most * kMostMargin);
    // Less would mean that activations were not quantized.
    if (GetParam().fp8_activations) {
      EXPECT_GT(median, GetParam().median / 2);
    }
  }
};

TEST_P(GoldenCudaTest, OneStageWholePrompts) { Compare({}, limits::kMaxStepTokens); }
TEST_P(GoldenCudaTest, TwoStagesInChunks) { Compare({1}, 100); }
TEST_P(GoldenCudaTest, TokenByToken) { Compare({1, 2}, 1); }

class GoldenCudaFp8ActivationsTest : public GoldenCudaTest {};
TEST_P(GoldenCudaFp8ActivationsTest, OneStageWholePrompts) { Compare({}, limits::kMaxStepTokens); }
TEST_P(GoldenCudaFp8ActivationsTest, DeterministicInChunks) { Compare({1}, 100, true); }
TEST_P(GoldenCudaFp8ActivationsTest, DeterministicTokenByToken) { Compare({}, 1, true); }

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  std::string name = info.param.shape;
  for (char& c : name) c = c == '-' ? '_' : c;
  return info.param.rows == RowFormat::kFp8 ? name + "_fp8_rows" : name;
}

INSTANTIATE_TEST_SUITE_P(Shapes, GoldenCudaTest, testing::ValuesIn(kCases), CaseName);
INSTANTIATE_TEST_SUITE_P(Shapes, GoldenCudaFp8ActivationsTest,
                         testing::ValuesIn(kFp8ActivationCases), CaseName);

}  // namespace
}  // namespace strait
