// SPDX-License-Identifier: Apache-2.0
//
// What several kernels share: launches that overlap the end of the kernel before, warp and block
// sums in a fixed order, the tensor core's bf16 product, e4m3 codes widened to bf16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/matrix.h"

namespace strait::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Waits until the kernels before this one in the stream have ended and their writes are seen. Every
// kernel that LaunchChained starts calls it, in every block, before it touches what another kernel
// reads or writes; weights may be read before.
__device__ __forceinline__ void WaitForEarlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream begin, up to its WaitForEarlier, when all blocks said so.
__device__ __forceinline__ void StartNext() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the current device can begin a kernel before its predecessor has ended.
inline bool ChainsLaunches() {
  static const bool chains = [] {
    int device = 0;
    int major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major >= 9;
  }();
  return chains;
}

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

// d += a * b: 16 x 8 += (16 x 16) * (16 x 8).
__device__ __forceinline__ void MmaBf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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
