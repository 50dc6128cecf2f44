// SPDX-License-Identifier: Apache-2.0
//
// The latent cache as kernels see it: how rows lie in blocks, and the kernel that appends rows.
//
// Shapes:  a block is 64 rows; a row is latent[kv_lora_rank] then rope_key[qk_rope_head_dim], both
//          in the row format, padded to 16 bytes.
// Limits:  block ids index a pool of equal blocks: address = blocks + id * block_bytes.
//
// Intensity of append: none, one pass over the new rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace strait {

inline constexpr int64_t kCacheBlockTokens = 64;
inline constexpr int64_t kCacheRowAlignment = 16;

enum class CacheRowFormat : uint8_t { kFp32, kBf16 };

constexpr int64_t CacheRowBytes(CacheRowFormat format, int64_t kv_lora_rank,
                                int64_t qk_rope_head_dim) {
  const int64_t element_bytes = format == CacheRowFormat::kFp32 ? 4 : 2;
  const int64_t row_bytes = (kv_lora_rank + qk_rope_head_dim) * element_bytes;
  return (row_bytes + kCacheRowAlignment - 1) / kCacheRowAlignment * kCacheRowAlignment;
}

struct CacheLayout {
  CacheRowFormat format = CacheRowFormat::kFp32;
  int64_t kv_lora_rank = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t row_bytes = 0;    // CacheRowBytes(...)
  int64_t block_bytes = 0;  // at least 64 * row_bytes: the distance between block ids in the pool
};

constexpr CacheLayout MakeCacheLayout(CacheRowFormat format, int64_t kv_lora_rank,
                                      int64_t qk_rope_head_dim) {
  const int64_t row_bytes = CacheRowBytes(format, kv_lora_rank, qk_rope_head_dim);
  return {format, kv_lora_rank, qk_rope_head_dim, row_bytes, kCacheBlockTokens * row_bytes};
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
