// SPDX-License-Identifier: Apache-2.0
//
// Defends: a child's output lands in its log, its end is described rightly, and a program that
// cannot be started is an error at once.
#include "coordinator/cli/child.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace strait::cli {
namespace {

using ::testing::HasSubstr;

class ChildTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/childXXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string log() const { return folder_ + "/log"; }
  int RunToEnd(std::vector<std::string> argv) {
    const absl::StatusOr<pid_t> pid = Spawn({std::move(argv), log(), {}});
    EXPECT_TRUE(pid.ok()) << pid.status();
    int status = 0;
    EXPECT_EQ(waitpid(*pid, &status, 0), *pid);
    return status;
  }
  std::string folder_;
};

TEST_F(ChildTest, OutputGoesToTheLogAndTheEndIsDescribed) {
  const int status = RunToEnd({"/bin/sh", "-c", "echo out; echo err >&2; exit 3"});
  EXPECT_EQ(DescribeExit(status), "exit code 3");
  EXPECT_EQ(TailOf(log(), 5), "out\nerr");
  EXPECT_EQ(TailOf(log(), 1), "err");
}

// Regression: keys were handed on by the command line, which every user of the machine can read.
TEST_F(ChildTest, EnvironmentIsHandedOnAndWins) {
  ASSERT_EQ(setenv("STRAIT_CHILD_TEST", "ours", 1), 0);
  ASSERT_EQ(setenv("STRAIT_CHILD_TEST_KEPT", "kept", 1), 0);
  const absl::StatusOr<pid_t> pid =
      Spawn({{"/bin/sh", "-c", "echo $STRAIT_CHILD_TEST $STRAIT_CHILD_TEST_KEPT"},
             log(),
             {"STRAIT_CHILD_TEST=theirs"}});
  ASSERT_TRUE(pid.ok()) << pid.status();
  int status = 0;
  ASSERT_EQ(waitpid(*pid, &status, 0), *pid);
  EXPECT_EQ(TailOf(log(), 5), "theirs kept");
}

TEST_F(ChildTest, DeathBySignalIsDescribed) {
  EXPECT_EQ(DescribeExit(RunToEnd({"/bin/sh", "-c", "kill -9 $$"})), "signal 9 (Killed)");
}

TEST_F(ChildTest, ChildLeadsItsOwnProcessGroupWithoutBlockedSignals) {
  const absl::StatusOr<Signals> signals = Signals::Create();  // blocks them here
  ASSERT_TRUE(signals.ok());
  const absl::StatusOr<pid_t> pid = Spawn({{"/bin/sleep", "60"}, log(), {}});
  ASSERT_TRUE(pid.ok()) << pid.status();
  EXPECT_EQ(getpgid(*pid), *pid);
  ASSERT_EQ(kill(*pid, SIGTERM), 0);
  int status = 0;
  ASSERT_EQ(waitpid(*pid, &status, 0), *pid);
  EXPECT_EQ(DescribeExit(status), "signal 15 (Terminated)");
}

TEST_F(ChildTest, MissingProgramIsAnErrorThatNamesIt) {
  const absl::StatusOr<pid_t> pid = Spawn({{"/nowhere/strait-worker"}, log(), {}});
  ASSERT_FALSE(pid.ok());
  EXPECT_EQ(pid.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(pid.status().message()), HasSubstr("/nowhere/strait-worker"));
}

TEST_F(ChildTest, TailIsBounded) {
  std::ofstream file(log());
  for (int i = 0; i < 100'000; ++i) file << "line " << i << "\n";
  file.close();
  EXPECT_EQ(TailOf(log(), 2), "line 99998\nline 99999");
  EXPECT_LE(TailOf(log(), 1'000'000).size(), 16u << 10);
  EXPECT_EQ(TailOf(folder_ + "/absent", 3), "");
}

TEST(PortTest, FreePortIsFreeAndAListenerTakesIt) {
  const absl::StatusOr<uint16_t> port = FreePort("127.0.0.1");
  ASSERT_TRUE(port.ok()) << port.status();
  EXPECT_TRUE(PortIsFree("127.0.0.1", *port));
  EXPECT_EQ(FreePort("no such host").status().code(), absl::StatusCode::kInvalidArgument);
}

// The bug: the chosen port was one that the kernel hands out, and a worker that asked for any port
// got it before the coordinator listened there.
TEST(PortTest, FreePortIsNoneThatTheKernelHandsOut) {
  std::ifstream range("/proc/sys/net/ipv4/ip_local_port_range");
  int lowest = 0;
  ASSERT_TRUE(range >> lowest);
  if (lowest <= 20'000) GTEST_SKIP() << "this machine hands out nearly all ports, from " << lowest;
  for (int i = 0; i < 100; ++i) {
    const absl::StatusOr<uint16_t> port = FreePort("127.0.0.1");
    ASSERT_TRUE(port.ok()) << port.status();
    EXPECT_LT(*port, lowest);
  }
}

}  // namespace
}  // namespace strait::cli
