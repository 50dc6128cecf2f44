// SPDX-License-Identifier: Apache-2.0
//
// Piece: 16 rows of a weight by 128 of K, as a warp of the few-rows kernel copies it to its part of
// shared memory, and its product with rows of x. A lane reads only what it copied itself: waiting for
// its own copies is all that orders the two.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_internal.h"

namespace strait::cuda::few_rows {

inline constexpr int kRows = 16;           // of W, a team
inline constexpr int kPiece = kGemmPiece;  // of K, a warp at a time; one fp8 scale

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

// A 128-wide piece of 16 rows of W: a lane has 16 bytes each of rows r and r + 8, kChunks times.
template <bool kFp8>
struct Piece {
  static constexpr int kLane = kFp8 ? 16 : 8;  // elements that a lane copies at once
  static constexpr int kChunk = 4 * kLane;
  static constexpr int kChunks = kPiece / kChunk;
  static constexpr int kBytes = kRows * kPiece * (kFp8 ? 1 : 2);
};

// Begins to copy a piece to `to`, this lane's 16 bytes in the warp's slot; what lies beyond K becomes
// zero.
template <bool kFp8>
__device__ __forceinline__ void CopyPiece(uint32_t to, const char* w0, const char* w1, int k0,
                                          int k_end) {
  using P = Piece<kFp8>;
  constexpr int kElement = kFp8 ? 1 : 2;
  const int first = k0 + threadIdx.x % 4 * P::kLane;
#pragma unroll
  for (int c = 0; c < P::kChunks; ++c) {
    const int k = first + c * P::kChunk;
    const int valid = max(0, min(16, (k_end - k) * kElement));
    const int64_t offset = valid > 0 ? int64_t{k} * kElement : 0;
    CopyAsync(to + (2 * c) * 512, w0 + offset, valid);
    CopyAsync(to + (2 * c + 1) * 512, w1 + offset, valid);
  }
}

template <bool kFp8, int kTokenTiles, int kPending, bool kTail>
__device__ __forceinline__ void MultiplyPart(const Vec* from, const Bf16* const (&x)[kTokenTiles],
                                             int k0, int k_end, float (&sums)[kTokenTiles][4]) {
  using P = Piece<kFp8>;
  const int j = threadIdx.x % 4;
  constexpr int kHalves = P::kLane / 8;  // 8 k at a time: 16 bytes of x
  constexpr int kXLoads = P::kChunks * kHalves;
  // Up to 16 rows of x are on their way before the first weight is looked at; more have no registers.
  constexpr int kAhead = kTokenTiles <= 2 ? kXLoads : 1;
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
  if (kAhead == kXLoads) {
#pragma unroll
    for (int i = 0; i < kXLoads; ++i) load_x(i, b[i % kAhead]);
  }
  WaitCopyGroups<kPending>();
#pragma unroll
  for (int i = 0; i < kXLoads; ++i) {
    if (kAhead != kXLoads) load_x(i, b[0]);
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
      const Vec& xs = b[i % kAhead][t];
      MmaBf16(sums[t], a[0][0], a[1][0], a[0][1], a[1][1], xs.v[0], xs.v[1]);
      MmaBf16(sums[t], a[0][2], a[1][2], a[0][3], a[1][3], xs.v[2], xs.v[3]);
    }
  }
}

// sums += W[16 rows, piece] * x[rows, piece]^T, when all but the last kPending pieces that this lane
// asked for are there.
template <bool kFp8, int kTokenTiles, int kPending>
__device__ __forceinline__ void Multiply(const Vec* from, const Bf16* const (&x)[kTokenTiles],
                                         int k0, int k_end, float (&sums)[kTokenTiles][4]) {
  if (k0 + kPiece <= k_end) {
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

// The scale of piece k0 of the rows from n0 on.
template <bool kFp8>
__device__ __forceinline__ float ScaleOf(const GemmParams& p, const Matrix& w, int group, int n0,
                                         int k0) {
  if (!kFp8 || k0 >= w.cols) return 1.0f;
  const int scale_cols = (w.cols + kScaleBlock - 1) / kScaleBlock;
  return w.scales[group * p.scale_group_stride + int64_t{n0 / kScaleBlock} * scale_cols +
                  k0 / kScaleBlock];
}

}  // namespace strait::cuda::few_rows
