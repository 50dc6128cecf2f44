// SPDX-License-Identifier: Apache-2.0
//
// Defends: a process without a usable GPU says why in words; with one it knows its sizes.
#include "kernels/cuda/device/device.h"

#include <gtest/gtest.h>

namespace strait::cuda {
namespace {

TEST(DeviceTest, OpensOrSaysWhy) {
  Device device;
  const std::string problem = OpenDevice(0, &device);
  if (problem.empty()) {
    EXPECT_GE(device.compute_capability, 80);
    EXPECT_GT(device.num_multiprocessors, 0);
    EXPECT_GT(device.free_bytes, 0);
    EXPECT_GE(device.memory_bytes, device.free_bytes);
  } else {
    EXPECT_TRUE(problem.find("driver") != std::string::npos ||
                problem.find("GPU") != std::string::npos)
        << problem;
  }
}

TEST(DeviceTest, AGpuThatIsNotThere) {
  Device device;
  EXPECT_NE(OpenDevice(1000, &device), "");
}

}  // namespace
}  // namespace strait::cuda
