// SPDX-License-Identifier: Apache-2.0
//
// Cuts rows into pieces for the threads: norm, rotation, cache rows, activation and sums.
#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/level.h"
#include "kernels/float64_math.h"
#include "proto/base/check.h"

namespace strait::cpu {
namespace {

// A piece handles about this many numbers; less work than one piece stays on the caller's thread.
constexpr int64_t kPieceNumbers = 16 * 1024;

// Calls fn(begin, end) over rows of `width` numbers, in pieces.
template <typename Fn>
void ForRows(Context& context, int64_t num_rows, int64_t width, Fn fn) {
  if (num_rows <= 0) return;
  const int64_t rows = std::max<int64_t>(1, kPieceNumbers / std::max<int64_t>(1, width));
  context.pool().ParallelFor((num_rows + rows - 1) / rows, [&](int64_t piece, int) {
    fn(piece * rows, std::min(num_rows, (piece + 1) * rows));
  });
}

uint16_t ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void StoreRow(RowFormat format, const float* values, int64_t count, std::byte* to) {
  if (format == RowFormat::kFp32) {
    std::memcpy(to, values, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t value = ToBf16(values[i]);
    std::memcpy(to + i * 2, &value, sizeof(value));
  }
}

}  // namespace

void RmsNorm(Context& context, const RmsNormParams& p) {
  STRAIT_CHECK(p.weight_type != WeightType::kFp8E4m3 && p.dim > 0);
  ForRows(context, p.num_rows, p.dim,
          [&](int64_t begin, int64_t end) { context.table().rms_norm(p, begin, end); });
}

void RopeTable(Context& context, const RopeTableParams& p) {
  STRAIT_CHECK(p.dim % 2 == 0);
  constexpr int64_t kWorkPerAngle = 64;  // against one pass over a number
  ForRows(context, p.num_tokens, p.dim * kWorkPerAngle, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = p.cos_sin + t * p.dim;
      for (int64_t i = 0; i < p.dim / 2; ++i) {
        const double angle =
            static_cast<double>(p.positions[t]) * static_cast<double>(p.inv_freq[i]);
        const SinCos value = Float64SinCos(angle);
        row[2 * i] = static_cast<float>(value.cos) * p.attention_scaling;
        row[2 * i + 1] = static_cast<float>(value.sin) * p.attention_scaling;
      }
    }
  });
}

void Rope(Context& context, const RopeParams& p) {
  STRAIT_CHECK(p.dim % 2 == 0);
  ForRows(context, p.num_tokens, p.num_heads * p.dim, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* cos_sin = p.cos_sin + t * p.dim;
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const float* x = p.x + t * p.x_token_stride + h * p.x_head_stride;
        float* y = p.y + t * p.y_token_stride + h * p.y_head_stride;
        for (int64_t i = 0; i < p.dim; i += 2) {
          const float a = x[i];
          const float b = x[i + 1];
          y[i] = a * cos_sin[i] - b * cos_sin[i + 1];
          y[i + 1] = a * cos_sin[i + 1] + b * cos_sin[i];
        }
      }
    }
  });
}

void CacheAppend(Context& context, const CacheAppendParams& p) {
  const CacheLayout& layout = p.layout;
  CheckLayout(layout);
  const int64_t width = layout.kv_lora_rank + layout.qk_rope_head_dim;
  ForRows(context, p.num_tokens, width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (p.is_cached != nullptr && p.is_cached[p.sequence_index[t]] != 0) continue;
      const int64_t position = p.positions[t];
      const uint32_t block = p.page_tables[p.sequence_index[t]][position / kCacheBlockTokens];
      std::byte* row =
          p.blocks + block * layout.block_bytes + position % kCacheBlockTokens * layout.row_bytes;
      StoreRow(layout.format, p.latent + t * p.latent_stride, layout.kv_lora_rank, row);
      StoreRow(layout.format, p.rope_key + t * p.rope_key_stride, layout.qk_rope_head_dim,
               row + layout.rope_key_offset);
      // The padding is part of the row's bytes, which are compared and checksummed: zeros.
      std::memset(row + layout.row_end, 0, static_cast<size_t>(layout.row_bytes - layout.row_end));
    }
  });
}

void SiluMul(Context& context, const SiluMulParams& p) {
  if (p.num_rows == 1 && p.dim > kPieceNumbers / 8) {  // one long row: cut its columns
    constexpr int64_t kColumns = kPieceNumbers / 8;
    context.pool().ParallelFor((p.dim + kColumns - 1) / kColumns, [&](int64_t piece, int) {
      SiluMulParams part = p;
      part.gate += piece * kColumns;
      part.up += piece * kColumns;
      part.y += piece * kColumns;
      part.dim = std::min(kColumns, p.dim - piece * kColumns);
      context.table().silu_mul(part, 0, 1);
    });
    return;
  }
  constexpr int64_t kWorkPerNumber = 8;  // the exponential and the division
  ForRows(context, p.num_rows, p.dim * kWorkPerNumber,
          [&](int64_t begin, int64_t end) { context.table().silu_mul(p, begin, end); });
}

void Add(Context& context, const AddParams& p) {
  ForRows(context, p.count, 1, [&](int64_t begin, int64_t end) {
    context.table().add(p.x + begin, p.y + begin, end - begin);
  });
}

void ExpertSum(Context& context, const ExpertSumParams& p) {
  ForRows(context, p.num_tokens, p.dim * std::max(1, p.num_experts_per_tok),
          [&](int64_t begin, int64_t end) { context.table().expert_sum(p, begin, end); });
}

void Embedding(Context& context, const EmbeddingParams& p) {
  ForRows(context, p.num_tokens, p.table.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      STRAIT_CHECK(p.token_ids[t] >= 0 && p.token_ids[t] < p.table.rows);
      context.table().widen_row(p.table, p.token_ids[t], p.y + t * p.table.cols);
    }
  });
}

}  // namespace strait::cpu
