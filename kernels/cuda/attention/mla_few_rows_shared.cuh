// SPDX-License-Identifier: Apache-2.0
//
// Shared memory of the few-rows attention kernel, the barriers in it, and the warp that fills it.
#pragma once

#include <numeric>

#include "kernels/cuda/attention/mla_device.cuh"
#include "kernels/cuda/attention/mla_few_rows.h"

namespace strait::cuda::mla::few {

inline constexpr int kGroupThreads = 128;

// Cache rows as they lie in shared memory. A step is what a group scores at once: a cache block of fp8
// rows, half a block of bf16 rows.
template <RowFormat kFormat>
struct CacheRowsOf {
  static constexpr bool kFp8 = kFormat == RowFormat::kFp8;
  static constexpr int kStepRows = kFp8 ? kMlaBlockRows : kMlaBlockRows / 2;
  static constexpr uint32_t kBytes = RowBytes(kFormat, 512, 64);
  // Eight rows 16 bytes wide lie in eight different sixteenths of the banks' width: no conflicts.
  static constexpr uint32_t kStride = kFp8 ? kBytes : kBytes + 16;
  static_assert(kStride % 128 == 16);
  static constexpr uint32_t kRopeAt = RopeKeyOffset(kFormat, 512);
  static constexpr uint32_t kQuarterBytes = LatentBytes(kFormat, 128);
  static constexpr int kTiles = kStepRows / 8;  // rows of one product
  static constexpr uint32_t kTileBytes = 8 * kStride;
  static constexpr uint32_t kStageBytes = kStepRows * kStride;
  static constexpr uint32_t kPartialStride = kStepRows + 8;      // floats between heads
  static constexpr uint32_t kWeightStride = kStepRows * 2 + 16;  // bytes between heads
  static constexpr int kStepsOfBlock = kMlaBlockRows / kStepRows;
};
inline constexpr uint32_t kScalesAt = ScalesOffset(512);

// Registers of a thread; one warp of a warpgroup of its own feeds.
constexpr int ConsumerRegisters(int groups) { return groups == 1 ? 208 : groups == 2 ? 224 : 152; }
constexpr int FeederRegisters(int groups) { return groups == 1 ? 48 : 56; }

// Barriers that say that a step is there: step n's is n % kFull. As many as both stages and groups
// divide, so that within a stretch each is one group's alone. A barrier a stage is not enough: waits
// tell even from odd turns of a stage only. If groups take turns with it, one that is ahead, as the
// copies of its own step came first, finds the turn before unfinished and takes that for its own done.
constexpr int FullBarriers(int stages, int groups) { return std::lcm(stages, groups); }

// Offsets from a 1,024-byte boundary.
template <MlaFewRowsVariant kV>
struct Layout {
  using Rows = CacheRowsOf<kV.format>;
  static constexpr uint32_t kPartialBytes = 4 * kMlaFewRows * Rows::kPartialStride * 4;
  static constexpr uint32_t kWeightBytes = kMlaFewRows * Rows::kWeightStride;
  static constexpr uint32_t kPartialsAt = kV.stages * Rows::kStageBytes;
  // A group's result is handed over where scores were.
  static constexpr uint32_t kResultBytes = kV.groups > 1 ? kMlaFewRows * 512 * 4 : 0;
  static constexpr uint32_t kWeightsAt =
      kPartialsAt +
      (kV.groups * kPartialBytes > kResultBytes ? kV.groups * kPartialBytes : kResultBytes);
  static constexpr uint32_t kFactorsAt = kWeightsAt + kV.groups * kWeightBytes;
  static constexpr uint32_t kStatesAt = kFactorsAt + kV.groups * kMlaFewRows * 4;
  static constexpr uint32_t kQueryAt = kStatesAt + kV.groups * kMlaFewRows * 8;
  static constexpr uint32_t kBarriersAt = kQueryAt + kV.groups * kMlaFewRows * 16;
  static constexpr uint32_t kFull = FullBarriers(kV.stages, kV.groups);
  static_assert(kFull % kV.groups == 0 && kFull % kV.stages == 0);
  static constexpr uint32_t kBytes = kBarriersAt + (kFull + kV.stages) * 8;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <MlaFewRowsVariant kV>
struct Shared : Layout<kV> {
  using L = Layout<kV>;
  unsigned char* memory;  // 1,024-byte aligned
  uint32_t address;

  __device__ Shared(unsigned char* at) : memory(at), address(SharedAddress(at)) {}
  __device__ uint32_t stage(uint32_t i) const { return address + i * L::Rows::kStageBytes; }
  // Of the step; arrived at once, by the copy warp. Waited for: full_parity.
  __device__ uint32_t full(uint32_t step) const {
    return address + L::kBarriersAt + step % L::kFull * 8;
  }
  __device__ static uint32_t full_parity(uint32_t step) { return step / L::kFull & 1; }
  // Of the stage: all warps of the group whose step it had are done with it.
  __device__ uint32_t empty(uint32_t stage) const {
    return address + L::kBarriersAt + (L::kFull + stage) * 8;
  }
  // [16 heads] weights of the step's rows
  __device__ unsigned char* weights(int group) const {
    return memory + L::kWeightsAt + group * L::kWeightBytes;
  }
  // Scores [4 quarters, 16 heads, kPartialStride]; at a stretch's end, of all groups: one's result.
  __device__ float* partial(int group) const {
    return reinterpret_cast<float*>(memory + L::kPartialsAt + group * L::kPartialBytes);
  }
  __device__ float* factors(int group) const {
    return reinterpret_cast<float*>(memory + L::kFactorsAt) + group * kMlaFewRows;
  }
  // [maxima, sums][16 heads]
  __device__ float* states(int group) const {
    return reinterpret_cast<float*>(memory + L::kStatesAt) + group * 2 * kMlaFewRows;
  }
  // [4 warps, 16 heads]: the largest number of q, without its sign
  __device__ uint32_t* query(int group) const {
    return reinterpret_cast<uint32_t*>(memory + L::kQueryAt) + group * 4 * kMlaFewRows;
  }
};

// Steps of the work that have rows.
template <class Rows>
__device__ __forceinline__ int NumSteps(const MlaWork& work, int cache_rows) {
  const int rows =
      min(work.block_end * kMlaBlockRows, cache_rows) - work.block_begin * kMlaBlockRows;
  return max(rows + Rows::kStepRows - 1, 0) / Rows::kStepRows;
}

// The warp that copies. fp8: lane i of kV.copies copies a part of the rows in one piece; bf16: each
// lane a row, as rows lie 16 bytes further apart in shared memory.
template <MlaFewRowsVariant kV>
__device__ __forceinline__ void Feed(const MlaParams& p, const Shared<kV>& s) {
  using Rows = CacheRowsOf<kV.format>;
  constexpr int kCopies = Rows::kFp8 ? kV.copies : Rows::kStepRows;
  constexpr int kPart = Rows::kStepRows / kCopies;
  const int lane = threadIdx.x % 32;
  uint32_t at = 0;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int num_steps = NumSteps<Rows>(work, cache_rows);
    const int present_end =
        work.block_begin + (num_steps + Rows::kStepsOfBlock - 1) / Rows::kStepsOfBlock;
    const auto page = [&](int first) {
      return first + lane < present_end ? segment.page_table[first + lane] : 0u;
    };
    for (int pass = 0; pass < work.num_rows; pass += kMlaFewRows) {
      uint32_t pages = page(work.block_begin);
      uint32_t next_pages = page(work.block_begin + 32);
      for (int i = 0; i < num_steps; ++i, ++at) {
        const int of_work = i / Rows::kStepsOfBlock;
        const int first_row = i % Rows::kStepsOfBlock * Rows::kStepRows;
        if (of_work % 32 == 0 && first_row == 0 && i > 0) {
          pages = next_pages;
          next_pages = page(work.block_begin + of_work + 32);
        }
        const uint32_t id = __shfl_sync(kFullWarp, pages, of_work % 32);
        const int block = work.block_begin + of_work;
        const uint32_t stage = at % kV.stages;
        const int present = min(cache_rows - block * kMlaBlockRows - first_row, Rows::kStepRows);
        if (block >= work.settled_blocks) WaitForEarlier();
        if (lane == 0) {
          wgmma::BarrierWait(s.empty(stage), (at / kV.stages & 1) ^ 1);
          wgmma::BarrierExpect(s.full(at), present * Rows::kBytes);
        }
        __syncwarp();
        const int rows = min(present - lane * kPart, kPart);
        if (lane < kCopies && rows > 0) {
          wgmma::CopyBulk(s.stage(stage) + lane * kPart * Rows::kStride,
                          p.blocks + id * p.block_bytes + (first_row + lane * kPart) * Rows::kBytes,
                          rows * Rows::kBytes, s.full(at));
        }
        __syncwarp();
      }
    }
  }
}

#endif  // sm_90a

}  // namespace strait::cuda::mla::few
