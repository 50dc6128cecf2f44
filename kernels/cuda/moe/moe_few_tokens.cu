// SPDX-License-Identifier: Apache-2.0
//
// ChooseExperts: a block makes one expert's logits, norming the tokens on the way; the last block
// collects the logits, chooses experts and writes the lists, of at most 32 choices.
//
// Limit: latency: the launches that it replaces cost more than their work. The router's matrix is read
// once (V2-Lite 0.26 MB, V3 3.7 MB), before the kernel before has ended, as are the norm's weights.
// What is left, from the turn of the kernel to its end, one token:
//   x from L2, all of a thread's loads at once       1 trip
//   sum of squares, then the logit, over the block   2 barriers
//   the logit to L2, from there to the last block    1 trip and a half
//   scores, picks (2 reductions each), lists         one warp, no barrier
// The last block does not wait for a count of arrivals, which would cost a fence, an atomic's trip and
// then the trip for the logits: a logit and the mark that it is there are one word, which it reads
// until all are marked. It needs no other block's place to run: none waits for it.
#include <algorithm>

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_launch.cuh"
#include "kernels/cuda/moe/moe.h"
#include "kernels/cuda/moe/moe_route.cuh"

namespace strait::cuda {
namespace {

constexpr int kMaxTokens = kMaxChooseTokens;
constexpr int32_t kMaxChoices = 32;  // a lane each
constexpr int kVec = 8;              // columns of a 16-byte load of bf16
constexpr int kVecs = 2;             // of a thread
constexpr int kMaxThreads = 512;
constexpr int kMinThreads = kMaxTokens * 32;  // a warp routes a token
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr size_t kMaxSharedBytes = 80 << 10;
constexpr uint32_t kHere = 1;  // the mark, in the upper half of a word

__device__ __forceinline__ void AddProducts(const uint4& a, const uint4& b, float (&sums)[2]) {
  const uint32_t as[4] = {a.x, a.y, a.z, a.w};
  const uint32_t bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[0] = fmaf(__uint_as_float(as[i] << 16), __uint_as_float(bs[i] << 16), sums[0]);
    sums[1] =
        fmaf(__uint_as_float(as[i] & 0xffff0000u), __uint_as_float(bs[i] & 0xffff0000u), sums[1]);
  }
}

__device__ __forceinline__ uint32_t NormPair(float a, float b, float scale, float wa, float wb) {
  return PackBf16(a * scale * wa, b * scale * wb);
}

__device__ __forceinline__ uint4 NormVec(const float4 (&x)[2], float scale, const float4 (&w)[2]) {
  return make_uint4(NormPair(x[0].x, x[0].y, scale, w[0].x, w[0].y),
                    NormPair(x[0].z, x[0].w, scale, w[0].z, w[0].w),
                    NormPair(x[1].x, x[1].y, scale, w[1].x, w[1].y),
                    NormPair(x[1].z, x[1].w, scale, w[1].z, w[1].w));
}

// Sums over the block, known to all threads. `shared` is nobody else's.
template <int kTokens>
__device__ __forceinline__ void AddUp(float (&values)[kTokens], float (*shared)[kMaxWarps]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float sum = WarpSum(values[t]);
    if (threadIdx.x % 32 == 0) shared[t][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const int warps = blockDim.x / 32;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    values[t] = 0;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w) values[t] += w < warps ? shared[t][w] : 0.0f;
  }
}

// A thread has the same columns of all tokens: threadIdx.x-th 8, and blockDim.x further.
template <int kTokens>
__device__ __forceinline__ void MakeLogits(const ChooseExpertsParams& p, int expert) {
  __shared__ __align__(16) float squares_of[kTokens][kMaxWarps];
  __shared__ __align__(16) float logits_of[kTokens][kMaxWarps];
  const int dim = p.gate.cols;
  const int tokens = static_cast<int>(p.router.num_tokens);
  const bool has_rest = p.gate_rest.data != nullptr;
  const auto row_of = [&](const Matrix& m) {
    return static_cast<const Bf16*>(m.data) + int64_t{expert} * m.stride;
  };
  const uint4 none = make_uint4(0, 0, 0, 0);
  uint4 gate[kVecs];
  uint4 rest[kVecs];
  float4 weight[kVecs][2];
  int columns[kVecs];
  bool inside[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    columns[i] = static_cast<int>(threadIdx.x + i * blockDim.x) * kVec;
    inside[i] = columns[i] < dim;
    gate[i] = rest[i] = none;
    weight[i][0] = weight[i][1] = make_float4(0, 0, 0, 0);
    if (!inside[i]) continue;
    gate[i] = *reinterpret_cast<const uint4*>(row_of(p.gate) + columns[i]);
    if (has_rest) rest[i] = *reinterpret_cast<const uint4*>(row_of(p.gate_rest) + columns[i]);
    const auto* const from = reinterpret_cast<const float4*>(p.norm_weight + columns[i]);
    weight[i][0] = from[0];
    weight[i][1] = from[1];
  }
  WaitForEarlier();
  float4 x[kTokens][kVecs][2];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const bool there = t < tokens && inside[i];
      const auto* const from = reinterpret_cast<const float4*>(p.x + int64_t{t} * dim + columns[i]);
      x[t][i][0] = there ? from[0] : make_float4(0, 0, 0, 0);
      x[t][i][1] = there ? from[1] : make_float4(0, 0, 0, 0);
    }
  }
  float squares[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float parts[kVecs * 2];
#pragma unroll
    for (int i = 0; i < kVecs * 2; ++i) {
      const float4 v = x[t][i / 2][i % 2];
      parts[i] = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w)));
    }
    squares[t] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
  AddUp<kTokens>(squares, squares_of);
  uint4 normed[kTokens][kVecs];
  float logits[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float scale = rsqrtf(squares[t] / static_cast<float>(dim) + p.eps);
    float sums[kVecs][2] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      normed[t][i] = NormVec(x[t][i], scale, weight[i]);
      AddProducts(gate[i], normed[t][i], sums[i]);
      if (has_rest) AddProducts(rest[i], normed[t][i], sums[i]);
    }
    logits[t] = (sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]);
  }
  AddUp<kTokens>(logits, logits_of);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (static_cast<int>(threadIdx.x) != t * 32 || t >= tokens) continue;
    const int64_t at = int64_t{t} * p.router.n_routed_experts + expert;
    *const_cast<volatile uint64_t*>(&p.handed[at]) =
        uint64_t{kHere} << 32 | __float_as_uint(logits[t]);
    p.logits[at] = logits[t];
  }
  // Each block writes its share of what the experts read.
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (!inside[i] || columns[i] / kVec % p.router.n_routed_experts != expert) continue;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) continue;
      *reinterpret_cast<uint4*>(p.normed + t * p.normed_stride + columns[i]) = normed[t][i];
    }
  }
}

// A warp: waits for the token's logits, a lane for those that it keeps, and leaves the words empty.
__device__ __forceinline__ void CollectLogits(const ChooseExpertsParams& p, int64_t token,
                                              float* memory) {
  constexpr int kAtOnce = 8;
  const int32_t experts = p.router.n_routed_experts;
  uint64_t* const words = p.handed + token * experts;
  for (int32_t begin = threadIdx.x % 32; begin < experts; begin += 32 * kAtOnce) {
    uint64_t word[kAtOnce];
    bool all = false;
    while (!all) {
      all = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t e = begin + i * 32;
        if (e >= experts) continue;
        word[i] = *const_cast<volatile uint64_t*>(&words[e]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i * 32 < experts && word[i] >> 32 != kHere) all = false;
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t e = begin + i * 32;
      if (e >= experts) continue;
      moe::LogitAt(memory, e) = __uint_as_float(static_cast<uint32_t>(word[i]));
      words[e] = 0;
    }
  }
}

// A warp: one choice a lane, of at most 32, whose expert is `id`; more than any expert's where there is
// no choice. A tile holds all rows of an expert.
__device__ __forceinline__ void ListChoices(const ExpertListsParams& p, int32_t id) {
  const int lane = threadIdx.x % 32;
  const int32_t num_choices = p.num_tokens * p.num_experts_per_tok;
  const bool valid = lane < num_choices;
  const unsigned earlier = (1u << lane) - 1;
  // Choices, as bits: those of lower experts, those of this one.
  unsigned lower = earlier;  // one token's experts ascend
  unsigned same = 1u << lane;
  if (p.num_tokens > 1) {
    lower = same = 0;
    for (int32_t j = 0; j < num_choices; ++j) {
      const int32_t other = __shfl_sync(kFullWarp, id, j);
      lower |= static_cast<unsigned>(other < id) << j;
      same |= static_cast<unsigned>(other == id) << j;
    }
  }
  const int32_t before = __popc(same & earlier);
  const bool first = valid && before == 0;
  const unsigned firsts = __ballot_sync(kFullWarp, first);
  const int32_t less = __popc(lower);
  if (valid) {
    p.token_of[less + before] = lane / p.num_experts_per_tok;
    p.row_of[lane] = less + before;
  }
  if (first) p.tiles[p.num_shared + __popc(lower & firsts)] = {id, less, __popc(same)};
  for (int32_t i = lane; i < p.num_shared * p.num_tokens; i += 32) {
    p.token_of[num_choices + i] = i % p.num_tokens;
  }
  for (int32_t s = lane; s < p.num_shared; s += 32) {
    p.tiles[s] = {p.n_routed_experts + s, num_choices + s * p.num_tokens, p.num_tokens};
  }
  if (lane == 0) *p.num_tiles = p.num_shared + __popc(firsts);
}

template <int kTokens>
__device__ __forceinline__ void ChooseFromLogits(const ChooseExpertsParams& p, float* scratch) {
  const RouterParams& router = p.router;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int tokens = static_cast<int>(router.num_tokens);
  const int32_t floats = moe::RouteFloats(router);
  if (warp < tokens) {
    float* const memory = scratch + warp * floats;
    moe::SetBias(router, memory);
    WaitForEarlier();
    CollectLogits(p, warp, memory);
    moe::RouteToken(router, warp, memory);
  }
  if (kTokens > 1) __syncthreads();
  if (warp > 0) return;
  __syncwarp();
  const int32_t picks = router.num_experts_per_tok;
  const bool valid = lane < tokens * picks;
  float* const memory = scratch + (valid ? lane / picks : 0) * floats;
  const int32_t* const ids = moe::PickedIds(router, memory);
  ListChoices(p.lists, valid ? ids[lane % picks] : router.n_routed_experts);
}

// Grid: an expert each, then the block that chooses.
template <int kTokens>
__global__ void __launch_bounds__(kMaxThreads)
    Choose(const __grid_constant__ ChooseExpertsParams p) {
  auto* const scratch = DynamicShared<float>();
  StartNext();
  if (blockIdx.x + 1 < gridDim.x) {
    MakeLogits<kTokens>(p, static_cast<int>(blockIdx.x));
  } else {
    ChooseFromLogits<kTokens>(p, scratch);
  }
}

size_t SharedBytes(const ChooseExpertsParams& p) {
  return static_cast<size_t>(p.router.num_tokens) *
         static_cast<size_t>(moe::RouteFloats(p.router)) * sizeof(float);
}

}  // namespace

bool CanChooseExperts(const ChooseExpertsParams& p) {
  const int64_t tokens = p.router.num_tokens;
  return tokens >= 1 && tokens <= kMaxTokens && tokens <= p.lists.tile_rows &&
         tokens * p.router.num_experts_per_tok <= kMaxChoices && p.gate.cols % kVec == 0 &&
         p.gate.cols <= kMaxThreads * kVecs * kVec && p.normed_stride % kVec == 0 &&
         SharedBytes(p) <= kMaxSharedBytes;
}

cudaError_t ChooseExperts(const ChooseExpertsParams& p, cudaStream_t stream) {
  const int vecs = p.gate.cols / kVec;
  const int warps = (vecs + kVecs * 32 - 1) / (kVecs * 32);
  const auto threads = static_cast<unsigned>(std::max(warps * 32, kMinThreads));
  const auto kernel = p.router.num_tokens == 1 ? Choose<1> : Choose<kMaxTokens>;
  return LaunchWithShared(kernel, dim3(static_cast<unsigned>(p.router.n_routed_experts) + 1),
                          threads, static_cast<int>(SharedBytes(p)), stream, p);
}

}  // namespace strait::cuda
