// SPDX-License-Identifier: Apache-2.0
//
// Defends: quantized rows are the reference's, code for code and scale for scale, whatever their
// length and distance, and the scale is the least that holds the row; what lies beyond a row is
// neither looked at nor written; NaN stays NaN.
#include "kernels/cuda/rowwise/quantize.h"

#include "kernels/reference/kernels.h"
#include "tests/kernels/cuda/gemm/device_matrix.h"

namespace strait {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;
using kernel_test::RandomFloats;

class CudaQuantizeTest : public gpu_test::GpuTest {
 protected:
  // x [rows, dim] of bf16 numbers.
  static void Compare(const std::vector<float>& x, int64_t rows, int64_t dim, int64_t x_stride,
                      int64_t codes_stride) {
    SCOPED_TRACE(testing::Message() << rows << " x " << dim);
    const int64_t scale_cols = (dim + 127) / 128;
    std::vector<uint8_t> codes(static_cast<size_t>(rows * dim));
    std::vector<float> scales(static_cast<size_t>(rows * scale_cols));
    strait::QuantizeParams reference;
    reference.x = x.data();
    reference.num_rows = rows;
    reference.dim = dim;
    reference.codes = codes.data();
    reference.scales = scales.data();
    reference::Quantize(reference);

    const Buffer<Bf16> dx(gpu_test::PaddedRows(x, dim, x_stride));
    const Buffer<uint8_t> d_codes(rows * codes_stride + 64);
    const Buffer<float> d_scales(rows * scale_cols + 1);
    cuda::QuantizeParams p;
    p.x = dx.data();
    p.x_stride = x_stride;
    p.codes = d_codes.data();
    p.codes_stride = codes_stride;
    p.scales = d_scales.data();
    p.num_rows = rows;
    p.dim = static_cast<int32_t>(dim);
    ASSERT_EQ(cuda::Quantize(p, nullptr), cudaSuccess);
    std::vector<float> got_scales = d_scales.Get();
    EXPECT_TRUE(std::isnan(got_scales.back())) << "written after the scales";
    got_scales.pop_back();
    EXPECT_EQ(got_scales, scales);
    const std::vector<uint8_t> got = d_codes.Get();
    const int64_t zeros_to = (dim + 7) / 8 * 8;
    for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
      const int64_t row = i / codes_stride;
      const int64_t k = i % codes_stride;
      const int expected = row >= rows || k >= zeros_to ? 0xff
                           : k >= dim                   ? 0
                                                        : codes[static_cast<size_t>(row * dim + k)];
      ASSERT_EQ(got[static_cast<size_t>(i)], expected)
          << "row " << row << " column " << k << " of "
          << (row < rows && k < dim ? x[static_cast<size_t>(row * dim + k)] : NAN);
    }
  }
};

TEST_F(CudaQuantizeTest, RowsOfAnyLength) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  for (const auto& [rows, dim] : {std::pair<int64_t, int64_t>{1, 1},
                                  {1, 7},
                                  {3, 8},
                                  {17, 100},
                                  {5, 128},
                                  {9, 129},
                                  {33, 255},
                                  {2, 1536},
                                  {40, 2050}}) {
    std::vector<float> x = RandomFloats(rng, rows * dim);
    // Rows of other magnitudes, some elements of other ones yet.
    for (int64_t i = 0; i < rows * dim; ++i) {
      auto& value = x[static_cast<size_t>(i)];
      value = std::ldexp(value, static_cast<int>(i / dim * 5 % 90) - 45);
      if (rng() % 16 == 0) value = std::ldexp(value, -static_cast<int>(rng() % 24));
    }
    x = gpu_test::RoundedToBf16(x);
    Compare(x, rows, dim, cuda::AlignedStride(dim), cuda::AlignedStride(dim));
    Compare(x, rows, dim, cuda::AlignedStride(dim) + 24, cuda::AlignedStride(dim) + 32);
  }
}

// Where the scale changes, and where codes are: ties, the least codes, zeros of both signs.
TEST_F(CudaQuantizeTest, WhereCodesAndScalesChange) {
  for (const float most : {448.0f, 450.0f, 446.0f, 224.0f, 226.0f, 1.75f, 1.7578125f, 0x1p-120f,
                           0x1p-126f, 0x1p-130f, 0x1.fep127f}) {
    std::vector<float> x(256, 0.0f);
    x[0] = most;
    const int exponent = std::ilogb(most);
    for (int i = 1; i < 128; ++i) {
      // Steps of an eighth of a code's from 2^-17 of the largest on.
      x[static_cast<size_t>(i)] =
          (i % 2 == 0 ? -1.0f : 1.0f) *
          std::ldexp(1.0f + static_cast<float>(i % 64) / 64.0f, exponent - 1 - i % 19);
    }
    x[128] = -0.0f;  // and a block of zeros
    Compare(gpu_test::RoundedToBf16(x), 1, 256, 256, 256);
  }
}

TEST_F(CudaQuantizeTest, NanStaysNan) {
  std::vector<float> x(128, 1.0f);
  x[5] = NAN;
  const Buffer<Bf16> dx(gpu_test::ToBf16(x));
  const Buffer<uint8_t> codes(128);
  const Buffer<float> scales(1);
  cuda::QuantizeParams p;
  p.x = dx.data();
  p.x_stride = p.codes_stride = p.dim = 128;
  p.codes = codes.data();
  p.scales = scales.data();
  p.num_rows = 1;
  ASSERT_EQ(cuda::Quantize(p, nullptr), cudaSuccess);
  for (int k = 0; k < 128; ++k) {
    EXPECT_EQ(std::isnan(reference::E4m3Value(codes.Get()[static_cast<size_t>(k)])), k == 5) << k;
  }
}

}  // namespace
}  // namespace strait
