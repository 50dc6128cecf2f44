// SPDX-License-Identifier: Apache-2.0
//
// AppendPart: what one block of a LatentAppend does, alone or beside the blocks of another kernel. One
// block a token for its row, others for its query's heads. An fp8 row: codes of 128 columns at a time
// by one warp, scale = the largest magnitude / 448, so that the largest value keeps its full precision.
#pragma once

#include <cuda_fp8.h>

#include "kernels/cuda/attention/latent.h"
#include "kernels/cuda/device/common.cuh"

namespace strait::cuda::latent {

inline constexpr int kThreads = 256;
inline constexpr int kHeld = 2;       // columns of a row that a thread keeps
inline constexpr int kPairsEach = 2;  // of a thread of the blocks that rotate queries
inline constexpr float kE4m3Max = 448.0f;

// Blocks of a token.
__host__ __device__ inline int AppendParts(const LatentAppendParams& p) {
  const int pairs = p.num_heads * (p.rope / 2);
  return 1 + (pairs + kThreads * kPairsEach - 1) / (kThreads * kPairsEach);
}

__device__ inline void RotateQuery(const LatentAppendParams& p, int64_t token, int first) {
  const float* const cos_sin = p.cos_sin + token * p.rope;
  const int half = p.rope / 2;
#pragma unroll
  for (int n = 0; n < kPairsEach; ++n) {
    const int i = first + n * kThreads + threadIdx.x;
    if (i >= p.num_heads * half) return;
    const int head = i / half;
    const int pair = i % half * 2;
    const Bf16* const from =
        p.q + token * p.q_token_stride + head * p.q_head_stride + p.q_rope_offset + pair;
    const float a = __bfloat162float(from[0]);
    const float b = __bfloat162float(from[1]);
    Bf16* const to = p.q_rope + (token * p.num_heads + head) * p.q_rope_stride + pair;
    to[0] = __float2bfloat16(a * cos_sin[pair] - b * cos_sin[pair + 1]);
    to[1] = __float2bfloat16(a * cos_sin[pair + 1] + b * cos_sin[pair]);
  }
}

// `part` of a token's AppendParts, by kThreads threads.
__device__ inline void AppendPart(const LatentAppendParams& p, int64_t token, int part) {
  __shared__ float shared[kThreads / 32];
  if (part > 0) {
    WaitForEarlier();
    RotateQuery(p, token, (part - 1) * kThreads * kPairsEach);
    return;
  }
  // A step's tables are there before its first kernel begins.
  const int32_t position = p.positions[token];
  const MlaSegment& segment = p.segments[p.sequence_index[token]];
  if (segment.is_cached != 0) {
    WaitForEarlier();
    return;
  }
  const uint32_t block = segment.page_table[position / kMlaBlockRows];
  float weight[kHeld];
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const int i = n * kThreads + threadIdx.x;
    weight[n] = i < p.rank ? p.norm_weight[i] : 0.0f;
  }
  WaitForEarlier();
  const float* const cos_sin = p.cos_sin + token * p.rope;
  const int half = p.rope / 2;
  const float* const kv = p.kv_a + token * p.kv_a_stride;
  float value[kHeld];
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const int i = n * kThreads + threadIdx.x;
    value[n] = i < p.rank ? kv[i] : 0.0f;
  }
  const int32_t row_bytes = RowBytes(p.format, p.rank, p.rope);
  std::byte* const row =
      p.blocks + block * p.block_bytes + int64_t{position % kMlaBlockRows} * row_bytes;
  auto* const key = reinterpret_cast<Bf16*>(row + RopeKeyOffset(p.format, p.rank));
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float a = kv[p.rank + 2 * i];
    const float b = kv[p.rank + 2 * i + 1];
    key[2 * i] = __float2bfloat16(a * cos_sin[2 * i] - b * cos_sin[2 * i + 1]);
    key[2 * i + 1] = __float2bfloat16(a * cos_sin[2 * i + 1] + b * cos_sin[2 * i]);
  }
  // A row's bytes are compared and checksummed, its zeros among them. V3's rows have none.
  const int32_t row_end = RowEnd(p.format, p.rank, p.rope);
  for (int i = row_end + threadIdx.x; i < row_bytes; i += kThreads) row[i] = std::byte{0};
  float squares = 0;
#pragma unroll
  for (int n = 0; n < kHeld; ++n) squares = fmaf(value[n], value[n], squares);
  const float mean = BlockSum<kThreads>(squares, shared) / static_cast<float>(p.rank);
  const float scale = rsqrtf(mean + p.eps);

  if (p.format == RowFormat::kBf16) {
    auto* const latent = reinterpret_cast<Bf16*>(row);
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const int i = n * kThreads + threadIdx.x;
      if (i < p.rank) latent[i] = __float2bfloat16(value[n] * scale * weight[n]);
    }
  } else {
    auto* const codes = reinterpret_cast<__nv_fp8_storage_t*>(row);
    auto* const scales = reinterpret_cast<float*>(row + ScalesOffset(p.rank));
    const int lane = threadIdx.x % 32;
    for (int group = threadIdx.x / 32; group * kScaleBlock < p.rank; group += kThreads / 32) {
      const int begin = group * kScaleBlock;
      const int end = min(begin + kScaleBlock, p.rank);
      float most = 0;
      for (int i = begin + lane; i < end; i += 32) {
        most = fmaxf(most, fabsf(kv[i] * scale * p.norm_weight[i]));
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
      }
      const float unit = most > 0 ? most / kE4m3Max : 1.0f;
      for (int i = begin + lane; i < end; i += 32) {
        codes[i] = __nv_cvt_float_to_fp8(kv[i] * scale * p.norm_weight[i] / unit, __NV_SATFINITE,
                                         __NV_E4M3);
      }
      if (lane == 0) scales[group] = unit;
    }
  }
}

}  // namespace strait::cuda::latent
