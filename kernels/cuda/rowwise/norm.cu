// SPDX-License-Identifier: Apache-2.0
//
// One block a row. A row of up to 8,192 columns, a multiple of four, stays in registers; a longer or an
// odd one is read twice, the second time from cache.
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/rowwise/norm.h"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) RmsNormRows(const RmsNormParams p) {
  __shared__ float shared[kThreads / 32];
  StartNext();
  WaitForEarlier();
  const int64_t row = blockIdx.x;
  const float* const x = p.x + (p.x_rows ? p.x_rows[row] : row) * p.x_stride;
  Bf16* const y = p.y + row * p.y_stride;
  float squares = 0;
  for (int i = threadIdx.x; i < p.dim; i += kThreads) squares = fmaf(x[i], x[i], squares);
  const float mean = BlockSum<kThreads>(squares, shared) / static_cast<float>(p.dim);
  const float scale = rsqrtf(mean + p.eps);
  for (int i = threadIdx.x; i < p.dim; i += kThreads) {
    y[i] = __float2bfloat16(x[i] * scale * p.weight[i]);
  }
}

constexpr int kVecs = 2;  // of four columns, a thread

// dim a multiple of 4, at most kWide * 4 * kVecs.
template <int kWide>
__global__ void __launch_bounds__(kWide) RmsNormWide(const RmsNormParams p) {
  __shared__ float shared[kWide / 32];
  const int64_t row = blockIdx.x;
  float4 weights[kVecs];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int i = v * kWide + threadIdx.x;
    weights[v] = i < p.dim / 4 ? reinterpret_cast<const float4*>(p.weight)[i] : float4{};
  }
  StartNext();
  WaitForEarlier();
  const auto* const x =
      reinterpret_cast<const float4*>(p.x + (p.x_rows ? p.x_rows[row] : row) * p.x_stride);
  float4 values[kVecs];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int i = v * kWide + threadIdx.x;
    values[v] = i < p.dim / 4 ? x[i] : float4{};
    const float4& a = values[v];
    squares = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, squares))));
  }
  const float mean = BlockSum<kWide>(squares, shared) / static_cast<float>(p.dim);
  const float scale = rsqrtf(mean + p.eps);
  auto* const y = reinterpret_cast<__nv_bfloat162*>(p.y + row * p.y_stride);
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const int i = v * kWide + threadIdx.x;
    if (i >= p.dim / 4) continue;
    const float4& a = values[v];
    const float4& w = weights[v];
    y[2 * i] = __floats2bfloat162_rn(a.x * scale * w.x, a.y * scale * w.y);
    y[2 * i + 1] = __floats2bfloat162_rn(a.z * scale * w.z, a.w * scale * w.w);
  }
}

constexpr int kWide = 1024;

bool Aligned(const RmsNormParams& p) {
  const auto at = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16; };
  return p.dim % 4 == 0 && p.x_stride % 4 == 0 && p.y_stride % 4 == 0 && at(p.x) == 0 &&
         at(p.weight) == 0 && at(p.y) % 8 == 0;
}

}  // namespace

cudaError_t RmsNorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  if (Aligned(p) && p.dim <= kThreads * 4 * kVecs) {
    return LaunchChained(RmsNormWide<kThreads>, grid, kThreads, 0, stream, p);
  }
  if (Aligned(p) && p.dim <= kWide * 4 * kVecs) {
    return LaunchChained(RmsNormWide<kWide>, grid, kWide, 0, stream, p);
  }
  return LaunchChained(RmsNormRows, grid, kThreads, 0, stream, p);
}

}  // namespace strait::cuda
