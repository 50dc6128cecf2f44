// SPDX-License-Identifier: Apache-2.0
//
// Entry points of mla.h, and the merge of partial results:
//   out[row] = sum_s exp(lse_s - lse) out_s[row],  lse = log sum_s exp(lse_s)
//
// Roofline: bytes. Each partial is 64 x rank fp32 = 128 KiB at rank 512, written and read once,
// mostly from L2; a plan that is not deterministic has at most two a multiprocessor.
// Order: warp w of W takes partials w, w + W, ..., each weighted, then added; the warps' sums are
// added from the left. A partial that saw no row adds an exact zero.
#include "kernels/cuda/attention/mla_device.cuh"
#include "kernels/cuda/device/device.h"

namespace strait::cuda {
namespace mla {
namespace {

constexpr int kMergeThreads = 512;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kMergeColumns = 128;  // of one warp: four a lane
constexpr int kMergeAhead = 4;      // partials of a warp

__device__ __forceinline__ void StoreOut(const MlaParams& p, int64_t row, int column, float4 v) {
  const int64_t at = row * p.rank + column;
  if (p.out_fp32) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = v;
  } else {
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.out) + at) =
        make_uint2(PackBf16(v.x, v.y), PackBf16(v.z, v.w));
  }
}

__device__ __forceinline__ void AddWeighted(float4& sum, float weight, const float4& v) {
  sum.x = __fadd_rn(sum.x, __fmul_rn(weight, v.x));
  sum.y = __fadd_rn(sum.y, __fmul_rn(weight, v.y));
  sum.z = __fadd_rn(sum.z, __fmul_rn(weight, v.z));
  sum.w = __fadd_rn(sum.w, __fmul_rn(weight, v.w));
}

__device__ __forceinline__ void Finish(const MlaParams& p, int64_t row, int column, float4 sum,
                                       float weights, float max) {
  const float inverse = weights > 0 ? __fdiv_rn(1.0f, weights) : 0.0f;
  sum = make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
  if (column < p.rank) StoreOut(p, row, column, sum);
  if (column == 0 && p.lse != nullptr) p.lse[row] = weights > 0 ? max + logf(weights) : NegInf();
}

// The last merge that begins at or before the unit: 32 probes a round.
__device__ __forceinline__ int FindMerge(const MlaMerge* merges, int num_merges, int unit) {
  const int lane = threadIdx.x % 32;
  int low = 0;
  int count = num_merges;
  while (count > 1) {
    const int step = (count + 31) / 32;
    const int probe = low + lane * step;
    const bool before = probe < low + count && merges[probe].first_unit <= unit;
    const int last = __popc(__ballot_sync(0xffffffffu, before)) - 1;
    count = min(step, count - last * step);
    low += last * step;
  }
  return low;
}

__global__ void __launch_bounds__(kMergeThreads) MergeKernel(const MlaParams p) {
  __shared__ float4 sums[kMergeWarps][32];
  __shared__ float warp_weights[kMergeWarps];
  StartNext();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int num_merges = p.plan.counts[0];
  const int num_units = p.plan.counts[1];
  // Blocks without work make room at once; one waits, or this kernel might end before those before.
  if (blockIdx.x == 0 && num_units == 0) WaitForEarlier();
  for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    const MlaMerge merge = p.plan.merges[FindMerge(p.plan.merges, num_merges, unit)];
    const int local = unit - merge.first_unit;
    const int warps = merge.warps;
    const int share = warp % warps;  // which of the warps that share these columns
    const int row = warps == 1 ? local * 4 + warp / 4 : warps == 4 ? local : local / 4;
    const int chunk = warps == 1 ? warp % 4 : warps == 4 ? warp / 4 : local % 4;
    const int column = chunk * kMergeColumns + lane * 4;
    const bool inside = column < p.rank && row < merge.num_rows;
    const float* lse = p.partial_lse + static_cast<int64_t>(merge.first_partial) * kMlaTileRows +
                       min(row, merge.num_rows - 1);
    const int64_t partial_stride = static_cast<int64_t>(kMlaTileRows) * p.rank;
    const float* from = p.partial_out + merge.first_partial * partial_stride +
                        static_cast<int64_t>(row) * p.rank + column;
    WaitForEarlier();
    // The first partials go out before the maximum, which their weights wait for, is known.
    float4 ahead[kMergeAhead];
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      const int s = share + i * warps;
      ahead[i] = inside && s < merge.num_partials
                     ? *reinterpret_cast<const float4*>(from + s * partial_stride)
                     : make_float4(0, 0, 0, 0);
    }
    float max = NegInf();
    for (int s = lane; s < merge.num_partials; s += 32) max = fmaxf(max, lse[s * kMlaTileRows]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
    }
    const float base = max == NegInf() ? 0.0f : max;
    float4 sum = make_float4(0, 0, 0, 0);
    float weights = 0;
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      const int s = share + i * warps;
      if (s >= merge.num_partials) break;
      const float weight = Exp2((lse[s * kMlaTileRows] - base) * kLog2e);
      weights = __fadd_rn(weights, weight);
      if (inside) AddWeighted(sum, weight, ahead[i]);
    }
#pragma unroll 8
    for (int s = share + kMergeAhead * warps; s < merge.num_partials; s += warps) {
      const float weight = Exp2((lse[s * kMlaTileRows] - base) * kLog2e);
      weights = __fadd_rn(weights, weight);
      if (inside) {
        AddWeighted(sum, weight, *reinterpret_cast<const float4*>(from + s * partial_stride));
      }
    }
    if (warps > 1) {
      sums[warp][lane] = sum;
      if (lane == 0) warp_weights[warp] = weights;
      __syncthreads();
      for (int w = 1; share == 0 && w < warps; ++w) {
        AddWeighted(sum, 1.0f, sums[warp + w][lane]);
        weights = __fadd_rn(weights, warp_weights[warp + w]);
      }
      __syncthreads();
    }
    if (share == 0 && row < merge.num_rows) {
      Finish(p, merge.first_row + row, column, sum, weights, max);
    }
  }
}

}  // namespace

cudaError_t LaunchMerge(const MlaParams& params, cudaStream_t stream) {
  if (params.plan.limits.max_merges == 0) return cudaSuccess;
  cudaLaunchAttribute early = EarlyStart();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks) * 4);
  config.blockDim = dim3(kMergeThreads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, MergeKernel, params);
}

}  // namespace mla

cudaError_t PrepareMla() {
  for (const auto prepare :
       {mla::PreparePortable, mla::PrepareHopper, mla::PrepareFewRows, mla::PrepareCodes}) {
    const cudaError_t error = prepare();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

MlaPath MlaAutoPath(RowFormat, int32_t rank, int32_t rope) {
  const bool hopper = ComputeCapabilityMajor() == 9 && rank == 512 && rope == 64;
  return hopper ? MlaPath::kHopper : MlaPath::kPortable;
}

cudaError_t LaunchMla(const MlaParams& params, cudaStream_t stream) {
  if (params.rank <= 0 || params.rank > 512 || params.rank % 16 != 0 || params.rope <= 0 ||
      params.rope > 64 || params.rope % 8 != 0 || params.num_heads <= 0 ||
      params.q_latent_stride % 8 != 0 ||
      (params.format != RowFormat::kBf16 && params.format != RowFormat::kFp8) ||
      params.q_rope_stride % 8 != 0 || params.block_bytes % 16 != 0 ||
      params.plan.limits.num_thread_blocks <= 0) {
    return cudaErrorInvalidValue;
  }
  MlaPath path = params.path;
  if (path == MlaPath::kAuto) path = MlaAutoPath(params.format, params.rank, params.rope);
  if (path == MlaPath::kHopper && (params.rank != 512 || params.rope != 64)) {
    return cudaErrorInvalidValue;
  }
  if (params.units && (path != MlaPath::kHopper || params.format != RowFormat::kBf16)) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error = path == MlaPath::kPortable  ? mla::LaunchPortable(params, stream)
                            : mla::TakesFewRows(params) ? mla::LaunchFewRows(params, stream)
                            : mla::TakesCodes(params)   ? mla::LaunchCodes(params, stream)
                                                        : mla::LaunchHopper(params, stream);
  return error != cudaSuccess ? error : mla::LaunchMerge(params, stream);
}

}  // namespace strait::cuda
