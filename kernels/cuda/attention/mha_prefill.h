// SPDX-License-Identifier: Apache-2.0
//
// Attention of prompts on Hopper in the expanded form: keys and values of each head are made from
// the cached latent rows by one product, then
//   out[t, h, :] = softmax(scale * (q[t, h] . key[j, h] + q_rope[t, h] . rope_key[j])) value[j, h]
// over the keys j at positions up to the token's. MhaGather lists the cache rows that the product
// reads, MhaPrefill attends.
//
// Borrows: every pointer, until the stream has passed the launch; but `pieces`, until it returns.
// Thread:  any.
// Shapes:  keys and rope keys 128 + 64 columns, values 128; bf16, sums fp32, weights bf16.
// Stream:  launches on the one given, allocates nothing, synchronizes nothing. Kernels begin early
//          and wait for the one before them.
// Errors:  cudaErrorInvalidValue: strides, counts; cudaErrorNotSupported: not a Hopper GPU; else
//          what the launch returned.
// Limits:  kMhaMaxPieces pieces a launch.
// Why:     640 flops for a pair of positions instead of the absorbed form's 2,176, for 262,144 once
//          for each key and head: worth it from about 170 new tokens on. A sequence's keys may come
//          in spans, one launch after the other, so that expanded keys need a bounded buffer: what
//          a span leaves is fp32, so only the order of sums depends on the spans.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/attention/mla.h"
#include "kernels/cuda/gemm/matrix.h"

namespace strait::cuda {

inline constexpr int32_t kMhaRank = 512;  // of cache rows
inline constexpr int32_t kMhaNope = 128;
inline constexpr int32_t kMhaRope = 64;
inline constexpr int32_t kMhaValue = 128;
inline constexpr int32_t kMhaMaxPieces = 32;
inline constexpr int32_t kMhaTileKeys = 128;
inline constexpr int32_t kMhaStateFloats = kMhaValue + 2;

// New tokens of one sequence against a span of its keys. Rows of keys of a piece begin where those
// of the one before end, each padded to a multiple of kMhaTileKeys.
struct MhaPiece {
  int32_t first_token = 0;  // row of q and out
  int32_t num_tokens = 0;
  int32_t first_key = 0;       // row of keys and values, a multiple of kMhaTileKeys
  int32_t num_keys = 0;        // of the span
  int32_t first_position = 0;  // of the first token, less that of the span's first key
  int32_t sequence = 0;        // into segments
  int32_t span_position = 0;   // of the span's first key, a multiple of kMhaTileKeys
  bool begins = true;          // the sequence's first span: no state yet
  bool ends = true;            // its last: out is written, no state left
};

// The rows that a piece takes of the keys' buffer.
constexpr int32_t MhaKeyRows(int32_t num_keys) {
  return (num_keys + kMhaTileKeys - 1) / kMhaTileKeys * kMhaTileKeys;
}

struct MhaGatherParams {
  const MhaPiece* pieces = nullptr;  // [num_pieces] host
  int32_t num_pieces = 0;
  const MlaSegment* segments = nullptr;  // device; block i at position 64 * i
  const std::byte* blocks = nullptr;     // bf16 rows of 512 + 64 columns
  int64_t block_bytes = 0;               // 64 rows exactly
  int32_t* rows = nullptr;    // [key rows], out: the row of the pool, padding: the piece's last
  Bf16* rope_keys = nullptr;  // [key rows, 64], out
};

cudaError_t MhaGather(const MhaGatherParams& params, cudaStream_t stream);

struct MhaPrefillParams {
  const MhaPiece* pieces = nullptr;  // [num_pieces] host
  int32_t num_pieces = 0;
  int32_t num_tokens = 0;    // rows of q
  int32_t num_key_rows = 0;  // of keys, values, rope keys; more are not read
  int32_t num_heads = 0;
  // Strides in elements, multiples of 8; pointers 16-byte aligned.
  const Bf16* q = nullptr;  // [num_tokens, num_heads, 128]
  int64_t q_token_stride = 0;
  int64_t q_head_stride = 0;
  const Bf16* q_rope = nullptr;  // [num_tokens, num_heads, 64], rotated
  int64_t q_rope_token_stride = 0;
  int64_t q_rope_head_stride = 0;
  const Bf16* keys = nullptr;    // [num_key_rows, num_heads, 128]; padding: finite
  const Bf16* values = nullptr;  // the same
  int64_t key_row_stride = 0;    // of both
  int64_t key_head_stride = 0;
  const Bf16* rope_keys = nullptr;  // [num_key_rows, 64] dense
  Bf16* out = nullptr;              // [num_tokens, num_heads * 128]
  int64_t out_stride = 0;
  // Between spans: [num_tokens * num_heads] rows of kMhaStateFloats, 8-byte aligned, state_stride
  // apart (even); null if every piece begins and ends.
  float* state = nullptr;
  int64_t state_stride = 0;
  float softmax_scale = 1.0f;
};

// Once a device, before the first launch.
cudaError_t PrepareMhaPrefill();

// Whether the device has the kernel.
bool HasMhaPrefill();

cudaError_t MhaPrefill(const MhaPrefillParams& params, cudaStream_t stream);

}  // namespace strait::cuda
