// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever a peer says fits in its bound, stays one line, cannot command a terminal and is
// UTF-8, and what was fit already is unchanged.
#include "proto/base/text.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace strait {
namespace {

bool AllPrintable(std::string_view text) {
  while (!text.empty()) {
    const size_t bytes = PrintableBytes(text);
    if (bytes == 0) return false;
    text.remove_prefix(bytes);
  }
  return true;
}

TEST(TextTest, WhatIsPrintableStays) {
  for (const std::string text : {"", "stage 3 of 4", "größer als 8 → 日本語 🚀", "a\\x1b\"'"}) {
    EXPECT_EQ(PrintableText(text, 1024), text);
  }
}

TEST(TextTest, ControlsAndWhatIsNoUtf8AreEscaped) {
  EXPECT_EQ(PrintableText("a\nb\tc\r", 100), "a\\nb\\tc\\r");
  EXPECT_EQ(PrintableText("\x1b[2J\x7f\x01", 100), "\\x1b[2J\\x7f\\x01");
  EXPECT_EQ(PrintableText(std::string(1, '\0'), 100), "\\x00");
  EXPECT_EQ(PrintableText("\xc2\x9b"
                          "31m",
                          100),
            "\\xc2\\x9b31m");  // CSI in one code point
  // Alone, cut, overlong, surrogate, beyond Unicode.
  EXPECT_EQ(PrintableText("\x80", 100), "\\x80");
  EXPECT_EQ(PrintableText("\xe6\x97", 100), "\\xe6\\x97");
  EXPECT_EQ(PrintableText("\xc0\xaf", 100), "\\xc0\\xaf");
  EXPECT_EQ(PrintableText("\xe0\x80\xaf", 100), "\\xe0\\x80\\xaf");
  EXPECT_EQ(PrintableText("\xed\xa0\x80", 100), "\\xed\\xa0\\x80");
  EXPECT_EQ(PrintableText("\xf4\x90\x80\x80", 100), "\\xf4\\x90\\x80\\x80");
}

TEST(TextTest, IsCutBetweenCharacters) {
  EXPECT_EQ(PrintableText("12345678", 8), "12345678");
  EXPECT_EQ(PrintableText("123456789", 8), "12345…");
  EXPECT_EQ(PrintableText("1234日本", 8), "1234…");
  EXPECT_EQ(PrintableText("1\x1b\x1b", 8), "1\\x1b…");
}

TEST(TextTest, AnyBytesComeOutPrintableAndBounded) {
  constexpr uint32_t kSeed = 7;
  SCOPED_TRACE(kSeed);
  std::mt19937 random(kSeed);
  for (int round = 0; round < 2000; ++round) {
    std::string text(random() % 64, '\0');
    for (char& c : text) c = static_cast<char>(random());
    const size_t bytes_max = 3 + random() % 64;
    const std::string out = PrintableText(text, bytes_max);
    EXPECT_LE(out.size(), bytes_max);
    EXPECT_TRUE(AllPrintable(out)) << out;
  }
}

}  // namespace
}  // namespace strait
