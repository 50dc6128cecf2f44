// SPDX-License-Identifier: Apache-2.0
//
// RmsNormParams: y[t, :] = weight * (x[t, :] / sqrt(mean(x[t, :]^2) + eps)).
//
// Stream:  the parameter; asynchronous.
// Shapes:  below; sums in fp32, in an order that depends on dim alone.
// Errors:  CUDA's launch errors.
// Why:     the residual stays fp32 on the device, so a norm reads 4 bytes an element and rounds
//          once, to what the products read.
//
// Intensity: below 1 flop a byte; 6 bytes an element: bound by memory, and by the launch when few
// rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/gemm/matrix.h"

namespace strait::cuda {

struct RmsNormParams {
  const float* x = nullptr;  // [num_rows, dim] fp32, rows x_stride apart
  int64_t x_stride = 0;
  const int32_t* x_rows = nullptr;  // [num_rows] row of x that makes row t; may be null
  const float* weight = nullptr;    // [dim] fp32
  float eps = 1e-6f;
  Bf16* y = nullptr;  // [num_rows, dim] bf16, rows y_stride apart
  int64_t y_stride = 0;
  int64_t num_rows = 0;
  int32_t dim = 0;
};

cudaError_t RmsNorm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace strait::cuda
