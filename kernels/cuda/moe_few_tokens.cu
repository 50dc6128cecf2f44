// SPDX-License-Identifier: Apache-2.0
//
// ChooseExperts: every block norms the tokens, a warp makes one expert's logits, and the block that is
// done last chooses experts and writes the lists, of at most 32 choices, by one warp.
//
// Limit: latency: the launches that it replaces cost more than their work. The router's matrix is read
// once (V2-Lite 0.26 MB, V3 3.7 MB), before the kernel before has ended.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_launch.cuh"
#include "kernels/cuda/moe.h"
#include "kernels/cuda/moe_route.cuh"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kMaxTokens = 4;
constexpr int32_t kMaxChoices = 32;  // a lane each
constexpr int kVec = 8;              // bf16 of a 16-byte load
constexpr int kSpan = 32 * kVec;     // columns that a warp takes at once
constexpr size_t kMaxSharedBytes = 80 << 10;
constexpr int kEarly = 8;  // spans of the matrix read before the kernel before has ended

__device__ __forceinline__ void AddProducts(const uint4& a, const uint4& b, float& sum) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w};
  const uint32_t bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(as[i] << 16), __uint_as_float(bs[i] << 16), sum);
    sum = fmaf(__uint_as_float(as[i] & 0xffff0000u), __uint_as_float(bs[i] & 0xffff0000u), sum);
  }
}

__device__ __forceinline__ const Bf16* RowOf(const Matrix& m, int32_t row) {
  return static_cast<const Bf16*>(m.data) + int64_t{row} * m.stride;
}

// A warp: one choice a lane, of at most 32, whose expert is `id`; more than any expert's where there is
// no choice. A tile holds all rows of an expert.
__device__ void ListChoices(const ExpertListsParams& p, int32_t id) {
  const int lane = threadIdx.x % 32;
  const int32_t num_choices = p.num_tokens * p.num_experts_per_tok;
  const bool valid = lane < num_choices;
  int32_t less = 0;    // choices of lower experts
  int32_t before = 0;  // earlier choices of this one
  int32_t same = 0;
  for (int32_t j = 0; j < num_choices; ++j) {
    const int32_t other = __shfl_sync(kFullWarp, id, j);
    if (other < id) ++less;
    if (other == id) ++same;
    if (other == id && j < lane) ++before;
  }
  const bool first = valid && before == 0;
  const unsigned firsts = __ballot_sync(kFullWarp, first);
  int32_t tile = 0;
  for (int32_t j = 0; j < num_choices; ++j) {
    const int32_t other = __shfl_sync(kFullWarp, id, j);
    if ((firsts >> j & 1) != 0 && other < id) ++tile;
  }
  if (valid) {
    p.token_of[less + before] = lane / p.num_experts_per_tok;
    p.row_of[lane] = less + before;
  }
  if (first) p.tiles[tile] = {id, less, same};
  const int32_t routed_tiles = __popc(firsts);
  for (int32_t i = lane; i < p.num_shared * p.num_tokens; i += 32) {
    p.token_of[num_choices + i] = i % p.num_tokens;
  }
  for (int32_t s = lane; s < p.num_shared; s += 32) {
    p.tiles[routed_tiles + s] = {p.n_routed_experts + s, num_choices + s * p.num_tokens,
                                 p.num_tokens};
  }
  if (lane == 0) *p.num_tiles = routed_tiles + p.num_shared;
}

__global__ void __launch_bounds__(kThreads) Choose(const __grid_constant__ ChooseExpertsParams p) {
  __shared__ float sums[kWarps];
  __shared__ bool last;
  const int dim = p.gate.cols;
  const int tokens = static_cast<int>(p.router.num_tokens);
  const int32_t experts = p.router.n_routed_experts;
  auto* const normed = DynamicShared<Bf16>();  // [tokens, dim]
  auto* const scratch = reinterpret_cast<float*>(normed + tokens * dim);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int32_t expert = blockIdx.x * kWarps + warp;
  const Bf16* const row = RowOf(p.gate, min(expert, experts - 1));
  uint4 early[kEarly];
#pragma unroll
  for (int c = 0; c < kEarly; ++c) {
    const int k = c * kSpan + lane * kVec;
    early[c] = k < dim ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
  }
  StartNext();
  if (threadIdx.x == 0) PrefetchToL2(p.norm_weight, dim * sizeof(float));
  WaitForEarlier();
  for (int t = 0; t < tokens; ++t) {
    const auto* const x = reinterpret_cast<const float4*>(p.x + int64_t{t} * dim);
    const auto* const weight = reinterpret_cast<const float4*>(p.norm_weight);
    float squares = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < dim / 4; i += kThreads) {
      const float4 v = x[i];
      squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
    }
    const float mean = BlockSum<kThreads>(squares, sums) / static_cast<float>(dim);
    const float scale = rsqrtf(mean + p.eps);
    auto* const out = reinterpret_cast<uint2*>(p.normed + t * p.normed_stride);
#pragma unroll 4
    for (int i = threadIdx.x; i < dim / 4; i += kThreads) {
      const float4 v = x[i];
      const float4 w = weight[i];
      __nv_bfloat162 low = __floats2bfloat162_rn(v.x * scale * w.x, v.y * scale * w.y);
      __nv_bfloat162 high = __floats2bfloat162_rn(v.z * scale * w.z, v.w * scale * w.w);
      uint2 four;
      memcpy(&four.x, &low, 4);
      memcpy(&four.y, &high, 4);
      reinterpret_cast<uint2*>(normed + t * dim)[i] = four;
      if (i / kThreads % gridDim.x == blockIdx.x) out[i] = four;
    }
  }
  __syncthreads();
  if (expert < experts) {
    float logits[kMaxTokens] = {};
#pragma unroll
    for (int c = 0; c < kEarly; ++c) {
      const int k = c * kSpan + lane * kVec;
      if (k >= dim) break;
#pragma unroll
      for (int t = 0; t < kMaxTokens; ++t) {
        if (t >= tokens) break;
        AddProducts(early[c], *reinterpret_cast<const uint4*>(normed + t * dim + k), logits[t]);
      }
    }
    const auto add = [&](const Bf16* from, int begin) {
#pragma unroll 4
      for (int k = begin + lane * kVec; k < dim; k += kSpan) {
        const uint4 w = *reinterpret_cast<const uint4*>(from + k);
#pragma unroll
        for (int t = 0; t < kMaxTokens; ++t) {
          if (t >= tokens) break;
          AddProducts(w, *reinterpret_cast<const uint4*>(normed + t * dim + k), logits[t]);
        }
      }
    };
    add(row, kEarly * kSpan);
    if (p.gate_rest.data != nullptr) add(RowOf(p.gate_rest, expert), 0);
#pragma unroll
    for (int t = 0; t < kMaxTokens; ++t) {
      const float sum = WarpSum(logits[t]);
      if (lane == 0 && t < tokens) p.logits[int64_t{t} * experts + expert] = sum;
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.arrived, 1) + 1 == static_cast<int>(gridDim.x);
    if (last) *p.arrived = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  RouterParams router = p.router;
  router.logits = p.logits;
  if (warp < tokens) moe::RouteToken(router, warp, scratch + warp * moe::RouteFloats(router));
  __syncthreads();
  if (warp > 0) return;
  const int32_t picks = router.num_experts_per_tok;
  const bool valid = lane < tokens * picks;
  float* const memory = scratch + (valid ? lane / picks : 0) * moe::RouteFloats(router);
  ListChoices(p.lists, valid ? moe::PickedIds(router, memory)[lane % picks] : experts);
}

size_t SharedBytes(const ChooseExpertsParams& p) {
  return static_cast<size_t>(p.router.num_tokens) *
         (static_cast<size_t>(p.gate.cols) * sizeof(Bf16) +
          static_cast<size_t>(moe::RouteFloats(p.router)) * sizeof(float));
}

}  // namespace

bool CanChooseExperts(const ChooseExpertsParams& p) {
  const int64_t tokens = p.router.num_tokens;
  return tokens >= 1 && tokens <= kMaxTokens && tokens <= p.lists.tile_rows &&
         tokens * p.router.num_experts_per_tok <= kMaxChoices && p.gate.cols % kVec == 0 &&
         p.normed_stride % kVec == 0 && SharedBytes(p) <= kMaxSharedBytes;
}

cudaError_t ChooseExperts(const ChooseExpertsParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.router.n_routed_experts + kWarps - 1) / kWarps);
  return LaunchWithShared(Choose, dim3(blocks), kThreads, static_cast<int>(SharedBytes(p)), stream,
                          p);
}

}  // namespace strait::cuda
