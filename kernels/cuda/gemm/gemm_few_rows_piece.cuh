// SPDX-License-Identifier: Apache-2.0
//
// Piece: 16 rows of a weight by 256 bytes of K, as a warp of the few-rows kernel copies it to its
// part of shared memory, and its product with rows of x. A lane reads only what it copied itself:
// waiting for its own copies is all that orders the two.
#pragma once

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_internal.h"

namespace strait::cuda::few_rows {

inline constexpr int kRows = 16;  // of W, a team

struct alignas(16) Vec {
  uint32_t v[4];
};

// An ordinary load: the read-only path may not see what a kernel wrote that ran beside this one.
__device__ __forceinline__ Vec LoadX(const Bf16* from) {
  const uint4 value = *reinterpret_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}

// Keeps the first `count` of 8 bf16.
__device__ __forceinline__ void KeepBf16(Vec& vec, int count) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (count <= 2 * i) vec.v[i] = 0;
    if (count == 2 * i + 1) vec.v[i] &= 0xffffu;
  }
}

inline constexpr Vec kZero = {{0, 0, 0, 0}};

// A lane has 16 bytes each of rows r and r + 8, kChunks times.
template <bool kFp8>
struct Piece {
  static constexpr int kWidth = GemmPiece(kFp8);
  static constexpr int kScales = kFp8 ? kWidth / kScaleBlock : 1;  // whose sums are apart
  static constexpr int kElement = kFp8 ? 1 : 2;
  static constexpr int kLane = 16 / kElement;  // elements that a lane copies at once
  static constexpr int kChunk = 4 * kLane;
  static constexpr int kChunks = kWidth / kChunk;
  static constexpr int kBytes = kRows * kWidth * kElement;
  static constexpr int kCopyBytes = 32 * 16;  // what a warp's instruction copies
};

// Begins to copy a piece to `to`, this lane's 16 bytes in the warp's slot; what lies beyond K becomes
// zero.
template <bool kFp8>
__device__ __forceinline__ void CopyPiece(uint32_t to, const char* w0, const char* w1, int k0,
                                          int k_end) {
  using P = Piece<kFp8>;
  const int first = k0 + threadIdx.x % 4 * P::kLane;
  if (k0 + P::kWidth <= k_end) {
    w0 += int64_t{first} * P::kElement;
    w1 += int64_t{first} * P::kElement;
#pragma unroll
    for (int c = 0; c < P::kChunks; ++c) {
      CopyAsync(to + (2 * c) * P::kCopyBytes, w0 + c * 64, 16);
      CopyAsync(to + (2 * c + 1) * P::kCopyBytes, w1 + c * 64, 16);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < P::kChunks; ++c) {
    const int k = first + c * P::kChunk;
    const int valid = max(0, min(16, (k_end - k) * P::kElement));
    const int64_t offset = valid > 0 ? int64_t{k} * P::kElement : 0;
    CopyAsync(to + (2 * c) * P::kCopyBytes, w0 + offset, valid);
    CopyAsync(to + (2 * c + 1) * P::kCopyBytes, w1 + offset, valid);
  }
}

template <bool kFp8, int kTokenTiles, int kPending, bool kTail>
__device__ __forceinline__ void MultiplyPart(const Vec* from, const Bf16* const (&x)[kTokenTiles],
                                             int k0, int k_end,
                                             float (&sums)[Piece<kFp8>::kScales][kTokenTiles][4]) {
  using P = Piece<kFp8>;
  const int j = threadIdx.x % 4;
  constexpr int kHalves = P::kLane / 8;  // 8 k at a time: 16 bytes of x
  constexpr int kXLoads = P::kChunks * kHalves;
  // Up to 16 rows of x are on their way before the first weight is looked at; more have no registers.
  constexpr int kAhead = kTokenTiles <= 2 ? 4 : 1;
  Vec b[kAhead][kTokenTiles];
  const auto load_x = [&](int i, Vec(&to)[kTokenTiles]) {
    const int k = k0 + i / kHalves * P::kChunk + j * P::kLane + i % kHalves * 8;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      to[t] = kZero;
      if (!kTail || k < k_end) to[t] = LoadX(x[t] + k);
      if (kTail && k < k_end && k + 8 > k_end) KeepBf16(to[t], k_end - k);
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_x(i, b[i]);
  WaitCopyGroups<kPending>();
#pragma unroll
  for (int i = 0; i < kXLoads; ++i) {
    float(&to)[kTokenTiles][4] = sums[i * P::kScales / kXLoads];
    Vec xs[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) xs[t] = b[i % kAhead][t];
    if (i + kAhead < kXLoads) load_x(i + kAhead, b[i % kAhead]);
    const int c = i / kHalves;
    const int half = i % kHalves;
    uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Vec weights = from[(2 * c + r) * 32];
      if (kFp8) {
        WidenE4m3(weights.v[half * 2], a[r][0], a[r][1]);
        WidenE4m3(weights.v[half * 2 + 1], a[r][2], a[r][3]);
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) a[r][v] = weights.v[v];
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      MmaBf16(to[t], a[0][0], a[1][0], a[0][1], a[1][1], xs[t].v[0], xs[t].v[1]);
      MmaBf16(to[t], a[0][2], a[1][2], a[0][3], a[1][3], xs[t].v[2], xs[t].v[3]);
    }
  }
}

// sums[s] += W[16 rows, the piece's s-th 128 of K] * x[rows, the same]^T (bf16: one sum of it
// all), when all but the last kPending pieces that this lane asked for are there.
template <bool kFp8, int kTokenTiles, int kPending>
__device__ __forceinline__ void Multiply(const Vec* from, const Bf16* const (&x)[kTokenTiles],
                                         int k0, int k_end,
                                         float (&sums)[Piece<kFp8>::kScales][kTokenTiles][4]) {
  if (k0 + Piece<kFp8>::kWidth <= k_end) {
    MultiplyPart<kFp8, kTokenTiles, kPending, false>(from, x, k0, k_end, sums);
  } else {
    MultiplyPart<kFp8, kTokenTiles, kPending, true>(from, x, k0, k_end, sums);
  }
}

// The rows of a matrix that this lane copies.
template <bool kFp8>
struct Rows {
  const char* w0;
  const char* w1;

  Rows() = default;
  __device__ __forceinline__ Rows(const GemmParams& p, const Matrix& w, int group, int n0) {
    const int row = threadIdx.x % 32 / 4;
    const int64_t element = kFp8 ? 1 : 2;
    const char* base = static_cast<const char*>(w.data) + group * p.weight_group_stride * element;
    // Rows beyond the last one are read as the last one, and never written.
    w0 = base + int64_t{min(n0 + row, w.rows - 1)} * w.stride * element;
    w1 = base + int64_t{min(n0 + row + 8, w.rows - 1)} * w.stride * element;
  }
};

// The scales of the piece at k0 of the rows from n0 on; 1 beyond K.
template <bool kFp8>
__device__ __forceinline__ void LoadScales(const GemmParams& p, const Matrix& w, int group, int n0,
                                           int k0, float (&scales)[Piece<kFp8>::kScales]) {
  const int scale_cols = (w.cols + kScaleBlock - 1) / kScaleBlock;
#pragma unroll
  for (int s = 0; s < Piece<kFp8>::kScales; ++s) {
    const int k = k0 + s * kScaleBlock;
    scales[s] = kFp8 && k < w.cols
                    ? w.scales[group * p.scale_group_stride +
                               int64_t{n0 / kScaleBlock} * scale_cols + k / kScaleBlock]
                    : 1.0f;
  }
}

}  // namespace strait::cuda::few_rows
