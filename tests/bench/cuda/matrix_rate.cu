// SPDX-License-Identifier: Apache-2.0
//
// Warpgroup products of operands that stay in shared memory: what the tensor cores do at the clock
// that they hold, when nothing else is in their way. Operands are not all zero, as power, and so
// the clock, depends on them.
#include <cuda_runtime.h>

#include "kernels/cuda/attention/mla_wgmma.cuh"
#include "tests/bench/cuda/limits.h"

namespace strait::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kTileBytes = (128 + 256) * 128;  // each warpgroup's 64 rows, 256 of the other operand

__global__ void __launch_bounds__(kThreads) Multiply(const int steps, float* sink) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char raw[];
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(raw));
  const uint32_t memory = (start + 1023) / 1024 * 1024;
  auto* const words = reinterpret_cast<uint32_t*>(raw + (memory - start));
  for (int i = threadIdx.x; i < kTileBytes / 4; i += kThreads) {
    // Two bf16 of either sign between 2^-7 and 2^-5.
    words[i] = ((i * 2654435761u) & 0x80ff80ffu) | 0x3c003c00u;
  }
  cuda::wgmma::FenceProxy();
  __syncthreads();
  const cuda::wgmma::Operand a = cuda::wgmma::Rows(memory + threadIdx.x / 128 * 8192);
  const cuda::wgmma::Operand b = cuda::wgmma::Rows(memory + 16384);
  float sums[128];
  cuda::wgmma::Begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t offset = cuda::wgmma::RowsStep(k);
    cuda::wgmma::MultiplyRows(sums, a.At(offset), b.At(offset), k != 0);
  }
  cuda::wgmma::Commit();
  for (int step = 1; step < steps; ++step) {
    cuda::wgmma::Begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t offset = cuda::wgmma::RowsStep(k);
      cuda::wgmma::MultiplyRows(sums, a.At(offset), b.At(offset), 1);
    }
    cuda::wgmma::Commit();
    cuda::wgmma::Wait<1>();
  }
  cuda::wgmma::Wait<0>();
  cuda::wgmma::Pin(sums);
  float sum = 0;
#pragma unroll
  for (const float value : sums) sum += value;
  if (sum == 12345.678f) *sink = sum;
#endif
}

}  // namespace

double MatrixRate() {
  int major = 0;
  int blocks = 0;
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
  Check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0), "attribute");
  if (major != 9) return 0;
  constexpr int kSteps = 10000;
  constexpr int kBytes = kTileBytes + 1024;
  void* sink = nullptr;
  Check(cudaMalloc(&sink, 4), "cudaMalloc");
  Check(cudaFuncSetAttribute(Multiply, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "shared memory");
  const double us = MedianUs([&](int) {
    Multiply<<<blocks, kThreads, kBytes>>>(kSteps, static_cast<float*>(sink));
    Check(cudaGetLastError(), "launch");
  });
  Check(cudaFree(sink), "cudaFree");
  return 2.0 * 128 * 256 * 64 * kSteps * blocks / us * 1e6;
}

}  // namespace strait::bench
