// SPDX-License-Identifier: Apache-2.0
//
// How the products' kernels are started: the form of a product as constants, shared memory allowed.
#pragma once

#include <type_traits>

#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_internal.h"

namespace strait::cuda {

// Calls `launch` with the weight format and whether the product is gated, as constants.
template <class Launcher>
cudaError_t WithForm(const GemmParams& p, const Launcher& launch) {
  const bool gated = !p.up.empty();
  if (p.weight.scales != nullptr) {
    return gated ? launch(std::true_type(), std::true_type())
                 : launch(std::true_type(), std::false_type());
  }
  return gated ? launch(std::false_type(), std::true_type())
               : launch(std::false_type(), std::false_type());
}

// LaunchChained, after the kernel was allowed as much shared memory as it asks for.
template <class Kernel, class... Args>
cudaError_t LaunchWithShared(Kernel kernel, dim3 grid, unsigned threads, int shared_bytes,
                             cudaStream_t stream, const Args&... args) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return LaunchChained(kernel, grid, threads, static_cast<size_t>(shared_bytes), stream, args...);
}

}  // namespace strait::cuda
