// SPDX-License-Identifier: Apache-2.0
//
// Piece: 16 rows of a weight by 128 of K, as a warp of the few-rows kernel holds it in registers, and
// its product with rows of x.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_internal.h"

namespace strait::cuda::few_rows {

inline constexpr int kRows = 16;           // of W, a team
inline constexpr int kPiece = kGemmPiece;  // of K, a warp at a time; one fp8 scale

struct Vec {
  uint32_t v[4];  // 16 bytes
};

__device__ __forceinline__ Vec LoadWeight(const void* from) {
  const uint4 value = __ldcs(static_cast<const uint4*>(from));  // read once
  return {{value.x, value.y, value.z, value.w}};
}

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

// Keeps the first `count` of 16 codes.
__device__ __forceinline__ void KeepCodes(Vec& vec, int count) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int bytes = count - 4 * i;
    if (bytes <= 0) vec.v[i] = 0;
    if (bytes > 0 && bytes < 4) vec.v[i] &= (1u << (8 * bytes)) - 1;
  }
}

inline constexpr Vec kZero = {{0, 0, 0, 0}};

// A 128-wide piece of 16 rows of W, as a lane holds it: rows r and r + 8.
template <bool kFp8>
struct Piece {
  static constexpr int kLane = kFp8 ? 16 : 8;  // elements that a lane loads at once
  static constexpr int kChunk = 4 * kLane;
  Vec weights[kPiece / kChunk][2];
};

// kTail: the piece goes beyond K, and what lies there counts as zero.
template <bool kFp8, bool kTail>
__device__ __forceinline__ void LoadPart(Piece<kFp8>& piece, const char* w0, const char* w1, int k0,
                                         int k_end) {
  using P = Piece<kFp8>;
  const int j = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kPiece / P::kChunk; ++c) {
    const int k = k0 + c * P::kChunk + j * P::kLane;
    const int64_t offset = int64_t{k} * (kFp8 ? 1 : 2);
    if (!kTail || k < k_end) {
      piece.weights[c][0] = LoadWeight(w0 + offset);
      piece.weights[c][1] = LoadWeight(w1 + offset);
    } else {
      piece.weights[c][0] = piece.weights[c][1] = kZero;
    }
    if (kTail && k < k_end && k + P::kLane > k_end) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (kFp8) {
          KeepCodes(piece.weights[c][r], k_end - k);
        } else {
          KeepBf16(piece.weights[c][r], k_end - k);
        }
      }
    }
  }
}

// One branch for the whole piece, so that all its loads are issued together.
template <bool kFp8>
__device__ __forceinline__ void Load(Piece<kFp8>& piece, const char* w0, const char* w1, int k0,
                                     int k_end) {
  if (k0 + kPiece <= k_end) {
    LoadPart<kFp8, false>(piece, w0, w1, k0, k_end);
  } else {
    LoadPart<kFp8, true>(piece, w0, w1, k0, k_end);
  }
}

template <bool kFp8, int kTokenTiles, bool kTail>
__device__ __forceinline__ void MultiplyPart(const Piece<kFp8>& piece,
                                             const Bf16* const (&x)[kTokenTiles], int k0, int k_end,
                                             float (&sums)[kTokenTiles][4]) {
  using P = Piece<kFp8>;
  const int j = threadIdx.x % 4;
  constexpr int kHalves = P::kLane / 8;  // 8 k at a time: 16 bytes of x
  constexpr int kXLoads = kPiece / P::kChunk * kHalves;
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
#pragma unroll
  for (int i = 0; i < kXLoads; ++i) {
    if (kAhead != kXLoads) load_x(i, b[0]);
    const int c = i / kHalves;
    const int half = i % kHalves;
    uint32_t a[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (kFp8) {
        WidenE4m3(piece.weights[c][r].v[half * 2], a[r][0], a[r][1]);
        WidenE4m3(piece.weights[c][r].v[half * 2 + 1], a[r][2], a[r][3]);
      } else {
#pragma unroll
        for (int v = 0; v < 4; ++v) a[r][v] = piece.weights[c][r].v[v];
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

// sums += W[16 rows, piece] * x[rows, piece]^T.
template <bool kFp8, int kTokenTiles>
__device__ __forceinline__ void Multiply(const Piece<kFp8>& piece,
                                         const Bf16* const (&x)[kTokenTiles], int k0, int k_end,
                                         float (&sums)[kTokenTiles][4]) {
  if (k0 + kPiece <= k_end) {
    MultiplyPart<kFp8, kTokenTiles, false>(piece, x, k0, k_end, sums);
  } else {
    MultiplyPart<kFp8, kTokenTiles, true>(piece, x, k0, k_end, sums);
  }
}

// One matrix's part of a block's work: the rows that this lane reads.
template <bool kFp8>
struct Rows {
  const char* w0;
  const char* w1;
  const float* scales;

  Rows() = default;
  __device__ __forceinline__ Rows(const GemmParams& p, const Matrix& w, int group, int n0) {
    const int row = threadIdx.x % 32 / 4;
    const int64_t element = kFp8 ? 1 : 2;
    const char* base = static_cast<const char*>(w.data) + group * p.weight_group_stride * element;
    // Rows beyond the last one are read as the last one, and never written.
    w0 = base + int64_t{min(n0 + row, w.rows - 1)} * w.stride * element;
    w1 = base + int64_t{min(n0 + row + 8, w.rows - 1)} * w.stride * element;
    scales = nullptr;
    if (kFp8) {
      const int scale_cols = (w.cols + kScaleBlock - 1) / kScaleBlock;
      scales = w.scales + group * p.scale_group_stride + int64_t{n0 / kScaleBlock} * scale_cols;
    }
  }
};

}  // namespace strait::cuda::few_rows
