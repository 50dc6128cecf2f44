// SPDX-License-Identifier: Apache-2.0
//
// Half a warp takes 128 columns of a row, 16 bytes a lane: one load, the largest of all, one store.
#include <cuda_fp8.h>

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/rowwise/quantize.h"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;  // of 8 columns
constexpr int kBlocksEach = kThreads / kLanes;

// Exponent bits of the scale. 448 is 1.75 * 2^8: what is larger than 1.75 * 2^e needs 2^(e - 7).
__device__ __forceinline__ unsigned ScaleExponent(float most) {
  const unsigned exponent = (__float_as_uint(most) + 0x1fffffu) >> 23;
  return exponent > 9 ? exponent - 8 : 1;
}

__global__ void __launch_bounds__(kThreads) QuantizeRows(const __grid_constant__ QuantizeParams p) {
  StartNext();
  WaitForEarlier();
  const int scale_cols = (p.dim + kScaleBlock - 1) / kScaleBlock;
  const int64_t count = p.num_rows * scale_cols;
  const int64_t index = int64_t{blockIdx.x} * kBlocksEach + threadIdx.x / kLanes;
  const bool mine = index < count;
  const int64_t row = mine ? index / scale_cols : 0;
  const int block = mine ? static_cast<int>(index % scale_cols) : 0;
  const int lane = threadIdx.x % kLanes;
  const int column = block * kScaleBlock + lane * 8;
  float values[8] = {};
  if (column < p.dim) {
    const uint4 eight = *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column);
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // bf16 is the upper half of fp32
      if (column + 2 * i < p.dim) values[2 * i] = __uint_as_float(pairs[i] << 16);
      if (column + 2 * i + 1 < p.dim) values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(values[i]));
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
  }
  if (!mine) return;
  const unsigned exponent = ScaleExponent(most);
  if (lane == 0) p.scales[index] = __uint_as_float(exponent << 23);
  if (column >= p.dim) return;
  const float inverse = __uint_as_float((254 - exponent) << 23);
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* const four = values + 4 * i;
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(four[0] * inverse, four[1] * inverse),
                                                  __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(
        make_float2(four[2] * inverse, four[3] * inverse), __NV_SATFINITE, __NV_E4M3);
    words[i] = low | high << 16;
  }
  *reinterpret_cast<uint2*>(p.codes + row * p.codes_stride + column) =
      make_uint2(words[0], words[1]);
}

}  // namespace

cudaError_t Quantize(const QuantizeParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  const int64_t count = p.num_rows * ((p.dim + kScaleBlock - 1) / kScaleBlock);
  const dim3 grid(static_cast<unsigned>((count + kBlocksEach - 1) / kBlocksEach));
  return LaunchChained(QuantizeRows, grid, kThreads, 0, stream, p);
}

}  // namespace strait::cuda
