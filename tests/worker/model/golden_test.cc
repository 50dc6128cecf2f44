// SPDX-License-Identifier: Apache-2.0
//
// Defends: the backend gives Hugging Face transformers' log-probabilities for the checkpoints of
// tests/golden. (The same numbers over HTTP are the end-to-end suite's; here a failure is nearer
// its cause.)
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "proto/json.h"
#include "tests/worker/model/test_pipeline.h"

namespace strait {
namespace {

// What the issue promises of every prompt token's log-probability. The files' own error is ten
// times less.
constexpr double kTolerance = 1e-3;
// Where the reference prefers its first token by more than this, ours must be the same.
constexpr double kDecidedGap = 2e-3;

std::string GoldenDir(const std::string& shape) {
  return std::string(STRAIT_SOURCE_DIR) + "/tests/golden/" + shape;
}

std::vector<TokenId> Ids(const json::Value& array) {
  std::vector<TokenId> ids;
  for (const json::Value& id : array.as_array()) ids.push_back(id.to_number<TokenId>());
  return ids;
}

class GoldenTest : public testing::TestWithParam<const char*> {
 protected:
  // Largest difference over all prompts and continuations.
  void Compare(std::vector<LayerIndex> ends_before_last, uint32_t chunk) {
    const std::string dir = GoldenDir(GetParam());
    auto source = OpenCheckpointWeights(dir);
    ASSERT_TRUE(source.ok()) << source.status();
    ends_before_last.push_back((*source)->config().num_hidden_layers);
    CpuBackendOptions options;
    options.memory_bytes = 1 << 30;
    TestPipeline pipeline(options, *std::move(source), ends_before_last);
    const auto golden = json::ParseFile(dir + "/golden.json", 16 << 20);
    ASSERT_TRUE(golden.ok()) << golden.status();

    double worst = 0;
    uint32_t num_compared = 0;
    uint64_t id = 1;
    for (const json::Value& prompt : golden->at("prompts").as_array()) {
      const std::vector<TokenId> prompt_ids = Ids(prompt.at("tokens"));
      const json::Value& greedy = prompt.at("greedy");
      const std::vector<TokenId> greedy_ids = Ids(greedy.at("tokens"));
      std::vector<TokenId> tokens = prompt_ids;
      tokens.insert(tokens.end(), greedy_ids.begin(), greedy_ids.end());

      const std::vector<v1::TokenLogprob> scored = Score(&pipeline, id++, tokens, chunk);
      ASSERT_EQ(scored.size(), tokens.size() - 1);
      for (size_t i = 1; i < tokens.size(); ++i) {
        const v1::TokenLogprob& got = scored[i - 1];
        const bool in_prompt = i < prompt_ids.size();
        const size_t g = i - prompt_ids.size();
        const double expected = in_prompt ? prompt.at("logprobs").at(i).to_number<double>()
                                          : greedy.at("logprobs").at(g).to_number<double>();
        worst = std::max(worst, std::abs(got.logprob() - expected));
        ASSERT_NEAR(got.logprob(), expected, kTolerance)
            << "prompt of " << prompt_ids.size() << " tokens, position " << i;
        if (!in_prompt && greedy.at("gap").at(g).to_number<double>() > kDecidedGap) {
          ASSERT_EQ(got.top_ids(0), tokens[i])
              << "prompt of " << prompt_ids.size() << " tokens, generated token " << g;
        }
        ++num_compared;
      }
    }
    EXPECT_GT(num_compared, 1000u);
    std::printf("%s: %u log-probabilities, worst difference %.2e\n", GetParam(), num_compared,
                worst);
  }

 private:
  static std::vector<v1::TokenLogprob> Score(TestPipeline* pipeline, uint64_t id,
                                             const std::vector<TokenId>& tokens, uint32_t chunk) {
    std::vector<v1::TokenLogprob> scored;
    for (uint32_t begin = 0; begin < tokens.size(); begin += chunk) {
      const uint32_t end = std::min<uint32_t>(begin + chunk, static_cast<uint32_t>(tokens.size()));
      v1::StepPlan plan = pipeline->Plan();
      if (begin == 0) AddOpen(&plan, id);
      v1::SequenceStep* rows =
          AddRows(&plan, id, begin, {tokens.begin() + begin, tokens.begin() + end});
      for (uint32_t i = begin; i < end && i + 1 < tokens.size(); ++i) {
        WantScore(rows, i - begin, tokens[i + 1]);
        rows->mutable_logits(static_cast<int>(i - begin))->set_num_top(1);
      }
      for (const v1::SequenceResult& result : pipeline->Run(plan)) {
        scored.insert(scored.end(), result.scored().begin(), result.scored().end());
      }
    }
    v1::StepPlan plan = pipeline->Plan();
    AddClose(&plan, id);
    pipeline->Run(plan);
    return scored;
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
