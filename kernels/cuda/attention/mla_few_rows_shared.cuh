// SPDX-License-Identifier: Apache-2.0
//
// Shared memory of the few-rows attention kernel, the barriers in it, and the warp that fills it.
#pragma once

#include "kernels/cuda/attention/mla_device.cuh"

namespace strait::cuda::mla::few {

inline constexpr int kGroups = 2;  // warpgroups, which take cache blocks in turn
inline constexpr int kGroupThreads = 128;
inline constexpr int kThreads = (kGroups + 1) * kGroupThreads;
inline constexpr int kStages = 4;  // cache blocks in shared memory
inline constexpr int kCopies = 4;  // bulk copies of a block
// Of a thread; one warp of a warpgroup of its own feeds.
inline constexpr int kConsumerRegisters = 224;
inline constexpr int kFeederRegisters = 56;

// Within a stretch a stage is one group's alone. Waits tell even from odd turns only: of two groups that
// took turns with it, one whose own copy came first would find the turn before unfinished and take that
// for its own done.
static_assert(kStages % kGroups == 0);

// Cache rows as they lie, also in shared memory.
inline constexpr uint32_t kRowBytes = RowBytes(RowFormat::kFp8, 512, 64);
// Eight rows 16 bytes wide lie in eight different sixteenths of the banks' width: no conflicts.
static_assert(kRowBytes % 128 == 16);
inline constexpr uint32_t kScalesAt = ScalesOffset(512);
inline constexpr uint32_t kRopeAt = RopeKeyOffset(RowFormat::kFp8, 512);
inline constexpr uint32_t kQuarterBytes = LatentBytes(RowFormat::kFp8, 128);
inline constexpr int kTiles = kMlaBlockRows / 8;  // rows of one product
inline constexpr uint32_t kTileBytes = 8 * kRowBytes;
inline constexpr uint32_t kStageBytes = kMlaBlockRows * kRowBytes;
inline constexpr uint32_t kPartialStride = kMlaBlockRows + 8;      // floats between heads
inline constexpr uint32_t kWeightStride = kMlaBlockRows * 2 + 16;  // bytes between heads

// Offsets from a 1,024-byte boundary.
inline constexpr uint32_t kPartialBytes = 4 * kMlaFewRows * kPartialStride * 4;
inline constexpr uint32_t kWeightBytes = kMlaFewRows * kWeightStride;
inline constexpr uint32_t kPartialsAt = kStages * kStageBytes;
inline constexpr uint32_t kWeightsAt = kPartialsAt + kGroups * kPartialBytes;
// A group's result is handed over where scores were.
static_assert(kGroups * kPartialBytes >= kMlaFewRows * 512 * 4);
inline constexpr uint32_t kFactorsAt = kWeightsAt + kGroups * kWeightBytes;
inline constexpr uint32_t kStatesAt = kFactorsAt + kGroups * kMlaFewRows * 4;
inline constexpr uint32_t kQueryAt = kStatesAt + kGroups * kMlaFewRows * 8;
inline constexpr uint32_t kBarriersAt = kQueryAt + kGroups * kMlaFewRows * 16;
inline constexpr uint32_t kSharedBytes = kBarriersAt + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 * 1024);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Shared {
  unsigned char* memory;  // 1,024-byte aligned
  uint32_t address;

  __device__ Shared(unsigned char* at) : memory(at), address(SharedAddress(at)) {}
  __device__ uint32_t stage(uint32_t i) const { return address + i * kStageBytes; }
  // Arrived at once, by the copy warp.
  __device__ uint32_t full(uint32_t stage) const { return address + kBarriersAt + stage * 8; }
  // All warps of the group whose block it had are done with it.
  __device__ uint32_t empty(uint32_t stage) const {
    return address + kBarriersAt + (kStages + stage) * 8;
  }
  // [16 heads] weights of the block's rows
  __device__ unsigned char* weights(int group) const {
    return memory + kWeightsAt + group * kWeightBytes;
  }
  // Scores [4 quarters, 16 heads, kPartialStride]; at a stretch's end, of all groups: one's result.
  __device__ float* partial(int group) const {
    return reinterpret_cast<float*>(memory + kPartialsAt + group * kPartialBytes);
  }
  __device__ float* factors(int group) const {
    return reinterpret_cast<float*>(memory + kFactorsAt) + group * kMlaFewRows;
  }
  // [maxima, sums][16 heads]
  __device__ float* states(int group) const {
    return reinterpret_cast<float*>(memory + kStatesAt) + group * 2 * kMlaFewRows;
  }
  // [4 warps, 16 heads]: the largest number of q, without its sign
  __device__ uint32_t* query(int group) const {
    return reinterpret_cast<uint32_t*>(memory + kQueryAt) + group * 4 * kMlaFewRows;
  }
};

// Blocks of the work that have rows.
__device__ __forceinline__ int NumBlocks(const MlaWork& work, int cache_rows) {
  const int rows =
      min(work.block_end * kMlaBlockRows, cache_rows) - work.block_begin * kMlaBlockRows;
  return max(rows + kMlaBlockRows - 1, 0) / kMlaBlockRows;
}

// The warp that copies: lane i of kCopies a part of the block's rows in one piece.
__device__ __forceinline__ void Feed(const MlaParams& p, const Shared& s) {
  constexpr int kPart = kMlaBlockRows / kCopies;
  const int lane = threadIdx.x % 32;
  uint32_t at = 0;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int num_blocks = NumBlocks(work, cache_rows);
    const int present_end = work.block_begin + num_blocks;
    const auto page = [&](int first) {
      return first + lane < present_end ? segment.page_table[first + lane] : 0u;
    };
    for (int pass = 0; pass < work.num_rows; pass += kMlaFewRows) {
      uint32_t pages = page(work.block_begin);
      uint32_t next_pages = page(work.block_begin + 32);
      for (int i = 0; i < num_blocks; ++i, ++at) {
        if (i % 32 == 0 && i > 0) {
          pages = next_pages;
          next_pages = page(work.block_begin + i + 32);
        }
        const uint32_t id = __shfl_sync(kFullWarp, pages, i % 32);
        const int block = work.block_begin + i;
        const uint32_t stage = at % kStages;
        const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
        if (block >= work.settled_blocks) WaitForEarlier();
        if (lane == 0) {
          wgmma::BarrierWait(s.empty(stage), (at / kStages & 1) ^ 1);
          wgmma::BarrierExpect(s.full(stage), present * kRowBytes);
        }
        __syncwarp();
        const int rows = min(present - lane * kPart, kPart);
        if (lane < kCopies && rows > 0) {
          wgmma::CopyBulk(s.stage(stage) + lane * kPart * kRowBytes,
                          p.blocks + id * p.block_bytes + lane * kPart * kRowBytes,
                          rows * kRowBytes, s.full(stage));
        }
        __syncwarp();
      }
    }
  }
}

#endif  // sm_90a

}  // namespace strait::cuda::mla::few
