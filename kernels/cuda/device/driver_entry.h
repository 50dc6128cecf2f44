// SPDX-License-Identifier: Apache-2.0
//
// Functions of the CUDA driver by their names, so that nothing is linked to the driver: a machine
// without one starts the program and is told what it lacks.
//
// Thread:  any.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace strait::cuda {

// Null: the driver has no such function. `since`: the version of CUDA whose form of it is meant.
inline void* DriverEntry(const char* name, [[maybe_unused]] unsigned since) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &entry, since, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? entry : nullptr;
}

}  // namespace strait::cuda

#define STRAIT_DRIVER_ENTRY(function, since) \
  reinterpret_cast<decltype(&function)>(::strait::cuda::DriverEntry(#function, since))
