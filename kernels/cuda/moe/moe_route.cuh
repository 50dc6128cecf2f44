// SPDX-License-Identifier: Apache-2.0
//
// RouteToken: a warp chooses one token's experts. Scores lie in shared memory, a lane's own are those
// of experts lane, lane + 32, ...; the best are taken one by one by warp-wide comparison (greater value
// first, then lower id). Each lane knows the best of its own, so that only the lane whose expert was
// taken looks again: a pick is two reductions and one lane's few loads, without a barrier.
#pragma once

#include "kernels/cuda/device/common.cuh"
#include "kernels/moe.h"

namespace strait::cuda::moe {

inline constexpr float kNever = -INFINITY;

// Greater for greater values, equal for equal ones; NaN is nothing: 0, never taken.
__device__ __forceinline__ uint32_t OrderOf(float value) {
  if (isnan(value)) return 0;
  const uint32_t bits = __float_as_uint(value + 0.0f);  // one zero
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Takes the best `picks` of values[0, count) out of the running: they become NaN. Stops when all are. A
// lane reads and writes its own alone.
__device__ inline void StrikeBest(float* values, int32_t count, int32_t picks) {
  const int32_t lane = threadIdx.x % 32;
  uint32_t best = 0;
  int32_t index = count;
  const auto look = [&] {
    best = 0;
    index = count;
#pragma unroll 4
    for (int32_t i = lane; i < count; i += 32) {
      const uint32_t order = OrderOf(values[i]);
      if (order > best) {
        best = order;
        index = i;
      }
    }
  };
  look();
  for (int32_t i = 0; i < picks; ++i) {
    const uint32_t most = __reduce_max_sync(kFullWarp, best);
    if (most == 0) return;
    const auto taken = static_cast<int32_t>(
        __reduce_min_sync(kFullWarp, static_cast<uint32_t>(best == most ? index : count)));
    if (index != taken) continue;
    values[taken] = NAN;
    look();
  }
}

// Logits become scores; a lane its own.
__device__ inline void Score(const RouterParams& p, float* scores) {
  const int32_t n = p.n_routed_experts;
  const int32_t lane = threadIdx.x % 32;
  if (p.scoring == RouterScoring::kSigmoid) {
    for (int32_t e = lane; e < n; e += 32) scores[e] = 1.0f / (1.0f + expf(-scores[e]));
    return;
  }
  float most = kNever;
  for (int32_t e = lane; e < n; e += 32) most = fmaxf(most, scores[e]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
  }
  float sum = 0;
  for (int32_t e = lane; e < n; e += 32) {
    scores[e] = expf(scores[e] - most);
    sum += scores[e];
  }
  sum = WarpSum(sum);
  for (int32_t e = lane; e < n; e += 32) scores[e] /= sum;
}

// choice of experts outside the best topk_group groups becomes what no group may win with.
__device__ inline void LimitGroups(const RouterParams& p, float* choice, float* groups) {
  const int32_t size = p.n_routed_experts / p.n_group;
  for (int32_t g = threadIdx.x % 32; g < p.n_group; g += 32) {
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
  StrikeBest(groups, p.n_group, p.topk_group);
  __syncwarp();
  const float outside = p.method == RouterMethod::kNoauxTc ? kNever : 0.0f;
  for (int32_t e = threadIdx.x % 32; e < p.n_routed_experts; e += 32) {
    if (!isnan(groups[e / size])) choice[e] = outside;
  }
  __syncwarp();
}

// Floats of shared memory that a warp needs.
__host__ __device__ inline int32_t RouteFloats(const RouterParams& p) {
  return 2 * p.n_routed_experts + p.n_group + p.num_experts_per_tok;
}
// Where in it the token's experts lie afterwards, ascending.
__device__ __forceinline__ int32_t* PickedIds(const RouterParams& p, float* memory) {
  return reinterpret_cast<int32_t*>(memory + 2 * p.n_routed_experts + p.n_group);
}

// What RouteToken finds in `memory` [RouteFloats], in shared memory, of this warp alone; a lane writes
// its own experts' logits and, which may be read early, what is added to their scores for the choice.
__device__ __forceinline__ float& LogitAt(float* memory, int32_t expert) { return memory[expert]; }
__device__ inline void SetBias(const RouterParams& p, float* memory) {
#pragma unroll 4
  for (int32_t e = threadIdx.x % 32; e < p.n_routed_experts; e += 32) {
    memory[p.n_routed_experts + e] = p.correction_bias != nullptr ? p.correction_bias[e] : 0.0f;
  }
}

__device__ inline void RouteToken(const RouterParams& p, int64_t token, float* memory) {
  const int32_t lane = threadIdx.x % 32;
  float* const scores = memory;
  float* const choice = scores + p.n_routed_experts;
  float* const groups = choice + p.n_routed_experts;
  Score(p, scores);
  for (int32_t e = lane; e < p.n_routed_experts; e += 32) {
    const float value = scores[e] + choice[e];
    choice[e] = isnan(value) ? kNever : value;  // from here on, NaN is what was struck
  }
  if (p.method != RouterMethod::kGreedy) {
    __syncwarp();
    LimitGroups(p, choice, groups);
  }
  const int32_t picks = p.num_experts_per_tok;
  StrikeBest(choice, p.n_routed_experts, picks);
  // What was struck, ascending: each lane counts those before its own.
  int32_t* const ids = PickedIds(p, memory);
  float* const weights = p.expert_weights + token * picks;
  int32_t taken = 0;
  for (int32_t begin = 0; begin < p.n_routed_experts && taken < picks; begin += 32) {
    const int32_t e = begin + lane;
    const bool mine = e < p.n_routed_experts && isnan(choice[e]);
    const unsigned all = __ballot_sync(kFullWarp, mine);
    const int32_t at = taken + __popc(all & ((1u << lane) - 1));
    if (mine && at < picks) ids[at] = e;
    taken += __popc(all);
  }
  __syncwarp();
  const bool normalize = p.norm_topk_prob && p.scoring == RouterScoring::kSigmoid;
  float sum = 0;
  for (int32_t j = 0; normalize && j < picks; ++j) sum += scores[ids[j]];
  for (int32_t j = lane; j < picks; j += 32) {
    const float score = scores[ids[j]];
    p.expert_ids[token * picks + j] = ids[j];
    weights[j] = (normalize ? score / (sum + 1e-20f) : score) * p.routed_scaling_factor;
  }
}

}  // namespace strait::cuda::moe
