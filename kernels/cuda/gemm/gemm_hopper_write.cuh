// SPDX-License-Identifier: Apache-2.0
//
// WriteTile gives a warpgroup's sums out: as they are, added to fp32, or as gated pairs. Sums lie in
// the threads as MultiplyRows (ptx.cuh) leaves them, so a thread has pairs of neighbours.
//
// Why:     what is added to is loaded in batches: one by one, each load would wait for the store
//          before it. Pairs go out together where all of a row's are aligned.
#pragma once

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_internal.h"

namespace strait::cuda::hopper_gemm {

// Neighbours `to` and the next, of which `left` exist.
template <bool kPairs>
__device__ __forceinline__ float2 LoadPair(const float* from, int left) {
  if (kPairs && left >= 2) return *reinterpret_cast<const float2*>(from);
  return make_float2(left >= 1 ? from[0] : 0.0f, left >= 2 ? from[1] : 0.0f);
}
template <bool kPairs>
__device__ __forceinline__ void StorePair(float* to, int left, float2 value) {
  if (kPairs && left >= 2) {
    *reinterpret_cast<float2*>(to) = value;
    return;
  }
  if (left >= 1) to[0] = value.x;
  if (left >= 2) to[1] = value.y;
}
template <bool kPairs>
__device__ __forceinline__ void StorePair(Bf16* to, int left, float2 value) {
  if (kPairs && left >= 2) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(value.x, value.y);
    return;
  }
  if (left >= 1) to[0] = __float2bfloat16(value.x);
  if (left >= 2) to[1] = __float2bfloat16(value.y);
}

// One row of this thread's outputs; half: the first of its two rows, or the other. `to` is its first
// output's place, `left` how many columns are left there.
template <bool kGated, bool kPairs, int kSums, class To>
__device__ __forceinline__ void WriteRow(const float (&sums)[kSums], int half, To* to, int left,
                                         bool add) {
  constexpr int kRowPairs = kSums / 4 / (kGated ? 2 : 1);
  constexpr int kBatch = kRowPairs < 16 ? kRowPairs : 16;
#pragma unroll
  for (int begin = 0; begin < kRowPairs; begin += kBatch) {
    float2 old[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) old[i] = make_float2(0, 0);
    if constexpr (!kGated && sizeof(To) == sizeof(float)) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = 8 * (begin + i);
        if (add) old[i] = LoadPair<kPairs>(to + at, left - at);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int sum = 4 * (begin + i) + 2 * half;
      float2 value = make_float2(sums[sum], sums[sum + 1]);
      if constexpr (kGated) {
        constexpr int kUp = kSums / 2;
        value = make_float2(Silu(value.x) * sums[kUp + sum], Silu(value.y) * sums[kUp + sum + 1]);
      } else {
        value = make_float2(old[i].x + value.x, old[i].y + value.y);
      }
      const int at = 8 * (begin + i);
      StorePair<kPairs>(to + at, left - at, value);
    }
  }
}

// Where a thread's sums belong: its first row and column in the tile.
struct TilePlace {
  int row;
  int column;
};

template <bool kGated, int kSums, class To>
__device__ __forceinline__ void WriteRows(const float (&sums)[kSums], TilePlace at, To* y,
                                          int64_t y_stride, int num_rows, int columns, bool add) {
  const bool pairs = y_stride % 2 == 0 && reinterpret_cast<uintptr_t>(y) % (2 * sizeof(To)) == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = at.row + half * 8;
    if (row >= num_rows) break;
    To* const to = y + row * y_stride + at.column;
    if (pairs) {
      WriteRow<kGated, true>(sums, half, to, columns - at.column, add);
    } else {
      WriteRow<kGated, false>(sums, half, to, columns - at.column, add);
    }
  }
}

// The tile of `item` that begins at output n0; with several shares of K, to this share's partial sums.
template <bool kGated, int kSums>
__device__ __forceinline__ void WriteTile(const GemmParams& p, const float (&sums)[kSums],
                                          TilePlace at, const GemmItem& item, int n0, int share,
                                          int num_shares) {
  const int columns = p.weight.rows - n0;
  const int64_t first = item.group * p.y_group_stride + item.begin * p.y_stride + n0;
  if (p.y_bf16 != nullptr && num_shares == 1) {
    WriteRows<kGated>(sums, at, p.y_bf16 + first, p.y_stride, item.count, columns, false);
    return;
  }
  if constexpr (!kGated) {
    const int64_t width = p.weight.rows;
    if (num_shares > 1) {
      float* const partial = p.split_sums + (int64_t{share} * p.num_rows + item.begin) * width + n0;
      WriteRows<false>(sums, at, partial, width, item.count, columns, false);
    } else {
      WriteRows<false>(sums, at, p.y_fp32 + first, p.y_stride, item.count, columns, p.accumulate);
    }
  }
}

}  // namespace strait::cuda::hopper_gemm
