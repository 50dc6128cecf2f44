// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/reference/kernels.h"

namespace strait::reference {
namespace {

float ReadFloat(const std::byte* from) {
  float value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

uint16_t RoundToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rest = bits & 0xffffu;
  uint32_t high = bits >> 16;
  if (std::isnan(value)) return static_cast<uint16_t>(high | 0x40u);
  if (rest > 0x8000u || (rest == 0x8000u && high % 2 == 1)) ++high;
  return static_cast<uint16_t>(high);
}

// Element i of a cache row.
double RowValue(const CacheLayout& layout, const std::byte* row, int64_t i) {
  if (layout.format == RowFormat::kFp32) return ReadFloat(row + i * 4);
  uint16_t high;
  std::memcpy(&high, row + i * 2, sizeof(high));
  return std::bit_cast<float>(static_cast<uint32_t>(high) << 16);
}

void WriteRowValue(const CacheLayout& layout, std::byte* row, int64_t i, float value) {
  if (layout.format == RowFormat::kFp32) {
    std::memcpy(row + i * 4, &value, sizeof(value));
  } else {
    const uint16_t rounded = RoundToBf16(value);
    std::memcpy(row + i * 2, &rounded, sizeof(rounded));
  }
}

int64_t RowOffset(const CacheLayout& layout, const uint32_t* pages, int64_t position) {
  return pages[position / kCacheBlockTokens] * layout.block_bytes +
         position % kCacheBlockTokens * layout.row_bytes;
}

}  // namespace

void RopeTable(const RopeTableParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t i = 0; i < p.dim / 2; ++i) {
      const double angle = static_cast<double>(p.positions[t]) * p.inv_freq[i];
      float* pair = p.cos_sin + t * p.dim + 2 * i;
      pair[0] = static_cast<float>(std::cos(angle) * p.attention_scaling);
      pair[1] = static_cast<float>(std::sin(angle) * p.attention_scaling);
    }
  }
}

void Rope(const RopeParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const float* x = p.x + t * p.x_token_stride + h * p.x_head_stride;
      float* y = p.y + t * p.y_token_stride + h * p.y_head_stride;
      for (int64_t i = 0; i < p.dim; i += 2) {
        const double cos = p.cos_sin[t * p.dim + i];
        const double sin = p.cos_sin[t * p.dim + i + 1];
        const double a = x[i];
        const double b = x[i + 1];
        y[i] = static_cast<float>(a * cos - b * sin);
        y[i + 1] = static_cast<float>(a * sin + b * cos);
      }
    }
  }
}

void CacheAppend(const CacheAppendParams& p) {
  const CacheLayout& layout = p.layout;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.is_cached != nullptr && p.is_cached[p.sequence_index[t]] != 0) continue;
    std::byte* row =
        p.blocks + RowOffset(layout, p.page_tables[p.sequence_index[t]], p.positions[t]);
    std::memset(row, 0, static_cast<size_t>(layout.row_bytes));
    for (int64_t i = 0; i < layout.kv_lora_rank; ++i) {
      WriteRowValue(layout, row, i, p.latent[t * p.latent_stride + i]);
    }
    for (int64_t i = 0; i < layout.qk_rope_head_dim; ++i) {
      WriteRowValue(layout, row, layout.kv_lora_rank + i, p.rope_key[t * p.rope_key_stride + i]);
    }
  }
}

void AbsorbQuery(const AbsorbQueryParams& p) {
  const int64_t rank = p.kv_b_proj.cols;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const int64_t first_row = h * (p.qk_nope_head_dim + p.v_head_dim);
      for (int64_t r = 0; r < rank; ++r) {
        double sum = 0;
        for (int64_t d = 0; d < p.qk_nope_head_dim; ++d) {
          sum += p.q_nope[t * p.q_token_stride + h * p.q_head_stride + d] *
                 WeightValue(p.kv_b_proj, first_row + d, r);
        }
        p.q_latent[(t * p.num_heads + h) * rank + r] = static_cast<float>(sum);
      }
    }
  }
}

void Mla(const MlaParams& p) {
  const int64_t rank = p.layout.kv_lora_rank;
  const int64_t rope = p.layout.qk_rope_head_dim;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int64_t num_rows = p.positions[t] + 1;
    const uint32_t* pages = p.page_tables[p.sequence_index[t]];
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const int64_t pair = t * p.num_heads + h;
      std::vector<double> weights(static_cast<size_t>(num_rows));
      for (int64_t j = 0; j < num_rows; ++j) {
        const std::byte* row = p.blocks + RowOffset(p.layout, pages, j);
        double score = 0;
        for (int64_t i = 0; i < rank; ++i) {
          score += p.q_latent[pair * rank + i] * RowValue(p.layout, row, i);
        }
        for (int64_t i = 0; i < rope; ++i) {
          score += p.q_rope[pair * rope + i] * RowValue(p.layout, row, rank + i);
        }
        weights[static_cast<size_t>(j)] = score * p.softmax_scale;
      }
      const double max = *std::max_element(weights.begin(), weights.end());
      double sum = 0;
      for (double& weight : weights) {
        weight = std::exp(weight - max);
        sum += weight;
      }
      for (int64_t i = 0; i < rank; ++i) {
        double out = 0;
        for (int64_t j = 0; j < num_rows; ++j) {
          const std::byte* row = p.blocks + RowOffset(p.layout, pages, j);
          out += weights[static_cast<size_t>(j)] * RowValue(p.layout, row, i);
        }
        p.o_latent[pair * rank + i] = static_cast<float>(out / sum);
      }
    }
  }
}

void ValueUp(const ValueUpParams& p) {
  const int64_t rank = p.kv_b_proj.cols;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const int64_t first_row = h * (p.qk_nope_head_dim + p.v_head_dim) + p.qk_nope_head_dim;
      for (int64_t v = 0; v < p.v_head_dim; ++v) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r) {
          sum += p.o_latent[(t * p.num_heads + h) * rank + r] *
                 WeightValue(p.kv_b_proj, first_row + v, r);
        }
        p.out[(t * p.num_heads + h) * p.v_head_dim + v] = static_cast<float>(sum);
      }
    }
  }
}

}  // namespace strait::reference
