// SPDX-License-Identifier: Apache-2.0
#include "tests/worker/model/cuda/wait_for_host.h"

namespace strait::cuda_test {
namespace {

__global__ void WaitForHost(const volatile int* flag) {
  while (*flag == 0) __nanosleep(1000);
}

}  // namespace

cudaError_t LaunchWaitForHost(const int* flag, cudaStream_t stream) {
  WaitForHost<<<1, 1, 0, stream>>>(flag);
  return cudaGetLastError();
}

}  // namespace strait::cuda_test
