// SPDX-License-Identifier: Apache-2.0
//
// Asynchronous 16-byte copies to shared memory, as the tiled products make them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace strait::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, of which `valid` are read and the others zero.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(valid)
               : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until at most kPending of this thread's groups are on their way.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ int Clamp(int64_t value, int most) {
  return value < 0 ? 0 : value > most ? most : static_cast<int>(value);
}

}  // namespace strait::cuda
