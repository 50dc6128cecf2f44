// SPDX-License-Identifier: Apache-2.0
//
// Pairs of halves in registers, for the kernels that widen the codes of fp8 rows there.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace strait::cuda::mla {

__device__ __forceinline__ uint32_t PackHalves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t MultiplyHalves(uint32_t a, uint32_t b) {
  __half2 x;
  __half2 y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  x = __hmul2(x, y);
  memcpy(&a, &x, sizeof(a));
  return a;
}

}  // namespace strait::cuda::mla
