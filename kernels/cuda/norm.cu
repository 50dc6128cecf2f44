// SPDX-License-Identifier: Apache-2.0
//
// One block a row; the row is read twice, the second time from cache.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/norm.h"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) RmsNormRows(const RmsNormParams p) {
  __shared__ float shared[kThreads / 32];
  WaitForEarlier();
  StartNext();
  const int64_t row = blockIdx.x;
  float* const x = p.x + (p.x_rows ? p.x_rows[row] : row) * p.x_stride;
  Bf16* const y = p.y + row * p.y_stride;
  float squares = 0;
  if (p.delta != nullptr) {
    const Bf16* const delta = p.delta + row * p.delta_stride;
    for (int i = threadIdx.x; i < p.dim; i += kThreads) {
      const float value = x[i] + __bfloat162float(delta[i]);
      x[i] = value;
      squares = fmaf(value, value, squares);
    }
  } else {
    for (int i = threadIdx.x; i < p.dim; i += kThreads) squares = fmaf(x[i], x[i], squares);
  }
  const float mean = BlockSum<kThreads>(squares, shared) / static_cast<float>(p.dim);
  const float scale = rsqrtf(mean + p.eps);
  // Element i is read by the thread that wrote it.
  for (int i = threadIdx.x; i < p.dim; i += kThreads) {
    y[i] = __float2bfloat16(x[i] * scale * p.weight[i]);
  }
}

}  // namespace

cudaError_t RmsNorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  return LaunchChained(RmsNormRows, dim3(static_cast<unsigned>(p.num_rows)), kThreads, 0, stream,
                       p);
}

}  // namespace strait::cuda
