// SPDX-License-Identifier: Apache-2.0
//
// Matrix names weights on the device, in the precision in which products read them.
//
// Borrows: data and scales; they outlive every kernel that gets them.
// Shapes:  data [rows, stride] bf16, or e4m3 codes if there are scales: value = code * scale.
//          NaN codes are not told from 480. What lies between cols and stride is never used.
// Limits:  stride is a multiple of kMatrixAlign elements and data 16-byte aligned, so that every
//          row is.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace strait::cuda {

using Bf16 = __nv_bfloat16;

inline constexpr int32_t kMatrixAlign = 16;  // elements
inline constexpr int32_t kScaleBlock = 128;  // rows and columns that share one scale

struct Matrix {
  const void* data = nullptr;     // [rows, stride]
  const float* scales = nullptr;  // [ceil(rows/128), ceil(cols/128)] fp32; null: bf16
  int32_t rows = 0;
  int32_t cols = 0;
  int32_t stride = 0;

  bool empty() const { return data == nullptr; }
};

constexpr int64_t AlignedStride(int64_t elements) {
  return (elements + kMatrixAlign - 1) / kMatrixAlign * kMatrixAlign;
}

}  // namespace strait::cuda
