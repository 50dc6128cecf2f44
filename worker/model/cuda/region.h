// SPDX-License-Identifier: Apache-2.0
//
// Region gives out aligned parts of one allocation; without a base it only measures. So what a
// stage takes is computed by the same code that lays it out.
//
// Thread:  a plain value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/gemm/matrix.h"

namespace strait {

class Region {
 public:
  static constexpr uint64_t kAlign = 256;  // bytes; what cudaMalloc gives

  explicit Region(std::byte* base, uint64_t begin = 0) : base_(base), end_(begin) {}

  // [count] T; null when only measuring, or for nothing.
  template <class T>
  T* Take(uint64_t count) {
    T* const at = base_ != nullptr && count > 0 ? reinterpret_cast<T*>(base_ + end_) : nullptr;
    end_ = (end_ + count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return at;
  }

  // Matrices of `num_groups` groups, one after the other; the first of them.
  cuda::Matrix TakeMatrix(uint64_t rows, uint64_t cols, bool fp8, uint64_t num_groups = 1) {
    cuda::Matrix m;
    m.rows = static_cast<int32_t>(rows);
    m.cols = static_cast<int32_t>(cols);
    m.stride = static_cast<int32_t>(cuda::AlignedStride(static_cast<int64_t>(cols)));
    m.data = Take<std::byte>(num_groups * rows * static_cast<uint64_t>(m.stride) * (fp8 ? 1 : 2));
    if (fp8) m.scales = Take<float>(num_groups * ScaleCount(rows, cols));
    return m;
  }

  static uint64_t ScaleCount(uint64_t rows, uint64_t cols) {
    constexpr uint64_t kBlock = cuda::kScaleBlock;
    return (rows + kBlock - 1) / kBlock * ((cols + kBlock - 1) / kBlock);
  }

  uint64_t end() const { return end_; }

 private:
  std::byte* base_;
  uint64_t end_;
};

}  // namespace strait
