// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

namespace strait::cuda {
namespace {

__global__ void Nothing() {}

}  // namespace

cudaError_t ProbeKernel();

cudaError_t ProbeKernel() {
  Nothing<<<1, 1>>>();
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? cudaDeviceSynchronize() : launched;
}

}  // namespace strait::cuda
