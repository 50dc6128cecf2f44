// SPDX-License-Identifier: Apache-2.0
//
// What several kernels share: launches that overlap the end of the kernel before, warp and block
// sums in a fixed order, pairs of bf16, e4m3 codes widened to them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/ptx.cuh"
#include "kernels/cuda/gemm/matrix.h"

namespace strait::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Whether the device can begin a kernel before its predecessor has ended.
inline bool ChainsLaunches() { return ComputeCapabilityMajor() >= 9; }

// Launches a kernel that may, where the device can, begin while the one before it drains.
template <class... Params, class... Args>
cudaError_t LaunchChained(void (*kernel)(Params...), dim3 grid, unsigned threads,
                          size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = ChainsLaunches() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// Sum over the block, known to all threads. `shared` holds one float a warp.
template <int kThreads>
__device__ __forceinline__ float BlockSum(float value, float* shared) {
  constexpr int kWarps = kThreads / 32;
  value = WarpSum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

// Two floats rounded to bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

__device__ __forceinline__ uint32_t TimesTwoTo120(uint32_t pair) {
  const __nv_bfloat162 factor =
      __halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));
  __nv_bfloat162 value;
  memcpy(&value, &pair, sizeof(value));
  value = __hmul2(value, factor);
  memcpy(&pair, &value, sizeof(pair));
  return pair;
}

// Four e4m3 codes, lowest byte first, as two pairs of bf16. Exact: the code's exponent and mantissa
// become the low bits of a bf16 (a subnormal one for small codes), 2^120 too small.
__device__ __forceinline__ void WidenE4m3(uint32_t codes, uint32_t& low, uint32_t& high) {
  const uint32_t a = __byte_perm(codes, 0, 0x1404);  // codes 0 and 1 in the upper bytes
  const uint32_t b = __byte_perm(codes, 0, 0x3424);
  low = TimesTwoTo120((a & 0x80008000u) | ((a & 0x7f007f00u) >> 4));
  high = TimesTwoTo120((b & 0x80008000u) | ((b & 0x7f007f00u) >> 4));
}

__device__ __forceinline__ float Silu(float value) { return value / (1.0f + __expf(-value)); }

}  // namespace strait::cuda
