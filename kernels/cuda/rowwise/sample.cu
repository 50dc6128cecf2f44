// SPDX-License-Identifier: Apache-2.0
//
// One block a row. top_k and top_p are found by radix selection: four passes, each of which finds
// 8 more bits of the key of the last token kept; a key orders as its logit does.
#include <cub/block/block_scan.cuh>

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/rowwise/sample.h"

namespace strait::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr float kNever = -INFINITY;
constexpr float kOne = 1099511627776.0f;  // 2^40: the greatest probability as a whole number
using Whole = unsigned long long;
using Scan = cub::BlockScan<Whole, kThreads>;

struct Best {
  float value;
  int32_t index;
};

__device__ __forceinline__ bool Better(const Best& a, const Best& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

struct Shared {
  Best best[kWarps];
  double sums[kWarps];
  Whole bins[256];
  Whole above;
  uint32_t prefix;
  int32_t chosen;
  typename Scan::TempStorage scan;
};

__device__ Best BlockBest(Best best, Shared& s) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other = {__shfl_xor_sync(kFullWarp, best.value, offset),
                        __shfl_xor_sync(kFullWarp, best.index, offset)};
    if (Better(other, best)) best = other;
  }
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
  __syncthreads();
  best = s.best[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    if (Better(s.best[warp], best)) best = s.best[warp];
  }
  __syncthreads();
  return best;
}

__device__ double BlockSumDouble(double value, Shared& s) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += s.sums[warp];
  __syncthreads();
  return sum;
}

__device__ __forceinline__ float NoNan(float value) { return isnan(value) ? kNever : value; }

// Rises with the value; -0 and 0 are one.
__device__ __forceinline__ uint32_t KeyOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What of the tokens is left: greater keys, and of the last key ids up to last_id.
struct Kept {
  uint32_t last_key = 0;
  int32_t last_id = INT32_MAX;
};

// The distribution of a row after temperature: logits, and which tokens are kept.
struct Distribution {
  const float* logits;
  int32_t size;
  float temperature;
  float greatest;  // after division by the temperature
  float min_p;
  Kept kept;

  // Probability relative to the greatest, 0 if not kept.
  __device__ float Weight(int32_t id) const {
    const float logit = logits[id];
    const uint32_t key = KeyOf(logit);
    if (key < kept.last_key || (key == kept.last_key && id > kept.last_id)) return 0;
    const float weight = expf(logit / temperature - greatest);
    return weight >= min_p ? weight : 0;
  }
  __device__ Whole WholeWeight(int32_t id) const {
    return static_cast<Whole>(__float2ull_rn(Weight(id) * kOne));
  }
};

// The id of the `wanted`-th (from 1) kept token with this key, by rising id.
__device__ int32_t IdOfEqual(const Distribution& d, uint32_t key, Whole wanted, Shared& s) {
  const int32_t chunk = (d.size + kThreads - 1) / kThreads;
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x) * chunk, d.size);
  const int32_t end = min(begin + chunk, d.size);
  Whole own = 0;
  for (int32_t i = begin; i < end; ++i) own += KeyOf(d.logits[i]) == key && d.Weight(i) > 0;
  Whole before = 0;
  Scan(s.scan).ExclusiveSum(own, before);
  if (threadIdx.x == 0) s.chosen = INT32_MAX;
  __syncthreads();
  if (before < wanted && wanted <= before + own) {
    for (int32_t i = begin; i < end; ++i) {
      before += KeyOf(d.logits[i]) == key && d.Weight(i) > 0;
      if (before == wanted) {
        s.chosen = i;
        break;
      }
    }
  }
  __syncthreads();
  const int32_t id = s.chosen;
  __syncthreads();
  return id;
}

// Keeps the fewest of the best tokens whose measure (1 each, or their weight) reaches `wanted`.
template <bool kByWeight>
__device__ void KeepBest(Distribution& d, double wanted, Shared& s) {
  if (threadIdx.x == 0) {
    s.prefix = 0;
    s.above = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    const uint32_t prefix = s.prefix;
    for (int32_t i = threadIdx.x; i < d.size; i += kThreads) {
      const uint32_t key = KeyOf(d.logits[i]);
      if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) continue;
      const float weight = d.Weight(i);
      if (!(weight > 0)) continue;
      atomicAdd(&s.bins[key >> shift & 255],
                kByWeight ? static_cast<Whole>(__float2ull_rn(weight * kOne)) : Whole{1});
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 255;
      int lowest = -1;  // that has anything: where it ends if rounding leaves `wanted` unreached
      Whole lowest_above = s.above;
      Whole above = s.above;
      for (; bin >= 0; --bin) {
        if (s.bins[bin] > 0) {
          lowest = bin;
          lowest_above = above;
        }
        if (static_cast<double>(above + s.bins[bin]) >= wanted && s.bins[bin] > 0) break;
        above += s.bins[bin];
      }
      if (bin < 0) {
        bin = lowest < 0 ? 0 : lowest;
        above = lowest_above;
      }
      s.prefix |= static_cast<uint32_t>(bin) << shift;
      s.above = above;
    }
    __syncthreads();
  }
  const uint32_t key = s.prefix;
  const double missing = wanted - static_cast<double>(s.above);
  __syncthreads();
  Whole count = 1;  // of the tokens with this key
  if (kByWeight) {
    // All with this key weigh the same: bins[key & 255] is the sum over them.
    float logit = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    const float weight = expf(logit / d.temperature - d.greatest);
    const double each = static_cast<double>(__float2ull_rn(weight * kOne));
    if (each > 0 && missing > each) count = static_cast<Whole>(ceil(missing / each));
  } else if (missing > 1) {
    count = static_cast<Whole>(missing);
  }
  const int32_t id = IdOfEqual(d, key, count, s);
  d.kept.last_key = key;
  d.kept.last_id = id;
}

__device__ Whole TotalWeight(const Distribution& d, Shared& s) {
  Whole own = 0;
  for (int32_t i = threadIdx.x; i < d.size; i += kThreads) own += d.WholeWeight(i);
  Whole before = 0;
  Whole total = 0;
  Scan(s.scan).ExclusiveSum(own, before, total);
  __syncthreads();
  return total;
}

// The first id, by rising id, at which the sum of weights exceeds uniform * total.
__device__ int32_t Draw(const Distribution& d, double uniform, int32_t fallback, Shared& s) {
  const int32_t chunk = (d.size + kThreads - 1) / kThreads;
  const int32_t begin = min(static_cast<int32_t>(threadIdx.x) * chunk, d.size);
  const int32_t end = min(begin + chunk, d.size);
  Whole own = 0;
  for (int32_t i = begin; i < end; ++i) own += d.WholeWeight(i);
  Whole before = 0;
  Whole total = 0;
  Scan(s.scan).ExclusiveSum(own, before, total);
  if (threadIdx.x == 0) s.chosen = fallback;
  __syncthreads();
  const double wanted = uniform * static_cast<double>(total);
  if (static_cast<double>(before) <= wanted && static_cast<double>(before + own) > wanted) {
    for (int32_t i = begin; i < end; ++i) {
      before += d.WholeWeight(i);
      if (static_cast<double>(before) > wanted) {
        s.chosen = i;
        break;
      }
    }
  }
  __syncthreads();
  const int32_t id = s.chosen;
  __syncthreads();
  return id;
}

// Copies the logits with bans, bias and penalties applied.
__device__ void Adjust(const SampleParams& p, const SampleRow& row, const float* logits,
                       float* adjusted) {
  for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) adjusted[i] = NoNan(logits[i]);
  __syncthreads();
  for (int32_t i = row.banned_begin + threadIdx.x; i < row.bias_begin; i += kThreads) {
    adjusted[p.entries[i].token_id] = kNever;
  }
  __syncthreads();
  for (int32_t i = row.bias_begin + threadIdx.x; i < row.prompt_begin; i += kThreads) {
    adjusted[p.entries[i].token_id] += p.entries[i].value;
  }
  __syncthreads();
  for (int32_t i = row.prompt_begin + threadIdx.x; i < row.output_end; i += kThreads) {
    float& logit = adjusted[p.entries[i].token_id];
    if (row.repetition_penalty != 1.0f) {
      logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    }
    if (i >= row.output_begin) {
      logit -= row.frequency_penalty * p.entries[i].value;
      logit -= row.presence_penalty;
    }
  }
  __syncthreads();
}

__device__ int32_t SampleToken(const SampleParams& p, const SampleRow& row, const float* logits,
                               float* adjusted, Shared& s) {
  Adjust(p, row, logits, adjusted);
  Best own = {kNever, p.vocab_size};
  for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) {
    const Best one = {NoNan(adjusted[i]), i};
    if (Better(one, own)) own = one;
  }
  const Best best = BlockBest(own, s);
  if (row.temperature == 0 || best.value == kNever) return best.index;
  Distribution d = {
      adjusted, p.vocab_size, row.temperature, best.value / row.temperature, row.min_p, {}};
  if (isinf(d.greatest)) return best.index;  // overflown by a tiny temperature: greedy
  if (row.top_k > 0 && row.top_k < p.vocab_size) {
    KeepBest<false>(d, static_cast<double>(row.top_k), s);
  }
  if (row.top_p < 1.0f) {
    const Whole total = TotalWeight(d, s);
    KeepBest<true>(d, static_cast<double>(row.top_p) * static_cast<double>(total), s);
  }
  return Draw(d, row.uniform, best.index, s);
}

__global__ void __launch_bounds__(kThreads) ReadRow(const SampleParams p) {
  __shared__ Shared s;
  WaitForEarlier();
  const int64_t index = blockIdx.x;
  const float* const logits = p.logits + index * p.logits_stride;
  const SampleRow row = p.rows[index];
  SampleResult& result = p.results[index];
  Best own = {kNever, p.vocab_size};
  for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) {
    const Best one = {NoNan(logits[i]), i};
    if (Better(one, own)) own = one;
  }
  const float greatest = BlockBest(own, s).value;
  double sum = 0;
  for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) {
    sum += static_cast<double>(expf(logits[i] - greatest));
  }
  const double log_sum = static_cast<double>(greatest) + log(BlockSumDouble(sum, s));

  Best last = {INFINITY, -1};
  for (int32_t j = 0; j < min(row.num_top, min(kMaxTopTokens, p.vocab_size)); ++j) {
    own = {kNever, p.vocab_size};
    for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) {
      const Best one = {NoNan(logits[i]), i};
      if (Better(last, one) && Better(one, own)) own = one;
    }
    last = BlockBest(own, s);
    if (threadIdx.x == 0) {
      result.top_ids[j] = last.index;
      result.top_logprobs[j] = static_cast<float>(static_cast<double>(last.value) - log_sum);
    }
  }
  int32_t token = row.token;
  if (row.sample) {
    token = SampleToken(p, row, logits, p.adjusted + index * p.logits_stride, s);
  }
  if (threadIdx.x == 0) {
    result.token = token;
    if (p.token_ids != nullptr) p.token_ids[index] = token;
    result.logprob = static_cast<float>(static_cast<double>(logits[token]) - log_sum);
  }
}

}  // namespace

cudaError_t Sample(const SampleParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  return LaunchChained(ReadRow, dim3(static_cast<unsigned>(p.num_rows)), kThreads, 0, stream, p);
}

}  // namespace strait::cuda
