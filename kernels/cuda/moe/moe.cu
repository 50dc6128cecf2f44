// SPDX-License-Identifier: Apache-2.0
//
// Router: one warp a token (moe_route.cuh). Lists: one block an expert; each counts all choices, finds
// where its own begin, and writes them in order of choice; then the shared experts, which every token
// goes to: their rows last, their tiles first. Sum: one block a token, and the norm of what comes out, if wanted.
#include <cub/block/block_scan.cuh>

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/moe/moe.h"
#include "kernels/cuda/moe/moe_route.cuh"

namespace strait::cuda {
namespace {

__global__ void __launch_bounds__(32) RouteTokens(const RouterParams p) {
  auto* const memory = DynamicShared<float>();
  StartNext();
  moe::SetBias(p, memory);
  WaitForEarlier();
  const float* const logits = p.logits + int64_t{blockIdx.x} * p.n_routed_experts;
#pragma unroll 4
  for (int32_t e = threadIdx.x; e < p.n_routed_experts; e += 32) {
    moe::LogitAt(memory, e) = logits[e];
  }
  moe::RouteToken(p, blockIdx.x, memory);
}

constexpr int kListThreads = 256;

// Sums of two numbers over the block, known to all threads.
__device__ void AddUp(int32_t& a, int32_t& b, int32_t (*shared)[2]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    a += __shfl_xor_sync(kFullWarp, a, offset);
    b += __shfl_xor_sync(kFullWarp, b, offset);
  }
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32][0] = a;
    shared[threadIdx.x / 32][1] = b;
  }
  __syncthreads();
  a = b = 0;
  for (int warp = 0; warp < kListThreads / 32; ++warp) {
    a += shared[warp][0];
    b += shared[warp][1];
  }
}

__device__ __forceinline__ int32_t TilesOf(int32_t rows, int32_t tile_rows) {
  return (rows + tile_rows - 1) / tile_rows;
}

__global__ void __launch_bounds__(kListThreads) ListExperts(const ExpertListsParams p) {
  auto* const counts = DynamicShared<int32_t>();  // [n_routed_experts]
  using Scan = cub::BlockScan<int32_t, kListThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int32_t sums[kListThreads / 32][2];
  StartNext();
  WaitForEarlier();
  const int32_t expert = blockIdx.x;
  const bool shared = expert >= p.n_routed_experts;
  const int32_t num_choices = p.num_tokens * p.num_experts_per_tok;
  for (int32_t e = threadIdx.x; e < p.n_routed_experts; e += kListThreads) counts[e] = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < num_choices; i += kListThreads) {
    atomicAdd(&counts[p.expert_ids[i]], 1);
  }
  __syncthreads();
  // Rows and tiles of the experts before this one.
  int32_t begin = 0;
  int32_t first_tile = 0;
  for (int32_t e = threadIdx.x; e < min(expert, p.n_routed_experts); e += kListThreads) {
    begin += counts[e];
    first_tile += TilesOf(counts[e], p.tile_rows);
  }
  AddUp(begin, first_tile, sums);
  const int32_t shared_tiles = TilesOf(p.num_tokens, p.tile_rows);  // of one such expert
  if (shared) {  // every token goes to each of these; their rows lie last, their tiles first
    const int32_t before = expert - p.n_routed_experts;
    begin += before * p.num_tokens;
    first_tile = before * shared_tiles;
  } else {
    first_tile += p.num_shared * shared_tiles;
  }
  const int32_t count = shared ? p.num_tokens : counts[expert];
  const int32_t num_tiles = TilesOf(count, p.tile_rows);
  if (expert + 1 == p.n_routed_experts && threadIdx.x == 0) *p.num_tiles = first_tile + num_tiles;
  for (int32_t i = threadIdx.x; i < num_tiles; i += kListThreads) {
    p.tiles[first_tile + i] = {expert, begin + i * p.tile_rows,
                               min(p.tile_rows, count - i * p.tile_rows)};
  }
  if (shared) {
    for (int32_t t = threadIdx.x; t < count; t += kListThreads) p.token_of[begin + t] = t;
    return;
  }
  int32_t row = begin;
  for (int32_t from = 0; from < num_choices && row < begin + count; from += kListThreads) {
    const int32_t i = from + threadIdx.x;
    const int32_t mine = i < num_choices && p.expert_ids[i] == expert ? 1 : 0;
    int32_t before = 0;
    int32_t all = 0;
    Scan(scan).ExclusiveSum(mine, before, all);
    if (mine) {
      p.token_of[row + before] = i / p.num_experts_per_tok;
      p.row_of[i] = row + before;
    }
    row += all;
    __syncthreads();
  }
}

constexpr int kSumThreads = 512;

// Where a token's rows lie, and what they are multiplied with; then a barrier.
__device__ __forceinline__ void FindRows(const ExpertSumParams& p, int64_t token, float* weights,
                                         const Bf16** rows) {
  for (int32_t j = threadIdx.x; j < p.num_experts_per_tok + p.num_shared; j += kSumThreads) {
    if (j < p.num_experts_per_tok) {
      const int64_t choice = token * p.num_experts_per_tok + j;
      weights[j] = p.expert_weights[choice];
      rows[j] = p.expert_rows + p.row_of[choice] * p.expert_stride;
    } else {  // those of shared experts lie behind all choices
      weights[j] = 1.0f;
      rows[j] = p.expert_rows + (p.num_tokens * j + token) * p.expert_stride;
    }
  }
  __syncthreads();
}

struct SumShared {
  float* weights;     // [num_experts_per_tok + num_shared]
  const Bf16** rows;  // the same
  __device__ explicit SumShared(const ExpertSumParams& p)
      : weights(DynamicShared<float>()),
        rows(reinterpret_cast<const Bf16**>(weights +
                                            (p.num_experts_per_tok + p.num_shared + 1) / 2 * 2)) {}
};

size_t SumSharedBytes(const ExpertSumParams& p) {
  const int32_t rows = p.num_experts_per_tok + p.num_shared;
  return sizeof(float) * (rows + 1) + sizeof(void*) * rows;
}

// Any number of columns.
__global__ void __launch_bounds__(kSumThreads) SumExperts(const ExpertSumParams p) {
  __shared__ float shared[kSumThreads / 32];
  const SumShared s(p);
  StartNext();
  WaitForEarlier();
  const int64_t token = blockIdx.x;
  FindRows(p, token, s.weights, s.rows);
  float* const y = p.y + token * p.dim;
  float squares = 0;
  for (int i = threadIdx.x; i < p.dim; i += kSumThreads) {
    float sum = 0;
    for (int32_t j = 0; j < p.num_experts_per_tok + p.num_shared; ++j) {
      sum = fmaf(s.weights[j], __bfloat162float(s.rows[j][i]), sum);
    }
    y[i] += sum;
    squares = fmaf(y[i], y[i], squares);
  }
  if (p.norm_weight == nullptr) return;
  const float mean = BlockSum<kSumThreads>(squares, shared) / static_cast<float>(p.dim);
  const float scale = rsqrtf(mean + p.eps);
  Bf16* const normed = p.normed + token * p.normed_stride;
  for (int i = threadIdx.x; i < p.dim; i += kSumThreads) {
    normed[i] = __float2bfloat16(y[i] * scale * p.norm_weight[i]);
  }
}

constexpr int kSumVecs = 4;  // of four columns, a thread

// The token stays in registers: columns a multiple of four, as strides are, and as many as fit. Of one
// token the trips to L2 are the cost: y goes out with where the rows are, the norm's weights before.
__global__ void __launch_bounds__(kSumThreads) SumExpertsHeld(const ExpertSumParams p) {
  __shared__ float shared[kSumThreads / 32];
  const SumShared s(p);
  const int64_t token = blockIdx.x;
  StartNext();
  float4 weight[kSumVecs];
#pragma unroll
  for (int n = 0; n < kSumVecs; ++n) {
    const int i = (n * kSumThreads + threadIdx.x) * 4;
    weight[n] = p.norm_weight != nullptr && i < p.dim
                    ? *reinterpret_cast<const float4*>(p.norm_weight + i)
                    : make_float4(0, 0, 0, 0);
  }
  WaitForEarlier();
  float4 y[kSumVecs];
#pragma unroll
  for (int n = 0; n < kSumVecs; ++n) {
    const int i = (n * kSumThreads + threadIdx.x) * 4;
    y[n] = i < p.dim ? *reinterpret_cast<const float4*>(p.y + token * p.dim + i)
                     : make_float4(0, 0, 0, 0);
  }
  FindRows(p, token, s.weights, s.rows);
  float squares = 0;
#pragma unroll
  for (int n = 0; n < kSumVecs; ++n) {
    const int i = (n * kSumThreads + threadIdx.x) * 4;
    if (i >= p.dim) break;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int32_t j = 0; j < p.num_experts_per_tok + p.num_shared; ++j) {
      const uint2 four = *reinterpret_cast<const uint2*>(s.rows[j] + i);
      const float by = s.weights[j];
      sum.x = fmaf(by, __uint_as_float(four.x << 16), sum.x);
      sum.y = fmaf(by, __uint_as_float(four.x & 0xffff0000u), sum.y);
      sum.z = fmaf(by, __uint_as_float(four.y << 16), sum.z);
      sum.w = fmaf(by, __uint_as_float(four.y & 0xffff0000u), sum.w);
    }
    float4& v = y[n];
    v = make_float4(v.x + sum.x, v.y + sum.y, v.z + sum.z, v.w + sum.w);
    squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
    *reinterpret_cast<float4*>(p.y + token * p.dim + i) = v;
  }
  if (p.norm_weight == nullptr) return;
  const float mean = BlockSum<kSumThreads>(squares, shared) / static_cast<float>(p.dim);
  const float scale = rsqrtf(mean + p.eps);
#pragma unroll
  for (int n = 0; n < kSumVecs; ++n) {
    const int i = (n * kSumThreads + threadIdx.x) * 4;
    if (i >= p.dim) break;
    const float4 v = y[n];
    const float4 w = weight[n];
    *reinterpret_cast<uint2*>(p.normed + token * p.normed_stride + i) =
        make_uint2(PackBf16(v.x * scale * w.x, v.y * scale * w.y),
                   PackBf16(v.z * scale * w.z, v.w * scale * w.w));
  }
}

}  // namespace

cudaError_t Router(const RouterParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (p.n_routed_experts > kMaxRouterExperts) return cudaErrorInvalidValue;
  const size_t bytes = sizeof(float) * moe::RouteFloats(p);
  return LaunchChained(RouteTokens, dim3(static_cast<unsigned>(p.num_tokens)), 32, bytes, stream,
                       p);
}

cudaError_t ExpertLists(const ExpertListsParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (p.n_routed_experts > kMaxRouterExperts) return cudaErrorInvalidValue;
  return LaunchChained(ListExperts, dim3(p.n_routed_experts + p.num_shared), kListThreads,
                       sizeof(int32_t) * p.n_routed_experts, stream, p);
}

cudaError_t ExpertSum(const ExpertSumParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const bool held = p.dim % 4 == 0 && p.dim <= kSumThreads * kSumVecs * 4 &&
                    p.expert_stride % 4 == 0 && p.normed_stride % 4 == 0;
  return LaunchChained(held ? SumExpertsHeld : SumExperts,
                       dim3(static_cast<unsigned>(p.num_tokens)), kSumThreads, SumSharedBytes(p),
                       stream, p);
}

}  // namespace strait::cuda
