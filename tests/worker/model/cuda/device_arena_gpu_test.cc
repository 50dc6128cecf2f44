// SPDX-License-Identifier: Apache-2.0
//
// Defends: memory changes hands while a kernel waits for a peer that may never come: else a lost worker
// would hold up the cache of those that live.
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <thread>

#include "tests/kernels/cuda/gpu_test.h"
#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/cuda/wait_for_host.h"
#include "worker/model/cuda/device_arena.h"

namespace strait {
namespace {

using DeviceArenaGpuTest = gpu_test::GpuTest;

TEST_F(DeviceArenaGpuTest, LeasesDoNotWaitForKernelsOfOthers) {
  constexpr uint64_t kBytes = uint64_t{1} << 30;
  auto slab_bytes = DeviceArena::SlabBytesFor(0, kBytes);
  ASSERT_TRUE(slab_bytes.ok());
  auto budget = std::make_shared<MemoryBudget>(kBytes);
  auto arena = DeviceArena::Create(0, budget, *slab_bytes, kBytes);
  ASSERT_TRUE(arena.ok()) << arena.status();
  auto cache = (*arena)->Take(kBytes / 2, kBytes, "the latent cache");
  ASSERT_TRUE(cache.ok());
  int* flag = nullptr;
  ASSERT_EQ(cudaHostAlloc(reinterpret_cast<void**>(&flag), sizeof(int), cudaHostAllocDefault),
            cudaSuccess);
  *flag = 0;
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cuda_test::LaunchWaitForHost(flag, stream), cudaSuccess);
  const auto timed = [](const char* what, auto&& call) {
    const auto begin = std::chrono::steady_clock::now();
    const bool ok = call();
    const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - begin;
    std::printf("%s: %.0f us\n", what, us.count());
    return ok;
  };
  auto done = std::async(std::launch::async, [&] {
    (void)cudaSetDevice(0);
    bool ok = timed("half a gigabyte given back", [&] { return cache->Resize(0, "").ok(); });
    auto weights = (*arena)->Take(kBytes, "weights");
    ok = ok && weights.ok();
    ok = ok && timed("given back whole", [&] {
           *weights = DeviceArena::Lease();
           return true;
         });
    return ok && timed("half a gigabyte taken",
                       [&] { return cache->Resize(kBytes / 2, "the latent cache").ok(); });
  });
  // Not how fast it is, but that it comes back at all while the kernel waits.
  const bool came_back = done.wait_for(std::chrono::seconds(20)) == std::future_status::ready;
  EXPECT_TRUE(came_back) << "giving memory back waits for every kernel of the process";
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  (void)cudaGetLastError();
  *flag = 1;
  EXPECT_TRUE(done.get());
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  (void)cudaStreamDestroy(stream);
  (void)cudaFreeHost(flag);
}

// The bug: a stage gave its pinned memory back to CUDA when it was resized or unloaded. cudaFreeHost waits for
// every kernel of the process, and no thread launches one meanwhile.
TEST_F(DeviceArenaGpuTest, StagesComeAndGoWhileAKernelWaits) {
  const ModelConfig config = OnCuda(TinyV3());
  const auto backend = MakeCuda(config, {.memory_bytes = uint64_t{1} << 30});
  const StageSpec whole = {{0, config.num_hidden_layers}, 1000};
  ASSERT_TRUE(backend->cache().Resize(whole.pool_blocks, {}).ok());
  ASSERT_TRUE(backend->Load(whole, {}).ok());  // what CUDA does once
  int* flag = nullptr;
  ASSERT_EQ(cudaHostAlloc(reinterpret_cast<void**>(&flag), sizeof(int), cudaHostAllocDefault),
            cudaSuccess);
  *flag = 0;
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cuda_test::LaunchWaitForHost(flag, stream), cudaSuccess);
  auto done = std::async(std::launch::async, [&] {
    auto model = backend->Load(whole, {});
    if (!model.ok()) return model.status();
    for (const uint32_t blocks : {50'000u, 10u, 1000u}) {
      const absl::Status status = (*model)->SetCapacity(blocks);
      if (!status.ok()) return status;
    }
    model->reset();
    return backend->cache().Resize(1, {});
  });
  EXPECT_EQ(done.wait_for(std::chrono::seconds(30)), std::future_status::ready)
      << "it waits for every kernel of the process";
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  (void)cudaGetLastError();
  *flag = 1;
  EXPECT_TRUE(done.get().ok());
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  (void)cudaStreamDestroy(stream);
  (void)cudaFreeHost(flag);
}

}  // namespace
}  // namespace strait
