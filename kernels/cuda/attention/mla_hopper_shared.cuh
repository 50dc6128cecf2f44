// SPDX-License-Identifier: Apache-2.0
//
// Shared memory of the Hopper attention kernel, and the barriers in it.
#pragma once

#include "kernels/cuda/attention/mla_device.cuh"
#include "kernels/cuda/attention/mla_wgmma.cuh"

namespace strait::cuda::mla::hopper {

inline constexpr int kThreads = 384;
inline constexpr int kConsumers = 256;
inline constexpr int kChunks = 9;
inline constexpr int kHalfChunks = 4;   // the columns of a group's half of the output
inline constexpr int kWeightChunk = 8;  // rope columns, then weights
inline constexpr uint32_t kTileBytes = kChunks * wgmma::kChunkBytes;
inline constexpr uint32_t kNumTiles = 2;

// Offsets from a 1,024-byte boundary.
inline constexpr uint32_t kQueryAt = 0;
inline constexpr uint32_t kTilesAt = kTileBytes;
inline constexpr uint32_t kBarriersAt =
    kTilesAt + kNumTiles * kTileBytes;                    // full[2, 2], empty[2, 2]
inline constexpr uint32_t kMaxAt = kBarriersAt + 64;      // [2, 64] fp32
inline constexpr uint32_t kSumAt = kMaxAt + 2 * 64 * 4;   // [2, 64] fp32
inline constexpr uint32_t kFlagAt = kSumAt + 2 * 64 * 4;  // int
inline constexpr uint32_t kSharedBytes = kFlagAt + 16 + 1024;

// Named barriers; 0 is __syncthreads'.
inline constexpr int kAllConsumers = 1;
inline constexpr int kGroup = 2;    // + group
inline constexpr int kWeights = 4;  // + group whose weights are ready

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Shared {
  unsigned char* memory;
  uint32_t address;
  __device__ uint32_t query() const { return address + kQueryAt; }
  __device__ uint32_t tile(uint32_t index) const {
    return address + kTilesAt + index % kNumTiles * kTileBytes;
  }
  // A tile comes and goes in halves: chunks 0 to 3, chunks 4 to 8.
  __device__ uint32_t full(uint32_t index, int half) const {
    return address + kBarriersAt + (index % kNumTiles * 2 + half) * 8;
  }
  __device__ uint32_t empty(uint32_t index, int half) const {
    return address + kBarriersAt + 32 + (index % kNumTiles * 2 + half) * 8;
  }
  __device__ float* max(int group) const {
    return reinterpret_cast<float*>(memory + kMaxAt) + group * 64;
  }
  __device__ float* sum(int group) const {
    return reinterpret_cast<float*>(memory + kSumAt) + group * 64;
  }
  __device__ volatile int* flag() const { return reinterpret_cast<int*>(memory + kFlagAt); }
};

__device__ __forceinline__ uint32_t FullParity(uint32_t index) { return index / kNumTiles % 2; }

#endif  // sm_90a

}  // namespace strait::cuda::mla::hopper
