// SPDX-License-Identifier: Apache-2.0
//
// GoldenScores runs a golden checkpoint's prompts and continuations through a pipeline and gives
// each token's log-probability beside the reference's.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "proto/base/json.h"
#include "tests/worker/model/test_pipeline.h"

namespace strait {

struct GoldenScore {
  uint32_t prompt_tokens = 0;  // of its prompt
  uint32_t position = 0;
  double got = 0;
  double expected = 0;
  double gap = -1;  // generated tokens: the reference's first choice above its second; else -1
  bool is_first = false;  // whether the reference's token is our first choice, too
};

// STRAIT_SOURCE_DIR of the environment wins: programs that travelled find the tree there.
inline std::string GoldenDir(const std::string& shape) {
  const char* tree = std::getenv("STRAIT_SOURCE_DIR");
  return std::string(tree ? tree : STRAIT_SOURCE_DIR) + "/tests/golden/" + shape;
}

inline std::vector<TokenId> GoldenIds(const json::Value& array) {
  std::vector<TokenId> ids;
  for (const json::Value& id : array.as_array()) ids.push_back(id.to_number<TokenId>());
  return ids;
}

// Every token of a sequence but the first, prefilled in chunks.
inline std::vector<v1::TokenLogprob> ScoreTokens(TestPipeline* pipeline, uint64_t id,
                                                 const std::vector<TokenId>& tokens,
                                                 uint32_t chunk) {
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

inline std::vector<GoldenScore> GoldenScores(const std::string& shape, TestPipeline* pipeline,
                                             uint32_t chunk) {
  const auto golden = json::ParseFile(GoldenDir(shape) + "/golden.json", 16 << 20);
  EXPECT_TRUE(golden.ok()) << golden.status();
  std::vector<GoldenScore> scores;
  uint64_t id = 1;
  for (const json::Value& prompt : golden->at("prompts").as_array()) {
    const std::vector<TokenId> prompt_ids = GoldenIds(prompt.at("tokens"));
    const json::Value& greedy = prompt.at("greedy");
    const std::vector<TokenId> greedy_ids = GoldenIds(greedy.at("tokens"));
    std::vector<TokenId> tokens = prompt_ids;
    tokens.insert(tokens.end(), greedy_ids.begin(), greedy_ids.end());
    const std::vector<v1::TokenLogprob> scored = ScoreTokens(pipeline, id++, tokens, chunk);
    EXPECT_EQ(scored.size(), tokens.size() - 1);
    for (size_t i = 1; i < tokens.size() && i <= scored.size(); ++i) {
      const bool in_prompt = i < prompt_ids.size();
      const size_t g = i - prompt_ids.size();
      GoldenScore score;
      score.prompt_tokens = static_cast<uint32_t>(prompt_ids.size());
      score.position = static_cast<uint32_t>(i);
      score.got = scored[i - 1].logprob();
      score.expected = in_prompt ? prompt.at("logprobs").at(i).to_number<double>()
                                 : greedy.at("logprobs").at(g).to_number<double>();
      if (!in_prompt) score.gap = greedy.at("gap").at(g).to_number<double>();
      score.is_first = scored[i - 1].top_ids_size() > 0 && scored[i - 1].top_ids(0) == tokens[i];
      scores.push_back(score);
    }
  }
  return scores;
}

}  // namespace strait
