// SPDX-License-Identifier: Apache-2.0
//
// WeightMatrix names a matrix in the precision in which its checkpoint stores it.
//
// Borrows: data and scale_inv; they outlive every kernel call that gets them.
// Shapes:  data [rows, cols] row-major, aligned to its element only (memory-mapped safetensors).
// Why:     weights are never copied into a wider type: decoding is bound by the bytes read.
#pragma once

#include <cstdint>

namespace strait {

enum class WeightType : uint8_t {
  kFp32,
  kBf16,
  kFp16,
  kFp8E4m3,  // codes with one fp32 scale per 128 x 128 block; value = code * scale, in fp32
};

// Edge of the square of weights that shares one scale (DeepSeek-V3's weight_block_size).
inline constexpr int64_t kFp8BlockSize = 128;

struct WeightMatrix {
  const void* data = nullptr;        // [rows, cols] of type
  const float* scale_inv = nullptr;  // [ceil(rows/128), ceil(cols/128)] fp32; null unless kFp8E4m3
  WeightType type = WeightType::kFp32;
  int64_t rows = 0;
  int64_t cols = 0;
};

// Bytes of one stored element.
constexpr int64_t WeightElementBytes(WeightType type) {
  return type == WeightType::kFp32 ? 4 : type == WeightType::kFp8E4m3 ? 1 : 2;
}

}  // namespace strait
