// SPDX-License-Identifier: Apache-2.0
//
// A warpgroup of values of the attention kernel that widens codes in registers; mla_codes.cu tells
// the plan.
#pragma once

#include "kernels/cuda/attention/mla_codes_shared.cuh"

namespace strait::cuda::mla::codes {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Latent columns are A, rows of the tile B. A warp has 32 columns of each of two quarters, of which the
// even ones are a product and the odd ones another: a thread has, of a quarter's results, columns
// 2 * row() and 2 * row() + 16 and the next of the warp's, and of the tile rows 8 * i + 2 * quad() and
// the next.
class Values {
  static constexpr int kRuns = kTile / 8;
  static constexpr uint32_t kStages = Layout::kStages;

 public:
  __device__ Values(const MlaParams& params, const Shared& shared, int group)
      : p_(params),
        s_(shared),
        column_(group * 256 + static_cast<int>(threadIdx.x) / 32 % 4 * 32),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void Run() {
    Ring<kStages> stage;
    Ring<kTurns> turn;
    Ring<2> stretch;
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork& work = p_.plan.work[w];
      const int num_blocks = NumBlocks(work, CacheRows(work, p_.segments[work.sequence]));
      for (int first = 0; first < work.num_rows; first += kTile, stretch.Advance()) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int i = 0; i < kTile / 2; ++i) out_[t][i] = 0;
        }
#pragma unroll 1
        for (int i = 0; i < num_blocks; ++i, turn.Advance(), stage.Advance()) {
          wgmma::BarrierWait(s_.full(stage.index), stage.phase);
          wgmma::BarrierWait(s_.weighed(turn.index), turn.phase);
          if (__builtin_expect(*s_.moved(turn.index) != 0, 0)) {
            wgmma::Wait<0>();
            Multiply(s_.factors(turn.index));
          }
          Block(stage.index, turn.index, i > 0);
        }
        wgmma::Wait<0>();
        if (num_blocks > 0) ArriveWarp(s_.used(turn.index ^ 1));
        wgmma::BarrierWait(s_.finished(stretch.index), stretch.phase);
        Multiply(s_.finals(stretch.index));
        ArriveWarp(s_.taken(stretch.index));
        Write(work, first);
      }
    }
  }

 private:
  __device__ __forceinline__ int row() const { return lane_ / 4; }
  __device__ __forceinline__ int quad() const { return lane_ % 4; }

  // out += columns . weights: 16 cache rows at a time of either quarter, even columns, then odd ones.
  // before: the block before, whose last product may not have ended, still has its weights.
  __device__ __forceinline__ void Block(uint32_t stage, uint32_t turn, bool before) {
    const uint32_t weights = s_.weights(turn);
    uint32_t rows = s_.stage(stage) + lane_ % 16 * kRowBytes + lane_ / 16 * 16 + column_;
    const unsigned char* ratios = s_.ratios(turn) + column_ / 256 * 2 * kRatioBytes + quad() * 4;
    uint32_t words[4];
    LoadMatricesTransposed(words, rows);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const wgmma::Operand b = Rows(weights + wgmma::RowsStep(step));
#pragma unroll
      for (int quarter = 0; quarter < 2; ++quarter) {
        const uint32_t ratio[2] = {Ratio(ratios, quarter, 0), Ratio(ratios, quarter, 1)};
        uint32_t(&now)[2][4] = a_[quarter];
        wgmma::Wait<1>();
        wgmma::Pin(now);
        if (quarter == 1 && step == 0 && before) ArriveWarp(s_.used(turn ^ 1));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Rows 2 * quad() and the next, of 8: columns 2 * row() and the next.
          const int to = i / 2 + i % 2 * 2;
          uint32_t even;
          uint32_t odd;
          E4m3QuadToHalves(__byte_perm(words[i], 0, 0x3120), even, odd);
          now[0][to] = MultiplyHalves(even, ratio[i % 2]);
          now[1][to] = MultiplyHalves(odd, ratio[i % 2]);
        }
        if (quarter == 0) {
          LoadMatricesTransposed(words, rows + kQuarterBytes);
        } else if (step < 3) {
          rows += 16 * kRowBytes;
          LoadMatricesTransposed(words, rows);
        } else {
          ArriveWarp(s_.empty(stage));
        }
        wgmma::Begin();
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          wgmma::MultiplyHalfRows(out_[quarter * 2 + odd], now[odd], b.At(0), 1);
        }
        wgmma::Commit();
      }
      ratios += 32;
    }
  }

  static __device__ __forceinline__ uint32_t Ratio(const unsigned char* ratios, int quarter,
                                                   int eight) {
    return *reinterpret_cast<const uint32_t*>(ratios + quarter * kRatioBytes + eight * 16);
  }

  __device__ __forceinline__ void Multiply(const float* factors) {
#pragma unroll
    for (int t = 0; t < 4; ++t) wgmma::Pin(out_[t]);
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + i * 8 + quad() * 2);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        out_[t][i * 4] *= factor.x;
        out_[t][i * 4 + 1] *= factor.y;
        out_[t][i * 4 + 2] *= factor.x;
        out_[t][i * 4 + 3] *= factor.y;
      }
    }
  }

  __device__ __forceinline__ void Write(const MlaWork& work, int first) {
    WaitForEarlier();
    const bool partial = work.partial >= 0;
    const int64_t row = first + quad() * 2 +
                        (partial ? int64_t{work.partial} * kMlaTileRows : int64_t{work.first_row});
    const int64_t at = row * 512 + column_ + this->row() * 2;
    const int rows = work.num_rows - first - quad() * 2;
    if (partial || p_.out_fp32) {
      float* const to = (partial ? p_.partial_out : static_cast<float*>(p_.out)) + at;
      Store(rows, [&](int offset, float x, float y) {
        *reinterpret_cast<float2*>(to + offset) = make_float2(x, y);
      });
    } else {
      __nv_bfloat16* const to = static_cast<__nv_bfloat16*>(p_.out) + at;
      Store(rows, [&](int offset, float x, float y) {
        *reinterpret_cast<uint32_t*>(to + offset) = PackBf16(x, y);
      });
    }
  }
  // rows: of the tile from the lane's first.
  template <class Put>
  __device__ __forceinline__ void Store(int rows, const Put& put) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (i * 8 + e >= rows) continue;
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          put((i * 8 + e) * 512 + part / 2 * 128 + part % 2 * 16,
              out_[part / 2 * 2][i * 4 + part % 2 * 2 + e],
              out_[part / 2 * 2 + 1][i * 4 + part % 2 * 2 + e]);
        }
      }
    }
  }

  const MlaParams& p_;
  const Shared s_;
  const int column_;  // the warp's first of its first quarter
  const int lane_;
  float out_[4][kTile / 2];   // [quarter, even or odd columns]
  uint32_t a_[2][2][4] = {};  // of two groups of products in turn, [even or odd columns]
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::codes
