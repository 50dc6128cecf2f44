// SPDX-License-Identifier: Apache-2.0
//
// Reads memory once: the ceiling of everything that is bound by reading. Intensity: none.
#include <cuda_runtime.h>

#include "tests/bench/cuda/limits.h"

namespace strait::bench {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;

__global__ void __launch_bounds__(kThreads) Read(const uint4* data, size_t count, unsigned* sink) {
  unsigned sum = 0;
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    uint4 v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) v[j] = __ldcs(data + i + j * step);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += step) sum ^= data[i].x;
  if (sum == 0x12345678u) *sink = sum;  // never, but the compiler does not know
}

}  // namespace

cudaError_t ReadAll(const void* data, size_t bytes, unsigned* sink, cudaStream_t stream) {
  Read<<<132 * 4, kThreads, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace strait::bench
