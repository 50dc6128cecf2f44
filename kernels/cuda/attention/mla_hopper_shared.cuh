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
inline constexpr int kHalfChunks = 4;  // the columns of a group's half of the output
inline constexpr int kRopeChunk = 8;   // rope columns; then, in a pair's second tile, its weights
inline constexpr uint32_t kTileBytes = kChunks * wgmma::kChunkBytes;
inline constexpr uint32_t kNumTiles = 2;

// Offsets from a 1,024-byte boundary.
inline constexpr uint32_t kQueryAt = 0;
inline constexpr uint32_t kTilesAt = kTileBytes;
inline constexpr uint32_t kWeightsAt = kTilesAt + kNumTiles * kTileBytes;  // of a pair's first tile
inline constexpr uint32_t kBarriersAt = kWeightsAt + wgmma::kChunkBytes;  // full[2, 4], empty[2, 2]
inline constexpr uint32_t kMaxAt = kBarriersAt + 96;                      // [2, 64] fp32
inline constexpr uint32_t kSumAt = kMaxAt + 2 * 64 * 4;                   // [2, 64] fp32
inline constexpr uint32_t kSharedBytes = kSumAt + 2 * 64 * 4;

// Named barriers; 0 is __syncthreads'.
inline constexpr int kAllConsumers = 1;
inline constexpr int kGroup = 2;    // + group
inline constexpr int kOrder = 4;    // the first group's scores are nearly there
inline constexpr int kWeights = 5;  // + 4 * group whose weights are ready + warp of the group

// Who brings cache blocks.
enum class Feed {
  kRows,   // bf16: FeedBf16
  kUnits,  // bf16: FeedUnits
  kFp8,    // fp8 rows, widened on their way: FeedFp8
};
// Registers of a consumer thread and of a feeder thread: two of the former and one of the latter are at
// most 504. A second feeding warpgroup does not fit: a block of 512 threads begins with 128 each, and
// the compiler wants 158 for a product of 256 columns.
constexpr int ConsumerRegisters(Feed feed) { return feed == Feed::kFp8 ? 216 : 232; }
constexpr int FeederRegisters(Feed feed) { return feed == Feed::kFp8 ? 72 : 40; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Addresses are the same for all threads and known to be so: descriptors of products then cost
// nothing.
struct Shared {
  unsigned char* memory;  // 1,024-byte aligned
  uint32_t address;
  __device__ uint32_t query() const { return address + kQueryAt; }
  // The first and the second block of a pair have each their own tile.
  __device__ uint32_t tile(int index) const { return address + kTilesAt + index * kTileBytes; }
  __device__ uint32_t weights() const { return address + kWeightsAt; }
  __device__ uint32_t rope(int index) const {
    return tile(index) + kRopeChunk * wgmma::kChunkBytes;
  }
  // A tile goes in halves, chunks 0 to 3, chunks 4 to 7, and comes in quarters of two chunks. The
  // rope columns belong to the half that is free last, the second of the first tile, the first of
  // the second tile, and come with its second quarter.
  __device__ uint32_t full(int index, int quarter) const {
    return address + kBarriersAt + (index * 4 + quarter) * 8;
  }
  __device__ uint32_t empty(int index, int half) const {
    return address + kBarriersAt + 64 + (index * 2 + half) * 8;
  }
  __device__ float* max(int group) const {
    return reinterpret_cast<float*>(memory + kMaxAt) + group * 64;
  }
  __device__ float* sum(int group) const {
    return reinterpret_cast<float*>(memory + kSumAt) + group * 64;
  }
};

// wgmma::Rows and Columns of an address that is the same for all threads.
__device__ __forceinline__ wgmma::Operand Rows(uint32_t chunk) {
  return {(chunk & 0x3ffffu) / 16 | 1u << 16};
}
__device__ __forceinline__ wgmma::Operand Columns(uint32_t chunk) {
  return {(chunk & 0x3ffffu) / 16 | wgmma::kChunkBytes / 16 << 16};
}

// Which phase of their barriers the tiles are in.
struct Phases {
  uint32_t first = 0;
  uint32_t second = 0;
  __device__ uint32_t of(int index) const { return index == 0 ? first : second; }
  __device__ void Advance(bool both) {
    first ^= 1;
    if (both) second ^= 1;
  }
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::hopper
