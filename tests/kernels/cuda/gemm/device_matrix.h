// SPDX-License-Identifier: Apache-2.0
//
// DeviceMatrices uploads stored weights as kernels/cuda/gemm/matrix.h wants them: rows padded, padding
// NaN, the matrices of groups one after the other.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cuda/gemm/matrix.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait::gpu_test {

class DeviceMatrices {
 public:
  DeviceMatrices(kernel_test::Rng& rng, WeightType type, int64_t rows, int64_t cols,
                 int num_groups = 1) {
    const int64_t bytes = WeightElementBytes(type);
    const int64_t stride = cuda::AlignedStride(cols);
    group_stride_ = rows * stride;
    scale_group_stride_ = (rows + 127) / 128 * ((cols + 127) / 128);
    std::vector<uint8_t> data(static_cast<size_t>(num_groups * group_stride_ * bytes), 0xff);
    std::vector<float> scales;
    for (int g = 0; g < num_groups; ++g) {
      stored_.push_back(std::make_unique<kernel_test::StoredWeight>(rng, type, rows, cols, 0.1f));
      const WeightMatrix& m = stored_.back()->matrix();
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(&data[static_cast<size_t>((g * group_stride_ + r * stride) * bytes)],
                    static_cast<const char*>(m.data) + r * cols * bytes,
                    static_cast<size_t>(cols * bytes));
      }
      if (m.scale_inv) scales.insert(scales.end(), m.scale_inv, m.scale_inv + scale_group_stride_);
    }
    data_ = std::make_unique<Buffer<uint8_t>>(data);
    if (!scales.empty()) scales_ = std::make_unique<Buffer<float>>(scales);
    matrix_ = {data_->data(), scales_ ? scales_->data() : nullptr, static_cast<int32_t>(rows),
               static_cast<int32_t>(cols), static_cast<int32_t>(stride)};
  }

  const cuda::Matrix& matrix() const { return matrix_; }  // of group 0
  const WeightMatrix& stored(int group = 0) const {
    return stored_[static_cast<size_t>(group)]->matrix();
  }
  int64_t group_stride() const { return group_stride_; }
  int64_t scale_group_stride() const { return scale_group_stride_; }

 private:
  std::vector<std::unique_ptr<kernel_test::StoredWeight>> stored_;
  std::unique_ptr<Buffer<uint8_t>> data_;
  std::unique_ptr<Buffer<float>> scales_;
  cuda::Matrix matrix_;
  int64_t group_stride_ = 0;
  int64_t scale_group_stride_ = 0;
};

// Activations: bf16 rows of `dim`, `stride` apart, NaN between.
inline std::vector<Bf16> PaddedRows(const std::vector<float>& rows, int64_t dim, int64_t stride) {
  const int64_t count = static_cast<int64_t>(rows.size()) / dim;
  std::vector<Bf16> padded(static_cast<size_t>(count * stride), __float2bfloat16(NAN));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < dim; ++i) {
      padded[static_cast<size_t>(r * stride + i)] =
          __float2bfloat16(rows[static_cast<size_t>(r * dim + i)]);
    }
  }
  return padded;
}

}  // namespace strait::gpu_test
