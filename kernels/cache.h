// SPDX-License-Identifier: Apache-2.0
//
// The latent cache as kernels see it: how rows lie in blocks, and the kernel that appends rows.
//
// Shapes:  rows and blocks as proto/latent_block.h has them, fp32 or bf16.
// Limits:  block ids index a pool of equal blocks: address = blocks + id * block_bytes.
//
// Intensity of append: none, one pass over the new rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proto/base/check.h"
#include "proto/latent_block.h"

namespace strait {

inline constexpr int64_t kCacheBlockTokens = limits::kBlockTokens;

struct CacheLayout {
  RowFormat format = RowFormat::kFp32;
  int64_t kv_lora_rank = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t row_bytes = 0;        // RowBytes(...)
  int64_t rope_key_offset = 0;  // RopeKeyOffset(...)
  int64_t row_end = 0;          // RowEnd(...)
  int64_t block_bytes = 0;      // at least 64 * row_bytes: between block ids in the pool
};

// REQUIRES: kFp32 or kBf16.
constexpr CacheLayout MakeCacheLayout(RowFormat format, int64_t kv_lora_rank,
                                      int64_t qk_rope_head_dim) {
  STRAIT_CHECK(format == RowFormat::kFp32 || format == RowFormat::kBf16,
               "CPU kernels have fp32 and bf16 rows alone");
  const auto rank = static_cast<uint32_t>(kv_lora_rank);
  const auto rope = static_cast<uint32_t>(qk_rope_head_dim);
  const int64_t row_bytes = RowBytes(format, rank, rope);
  return {.format = format,
          .kv_lora_rank = kv_lora_rank,
          .qk_rope_head_dim = qk_rope_head_dim,
          .row_bytes = row_bytes,
          .rope_key_offset = RopeKeyOffset(format, rank),
          .row_end = RowEnd(format, rank, rope),
          .block_bytes = kCacheBlockTokens * row_bytes};
}

// Of whatever comes from a caller.
inline void CheckLayout(const CacheLayout& layout) {
  const CacheLayout expected =
      MakeCacheLayout(layout.format, layout.kv_lora_rank, layout.qk_rope_head_dim);
  STRAIT_CHECK(layout.row_bytes == expected.row_bytes && layout.row_end == expected.row_end);
  STRAIT_CHECK(layout.rope_key_offset == expected.rope_key_offset);
  STRAIT_CHECK(layout.block_bytes >= expected.block_bytes);
}

// Writes one row per token where its position lies. bf16 rows are rounded to nearest, ties to even.
struct CacheAppendParams {
  const float* latent = nullptr;  // [num_tokens, kv_lora_rank] fp32, after the norm
  int64_t latent_stride = 0;
  const float* rope_key = nullptr;  // [num_tokens, qk_rope_head_dim] fp32, rotated
  int64_t rope_key_stride = 0;
  const int32_t* positions = nullptr;       // [num_tokens]
  const int32_t* sequence_index = nullptr;  // [num_tokens] row of page_tables
  const uint8_t* is_cached = nullptr;  // [num_sequences] not 0: its rows are there, none is written
  const uint32_t* const* page_tables = nullptr;  // [num_sequences][position/64] block ids
  std::byte* blocks = nullptr;                   // the pool
  CacheLayout layout;
  int64_t num_tokens = 0;
};

}  // namespace strait
