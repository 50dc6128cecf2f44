// SPDX-License-Identifier: Apache-2.0
//
// RmsNormParams: y[t, :] = weight * (x[t, :] / sqrt(mean(x[t, :]^2) + eps)).
//
// Shapes:  below. y may be x (in place).
// Why:     the sum of squares has the 16-lane order of kernels/gemm.h.
//
// Intensity:about 1 flop per byte: bound by memory (or cache) bandwidth.
#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace strait {

struct RmsNormParams {
  const float* x = nullptr;  // [num_rows, dim] fp32, rows x_stride apart
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [dim] of weight_type (not fp8)
  WeightType weight_type = WeightType::kFp32;
  float eps = 1e-6f;
  float* y = nullptr;  // [num_rows, dim] fp32, rows y_stride apart; may be x
  int64_t y_stride = 0;
  int64_t num_rows = 0;
  int64_t dim = 0;
};

}  // namespace strait
