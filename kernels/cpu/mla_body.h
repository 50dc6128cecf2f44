// SPDX-License-Identifier: Apache-2.0
//
// Attention and query absorption of one instruction set (kernels/mla.h has the order of the sums).
//
// Why:     both products of attention are register tiles over (token, head) pairs: scores with the
//          lanes along the row (as in gemm), values with the lanes along the latent and the rows
//          in order. A cache block is read once for up to 32 pairs and stays in the second-level
//          cache between the two products. The limit is two fused multiply-adds a cycle.
#pragma once

#include "kernels/cpu/gemm_body.h"
#include "kernels/cpu/level.h"
#include "kernels/cpu/simd.h"

namespace strait::cpu::STRAIT_LEVEL {

#if defined(STRAIT_LEVEL_AVX512)
inline constexpr int kAxpyRows = 8;  // rows of c in a tile
inline constexpr int kAxpyVecs = 2;  // vectors of columns in it
#elif defined(STRAIT_LEVEL_AVX2)
inline constexpr int kAxpyRows = 6;
inline constexpr int kAxpyVecs = 2;
#else
inline constexpr int kAxpyRows = 2;
inline constexpr int kAxpyVecs = 1;
#endif

// c[m][col] += a[m][k] * b[k][col] for k in order, over kVecs vectors of columns.
template <int kRows, int kVecs>
STRAIT_INLINE void AxpyTile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                            int64_t depth, float* c, int64_t c_stride) {
  Vec sum[kRows][kVecs];
  STRAIT_UNROLL
  for (int m = 0; m < kRows; ++m) {
    STRAIT_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[m][v] = Load(c + m * c_stride + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
    STRAIT_UNROLL
    for (int v = 0; v < kVecs; ++v) row[v] = Load(b + v * kLanes);
    b += b_stride;
    STRAIT_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = Set1(a[m * a_stride + k]);
      STRAIT_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[m][v] = Fma(factor, row[v], sum[m][v]);
    }
  }
  STRAIT_UNROLL
  for (int m = 0; m < kRows; ++m) {
    STRAIT_UNROLL
    for (int v = 0; v < kVecs; ++v) Store(c + m * c_stride + v * kLanes, sum[m][v]);
  }
}

template <int kVecs, int kRows>
STRAIT_INLINE void AxpyTileRows(int64_t num_rows, const float* a, int64_t a_stride, const float* b,
                                int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
  if (num_rows == kRows) {
    return AxpyTile<kRows, kVecs>(a, a_stride, b, b_stride, depth, c, c_stride);
  }
  if constexpr (kRows > 1) {
    AxpyTileRows<kVecs, kRows - 1>(num_rows, a, a_stride, b, b_stride, depth, c, c_stride);
  }
}

// c[0..num_rows][0..cols] += a b; cols is a multiple of 16. Strips of columns go outermost, so that
// a strip of b stays in the first-level cache for all rows.
void Axpy(int64_t num_rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
          int64_t depth, float* c, int64_t c_stride, int64_t cols) {
  constexpr int64_t kStrip = kAxpyVecs * kLanes;
  int64_t col = 0;
  for (; col + kStrip <= cols; col += kStrip) {
    for (int64_t m = 0; m < num_rows; m += kAxpyRows) {
      AxpyTileRows<kAxpyVecs, kAxpyRows>(Smaller(kAxpyRows, num_rows - m), a + m * a_stride,
                                         a_stride, b + col, b_stride, depth, c + m * c_stride + col,
                                         c_stride);
    }
  }
  for (; col < cols; col += kLanes) {
    for (int64_t m = 0; m < num_rows; m += kAxpyRows) {
      AxpyTileRows<1, kAxpyRows>(Smaller(kAxpyRows, num_rows - m), a + m * a_stride, a_stride,
                                 b + col, b_stride, depth, c + m * c_stride + col, c_stride);
    }
  }
}

void Absorb(const AbsorbQueryParams& p, int64_t head, int64_t t0, int64_t t1, float* scratch) {
  const int64_t rank = p.kv_b_proj.cols;
  const int64_t cols = (rank + 15) / 16 * 16;
  const int64_t first_row = head * (p.qk_nope_head_dim + p.v_head_dim);
  float* panel = scratch;                      // [kAbsorbRows, cols]
  float* sums = panel + kAbsorbRows * cols;    // [kAbsorbTokens, cols]
  float* query = sums + kAbsorbTokens * cols;  // [kAbsorbTokens, kAbsorbRows]
  memset(sums, 0, static_cast<size_t>((t1 - t0) * cols) * sizeof(float));
  for (int64_t d0 = 0; d0 < p.qk_nope_head_dim; d0 += kAbsorbRows) {
    const int64_t rows = Smaller(kAbsorbRows, p.qk_nope_head_dim - d0);
    for (int64_t d = 0; d < rows; ++d) {
      WidenColumnsOf(p.kv_b_proj, first_row + d0 + d, 0, rank, panel + d * cols);
    }
    for (int64_t t = t0; t < t1; ++t) {
      memcpy(query + (t - t0) * kAbsorbRows,
             p.q_nope + t * p.q_token_stride + head * p.q_head_stride + d0,
             static_cast<size_t>(rows) * sizeof(float));
    }
    Axpy(t1 - t0, query, kAbsorbRows, panel, cols, rows, sums, cols, cols);
  }
  for (int64_t t = t0; t < t1; ++t) {
    memcpy(p.q_latent + (t * p.num_heads + head) * rank, sums + (t - t0) * cols,
           static_cast<size_t>(rank) * sizeof(float));
  }
}

// --- Attention -----------------------------------------------------------------------------------

// Widths of a row in scratch: latent and rope key, each padded with zeros to 16.
struct MlaWidths {
  int64_t rank, rope, rank_pad, width;
};
STRAIT_INLINE MlaWidths WidthsOf(const CacheLayout& layout) {
  const int64_t rank_pad = (layout.kv_lora_rank + 15) / 16 * 16;
  const int64_t rope_pad = (layout.qk_rope_head_dim + 15) / 16 * 16;
  return {layout.kv_lora_rank, layout.qk_rope_head_dim, rank_pad, rank_pad + rope_pad};
}

STRAIT_INLINE void WidenBf16(const char* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    Store16(to + i, LoadStored16<WeightType::kBf16>(from + i * 2));
  }
  if (i < count) {
    Store16(to + i, LoadStoredTail<WeightType::kBf16>(from + i * 2, count - i));
  }
}

STRAIT_INLINE void CopyPadded(const char* from, int64_t count, float* to) {
  memset(to + count, 0, static_cast<size_t>((16 - count % 16) % 16) * sizeof(float));
  memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// The first num_rows rows of a block as fp32, padded: in place where they lie like that already.
STRAIT_INLINE const float* BlockRows(const MlaParams& p, const MlaWidths& w, const char* block,
                                     int64_t num_rows, float* scratch, int64_t* stride) {
  const bool in_place =
      p.layout.format == RowFormat::kFp32 && w.rank == w.rank_pad && w.rank + w.rope == w.width;
  if (in_place) {
    *stride = p.layout.row_bytes / 4;
    return reinterpret_cast<const float*>(block);
  }
  *stride = w.width;
  for (int64_t r = 0; r < num_rows; ++r) {
    const char* row = block + r * p.layout.row_bytes;
    float* to = scratch + r * w.width;
    if (p.layout.format == RowFormat::kFp32) {
      CopyPadded(row, w.rank, to);
      CopyPadded(row + p.layout.rope_key_offset, w.rope, to + w.rank_pad);
    } else {
      WidenBf16(row, w.rank, to);
      WidenBf16(row + p.layout.rope_key_offset, w.rope, to + w.rank_pad);
    }
  }
  return scratch;
}

// scores[m][r] = scale * (query m . row r), for the first num_rows rows.
void Scores(const float* query, int64_t num_pairs, const float* rows, int64_t stride,
            int64_t num_rows, int64_t width, float scale, float* scores) {
  for (int64_t m = 0; m < num_pairs; m += kDotRows) {
    const int64_t pairs = Smaller(kDotRows, num_pairs - m);
    const float* a[kDotRows];
    for (int64_t i = 0; i < pairs; ++i) a[i] = query + (m + i) * width;
    for (int64_t r = 0; r < num_rows;) {
      float acc[kDotRows * kDotCols * 16] = {};
      const bool whole = num_rows - r >= kDotCols;
      const int64_t cols = whole ? kDotCols : 1;
      const float* b = rows + r * stride;
      if (whole) {
        DotTileRows<kDotCols>(pairs, a, b, stride, 16, kLanes, width / 16, acc);
      } else {
        DotTileRows<1>(pairs, a, b, stride, 16, kLanes, width / 16, acc);
      }
      for (int64_t i = 0; i < pairs; ++i) {
        for (int64_t n = 0; n < cols; ++n) {
          scores[(m + i) * kCacheBlockTokens + r + n] =
              Reduce(Load16(acc + (i * cols + n) * 16)) * scale;
        }
      }
      r += cols;
    }
  }
}

// Turns one pair's scores of a block into weights, and rescales what it has summed before.
STRAIT_INLINE void SoftmaxBlock(float* scores, int64_t num_valid, bool first, float* max,
                                float* sum, float* out, int64_t out_width) {
  for (int64_t r = num_valid; r < kCacheBlockTokens; ++r) scores[r] = -__builtin_inff();
  F32x16 s[4];
  for (int i = 0; i < 4; ++i) s[i] = Load16(scores + i * 16);
  const float block_max = ReduceMax(Max16(Max16(s[0], s[1]), Max16(s[2], s[3])));
  const float new_max = first || block_max > *max ? block_max : *max;
  F32x16 shift;
  for (int p = 0; p < kParts; ++p) shift.part[p] = Set1(new_max);
  for (int i = 0; i < 4; ++i) {
    s[i] = Sub16(s[i], shift);
    for (int p = 0; p < kParts; ++p) s[i].part[p] = Exp(s[i].part[p]);
    Store16(scores + i * 16, s[i]);
  }
  const float block_sum = Reduce(Add16(Add16(s[0], s[1]), Add16(s[2], s[3])));
  if (first) {
    *sum = block_sum;
    memset(out, 0, static_cast<size_t>(out_width) * sizeof(float));
  } else if (new_max == *max) {  // the factor below would be exactly 1
    *sum += block_sum;
  } else {
    const float factor = ExpOne(*max - new_max);
    *sum = *sum * factor + block_sum;
    const Vec f = Set1(factor);
    for (int64_t i = 0; i < out_width; i += kLanes) Store(out + i, Mul(Load(out + i), f));
  }
  *max = new_max;
}

// out[m] += weights[m] . latents, rows in order, each pair over its own number of valid rows.
STRAIT_INLINE void Values(const float* weights, const int64_t* num_valid, int64_t num_pairs,
                          const float* rows, int64_t stride, float* out, int64_t out_width) {
  int64_t common = num_valid[0];
  for (int64_t m = 1; m < num_pairs; ++m) common = Smaller(common, num_valid[m]);
  Axpy(num_pairs, weights, kCacheBlockTokens, rows, stride, common, out, out_width, out_width);
  for (int64_t m = 0; m < num_pairs; ++m) {
    if (num_valid[m] == common) continue;
    Axpy(1, weights + m * kCacheBlockTokens + common, kCacheBlockTokens, rows + common * stride,
         stride, num_valid[m] - common, out + m * out_width, out_width, out_width);
  }
}

void FoldSpan(const MlaWidths& w, int64_t pair, const MlaPartial& total, const MlaPartial& next) {
  const float max1 = total.max[pair];
  const float max2 = next.max[pair];
  const float max = max2 > max1 ? max2 : max1;
  const float f1 = ExpOne(max1 - max);
  const float f2 = ExpOne(max2 - max);
  total.max[pair] = max;
  total.sum[pair] = total.sum[pair] * f1 + next.sum[pair] * f2;
  float* out = total.out + pair * w.rank_pad;
  const float* more = next.out + pair * w.rank_pad;
  for (int64_t i = 0; i < w.rank_pad; i += kLanes) {
    Store(out + i, Fma(Load(more + i), Set1(f2), Mul(Load(out + i), Set1(f1))));
  }
}

// A pair takes part in a span if it sees the span's first row.
STRAIT_INLINE bool SeesSpan(const MlaParams& p, const MlaTile& tile, int64_t pair, int64_t span) {
  const int64_t position = p.positions[(tile.first_pair + pair) / p.num_heads];
  return position >= span * kMlaSpanBlocks * kCacheBlockTokens;
}

void MlaSpan(const MlaParams& p, const MlaTile& tile, int64_t span, const float* query,
             const MlaPartial& part, float* block_scratch, float* scores) {
  const MlaWidths w = WidthsOf(p.layout);
  const uint32_t* pages = p.page_tables[p.sequence_index[tile.first_pair / p.num_heads]];
  const int64_t last_block = tile.last_position / kCacheBlockTokens;
  const int64_t first = span * kMlaSpanBlocks;
  for (int64_t b = first; b < first + kMlaSpanBlocks && b <= last_block; ++b) {
    // Pairs are ordered by token, but tokens by no rule: those that see nothing here are skipped in
    // runs of pairs that do.
    int64_t num_valid[kMlaTileQueries];
    int64_t most = 0;
    for (int64_t m = 0; m < tile.num_pairs; ++m) {
      const int64_t position = p.positions[(tile.first_pair + m) / p.num_heads];
      const int64_t rows = position + 1 - b * kCacheBlockTokens;
      num_valid[m] = rows < 0 ? 0 : Smaller(rows, kCacheBlockTokens);
      most = Larger(most, num_valid[m]);
    }
    int64_t stride;
    const char* block = reinterpret_cast<const char*>(p.blocks) +
                        static_cast<int64_t>(pages[b]) * p.layout.block_bytes;
    const float* rows = BlockRows(p, w, block, most, block_scratch, &stride);
    for (int64_t m0 = 0; m0 < tile.num_pairs;) {
      if (num_valid[m0] == 0) {
        ++m0;
        continue;
      }
      int64_t m1 = m0;
      int64_t run_most = 0;
      for (; m1 < tile.num_pairs && num_valid[m1] > 0; ++m1) {
        run_most = Larger(run_most, num_valid[m1]);
      }
      float* run_scores = scores + m0 * kCacheBlockTokens;
      Scores(query + m0 * w.width, m1 - m0, rows, stride, run_most, w.width, p.softmax_scale,
             run_scores);
      for (int64_t m = m0; m < m1; ++m) {
        SoftmaxBlock(scores + m * kCacheBlockTokens, num_valid[m], b == first, &part.max[m],
                     &part.sum[m], part.out + m * w.rank_pad, w.rank_pad);
      }
      Values(run_scores, num_valid + m0, m1 - m0, rows, stride, part.out + m0 * w.rank_pad,
             w.rank_pad);
      m0 = m1;
    }
  }
}

void MlaFold(const MlaParams& p, const MlaTile& tile, const MlaPartial& total,
             const MlaPartial& next, int64_t span) {
  const MlaWidths w = WidthsOf(p.layout);
  for (int64_t m = 0; m < tile.num_pairs; ++m) {
    if (SeesSpan(p, tile, m, span)) FoldSpan(w, m, total, next);
  }
}

void MlaSpans(const MlaParams& p, const MlaTile& tile, int64_t span0, int64_t span1,
              const MlaPartial& result, float* scratch) {
  const MlaWidths w = WidthsOf(p.layout);
  float* query = scratch;                               // [kMlaTileQueries, width]
  float* block = query + kMlaTileQueries * w.width;     // [64, width]
  float* scores = block + kCacheBlockTokens * w.width;  // [kMlaTileQueries, 64]
  float* head = scores + kMlaTileQueries * kCacheBlockTokens;
  const MlaPartial next = {head, head + kMlaTileQueries, head + kMlaPartialHead};
  for (int64_t m = 0; m < tile.num_pairs; ++m) {
    const int64_t pair = tile.first_pair + m;
    CopyPadded(reinterpret_cast<const char*>(p.q_latent + pair * w.rank), w.rank,
               query + m * w.width);
    CopyPadded(reinterpret_cast<const char*>(p.q_rope + pair * w.rope), w.rope,
               query + m * w.width + w.rank_pad);
  }
  for (int64_t span = span0; span < span1; ++span) {
    MlaSpan(p, tile, span, query, span == span0 ? result : next, block, scores);
    if (span != span0) MlaFold(p, tile, result, next, span);
  }
}

void MlaFinish(const MlaParams& p, const MlaTile& tile, const MlaPartial& total) {
  const MlaWidths w = WidthsOf(p.layout);
  for (int64_t m = 0; m < tile.num_pairs; ++m) {
    float* out = total.out + m * w.rank_pad;
    const Vec factor = Set1(1.0f / total.sum[m]);
    for (int64_t i = 0; i < w.rank_pad; i += kLanes) Store(out + i, Mul(Load(out + i), factor));
    memcpy(p.o_latent + (tile.first_pair + m) * w.rank, out,
           static_cast<size_t>(w.rank) * sizeof(float));
  }
}

}  // namespace strait::cpu::STRAIT_LEVEL
