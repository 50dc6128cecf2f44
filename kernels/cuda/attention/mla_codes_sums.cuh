// SPDX-License-Identifier: Apache-2.0
//
// The warp of sums of the attention kernel that widens codes in registers; mla_codes.cu tells the plan.
#pragma once

#include "kernels/cuda/attention/mla_codes_shared.cuh"

namespace strait::cuda::mla::codes {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Sums of the weights of all rows of the tile, as products with ones: of the very halves that values are
// multiplied by. A lane has those of rows row() and row() + 8 of every 16.
class Sums {
 public:
  __device__ Sums(const MlaParams& params, const Shared& shared)
      : p_(params), s_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void Run() {
    Ring<kTurns> turn;
    Ring<2> stretch;
    uint32_t state = 0;  // of stretches that have blocks, whether it is an odd one
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork& work = p_.plan.work[w];
      const int num_blocks = NumBlocks(work, CacheRows(work, p_.segments[work.sequence]));
      for (int first = 0; first < work.num_rows; first += kTile, stretch.Advance()) {
#pragma unroll
        for (int t = 0; t < kTile / 16; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum_[t][i] = 0;
        }
        if (num_blocks == 0) Finish(stretch, state, work, first);
        for (int i = 0; i < num_blocks; ++i, turn.Advance()) {
          wgmma::BarrierWait(s_.weighed(turn.index), turn.phase);
          if (*s_.moved(turn.index) != 0) Multiply(s_.sum_factors(turn.index));
          Add(s_.weights(turn.index));
          // Before the weights are given back: the stretch after the next has other bases there.
          if (i + 1 == num_blocks) Finish(stretch, state, work, first);
          ArriveWarp(s_.used(turn.index));
        }
        if (num_blocks > 0) state ^= 1;
      }
    }
  }

 private:
  __device__ __forceinline__ int row() const { return lane_ / 4; }

  __device__ __forceinline__ void Add(uint32_t weights) {
    constexpr uint32_t kOnes = 0x3c003c00;
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
#pragma unroll
      for (int step = 0; step < kMlaBlockRows / 16; ++step) {
        uint32_t a[4];
        LoadMatrices(a, weights + wgmma::PieceOffset(t * 16 + lane_ % 16, step * 2 + lane_ / 16));
        MmaF16(sum_[t], a, kOnes, kOnes);
      }
    }
  }

  __device__ __forceinline__ void Multiply(const float* factors) {
#pragma unroll
    for (int t = 0; t < kTile / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[t][i] *= factors[t * 16 + i / 2 * 8 + row()];
    }
  }

  // Sums to what makes results of both groups' sums of values, and to log-sum-exps.
  __device__ __forceinline__ void Finish(const Ring<2>& stretch, uint32_t state,
                                         const MlaWork& work, int first) {
    wgmma::BarrierWait(s_.taken(stretch.index), stretch.phase ^ 1);
    float* const finals = s_.finals(stretch.index);
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int t = 0; t < kTile / 16; ++t) {
        finals[t * 16 + row()] = sum_[t][0];
        finals[t * 16 + 8 + row()] = sum_[t][2];
      }
    }
    __syncwarp();
    WaitForEarlier();
    const bool partial = work.partial >= 0;
    float* const lse = partial ? p_.partial_lse : p_.lse;
    const float unit = __uint_as_float(*s_.unit(state) << 23);
#pragma unroll 1
    for (int at = lane_; at < kTile; at += 32) {
      const float sum = finals[at];
      finals[at] = sum > 0 ? unit / sum : 0.0f;
      const int in_tile = first + at;
      if (in_tile >= work.num_rows || lse == nullptr) continue;
      lse[partial ? static_cast<int64_t>(work.partial) * kMlaTileRows + in_tile
                  : work.first_row + in_tile] =
          sum > 0 ? (s_.bases(state)[at] + log2f(sum)) * kLn2 : NegInf();
    }
    ArriveWarp(s_.finished(stretch.index));
  }

  const MlaParams& p_;
  const Shared s_;
  const int lane_;
  float sum_[kTile / 16][4];
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::codes
