// SPDX-License-Identifier: Apache-2.0
//
// Multi-head latent attention in its absorbed form, and the two projections around it:
//   AbsorbQueryParams  q_latent[t, h, :] = W_UK[h]^T q_nope[t, h, :]
//   MlaParams          o_latent[t, h, :] = softmax(scale * (q_latent . latent + q_rope . rope_key))
//   latent ValueUpParams      out[t, h, :]      = W_UV[h] o_latent[t, h, :]
// W_UK and W_UV are the rows of kv_b_proj: head h owns rows h * (nope + v), first nope rows of
// W_UK, then v rows of W_UV.
//
// Shapes:  below. Tokens may come in any order; it is fastest when a sequence's lie together.
// Errors:  none; arguments are checked as our own bugs.
// Why:     a token at position p reads rows 0..p of its sequence and nothing else: rows behind p
//          and page table entries behind p/64 may hold anything. Order of the sums, a function of
//          p alone: a score is a 16-lane dot product over latent then rope_key (each padded with
//          zeros to 16, one tree at the end); rows are folded in blocks of 64 by position (online
//          softmax), a span of 16 blocks left to right, then the spans left to right. So a token's
//          result does not depend on batch, chunk, tile, thread or instruction set.
//
// Intensity of MlaParams: 2 * num_heads flops per cached number for each token that shares the
// load, from 16 heads on bound by fused multiply-adds, also when decoding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cache.h"
#include "kernels/weight.h"

namespace strait {

// Blocks folded left to right before spans are folded (1,024 rows).
inline constexpr int64_t kMlaSpanBlocks = 16;

struct MlaParams {
  const float* q_latent = nullptr;               // [num_tokens, num_heads, kv_lora_rank] fp32
  const float* q_rope = nullptr;                 // [num_tokens, num_heads, qk_rope_head_dim] fp32
  const int32_t* positions = nullptr;            // [num_tokens] absolute, >= 0
  const int32_t* sequence_index = nullptr;       // [num_tokens] row of page_tables
  const uint32_t* const* page_tables = nullptr;  // [num_sequences][position/64] block ids
  const std::byte* blocks = nullptr;             // the pool; rows 0..position must be written
  CacheLayout layout;
  float softmax_scale = 1.0f;  // AttentionSoftmaxScale()
  float* o_latent = nullptr;   // [num_tokens, num_heads, kv_lora_rank] fp32
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
};

struct AbsorbQueryParams {
  const float* q_nope = nullptr;  // [num_tokens, num_heads, qk_nope_head_dim] fp32, strides below
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  WeightMatrix kv_b_proj;     // [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]
  float* q_latent = nullptr;  // [num_tokens, num_heads, kv_lora_rank] fp32, dense
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t v_head_dim = 0;
};

struct ValueUpParams {
  const float* o_latent = nullptr;  // [num_tokens, num_heads, kv_lora_rank] fp32, dense
  WeightMatrix kv_b_proj;           // [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]
  float* out = nullptr;             // [num_tokens, num_heads, v_head_dim] fp32, dense
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t v_head_dim = 0;
};

}  // namespace strait
