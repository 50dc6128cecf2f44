// SPDX-License-Identifier: Apache-2.0
//
// QuantizeParams: bf16 rows to e4m3 codes, one power-of-two scale a row and 128 columns. Semantics:
// kernels/quantize.h.
//
// Stream:  the parameter; asynchronous.
// Shapes:  below.
// Errors:  CUDA's launch errors.
//
// Intensity: 3 bytes an element, a row is read once: bound by memory, and by the launch when few rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/gemm/matrix.h"

namespace strait::cuda {

struct QuantizeParams {
  const Bf16* x = nullptr;   // [num_rows, dim], rows x_stride apart, 16-byte aligned
  int64_t x_stride = 0;      // elements, multiple of 8; what lies beyond dim is not looked at
  uint8_t* codes = nullptr;  // [num_rows, dim], rows codes_stride apart, 16-byte aligned
  int64_t codes_stride = 0;  // multiple of 16; up to the next 8 columns after dim: zeros
  float* scales = nullptr;   // [num_rows, ceil(dim / 128)]
  int64_t num_rows = 0;
  int32_t dim = 0;
};

cudaError_t Quantize(const QuantizeParams& params, cudaStream_t stream);

}  // namespace strait::cuda
