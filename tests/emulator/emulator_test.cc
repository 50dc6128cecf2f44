// SPDX-License-Identifier: Apache-2.0
//
// Defends: the emulator shows the mistakes that a GPU only sometimes shows: a missing wait, lanes
// that part, threads that wait for ever, memory beyond an allocation.
#include "tests/emulator/emulator.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/ptx.cuh"

namespace strait::emulator {
namespace {

template <class... Params, class... Args>
cudaError_t RunTwo(void (*kernel)(Params...), unsigned threads, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 32 << 10;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

class Numbers {
 public:
  explicit Numbers(int count) : count_(count) {
    void* data = nullptr;
    EXPECT_EQ(cudaMalloc(&data, static_cast<size_t>(count) * sizeof(int)), cudaSuccess);
    data_ = static_cast<int*>(data);
    for (int i = 0; i < count; ++i) data_[i] = i;
  }
  ~Numbers() { EXPECT_EQ(cudaFree(data_), cudaSuccess); }
  int* data() const { return data_; }
  std::vector<int> Get() const { return {data_, data_ + count_}; }

 private:
  int* data_ = nullptr;
  const int count_;
};

// Each thread of a block gives its number to the next one through shared memory.
template <bool kSync>
__global__ void PassOn(int* numbers) {
  int* const shared = cuda::DynamicShared<int>();
  const int me = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>(blockDim.x);
  shared[me] = me;
  if (kSync) __syncthreads();
  numbers[static_cast<int>(blockIdx.x) * count + me] = shared[(me + 1) % count];
}

TEST(EmulatorTest, ABlocksThreadsMeet) {
  const Numbers numbers(128);
  ASSERT_EQ(RunTwo(PassOn<true>, 64, numbers.data()), cudaSuccess);
  for (int i = 0; i < 128; ++i) EXPECT_EQ(numbers.Get()[i], (i + 1) % 64);
}

TEST(EmulatorTest, AMissingBarrierShows) {
  const Numbers numbers(128);
  ASSERT_EQ(RunTwo(PassOn<false>, 64, numbers.data()), cudaSuccess);
  int wrong = 0;
  for (int i = 0; i < 128; ++i) wrong += numbers.Get()[i] != (i + 1) % 64;
  EXPECT_GT(wrong, 0);
}

__global__ void SumOfWarp(int* numbers) {
  int sum = numbers[threadIdx.x];
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
  __syncthreads();
  numbers[threadIdx.x] = sum;
}

TEST(EmulatorTest, LanesExchange) {
  const Numbers numbers(64);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  ASSERT_EQ(cudaLaunchKernelEx(&config, SumOfWarp, numbers.data()), cudaSuccess);
  EXPECT_EQ(numbers.Get()[0], 31 * 32 / 2);
  EXPECT_EQ(numbers.Get()[63], 31 * 32 / 2 + 32 * 32);
}

__global__ void LanesPart(int* numbers) {
  if (threadIdx.x % 2 == 0) {
    numbers[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  } else {
    __syncwarp();
  }
}

__global__ void HalfWaits(int*) {
  if (threadIdx.x < 32) cuda::wgmma::NamedSync<1, 64>();
}

__global__ void CopiesAndLeaves(int* numbers) {
  cuda::CopyAsync(cuda::SharedAddress(cuda::DynamicShared<int>()), numbers, 16);
  cuda::CommitCopies();
}

__global__ void ReadsBeyond(int* numbers) { numbers[0] = numbers[1 << 20]; }

TEST(EmulatorDeathTest, WhatIsUndefinedEndsTheProcess) {
  const Numbers numbers(64);
  EXPECT_DEATH((void)RunTwo(LanesPart, 32, numbers.data()), "met in different ones");
  EXPECT_DEATH((void)RunTwo(HalfWaits, 64, numbers.data()), "deadlock");
  EXPECT_DEATH((void)RunTwo(CopiesAndLeaves, 32, numbers.data()), "did not wait for");
  EXPECT_DEATH((void)RunTwo(ReadsBeyond, 1, numbers.data()), "");
}

// Reads what it copied, after its wait or before it.
template <bool kWait>
__global__ void CopyAndRead(int* numbers) {
  int* const shared = cuda::DynamicShared<int>();
  cuda::CopyAsync(cuda::SharedAddress(shared), numbers + 4, 16);
  cuda::CommitCopies();
  if (kWait) cuda::WaitCopyGroups<0>();
  numbers[0] = shared[0];
  cuda::WaitCopyGroups<0>();
}

TEST(EmulatorTest, ACopyIsThereAfterTheWaitAndNotBefore) {
  const Numbers waited(64);
  ASSERT_EQ(RunTwo(CopyAndRead<true>, 1, waited.data()), cudaSuccess);
  EXPECT_EQ(waited.Get()[0], 4);
  const Numbers hasty(64);
  ASSERT_EQ(RunTwo(CopyAndRead<false>, 1, hasty.data()), cudaSuccess);
  EXPECT_NE(hasty.Get()[0], 4);
}

TEST(EmulatorTest, LaunchesThatNoGpuTakesAreRefused) {
  const Numbers numbers(64);
  EXPECT_EQ(RunTwo(SumOfWarp, 2048, numbers.data()), cudaErrorInvalidConfiguration);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 100 << 10;  // more than asked for
  EXPECT_EQ(cudaLaunchKernelEx(&config, SumOfWarp, numbers.data()), cudaErrorInvalidValue);
}

// Who changes what a copy reads, or reads what it writes, before waiting for it, sees it every time.
TEST(EmulatorTest, AStreamsWorkIsDoneWhenSomebodyWaitsForIt) {
  const Numbers numbers(3);
  cudaStream_t stream = nullptr;
  cudaEvent_t events[2] = {};
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  int host = 7;
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(
        cudaMemcpyAsync(numbers.data() + i, &host, sizeof(host), cudaMemcpyHostToDevice, stream),
        cudaSuccess);
    ASSERT_EQ(cudaEventCreateWithFlags(&events[i], cudaEventDisableTiming), cudaSuccess);
    ASSERT_EQ(cudaEventRecord(events[i], stream), cudaSuccess);
  }
  EXPECT_EQ(numbers.Get(), (std::vector<int>{0, 1, 2}));
  host = 8;
  ASSERT_EQ(cudaEventSynchronize(events[0]), cudaSuccess);
  EXPECT_EQ(numbers.Get(), (std::vector<int>{8, 1, 2})) << "what is behind the event waits";
  ASSERT_EQ(cudaMemsetAsync(numbers.data() + 2, 0, sizeof(int), stream), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(events[0], stream), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(events[0]), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(events[1]), cudaSuccess) << "a poll does one piece of work";
  EXPECT_EQ(numbers.Get(), (std::vector<int>{8, 8, 2}));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(numbers.Get(), (std::vector<int>{8, 8, 0}));
  for (const cudaEvent_t event : events) EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST(EmulatorTest, AGraphIsReplayed) {
  const Numbers numbers(64);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, 0), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  config.stream = stream;
  ASSERT_EQ(cudaLaunchKernelEx(&config, SumOfWarp, numbers.data()), cudaSuccess);
  EXPECT_EQ(numbers.Get()[0], 0);  // not yet
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphExec_t ready = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&ready, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(ready, stream), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(numbers.Get()[0], 31 * 32 / 2);
  ASSERT_EQ(cudaGraphLaunch(ready, stream), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(numbers.Get()[0], 31 * 32 / 2 * 32);
  EXPECT_EQ(cudaGraphExecDestroy(ready), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

}  // namespace
}  // namespace strait::emulator
