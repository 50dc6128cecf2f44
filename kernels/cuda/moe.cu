// SPDX-License-Identifier: Apache-2.0
//
// Router: one warp a token, scores in shared memory, the best taken one by one by warp-wide
// comparison (greater value first, then lower id). Lists: one block an expert; each counts all
// choices, finds where its own begin, and writes them in order of choice; then the shared experts,
// which every token goes to.
#include <cub/block/block_scan.cuh>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/moe.h"

namespace strait::cuda {
namespace {

constexpr float kNever = -INFINITY;

struct Best {
  float value;
  int32_t index;
};

// NaN is nothing: never taken.
__device__ __forceinline__ bool Better(const Best& a, const Best& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// Index of the best of values[0, count), the same in all lanes; count if all are NaN.
__device__ int32_t WarpBest(const float* values, int32_t count) {
  Best best = {kNever, count};
  for (int32_t i = threadIdx.x; i < count; i += 32) {
    const Best one = {values[i], i};
    if (Better(one, best)) best = one;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other = {__shfl_xor_sync(kFullWarp, best.value, offset),
                        __shfl_xor_sync(kFullWarp, best.index, offset)};
    if (Better(other, best)) best = other;
  }
  return best.index;
}

// Takes it out of the running.
__device__ __forceinline__ void Strike(float* values, int32_t index) {
  __syncwarp();
  if (threadIdx.x == 0) values[index] = NAN;
  __syncwarp();
}

__device__ void Scores(const RouterParams& p, const float* logits, float* scores) {
  const int32_t n = p.n_routed_experts;
  if (p.scoring == RouterScoring::kSigmoid) {
    for (int32_t e = threadIdx.x; e < n; e += 32) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
    return;
  }
  float most = kNever;
  for (int32_t e = threadIdx.x; e < n; e += 32) most = fmaxf(most, logits[e]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
  }
  float sum = 0;
  for (int32_t e = threadIdx.x; e < n; e += 32) {
    scores[e] = expf(logits[e] - most);
    sum += scores[e];
  }
  sum = WarpSum(sum);
  for (int32_t e = threadIdx.x; e < n; e += 32) scores[e] /= sum;
}

// choice of experts outside the best topk_group groups becomes what no group may win with.
__device__ void LimitGroups(const RouterParams& p, float* choice, float* groups) {
  const int32_t size = p.n_routed_experts / p.n_group;
  for (int32_t g = threadIdx.x; g < p.n_group; g += 32) {
    float first = kNever;
    float second = kNever;
    for (int32_t e = g * size; e < (g + 1) * size; ++e) {
      if (choice[e] > first) {
        second = first;
        first = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    const bool two = p.method == RouterMethod::kNoauxTc && size > 1;
    groups[g] = two ? first + second : first;
  }
  __syncwarp();
  for (int32_t i = 0; i < p.topk_group; ++i) {
    const int32_t best = WarpBest(groups, p.n_group);
    if (best < p.n_group) Strike(groups, best);
  }
  const float outside = p.method == RouterMethod::kNoauxTc ? kNever : 0.0f;
  for (int32_t e = threadIdx.x; e < p.n_routed_experts; e += 32) {
    if (!isnan(groups[e / size])) choice[e] = outside;
  }
  __syncwarp();
}

__global__ void __launch_bounds__(32) RouteToken(const RouterParams p) {
  auto* const memory = DynamicShared<float>();
  WaitForEarlier();
  StartNext();
  float* const scores = memory;
  float* const choice = scores + p.n_routed_experts;
  float* const groups = choice + p.n_routed_experts;
  const int64_t token = blockIdx.x;
  Scores(p, p.logits + token * p.n_routed_experts, scores);
  for (int32_t e = threadIdx.x; e < p.n_routed_experts; e += 32) {
    const float value = scores[e] + (p.correction_bias ? p.correction_bias[e] : 0.0f);
    choice[e] = isnan(value) ? kNever : value;  // from here on, NaN is what was struck
  }
  __syncwarp();
  if (p.method != RouterMethod::kGreedy) LimitGroups(p, choice, groups);
  const int32_t picks = p.num_experts_per_tok;
  for (int32_t i = 0; i < picks; ++i) {
    Strike(choice, WarpBest(choice, p.n_routed_experts));
  }
  // What was struck, ascending: each lane counts those before its own.
  int32_t* const ids = p.expert_ids + token * picks;
  float* const weights = p.expert_weights + token * picks;
  int32_t taken = 0;
  float sum = 0;
  for (int32_t begin = 0; begin < p.n_routed_experts && taken < picks; begin += 32) {
    const int32_t e = begin + threadIdx.x;
    const bool mine = e < p.n_routed_experts && isnan(choice[e]);
    const unsigned all = __ballot_sync(kFullWarp, mine);
    const int32_t at = taken + __popc(all & ((1u << threadIdx.x) - 1));
    if (mine && at < picks) ids[at] = e;
    taken += __popc(all);
  }
  __syncwarp();
  for (int32_t j = 0; j < picks; ++j) sum += scores[ids[j]];
  const bool normalize = p.norm_topk_prob && p.scoring == RouterScoring::kSigmoid;
  for (int32_t j = threadIdx.x; j < picks; j += 32) {
    const float score = scores[ids[j]];
    weights[j] = (normalize ? score / (sum + 1e-20f) : score) * p.routed_scaling_factor;
  }
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
  WaitForEarlier();
  StartNext();
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
  if (shared) {  // every token goes to each of these
    const int32_t before = expert - p.n_routed_experts;
    begin += before * p.num_tokens;
    first_tile += before * TilesOf(p.num_tokens, p.tile_rows);
  }
  const int32_t count = shared ? p.num_tokens : counts[expert];
  const int32_t num_tiles = TilesOf(count, p.tile_rows);
  if (blockIdx.x + 1 == gridDim.x && threadIdx.x == 0) *p.num_tiles = first_tile + num_tiles;
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

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) SumExperts(const ExpertSumParams p) {
  WaitForEarlier();
  StartNext();
  const int64_t token = blockIdx.x;
  const int32_t i = blockIdx.y * kSumThreads + threadIdx.x;
  if (i >= p.dim) return;
  float sum = 0;
  for (int32_t j = 0; j < p.num_experts_per_tok; ++j) {
    const int64_t choice = token * p.num_experts_per_tok + j;
    const float value = __bfloat162float(p.expert_rows[p.row_of[choice] * p.expert_stride + i]);
    sum = fmaf(p.expert_weights[choice], value, sum);
  }
  for (int32_t s = 0; s < p.num_shared; ++s) {
    const int64_t row = p.num_tokens * (p.num_experts_per_tok + s) + token;
    sum += __bfloat162float(p.expert_rows[row * p.expert_stride + i]);
  }
  p.y[token * p.dim + i] += sum;
}

}  // namespace

cudaError_t Router(const RouterParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (p.n_routed_experts > kMaxRouterExperts) return cudaErrorInvalidValue;
  const size_t bytes = sizeof(float) * (2 * p.n_routed_experts + p.n_group);
  return LaunchChained(RouteToken, dim3(static_cast<unsigned>(p.num_tokens)), 32, bytes, stream, p);
}

cudaError_t ExpertLists(const ExpertListsParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (p.n_routed_experts > kMaxRouterExperts) return cudaErrorInvalidValue;
  return LaunchChained(ListExperts, dim3(p.n_routed_experts + p.num_shared), kListThreads,
                       sizeof(int32_t) * p.n_routed_experts, stream, p);
}

cudaError_t ExpertSum(const ExpertSumParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(p.num_tokens), (p.dim + kSumThreads - 1) / kSumThreads);
  return LaunchChained(SumExperts, grid, kSumThreads, 0, stream, p);
}

}  // namespace strait::cuda
