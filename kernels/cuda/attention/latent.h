// SPDX-License-Identifier: Apache-2.0
//
// What lies between the projections of a layer and its attention, and at the ends of a stage:
//   RopeTableParams     cos and sin of a step's positions, once a step
//   LatentAppendParams  norms the latent, rotates query and shared key, writes the cache row
//   EmbeddingParams     rows of the embedding table
//
// Stream:  the parameter; asynchronous.
// Shapes:  below; pairs of a rope part are (2i, 2i + 1), as in kernels/rope.h.
// Errors:  CUDA's launch errors; cudaErrorInvalidValue beyond a rank of 512, and for fp32 rows.
// Why:     angles are float64 products of the position and the fp32 inverse frequency, as on the
//          CPU; sine and cosine of them by CUDA's float64 functions, within 2 units of the last
//          place of float64. A cache row is rounded once, from fp32.
//
// Intensity: none to speak of: a few kilobytes a token; bound by launch and memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/attention/mla.h"
#include "kernels/cuda/gemm/gemm.h"
#include "kernels/cuda/gemm/matrix.h"

namespace strait::cuda {

struct RopeTableParams {
  const int32_t* positions = nullptr;  // [num_tokens]
  const float* inv_freq = nullptr;     // [dim/2] fp32
  float attention_scaling = 1.0f;
  float* cos_sin = nullptr;  // [num_tokens, dim/2, 2] fp32, out
  int64_t num_tokens = 0;
  int32_t dim = 0;  // qk_rope_head_dim, even
};

cudaError_t RopeTable(const RopeTableParams& params, cudaStream_t stream);

struct LatentAppendParams {
  const float* kv_a = nullptr;  // [num_tokens, rank + rope] fp32, rows kv_a_stride apart
  int64_t kv_a_stride = 0;
  const float* norm_weight = nullptr;  // [rank] fp32
  float eps = 1e-6f;
  const float* cos_sin = nullptr;  // [num_tokens, rope/2, 2] fp32

  const Bf16* q = nullptr;  // [num_tokens, num_heads, q_head_stride]; rope part at q_rope_offset
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  int32_t q_rope_offset = 0;
  Bf16* q_rope = nullptr;  // [num_tokens * num_heads, rope], rows q_rope_stride apart, out
  int64_t q_rope_stride = 0;

  const int32_t* positions = nullptr;       // [num_tokens]
  const int32_t* sequence_index = nullptr;  // [num_tokens] into segments
  const MlaSegment* segments = nullptr;     // this layer's; page_table[position / 64] is used
  std::byte* blocks = nullptr;              // the pool
  int64_t block_bytes = 0;
  RowFormat format = RowFormat::kBf16;
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t rank = 0;
  int32_t rope = 0;
};

cudaError_t LatentAppend(const LatentAppendParams& params, cudaStream_t stream);

// The same and a product, in one launch where that is of few rows (in gemm.cc, which chooses the
// product's kernel). Neither reads what the other writes.
cudaError_t LatentAppendBeside(const LatentAppendParams& params, const GemmParams& product,
                               cudaStream_t stream);

// In place of a token id: it is sampled_ids[index], which the host does not know yet.
constexpr int32_t LateTokenId(uint32_t index) { return -1 - static_cast<int32_t>(index); }

struct EmbeddingParams {
  Matrix table;                          // [vocab_size, hidden_size] bf16
  const int32_t* token_ids = nullptr;    // [num_tokens], each in [0, vocab_size), or a LateTokenId
  const int32_t* sampled_ids = nullptr;  // that late ones stand for; may be null without any
  float* y = nullptr;                    // [num_tokens, hidden_size] fp32, dense
  int64_t num_tokens = 0;
};

cudaError_t Embedding(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace strait::cuda
