// SPDX-License-Identifier: Apache-2.0
//
// Defends: an answer says how many tokens of its prompts were cached, each prompt once; who may share cached rows
// follows from the salt, or from the API key, and no salt can be taken for a key.
#include "tests/coordinator/http/api_fixture.h"

namespace strait {
namespace {

class CacheTest : public ApiTest {
 protected:
  static int64_t CachedOf(const json::Value& answer) {
    return answer.at("usage").at("prompt_tokens_details").at("cached_tokens").as_int64();
  }
  // Of the request with this body and header.
  std::string SaltOf(const std::string& body, HttpHeaders headers = {}) {
    const auto responder = Begin("POST", "/v1/completions", body, std::move(headers));
    engine_.StepAll();
    responder->RunPosts();
    return engine_.specs().back().sequences[0].cache_salt;
  }
};

TEST_F(CacheTest, UsageTellsCachedTokensOfEachPromptOnce) {
  engine_.cached = 2;
  EXPECT_EQ(CachedOf(Complete(R"({"prompt": "hey", "max_tokens": 1})")->Json()), 2);
  EXPECT_EQ(CachedOf(Complete(R"({"prompt": "hey", "max_tokens": 1, "n": 3})")->Json()), 2);
  EXPECT_EQ(CachedOf(Complete(R"({"prompt": ["hey", "you"], "max_tokens": 1, "n": 2})")->Json()),
            4);
  EXPECT_EQ(
      CachedOf(
          Chat(R"({"messages": [{"role": "user", "content": "hey"}], "max_tokens": 1})")->Json()),
      2);
}

TEST_F(CacheTest, TheLastChunkOfAStreamTellsThem) {
  engine_.cached = 3;
  const auto events =
      Complete(
          R"({"prompt": "hey", "max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}})")
          ->Events();
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(CachedOf(events[events.size() - 2].Json()), 3);
}

TEST_F(CacheTest, SaltsAreKeptApartFromKeysAndFromNone) {
  EXPECT_EQ(SaltOf(R"({"prompt": "hey"})"), "");
  EXPECT_EQ(SaltOf(R"({"prompt": "hey", "cache_salt": "blue"})"), "salt blue");
  Use(TestModel(), {"one", "two"});
  EXPECT_EQ(SaltOf(R"({"prompt": "hey"})", {{"authorization", "Bearer one"}}), "key one");
  EXPECT_EQ(SaltOf(R"({"prompt": "hey"})", {{"authorization", "bearer two"}}), "key two");
  EXPECT_EQ(
      SaltOf(R"({"prompt": "hey", "cache_salt": "key one"})", {{"authorization", "Bearer two"}}),
      "salt key one");
}

TEST_F(CacheTest, SaltsHaveALength) {
  for (const auto& [salt, message] : std::vector<std::pair<std::string, std::string>>{
           {"\"\"", "has 0 bytes; it must have 1 to 256"},
           {"\"" + std::string(257, 'x') + "\"", "has 257 bytes; it must have 1 to 256"},
           {"7", "must be a string"}}) {
    const std::string body = R"({"prompt": "hey", "cache_salt": )" + salt + "}";
    ExpectError(*Begin("POST", "/v1/completions", body), 400, "cache_salt", message, body);
  }
  EXPECT_EQ(SaltOf(R"({"prompt": "hey", "cache_salt": ")" + std::string(256, 'x') + "\"}").size(),
            5 + 256u);
}

}  // namespace
}  // namespace strait
