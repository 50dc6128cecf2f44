// SPDX-License-Identifier: Apache-2.0
//
// Defends: the emulator shows the mistakes that a GPU only sometimes shows: a missing wait, lanes
// that part, threads that wait for ever, memory beyond an allocation, a block of a cluster that ends
// while another still reaches into it.
#include "tests/emulator/emulator.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/device/tensor_map.h"

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

template <class... Params, class... Args>
cudaError_t RunCluster(void (*kernel)(Params...), unsigned blocks, unsigned cluster, Args... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 32 << 10;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

struct Map {
  CUtensorMap map;
};

constexpr int kBoxBytes = 8 * 128;

// Each block of a cluster has one row of the map's [1, 2, 64] pairs of bytes brought to both blocks,
// and writes what it then has, after the wait for both rows or before it. kMeet: they end
// together; otherwise the second at once.
template <bool kWait, bool kMeet>
__global__ void Exchange(Map map, int* numbers) {
  auto* const shared = cuda::DynamicShared<unsigned char>();
  const uint32_t memory = cuda::SharedAddress(shared);
  const uint32_t barrier = memory + 2 * kBoxBytes;
  const uint32_t rank = cuda::cluster::Rank();
  if (threadIdx.x == 0) cuda::wgmma::BarrierInit(barrier, 2);
  cuda::cluster::Sync();
  if (!kMeet) {
    if (rank == 1) return;
    for (int rounds = 0; rounds < 4; ++rounds) __syncthreads();
  }
  if (threadIdx.x == 0) {
    cuda::wgmma::BarrierExpect(barrier, 2 * 128);
    cuda::cluster::LoadBox(memory + rank * kBoxBytes, &map, 0, static_cast<int>(rank), 0, barrier,
                           3);
    cuda::cluster::BarrierArrive(barrier, 1 - rank);
  }
  if (kWait) cuda::wgmma::BarrierWait(barrier, 0);
  if (threadIdx.x == 0) {
    for (int row = 0; row < 2; ++row) {
      std::memcpy(numbers + blockIdx.x * 2 + row, shared + row * kBoxBytes, sizeof(int));
    }
  }
  if (!kWait && kMeet) cuda::wgmma::BarrierWait(barrier, 0);
  if (kMeet) cuda::cluster::Sync();
}

class EmulatedCluster : public testing::Test {
 protected:
  // Rows of 32 numbers: the first ones of both are 0 and 32.
  EmulatedCluster() : from_(64), to_(8) {
    const cuda::TensorShape shape = {{64, 2, 1}, {128, 256}, {64, 1, 1}};
    EXPECT_EQ(cuda::MakeTensorMap(from_.data(), shape, &map_.map), cudaSuccess);
  }

  const Numbers from_;
  const Numbers to_;
  Map map_;
};

TEST_F(EmulatedCluster, BlocksLoadForEachOther) {
  ASSERT_EQ(RunCluster(Exchange<true, true>, 4, 2, map_, to_.data()), cudaSuccess);
  EXPECT_EQ(to_.Get(), (std::vector<int>{0, 32, 0, 32, 0, 32, 0, 32}));
}

TEST_F(EmulatedCluster, WhatIsNotWaitedForIsNotThere) {
  ASSERT_EQ(RunCluster(Exchange<false, true>, 4, 2, map_, to_.data()), cudaSuccess);
  EXPECT_NE(to_.Get(), (std::vector<int>{0, 32, 0, 32, 0, 32, 0, 32}));
}

TEST_F(EmulatedCluster, ABlockThatEndsIsNotReachedInto) {
  EXPECT_DEATH((void)RunCluster(Exchange<false, false>, 2, 2, map_, to_.data()),
               "block that has ended");
}

TEST_F(EmulatedCluster, OnlyPairsAreClusters) {
  EXPECT_EQ(RunCluster(Exchange<true, true>, 4, 4, map_, to_.data()), cudaErrorNotSupported);
  EXPECT_EQ(RunCluster(Exchange<true, true>, 3, 2, map_, to_.data()),
            cudaErrorInvalidConfiguration);
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
