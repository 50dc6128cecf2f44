// SPDX-License-Identifier: Apache-2.0
//
// The gemm pieces of one instruction set (kernels/gemm.h has the order of the sums).
//
// Why:     two ways to the same bits. Direct: few rows of x against weights as they are stored,
//          for decoding; the limit is memory bandwidth. Panel: weights widened into a panel that
//          stays in the first-level cache while tiles of rows pass over it, for prefill; the limit
//          is two fused multiply-adds a cycle. Between panels of K the 16-lane sums rest in
//          scratch, so that blocking K does not change their order.
#pragma once

#include "kernels/cpu/level.h"
#include "kernels/cpu/simd.h"

namespace strait::cpu::STRAIT_LEVEL {

#if defined(STRAIT_LEVEL_AVX512)
inline constexpr int kDotRows = 4;  // rows of x in a tile of dot products
inline constexpr int kDotCols = 6;  // weight rows in it
inline constexpr int kDirectCols = 4;
#elif defined(STRAIT_LEVEL_AVX2)
inline constexpr int kDotRows = 4;
inline constexpr int kDotCols = 3;
inline constexpr int kDirectCols = 4;
#else
inline constexpr int kDotRows = 2;
inline constexpr int kDotCols = 2;
inline constexpr int kDirectCols = 2;
#endif
static_assert(kGemmPanelN % kDotCols == 0 && kGemmPanelM % kDotRows == 0);

STRAIT_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
STRAIT_INLINE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <WeightType kType>
STRAIT_INLINE Vec LoadStored(const void* p) {
  if constexpr (kType == WeightType::kFp32) return Load(static_cast<const float*>(p));
  if constexpr (kType == WeightType::kBf16) return LoadBf16(p);
  if constexpr (kType == WeightType::kFp16) return LoadF16(p);
  if constexpr (kType == WeightType::kFp8E4m3) return LoadFp8(p);
}

template <WeightType kType>
inline constexpr int64_t kStoredBytes = kType == WeightType::kFp32      ? 4
                                        : kType == WeightType::kFp8E4m3 ? 1
                                                                        : 2;

// A stored fp8 code is read as code * 2^-8, so its scale is taken times 2^8: both are exact.
inline constexpr float kFp8ScaleFactor = 256.0f;

STRAIT_INLINE float Fp8Scale(const WeightMatrix& w, int64_t row, int64_t col) {
  const int64_t scale_cols = (w.cols + kFp8BlockSize - 1) / kFp8BlockSize;
  return w.scale_inv[row / kFp8BlockSize * scale_cols + col / kFp8BlockSize] * kFp8ScaleFactor;
}

template <WeightType kType>
STRAIT_INLINE const char* StoredRow(const WeightMatrix& w, int64_t row) {
  return static_cast<const char*>(w.data) + row * w.cols * kStoredBytes<kType>;
}

// count (1 to 16) stored values at p as 16 lanes, zeros behind them.
template <WeightType kType>
STRAIT_INLINE F32x16 LoadStoredTail(const char* p, int64_t count) {
  char padded[64] = {};
  memcpy(padded, p, static_cast<size_t>(count * kStoredBytes<kType>));
  F32x16 r;
  for (int part = 0; part < kParts; ++part) {
    r.part[part] = LoadStored<kType>(padded + part * kLanes * kStoredBytes<kType>);
  }
  return r;
}

template <WeightType kType>
STRAIT_INLINE F32x16 LoadStored16(const char* p) {
  F32x16 r;
  STRAIT_UNROLL
  for (int part = 0; part < kParts; ++part) {
    r.part[part] = LoadStored<kType>(p + part * kLanes * kStoredBytes<kType>);
  }
  return r;
}

STRAIT_INLINE F32x16 Scale16(const F32x16& v, float scale) {
  F32x16 r;
  const Vec s = Set1(scale);
  STRAIT_UNROLL
  for (int p = 0; p < kParts; ++p) r.part[p] = Mul(v.part[p], s);
  return r;
}

// Columns [k0, k0 + count) of a stored row as fp32, zeros up to the next multiple of 16.
// k0 is a multiple of 16.
template <WeightType kType>
void WidenColumns(const WeightMatrix& w, int64_t row, int64_t k0, int64_t count, float* to) {
  const char* from = StoredRow<kType>(w, row);
  int64_t k = 0;
  while (k < count) {
    const int64_t left = Smaller(16, count - k);
    F32x16 v = left == 16 ? LoadStored16<kType>(from + (k0 + k) * kStoredBytes<kType>)
                          : LoadStoredTail<kType>(from + (k0 + k) * kStoredBytes<kType>, left);
    if constexpr (kType == WeightType::kFp8E4m3) {
      v = Scale16(v, Fp8Scale(w, row, k0 + k));  // 128 is a multiple of 16: one scale
    }
    Store16(to + k, v);
    k += 16;
  }
}

STRAIT_INLINE void WidenColumnsOf(const WeightMatrix& w, int64_t row, int64_t k0, int64_t count,
                                  float* to) {
  switch (w.type) {
    case WeightType::kFp32:
      return WidenColumns<WeightType::kFp32>(w, row, k0, count, to);
    case WeightType::kBf16:
      return WidenColumns<WeightType::kBf16>(w, row, k0, count, to);
    case WeightType::kFp16:
      return WidenColumns<WeightType::kFp16>(w, row, k0, count, to);
    case WeightType::kFp8E4m3:
      return WidenColumns<WeightType::kFp8E4m3>(w, row, k0, count, to);
  }
}

STRAIT_INLINE const float* GemmRow(const GemmParams& p, int64_t m) {
  return p.x + (p.x_rows ? p.x_rows[m] : m) * p.x_stride;
}

STRAIT_INLINE void GemmWrite(const GemmParams& p, int64_t m, int64_t n, const F32x16& lanes) {
  const float sum = Reduce(lanes);
  float* y = p.y + m * p.y_stride + n;
  *y = p.accumulate ? *y + sum : sum;
}

// Whether `count` fp8 codes, a multiple of 16 and at most a block, hold no NaN.
STRAIT_INLINE bool Fp8FiniteRun(const char* p, int64_t count) {
  static_assert(kFp8BlockSize == 128);
  if (count == kFp8BlockSize) return Fp8Finite128(p);
  bool finite = true;
  for (int64_t i = 0; i < count; i += 16) finite &= Fp8Finite16(p + i);
  return finite;
}

// --- Direct --------------------------------------------------------------------------------------

template <WeightType kType, int kRows, int kCols>
void DirectTile(const GemmParams& p, int64_t weight_row, int64_t m0, int64_t n0) {
  constexpr int64_t kBytes = kStoredBytes<kType>;
  // Distance at which a stream is asked for ahead: covers DRAM latency at the rate of one core.
  constexpr int64_t kPrefetch = 1024;
  const WeightMatrix& w = p.weight;
  const int64_t depth = w.cols;
  const float* x[kRows];
  const char* weight[kCols];
  F32x16 acc[kRows][kCols];
  for (int m = 0; m < kRows; ++m) x[m] = GemmRow(p, m0 + m);
  for (int n = 0; n < kCols; ++n) weight[n] = StoredRow<kType>(w, weight_row + n0 + n);
  STRAIT_UNROLL
  for (int m = 0; m < kRows; ++m) {
    STRAIT_UNROLL
    for (int n = 0; n < kCols; ++n) acc[m][n] = Zero16();
  }
  int64_t k = 0;
  // Whole steps of 16 columns up to `end`. fp8: all in one block, and read by `load`.
  const auto run = [&](int64_t end, const float* scale, auto load) STRAIT_INLINE_LAMBDA {
    for (; k < end; k += 16) {
      STRAIT_UNROLL
      for (int n = 0; n < kCols; ++n) {
        const char* at = weight[n] + k * kBytes;
        // A run of fp8 codes was asked for as a whole.
        if constexpr (kType != WeightType::kFp8E4m3) __builtin_prefetch(at + kPrefetch);
        F32x16 v;
        STRAIT_UNROLL
        for (int part = 0; part < kParts; ++part) v.part[part] = load(at + part * kLanes * kBytes);
        if constexpr (kType == WeightType::kFp8E4m3) v = Scale16(v, scale[n]);
        STRAIT_UNROLL
        for (int m = 0; m < kRows; ++m) acc[m][n] = Fma16(Load16(x[m] + k), v, acc[m][n]);
      }
    }
  };
  if constexpr (kType == WeightType::kFp8E4m3) {
    while (k + 16 <= depth) {
      const int64_t end = Smaller(k + kFp8BlockSize, depth / 16 * 16);
      float scale[kCols];
      // Behind a row's end the next tile's row of the same stream follows.
      const int64_t ahead = kPrefetch + (k + kPrefetch < depth ? 0 : (kCols - 1) * depth);
      bool finite = true;  // widening is what takes the time: NaN codes are looked for in bulk
      STRAIT_UNROLL
      for (int n = 0; n < kCols; ++n) {
        const char* at = weight[n] + k;
        scale[n] = Fp8Scale(w, weight_row + n0 + n, k);
        STRAIT_UNROLL
        for (int64_t i = 0; i < kFp8BlockSize; i += 64) __builtin_prefetch(at + ahead + i);
        finite &= Fp8FiniteRun(at, end - k);
      }
      if (finite) {
        run(end, scale, [](const char* at) STRAIT_INLINE_LAMBDA { return LoadFp8Finite(at); });
      } else {
        run(end, scale, [](const char* at) STRAIT_INLINE_LAMBDA { return LoadFp8(at); });
      }
    }
  } else {
    run(depth / 16 * 16, nullptr,
        [](const char* at) STRAIT_INLINE_LAMBDA { return LoadStored<kType>(at); });
  }
  if (k < depth) {
    const int64_t left = depth - k;
    for (int n = 0; n < kCols; ++n) {
      F32x16 v = LoadStoredTail<kType>(weight[n] + k * kBytes, left);
      if constexpr (kType == WeightType::kFp8E4m3) {
        v = Scale16(v, Fp8Scale(w, weight_row + n0 + n, k));
      }
      for (int m = 0; m < kRows; ++m) {
        acc[m][n] =
            Fma16(LoadStoredTail<WeightType::kFp32>(reinterpret_cast<const char*>(x[m] + k), left),
                  v, acc[m][n]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kCols; ++n) GemmWrite(p, m0 + m, n0 + n, acc[m][n]);
  }
}

template <WeightType kType, int kRows>
void DirectRows(const GemmParams& p, int64_t weight_row, int64_t m0, int64_t n0, int64_t n1) {
  constexpr int kCols = kRows == 1 ? kDirectCols : (kDirectCols + 1) / 2;
  int64_t n = n0;
  for (; n + kCols <= n1; n += kCols) DirectTile<kType, kRows, kCols>(p, weight_row, m0, n);
  for (; n < n1; ++n) DirectTile<kType, kRows, 1>(p, weight_row, m0, n);
}

// Rows go three at a time: the first three bring the weights into cache, where the others find
// them.
template <WeightType kType>
void GemmDirect(const GemmParams& p, int64_t weight_row, int64_t m0, int64_t m1, int64_t n0,
                int64_t n1) {
  for (; m1 - m0 >= 3; m0 += 3) DirectRows<kType, 3>(p, weight_row, m0, n0, n1);
  if (m1 - m0 == 2) DirectRows<kType, 2>(p, weight_row, m0, n0, n1);
  if (m1 - m0 == 1) DirectRows<kType, 1>(p, weight_row, m0, n0, n1);
}

// --- Panel ---------------------------------------------------------------------------------------

// acc[m][n][16] += a[m] . b[n] over steps * 16 values. Part `p` of 16-group `s` of b[n] lies at
// b + n * b_col + s * b_step + p * b_part.
template <int kRows, int kCols>
STRAIT_INLINE void DotTile(const float* const* a, const float* b, int64_t b_col, int64_t b_step,
                           int64_t b_part, int64_t steps, float* acc) {
  for (int part = 0; part < kParts; ++part) {
    Vec sum[kRows][kCols];
    STRAIT_UNROLL
    for (int m = 0; m < kRows; ++m) {
      STRAIT_UNROLL
      for (int n = 0; n < kCols; ++n) sum[m][n] = Load(acc + (m * kCols + n) * 16 + part * kLanes);
    }
    const float* rows[kRows];
    STRAIT_UNROLL
    for (int m = 0; m < kRows; ++m) rows[m] = a[m] + part * kLanes;
    const float* cols = b + part * b_part;
    for (int64_t s = 0; s < steps; ++s) {
      Vec col[kCols];
      STRAIT_UNROLL
      for (int n = 0; n < kCols; ++n) col[n] = Load(cols + n * b_col);
      STRAIT_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const Vec row = Load(rows[m] + s * 16);
        STRAIT_UNROLL
        for (int n = 0; n < kCols; ++n) sum[m][n] = Fma(row, col[n], sum[m][n]);
      }
      cols += b_step;
    }
    STRAIT_UNROLL
    for (int m = 0; m < kRows; ++m) {
      STRAIT_UNROLL
      for (int n = 0; n < kCols; ++n) Store(acc + (m * kCols + n) * 16 + part * kLanes, sum[m][n]);
    }
  }
}

// The same with fewer rows than a whole tile (1 to kDotRows).
template <int kCols, int kRows = kDotRows>
STRAIT_INLINE void DotTileRows(int64_t num_rows, const float* const* a, const float* b,
                               int64_t b_col, int64_t b_step, int64_t b_part, int64_t steps,
                               float* acc) {
  if (num_rows == kRows) return DotTile<kRows, kCols>(a, b, b_col, b_step, b_part, steps, acc);
  if constexpr (kRows > 1) {
    DotTileRows<kCols, kRows - 1>(num_rows, a, b, b_col, b_step, b_part, steps, acc);
  }
}

// One weight row's columns k0 + [0, count) into its place in a panel tile, zeros behind them.
template <WeightType kType>
void PackRow(const WeightMatrix& w, int64_t row, int64_t k0, int64_t count, float* to) {
  constexpr int64_t kBytes = kStoredBytes<kType>;
  constexpr int64_t kStep = kDotCols * kLanes;
  const char* from = StoredRow<kType>(w, row) + k0 * kBytes;
  const int64_t steps = (count + 15) / 16;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t left = count - s * 16;
    F32x16 v = left >= 16 ? LoadStored16<kType>(from + s * 16 * kBytes)
                          : LoadStoredTail<kType>(from + s * 16 * kBytes, left);
    if constexpr (kType == WeightType::kFp8E4m3) v = Scale16(v, Fp8Scale(w, row, k0 + s * 16));
    STRAIT_UNROLL
    for (int part = 0; part < kParts; ++part) Store(to + (part * steps + s) * kStep, v.part[part]);
  }
}

// Widens weight rows row0 + [0, num_cols) for columns k0 + [0, count), zeros up to a whole tile:
// panel[tile][part][step][col][lane].
void PackPanel(const WeightMatrix& w, int64_t row0, int64_t num_cols, int64_t k0, int64_t count,
               float* panel) {
  const int64_t steps = (count + 15) / 16;
  const int64_t padded_cols = (num_cols + kDotCols - 1) / kDotCols * kDotCols;
  for (int64_t n = 0; n < padded_cols; ++n) {
    float* to = panel + n / kDotCols * kDotCols * steps * 16 + n % kDotCols * kLanes;
    if (n >= num_cols) {
      for (int64_t i = 0; i < kParts * steps; ++i) Store(to + i * kDotCols * kLanes, Zero());
      continue;
    }
    switch (w.type) {
      case WeightType::kFp32:
        PackRow<WeightType::kFp32>(w, row0 + n, k0, count, to);
        break;
      case WeightType::kBf16:
        PackRow<WeightType::kBf16>(w, row0 + n, k0, count, to);
        break;
      case WeightType::kFp16:
        PackRow<WeightType::kFp16>(w, row0 + n, k0, count, to);
        break;
      case WeightType::kFp8E4m3:
        PackRow<WeightType::kFp8E4m3>(w, row0 + n, k0, count, to);
        break;
    }
  }
}

// Asks for the stored bytes of columns k0 + [0, count) of some weight rows.
STRAIT_INLINE void PrefetchRows(const WeightMatrix& w, int64_t row0, int64_t row1, int64_t k0,
                                int64_t count) {
  const int64_t bytes = w.type == WeightType::kFp32 ? 4 : w.type == WeightType::kFp8E4m3 ? 1 : 2;
  for (int64_t row = row0; row < row1; ++row) {
    const char* from = static_cast<const char*>(w.data) + (row * w.cols + k0) * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

void GemmPanel(const GemmParams& p, int64_t weight_row, int64_t m0, int64_t m1, int64_t n0,
               int64_t n1, float* scratch) {
  const int64_t depth = p.weight.cols;
  float* panel = scratch;
  float* acc = panel + kGemmPanelN * kGemmPanelK;
  float* padded = acc + kGemmPanelM * kGemmPanelN * 16;
  const int64_t num_tiles = (n1 - n0 + kDotCols - 1) / kDotCols;
  constexpr int64_t kTileFloats = kDotRows * kDotCols * 16;
  const int64_t num_row_tiles = (m1 - m0 + kDotRows - 1) / kDotRows;
  memset(acc, 0, static_cast<size_t>(num_row_tiles * num_tiles * kTileFloats) * sizeof(float));

  for (int64_t k0 = 0; k0 < depth; k0 += kGemmPanelK) {
    const int64_t count = Smaller(kGemmPanelK, depth - k0);
    const int64_t steps = (count + 15) / 16;
    PackPanel(p.weight, weight_row + n0, n1 - n0, k0, count, panel);
    for (int64_t i = 0; i < num_row_tiles; ++i) {
      const int64_t m = m0 + i * kDotRows;
      const int64_t num_rows = Smaller(kDotRows, m1 - m);
      const float* a[kDotRows];
      for (int64_t r = 0; r < num_rows; ++r) {
        a[r] = GemmRow(p, m + r) + k0;
        if (count % 16 != 0) {  // whole steps would read past the row: zeros stand in
          float* copy = padded + r * kGemmPanelK;
          memset(copy + (steps - 1) * 16, 0, 16 * sizeof(float));
          memcpy(copy, a[r], static_cast<size_t>(count) * sizeof(float));
          a[r] = copy;
        }
      }
      // The next panel's weights come from memory: a share is fetched under each row of tiles.
      const int64_t cols = n1 - n0;
      PrefetchRows(p.weight, weight_row + n0 + cols * i / num_row_tiles,
                   weight_row + n0 + cols * (i + 1) / num_row_tiles, k0 + kGemmPanelK,
                   Smaller(kGemmPanelK, depth - k0 - kGemmPanelK));
      float* tile_acc = acc + i * num_tiles * kTileFloats;
      for (int64_t t = 0; t < num_tiles; ++t) {
        DotTileRows<kDotCols>(num_rows, a, panel + t * kDotCols * steps * 16, kLanes,
                              kDotCols * kLanes, steps * kDotCols * kLanes, steps,
                              tile_acc + t * kTileFloats);
      }
    }
  }
  for (int64_t i = 0; i < num_row_tiles; ++i) {
    for (int64_t r = 0; r < Smaller(kDotRows, m1 - m0 - i * kDotRows); ++r) {
      for (int64_t n = 0; n < n1 - n0; ++n) {
        const float* lanes =
            acc + (i * num_tiles + n / kDotCols) * kTileFloats + (r * kDotCols + n % kDotCols) * 16;
        GemmWrite(p, m0 + i * kDotRows + r, n0 + n, Load16(lanes));
      }
    }
  }
}

void Gemm(const GemmParams& p, int64_t weight_row, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
          float* scratch) {
  if (m1 - m0 > kGemmDirectRows) return GemmPanel(p, weight_row, m0, m1, n0, n1, scratch);
  switch (p.weight.type) {
    case WeightType::kFp32:
      return GemmDirect<WeightType::kFp32>(p, weight_row, m0, m1, n0, n1);
    case WeightType::kBf16:
      return GemmDirect<WeightType::kBf16>(p, weight_row, m0, m1, n0, n1);
    case WeightType::kFp16:
      return GemmDirect<WeightType::kFp16>(p, weight_row, m0, m1, n0, n1);
    case WeightType::kFp8E4m3:
      return GemmDirect<WeightType::kFp8E4m3>(p, weight_row, m0, m1, n0, n1);
  }
}

void WidenRow(const WeightMatrix& w, int64_t row, float* y) {
  const int64_t whole = w.cols / 16 * 16;
  if (whole > 0) WidenColumnsOf(w, row, 0, whole, y);
  if (whole < w.cols) {
    float tail[16];
    WidenColumnsOf(w, row, whole, w.cols - whole, tail);
    memcpy(y + whole, tail, static_cast<size_t>(w.cols - whole) * sizeof(float));
  }
}

}  // namespace strait::cpu::STRAIT_LEVEL
