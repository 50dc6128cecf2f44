// SPDX-License-Identifier: Apache-2.0
//
// Defends: an event is one line, and text of a peer in it neither breaks the line nor reaches a
// terminal as a command. Regression: the text form passed escape sequences and bytes that are no
// UTF-8 through, in messages and in values without spaces.
#include "proto/base/log.h"

#include <gtest/gtest.h>

#include <string>

#include "proto/base/json.h"

namespace strait {
namespace {

std::string Logged(bool json, std::string_view message, std::string_view value) {
  InitLog("tested", LogLevel::kInfo, json);
  testing::internal::CaptureStderr();
  Log(LogLevel::kInfo, message, {{"why", value}});
  return testing::internal::GetCapturedStderr();
}

TEST(LogTest, ControlBytesAreEscapedInText) {
  const std::string line = Logged(false, "worker\x1b[2J\nlost", "\x1b]0;title\x07");
  EXPECT_EQ(line.find('\x1b'), std::string::npos) << line;
  EXPECT_EQ(line.find('\x07'), std::string::npos) << line;
  EXPECT_EQ(line.find('\n'), line.size() - 1) << line;
  EXPECT_NE(line.find("worker\\x1b[2J\\nlost why=\"\\u001b]0;title\\u0007\""), std::string::npos)
      << line;
}

TEST(LogTest, WhatIsNoUtf8IsEscaped) {
  EXPECT_NE(Logged(false, "m", "\xff\xc2\x9b").find("why=\"\\u00ff\\u00c2\\u009b\""),
            std::string::npos);
  EXPECT_NE(Logged(false, "m", "größer").find("why=größer\n"), std::string::npos);
}

TEST(LogTest, JsonLinesStayJson) {
  const std::string line = Logged(true, "a \"b\" \\ \x1b\xff\n", "日本\x80");
  const auto parsed = json::Parse(line, "the line");
  ASSERT_TRUE(parsed.ok()) << parsed.status() << line;
  EXPECT_EQ(parsed->get_object().at("message").as_string(), "a \"b\" \\ \x1b\u00ff\n");
  EXPECT_EQ(parsed->get_object().at("why").as_string(), "日本\u0080");
}

}  // namespace
}  // namespace strait
