// SPDX-License-Identifier: Apache-2.0
//
// Golden bits: digests of log-probabilities, recorded in tests/golden/bits.json when the numbers were last
// meant to change. A change that should move no bit is held to them.
//
// Errors:  a digest that differs, or that nobody recorded, fails the test and prints the line to record.
#pragma once

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/model/golden_scores.h"

namespace strait {

class BitsDigest {
 public:
  void Add(const std::vector<v1::TokenLogprob>& scored) {
    for (const v1::TokenLogprob& token : scored) {
      words_.push_back(token.token_id());
      words_.push_back(std::bit_cast<uint32_t>(token.logprob()));
      for (const uint32_t id : token.top_ids()) words_.push_back(id);
      for (const float logprob : token.top_logprobs()) {
        words_.push_back(std::bit_cast<uint32_t>(logprob));
      }
    }
  }
  size_t num_words() const { return words_.size(); }
  std::string Hex() const {
    char text[17];
    std::snprintf(text, sizeof(text), "%016llx",
                  static_cast<unsigned long long>(  // NOLINT: of printf
                      XXH3_64bits(words_.data(), words_.size() * sizeof(uint32_t))));
    return text;
  }

 private:
  std::vector<uint32_t> words_;
};

// Every token of a golden checkpoint's prompts and continuations.
inline BitsDigest DigestOfCheckpoint(const std::string& shape, TestPipeline* pipeline,
                                     uint32_t chunk) {
  const auto golden = json::ParseFile(GoldenDir(shape) + "/golden.json", 16 << 20);
  EXPECT_TRUE(golden.ok()) << golden.status();
  BitsDigest digest;
  uint64_t id = 1;
  for (const json::Value& prompt : golden->at("prompts").as_array()) {
    std::vector<TokenId> tokens = GoldenIds(prompt.at("tokens"));
    const std::vector<TokenId> greedy = GoldenIds(prompt.at("greedy").at("tokens"));
    tokens.insert(tokens.end(), greedy.begin(), greedy.end());
    digest.Add(ScoreTokens(pipeline, id++, tokens, chunk));
  }
  return digest;
}

// Every token but the first of a sequence that a seed draws.
inline BitsDigest DigestOfRandomTokens(uint32_t count, uint32_t vocab, TestPipeline* pipeline,
                                       uint32_t chunk) {
  std::mt19937 rng(1);
  std::vector<TokenId> tokens;
  for (uint32_t i = 0; i < count; ++i) tokens.push_back(rng() % vocab);
  BitsDigest digest;
  digest.Add(ScoreTokens(pipeline, 1, tokens, chunk));
  return digest;
}

// `name`: numerics id, then the case.
inline void ExpectGoldenBits(const std::string& name, const BitsDigest& digest) {
  EXPECT_GT(digest.num_words(), 1000u);
  const auto recorded = json::ParseFile(GoldenDir("bits.json"), 1 << 20);
  ASSERT_TRUE(recorded.ok()) << recorded.status();
  const json::Value* const expected = recorded->as_object().if_contains(name);
  const std::string line = "  \"" + name + "\": \"" + digest.Hex() + "\",";
  std::printf("BITS %s\n", line.c_str());
  ASSERT_TRUE(expected != nullptr)
      << "nobody recorded these bits; if they are right, tests/golden/bits.json gets the line\n"
      << line;
  EXPECT_EQ(std::string(expected->as_string()), digest.Hex()) << name;
}

}  // namespace strait
