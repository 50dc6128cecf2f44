// SPDX-License-Identifier: Apache-2.0
//
// One block a token for its row, others for its query's heads. An fp8 row: codes of 128 columns
// at a time by one warp, scale = the largest magnitude / 448, so that the largest value keeps its
// full precision.
#include <cuda_fp8.h>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/latent.h"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kE4m3Max = 448.0f;

__global__ void FillRopeTable(const RopeTableParams p) {
  StartNext();
  WaitForEarlier();
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t half = p.dim / 2;
  if (index >= p.num_tokens * half) return;
  const double angle = static_cast<double>(p.positions[index / half]) *
                       static_cast<double>(p.inv_freq[index % half]);
  double sine = 0;
  double cosine = 0;
  sincos(angle, &sine, &cosine);
  p.cos_sin[2 * index] = static_cast<float>(cosine * static_cast<double>(p.attention_scaling));
  p.cos_sin[2 * index + 1] = static_cast<float>(sine * static_cast<double>(p.attention_scaling));
}

constexpr int kPairsEach = 2;  // of a thread of the blocks that rotate queries
__device__ void RotateQuery(const LatentAppendParams& p, int64_t token, int first) {
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

// Grid: (num_tokens, 1 + blocks that rotate).
__global__ void __launch_bounds__(kThreads)
    AppendRow(const __grid_constant__ LatentAppendParams p) {
  __shared__ float shared[kThreads / 32];
  const int64_t token = blockIdx.x;
  StartNext();
  if (blockIdx.y > 0) {
    WaitForEarlier();
    RotateQuery(p, token, (static_cast<int>(blockIdx.y) - 1) * kThreads * kPairsEach);
    return;
  }
  // A step's tables are there before its first kernel begins.
  const int32_t position = p.positions[token];
  const uint32_t block = p.segments[p.sequence_index[token]].page_table[position / kMlaBlockRows];
  WaitForEarlier();
  const float* const cos_sin = p.cos_sin + token * p.rope;
  const int half = p.rope / 2;
  const float* const kv = p.kv_a + token * p.kv_a_stride;
  float squares = 0;
  for (int i = threadIdx.x; i < p.rank; i += kThreads) squares = fmaf(kv[i], kv[i], squares);
  const float mean = BlockSum<kThreads>(squares, shared) / static_cast<float>(p.rank);
  const float scale = rsqrtf(mean + p.eps);

  const int32_t row_bytes = MlaRowBytes(p.format, p.rank, p.rope);
  std::byte* const row =
      p.blocks + block * p.block_bytes + int64_t{position % kMlaBlockRows} * row_bytes;
  if (p.format == MlaRowFormat::kBf16) {
    auto* const latent = reinterpret_cast<Bf16*>(row);
    for (int i = threadIdx.x; i < p.rank; i += kThreads) {
      latent[i] = __float2bfloat16(kv[i] * scale * p.norm_weight[i]);
    }
  } else {
    auto* const codes = reinterpret_cast<__nv_fp8_storage_t*>(row);
    auto* const scales = reinterpret_cast<float*>(row + MlaScalesOffset(p.rank));
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
  auto* const key = reinterpret_cast<Bf16*>(row + MlaRopeOffset(p.format, p.rank));
  for (int i = threadIdx.x; i < half; i += kThreads) {
    const float a = kv[p.rank + 2 * i];
    const float b = kv[p.rank + 2 * i + 1];
    key[2 * i] = __float2bfloat16(a * cos_sin[2 * i] - b * cos_sin[2 * i + 1]);
    key[2 * i + 1] = __float2bfloat16(a * cos_sin[2 * i + 1] + b * cos_sin[2 * i]);
  }
}

__global__ void __launch_bounds__(kThreads) EmbedRow(const EmbeddingParams p) {
  StartNext();
  WaitForEarlier();
  const int64_t token = blockIdx.x;
  int32_t id = p.token_ids[token];
  if (id < 0) id = p.sampled_ids[-1 - id];
  const Bf16* const row = static_cast<const Bf16*>(p.table.data) + int64_t{id} * p.table.stride;
  for (int i = threadIdx.x; i < p.table.cols; i += kThreads) {
    p.y[token * p.table.cols + i] = __bfloat162float(row[i]);
  }
}

}  // namespace

cudaError_t RopeTable(const RopeTableParams& p, cudaStream_t stream) {
  const int64_t pairs = p.num_tokens * (p.dim / 2);
  if (pairs == 0) return cudaSuccess;
  return LaunchChained(FillRopeTable, dim3(static_cast<unsigned>((pairs + 127) / 128)), 128, 0,
                       stream, p);
}

cudaError_t LatentAppend(const LatentAppendParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const int32_t pairs = p.num_heads * (p.rope / 2);
  const int32_t rotating = (pairs + kThreads * kPairsEach - 1) / (kThreads * kPairsEach);
  return LaunchChained(AppendRow, dim3(static_cast<unsigned>(p.num_tokens), 1 + rotating), kThreads,
                       0, stream, p);
}

cudaError_t Embedding(const EmbeddingParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  return LaunchChained(EmbedRow, dim3(static_cast<unsigned>(p.num_tokens)), kThreads, 0, stream, p);
}

}  // namespace strait::cuda
