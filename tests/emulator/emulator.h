// SPDX-License-Identifier: Apache-2.0
//
// The emulator runs CUDA kernels on the host, one thread of the kernel at a time, so that they are
// tested where there is no GPU. The kernels' own sources are compiled as C++ with device_language.h
// before them and shadow/ first in the include path.
//
// Thread:  a launch runs to its end in one thread, that which waits for its stream; launches of
//          several threads take turns.
// Shapes:  blocks (clusters) one after the other, each thread of a block a fiber with its own stack;
//          whoever waits lets the others run, in an order that changes from round to round. The blocks
//          of a cluster run together, each with a shared memory of its own.
// Errors:  what is undefined on a GPU and visible here ends the process with a line that names it:
//          a deadlock, lanes that meet in different operations, copies outstanding at a block's end.
// Limits:  blocks that wait for blocks behind them hang. Clusters of two blocks, neighbours in x, else
//          cudaErrorNotSupported; their kernels have no static shared memory: there is one of it.
// Why:     asynchronous work (streams, copies, warpgroup products) is done as late as the code
//          allows, and shared memory begins as NaN, so that a missing wait gives wrong results here
//          every time, not sometimes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace strait::emulator {

inline constexpr int kWarpLanes = 32;
inline constexpr int kWarpgroupThreads = 128;

// ---- Launching ----
// `body` is called once for each thread of the grid. cluster: its blocks.
cudaError_t Launch(const void* kernel, dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
                   cudaStream_t stream, std::function<void()> body);
// `work` in the stream's order (stream.h), or when the graph that is being captured is replayed.
cudaError_t Enqueue(cudaStream_t stream, std::function<void()> work);
cudaError_t SetSharedLimit(const void* kernel, int bytes);

// ---- Of the thread that runs ----
uint3 ThreadIndex();
uint3 BlockIndex();
dim3 BlockSize();
dim3 GridSize();
unsigned char* DynamicSharedMemory();  // its address has 32 bits

void Yield();     // lets others run
void Progress();  // says that this thread can go on: else nobody may be able to
// Lets others run until ready().
template <class Ready>
void WaitUntil(Ready ready) {
  while (!ready()) Yield();
  Progress();
}
void SyncThreads();
// bar.sync and bar.arrive.
void NamedBarrier(int id, int threads, bool wait);

// All threads of `mask` in the warp meet; the last to come calls combine(slots), where slots[lane]
// is what that lane gave. `operation` must be the same for all.
using Combine = void (*)(void* const* slots, uint32_t mask);
void MeetWarp(uint32_t mask, void* mine, Combine combine);
// The same for the 128 threads of a warpgroup; the mask is 0.
void MeetWarpgroup(void* mine, Combine combine);

// ---- Of the cluster, a block by default ----
uint32_t ClusterRank();
void SyncCluster();
// Where what lies at `shared_address` of this block lies in block `rank` of its cluster.
uint32_t AddressInBlock(uint32_t shared_address, uint32_t rank);
// Fails if the block to which the address belongs has ended: nobody may reach into it any more.
void CheckAlive(uint32_t shared_address);

// Runs some time later, at the latest when nobody can go on without it. Later ones may come first.
void Defer(std::function<void()> work);

// A thread's asynchronous copies, made when it waits for them.
void AddCopy(std::function<void()> work);
void CommitCopyGroup();
void FinishCopies(int groups_left);  // 0: all, committed or not

[[noreturn]] void Fail(const char* what);

}  // namespace strait::emulator
