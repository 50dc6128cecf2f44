// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

namespace strait::cuda {
namespace {

__global__ void Nothing() {}

}  // namespace

cudaError_t ProbeKernel();

cudaError_t ProbeKernel() {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  const cudaError_t launched = cudaLaunchKernelEx(&config, Nothing);
  return launched == cudaSuccess ? cudaDeviceSynchronize() : launched;
}

}  // namespace strait::cuda
