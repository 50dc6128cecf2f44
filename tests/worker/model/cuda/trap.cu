// SPDX-License-Identifier: Apache-2.0
#include "tests/worker/model/cuda/trap.h"

namespace strait::cuda_test {
namespace {

__global__ void Trap() { asm volatile("trap;"); }

}  // namespace

cudaError_t LaunchTrap() {
  Trap<<<1, 1>>>();
  return cudaGetLastError();
}

}  // namespace strait::cuda_test
