// SPDX-License-Identifier: Apache-2.0
//
// Defends: both daemons end alike: what a flag's mistake, a failed start and a good end answer.
#include "proto/rpc/process.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace strait {
namespace {

struct Ended {
  int code = -1;
  std::string said;
  int runs = 0;
};

Ended RunWith(std::vector<std::string> args, const absl::Status& status) {
  CLI::App app("A daemon for tests", "strait-test");
  LogFlags log;
  AddLogFlags(app, &log);
  args.insert(args.begin(), "strait-test");
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  Ended ended;
  testing::internal::CaptureStderr();
  ended.code = RunDaemon(app, static_cast<int>(argv.size()), argv.data(), log, "", [&] {
    ++ended.runs;
    return status;
  });
  ended.said = testing::internal::GetCapturedStderr();
  return ended;
}

TEST(ProcessTest, AGoodEndIsSilent) {
  const Ended ended = RunWith({}, absl::OkStatus());
  EXPECT_EQ(ended.code, 0);
  EXPECT_EQ(ended.runs, 1);
  EXPECT_EQ(ended.said, "");
}

TEST(ProcessTest, AFailureIsLoggedUnderTheProgramsName) {
  const Ended ended = RunWith({"--log-json"}, absl::UnavailableError("the port is taken"));
  EXPECT_EQ(ended.code, 1);
  EXPECT_NE(ended.said.find("\"process\":\"strait-test\""), std::string::npos) << ended.said;
  EXPECT_NE(ended.said.find("the port is taken"), std::string::npos) << ended.said;
}

TEST(ProcessTest, NothingRunsWithFlagsThatMakeNoSense) {
  Ended ended = RunWith({"--log-level", "loud"}, absl::OkStatus());
  EXPECT_EQ(ended.code, 2);
  EXPECT_EQ(ended.runs, 0);
  EXPECT_NE(ended.said.find("'loud' is unknown"), std::string::npos) << ended.said;
  ended = RunWith({"--nonsense"}, absl::OkStatus());
  EXPECT_GT(ended.code, 2);
  EXPECT_EQ(ended.runs, 0);
}

TEST(ProcessTest, FlagsAreEnvironmentVariablesToo) {
  EXPECT_EQ(EnvironmentName("--max-step-tokens"), "STRAIT_MAX_STEP_TOKENS");
}

}  // namespace
}  // namespace strait
