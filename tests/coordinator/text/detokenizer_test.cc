// SPDX-License-Identifier: Apache-2.0
//
// Defends: streamed text is valid UTF-8 at every moment and in the end equals Decode of all ids; a
// stop string ends the text at the same byte however the text is cut into pieces.
#include "coordinator/text/detokenizer.h"

#include <random>

#include "golden.h"

namespace strait {
namespace {

using ::strait::testing::GoldenTokenizer;

TEST(DetokenizerTest, RandomIdsStreamAsTheyDecode) {
  const auto tokenizer = GoldenTokenizer();
  const uint32_t seed = 20260101;
  std::mt19937 random(seed);
  for (int round = 0; round < 2000; ++round) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed << " round " << round);
    // Ids of single bytes mostly: they make broken characters of every kind.
    std::vector<uint32_t> ids(random() % 40);
    for (uint32_t& id : ids) id = random() % (random() % 4 == 0 ? 640 : 259);
    const bool skip = random() % 2 == 0;
    Detokenizer detokenizer(*tokenizer, skip);
    std::string text;
    for (const uint32_t id : ids) {
      const std::string piece = detokenizer.Push(id);
      ASSERT_EQ(FindInvalidUtf8(piece), std::nullopt);
      ASSERT_LE(detokenizer.held_bytes(), 3u);
      text += piece;
    }
    text += detokenizer.Flush();
    ASSERT_EQ(text, tokenizer->Decode(ids, skip).value());
  }
}

TEST(DetokenizerTest, HoldsBackHalfACharacterAndNoMore) {
  const auto tokenizer = GoldenTokenizer();
  const auto byte = [&](const char* token) { return *tokenizer->TokenToId(token); };
  Detokenizer detokenizer(*tokenizer);
  EXPECT_EQ(detokenizer.Push(byte("ð")), "");            // F0
  EXPECT_EQ(detokenizer.Push(byte("Ł")), "");            // 9F
  EXPECT_EQ(detokenizer.Push(byte("ĺ")), "");            // 98
  EXPECT_EQ(detokenizer.Push(byte("Ģ")), "\U0001F600");  // 80
  EXPECT_EQ(detokenizer.Push(byte("Ã")), "");
  // Certain now that C3 stays alone, and the letter comes with it.
  EXPECT_EQ(detokenizer.Push(byte("a")), "\uFFFDa");
  EXPECT_EQ(detokenizer.Push(byte("Ã")), "");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(DetokenizerTest, IdsWithoutATokenAddNothing) {
  const auto tokenizer = GoldenTokenizer();
  Detokenizer detokenizer(*tokenizer);
  EXPECT_EQ(detokenizer.Push(640), "");
  EXPECT_EQ(detokenizer.Push(0xFFFFFFFF), "");
  EXPECT_EQ(detokenizer.Push(0), "");  // special
  EXPECT_EQ(Detokenizer(*tokenizer, false).Push(0), "<｜begin▁of▁sentence｜>");
}

TEST(Utf8Test, EachMaximalBrokenPartIsOneReplacement) {
  EXPECT_EQ(Utf8Lossy("a\xFF\xFE z"), "a\uFFFD\uFFFD z");
  EXPECT_EQ(Utf8Lossy("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(Utf8Lossy("\xF0\x9F\x98\xF0\x9F\x98\x80"), "\uFFFD\U0001F600");
  EXPECT_EQ(Utf8Lossy("\xE0\x80\x80"), "\uFFFD\uFFFD\uFFFD");            // overlong
  EXPECT_EQ(Utf8Lossy("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");            // surrogate
  EXPECT_EQ(Utf8Lossy("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");  // beyond U+10FFFF
  EXPECT_EQ(Utf8Lossy("\xC1\xBF"), "\uFFFD\uFFFD");
}

// What a matcher that sees the whole text at once would answer.
struct Outcome {
  std::string text;
  std::optional<size_t> match;
  friend bool operator==(const Outcome&, const Outcome&) = default;
};

Outcome Simple(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<size_t> best;
    for (size_t i = 0; i < stops.size(); ++i) {
      if (stops[i].empty() || !text.substr(0, end).ends_with(stops[i])) continue;
      if (!best.has_value() || stops[i].size() > stops[*best].size()) best = i;
    }
    if (best.has_value()) return {text.substr(0, include ? end : end - stops[*best].size()), best};
  }
  return {text, std::nullopt};
}

TEST(StopMatcherTest, SameEndHoweverTheTextIsCut) {
  const uint32_t seed = 7;
  std::mt19937 random(seed);
  for (int round = 0; round < 20000; ++round) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed << " round " << round);
    const auto word = [&](size_t longest) {
      std::string out;
      for (size_t n = random() % (longest + 1); n > 0; --n) out.push_back("ab"[random() % 2]);
      return out;
    };
    const std::string text = word(24);
    std::vector<std::string> stops;
    for (size_t n = random() % 4; n > 0; --n) stops.push_back(word(5));
    const bool include = random() % 2 == 0;
    StopMatcher matcher(stops, include);
    Outcome outcome;
    for (size_t at = 0; at < text.size();) {
      const size_t size = 1 + random() % 5;
      outcome.text += matcher.Push(std::string_view(text).substr(at, size));
      at += size;
      // Nothing shown is ever taken back.
      ASSERT_TRUE(Simple(text, stops, include).text.starts_with(outcome.text));
    }
    outcome.text += matcher.Flush();
    outcome.match = matcher.match();
    ASSERT_EQ(outcome, Simple(text, stops, include)) << text;
  }
}

TEST(StopMatcherTest, ShowsAllThatCannotBecomeAStop) {
  StopMatcher matcher({"</end>", "STOP"});
  EXPECT_EQ(matcher.Push("hello <"), "hello ");
  EXPECT_EQ(matcher.Push("b> S"), "<b> ");
  EXPECT_EQ(matcher.Push("TO"), "");
  EXPECT_EQ(matcher.Push("RE "), "STORE ");
  EXPECT_EQ(matcher.Push("x</en"), "x");
  EXPECT_FALSE(matcher.stopped());
  EXPECT_EQ(matcher.Push("d>more"), "");
  EXPECT_EQ(matcher.match(), 0u);
  EXPECT_EQ(matcher.Push("even more"), "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, WithoutStopsAllPasses) {
  StopMatcher matcher({"", ""});
  EXPECT_EQ(matcher.Push("any\0thing"), "any");
  EXPECT_FALSE(matcher.stopped());
  StopMatcher late({"xyz"});
  EXPECT_EQ(late.Push("axy"), "a");
  EXPECT_EQ(late.Flush(), "xy");
}

}  // namespace
}  // namespace strait
