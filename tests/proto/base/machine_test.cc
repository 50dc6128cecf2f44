// SPDX-License-Identifier: Apache-2.0
//
// Defends: memory and processors are those that the control groups around the process allow, of
// either version and at every level. Regression: only the outermost folder of version 2 was looked
// at, processor quotas never, and page cache counted as taken.
#include "proto/base/machine.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace strait {
namespace {

constexpr uint64_t kMiB = 1 << 20;

class MachineTest : public testing::Test {
 protected:
  MachineTest() {
    std::string pattern = testing::TempDir() + "/machineXXXXXX";
    root_ = mkdtemp(pattern.data());
    Write("/proc/meminfo", "MemTotal:       16384 kB\nMemAvailable:    8192 kB\n");
  }
  ~MachineTest() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  std::string root_;
};

TEST_F(MachineTest, WithoutGroupsTheMachineCounts) {
  EXPECT_EQ(AvailableMemoryBytes(root_), 8 * kMiB);
  EXPECT_GE(AvailableCores(root_), 1u);
}

TEST_F(MachineTest, Version2LimitsOfEveryLevelCount) {
  Write("/proc/self/cgroup", "0::/pods/one\n");
  Write("/sys/fs/cgroup/pods/one/memory.max", "max\n");
  Write("/sys/fs/cgroup/pods/one/cpu.max", "max 100000\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 8 * kMiB);
  const uint32_t cores = AvailableCores(root_);
  Write("/sys/fs/cgroup/pods/memory.max", "6291456\n");
  Write("/sys/fs/cgroup/pods/memory.current", "4194304\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 2 * kMiB);
  // Three of the four MiB are pages of files that nobody used lately.
  Write("/sys/fs/cgroup/pods/memory.stat", "anon 1048576\ninactive_file 3145728\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 5 * kMiB);
  Write("/sys/fs/cgroup/pods/cpu.max", "190000 100000\n");
  EXPECT_EQ(AvailableCores(root_), 1u);
  Write("/sys/fs/cgroup/pods/cpu.max", "9999900000 100000\n");
  EXPECT_EQ(AvailableCores(root_), cores);
}

TEST_F(MachineTest, LessThanOneProcessorIsOne) {
  Write("/proc/self/cgroup", "0::/\n");
  Write("/sys/fs/cgroup/cpu.max", "20000 100000\n");
  EXPECT_EQ(AvailableCores(root_), 1u);
}

TEST_F(MachineTest, MoreThanItsLimitLeavesNothing) {
  Write("/proc/self/cgroup", "0::/\n");
  Write("/sys/fs/cgroup/memory.max", "1048576\n");
  Write("/sys/fs/cgroup/memory.current", "2097152\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 0u);
}

TEST_F(MachineTest, Version1LimitsCount) {
  Write("/proc/self/cgroup", "5:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/x\n0::/\n");
  Write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", "4194304\n");
  Write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", "3145728\n");
  Write("/sys/fs/cgroup/memory/box/memory.stat", "total_inactive_file 1048576\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 2 * kMiB);
  Write("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1\n");
  Write("/sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n");
  const uint32_t cores = AvailableCores(root_);
  EXPECT_GE(cores, 1u);
  Write("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "100000\n");
  EXPECT_EQ(AvailableCores(root_), 1u);
}

TEST_F(MachineTest, NonsenseLimitsNothing) {
  Write("/proc/self/cgroup", "nonsense\n0::/gone\n");
  Write("/sys/fs/cgroup/memory.max", "12345678901234567890123\n");
  Write("/sys/fs/cgroup/cpu.max", "\n");
  EXPECT_EQ(AvailableMemoryBytes(root_), 8 * kMiB);
  EXPECT_GE(AvailableCores(root_), 1u);
}

TEST_F(MachineTest, AHostIsKnownByItsBoot) {
  EXPECT_EQ(HostIdentity(root_), "") << "nothing tells";
  Write("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n");
  const std::string first = HostIdentity(root_);
  EXPECT_EQ(first.size(), 16u);
  EXPECT_EQ(first.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(HostIdentity(root_), first);
  Write("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555556\n");
  EXPECT_NE(HostIdentity(root_), first);
}

}  // namespace
}  // namespace strait
