// SPDX-License-Identifier: Apache-2.0
//
// Defends: CUDA errors become statuses that name the call; a process whose GPU context is lost ends
// at once with its own exit code and a line that says so, and one whose context is well goes on.
#include "worker/model/cuda/status.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/cuda/device/device.h"
#include "tests/worker/model/cuda/trap.h"

namespace strait {
namespace {

TEST(CudaStatusTest, ErrorsNameTheCall) {
  EXPECT_TRUE(CudaStatus(cudaSuccess, "cudaMalloc").ok());
  const absl::Status no_memory = CudaStatus(cudaErrorMemoryAllocation, "cudaMalloc");
  EXPECT_EQ(no_memory.code(), absl::StatusCode::kResourceExhausted);
  const absl::Status other = CudaStatus(cudaErrorIllegalAddress, "cudaStreamSynchronize");
  EXPECT_EQ(other.code(), absl::StatusCode::kInternal);
  for (const char* part : {"cudaErrorIllegalAddress", "cudaStreamSynchronize"}) {
    EXPECT_NE(other.message().find(part), std::string::npos) << other;
  }
}

TEST(CudaStatusDeathTest, ALostContextEndsTheProcess) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  for (const cudaError_t lost : {cudaErrorIllegalAddress, cudaErrorECCUncorrectable,
                                 cudaErrorLaunchFailure, cudaErrorHardwareStackError}) {
    EXPECT_EXIT(ExitIfContextLost(absl::InternalError("CUDA: in step 7"), lost),
                testing::ExitedWithCode(kLostContextExit),
                "GPU context is lost.*in step 7.*" + std::string(cudaGetErrorString(lost)));
  }
}

TEST(CudaStatusTest, AContextThatIsWellGoesOn) {
  ExitIfContextLost(absl::InternalError("a launch with too many threads"), cudaSuccess);
}

TEST(CudaStatusDeathTest, ARealTrapIsRecognized) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  cuda::Device device;
  if (const std::string problem = cuda::OpenDevice(0, &device); !problem.empty()) {
    GTEST_SKIP() << "SKIPPED, no GPU test ran: " << problem;
  }
  EXPECT_EXIT(
      {
        (void)cuda::OpenDevice(0, &device);
        (void)cuda_test::LaunchTrap();
        ExitIfContextLost(CudaStatus(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
      },
      testing::ExitedWithCode(kLostContextExit), "GPU context is lost");
  // Of that process alone.
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

}  // namespace
}  // namespace strait
