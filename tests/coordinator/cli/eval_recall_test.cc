// SPDX-License-Identifier: Apache-2.0
//
// Defends: every answer of a recall context lies exactly as far behind its definition as was asked
// for, whatever the words' lengths, and nothing else in the context gives it away.
#include "coordinator/cli/eval_recall.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

namespace strait::cli {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kDefine = 1, kAsk = 2, kNewline = 3, kBos = 9;
constexpr uint32_t kFirstWord = 1000, kFirstFiller = 100'000;

// `extra`: word i has 1 + i % (extra + 1) tokens.
RecallParts Parts(size_t num_words, size_t extra) {
  RecallParts parts;
  parts.special = {kBos};
  parts.define = {kNewline, kDefine};
  parts.ask = {kNewline, kAsk};
  for (size_t i = 0; i < num_words; ++i) {
    parts.words.emplace_back(1 + i % (extra + 1), static_cast<uint32_t>(kFirstWord + i));
  }
  for (uint32_t i = 0; i < 9000; ++i) parts.filler.push_back(kFirstFiller + i);
  return parts;
}

struct Definition {
  size_t value_at;
  uint32_t value;
};

// Reads a context back by its marks; words are told apart by their id. Checks all that is promised.
void Check(const RecallContext& context, uint32_t distance, uint32_t limit) {
  ASSERT_LE(context.ids.size(), limit);
  ASSERT_EQ(context.ids[0], kBos);
  std::map<uint32_t, Definition> definitions;  // by key
  std::set<uint32_t> values;
  size_t definition_tokens = 0, num_questions = 0;
  for (size_t i = 1; i < context.ids.size();) {
    if (context.ids[i] != kNewline) {
      ++i;
      continue;
    }
    const bool is_question = context.ids[i + 1] == kAsk;
    const size_t begin = i, key_at = i + 2;
    const uint32_t key = context.ids[key_at];
    size_t value_at = key_at;
    while (context.ids[value_at] == key) ++value_at;
    const uint32_t value = context.ids[value_at];
    for (i = value_at; i < context.ids.size() && context.ids[i] == value;) ++i;
    if (!is_question) {
      ASSERT_EQ(num_questions, 0u);
      ASSERT_TRUE(definitions.emplace(key, Definition{value_at, value}).second) << "key twice";
      values.insert(value);
      definition_tokens += i - begin;
      continue;
    }
    ASSERT_TRUE(definitions.count(key));
    EXPECT_EQ(definitions[key].value, value);
    EXPECT_EQ(value_at - definitions[key].value_at, distance);
    ASSERT_LT(num_questions, context.answers.size());
    EXPECT_EQ(context.answers[num_questions].position, value_at);
    EXPECT_EQ(context.answers[num_questions].num_tokens, i - value_at);
    ++num_questions;
  }
  EXPECT_EQ(num_questions, definitions.size());
  EXPECT_EQ(num_questions, context.answers.size());
  EXPECT_LE(definition_tokens, distance / 2);
  EXPECT_LE(definitions.size(), kMaxRecallPairs);
  for (const auto& [key, definition] : definitions) EXPECT_FALSE(values.count(key));
}

TEST(RecallContextTest, EveryAnswerLiesAtTheDistance) {
  for (const size_t extra : {0, 2}) {
    const RecallParts parts = Parts(500, extra);
    for (const uint32_t distance : {8, 15, 64, 512, 2048, 8000}) {
      for (uint64_t key = 0; key < 8; ++key) {
        const auto context = MakeRecallContext(parts, distance, 8192, Draws{key << 32});
        if (!context.ok()) {  // words of up to three tokens need more room
          ASSERT_TRUE(extra > 0 && distance < 16) << distance << ": " << context.status();
          continue;
        }
        SCOPED_TRACE(testing::Message() << "distance " << distance << ", key " << key);
        Check(*context, distance, 8192);
      }
    }
  }
}

TEST(RecallContextTest, AsManyPairsAsFit) {
  const RecallParts parts = Parts(500, 0);
  const auto pairs = [&](uint32_t distance, uint32_t limit) {
    return MakeRecallContext(parts, distance, limit, Draws{1})->answers.size();
  };
  EXPECT_EQ(pairs(512, 8192), 64u);
  EXPECT_EQ(pairs(128, 8192), 16u);   // 64 tokens of definitions, 4 each
  EXPECT_EQ(pairs(2048, 8192), 64u);  // the bound
  EXPECT_EQ(pairs(8000, 8192), 47u);  // 1 + 8000 + 4 * 47 = 8189
}

TEST(RecallContextTest, DistanceOverTheContextNamesTheLimit) {
  const RecallParts parts = Parts(500, 0);
  EXPECT_TRUE(MakeRecallContext(parts, 8187, 8192, Draws{1}).ok());
  const auto over = MakeRecallContext(parts, 8188, 8192, Draws{1});
  EXPECT_EQ(over.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(over.status().message()),
              HasSubstr("--recall 8188 does not fit the model's context of 8192 tokens: at most "
                        "8187"));
  EXPECT_THAT(std::string(MakeRecallContext(parts, 7, 8192, Draws{1}).status().message()),
              HasSubstr("must be at least 8"));
}

TEST(RecallContextTest, FillerTooShortOrMarksOfUnequalLengthAreRefused) {
  RecallParts parts = Parts(500, 0);
  parts.filler.resize(300);
  EXPECT_TRUE(MakeRecallContext(parts, 400, 8192, Draws{1}).ok());
  EXPECT_THAT(std::string(MakeRecallContext(parts, 2048, 8192, Draws{1}).status().message()),
              HasSubstr("--text has 300 tokens"));
  parts.ask.push_back(7);
  EXPECT_EQ(MakeRecallContext(parts, 400, 8192, Draws{1}).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(RecallContextsTest, SeedAloneDecidesAndAnswersSuffice) {
  const RecallParts parts = Parts(500, 0);
  const auto make = [&](uint64_t seed) { return *MakeRecallContexts(parts, 512, 8192, 200, seed); };
  const auto a = make(1), again = make(1), other = make(2);
  ASSERT_EQ(a.size(), 4u);  // of 64 answers each
  EXPECT_EQ(a[3].ids, again[3].ids);
  EXPECT_NE(a[0].ids, other[0].ids);
  EXPECT_NE(a[0].ids, a[1].ids);
}

TEST(ChooseWordsTest, OneTokenWordsWhenThereAreEnough) {
  std::vector<TokenIds> words;
  for (uint32_t i = 0; i < 63; ++i) words.push_back({i});
  words.push_back({500, 501});
  words.push_back({});
  words.push_back({0});  // the same tokens again
  EXPECT_EQ(ChooseWords(words).size(), 64u);
  words.push_back({63});
  const auto single = ChooseWords(words);
  EXPECT_EQ(single.size(), 64u);
  EXPECT_TRUE(
      std::all_of(single.begin(), single.end(), [](const TokenIds& w) { return w.size() == 1; }));
}

TEST(CommonWordsTest, ManyAndDifferentAndLetters) {
  std::set<std::string_view> seen;
  for (const std::string_view word : CommonWords()) {
    EXPECT_TRUE(seen.insert(word).second) << word;
    EXPECT_TRUE(std::all_of(word.begin(), word.end(), [](char c) { return c >= 'a' && c <= 'z'; }));
  }
  EXPECT_GE(seen.size(), 500u);
}

}  // namespace
}  // namespace strait::cli
