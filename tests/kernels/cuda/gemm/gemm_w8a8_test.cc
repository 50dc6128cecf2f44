// SPDX-License-Identifier: Apache-2.0
//
// Defends: products of codes with codes are the reference's of the numbers that the codes mean,
// whatever the number of rows, columns and k, gated, with rows gathered, experts without rows, K
// split, outputs of any alignment; what lies beside a matrix, a row or an item is neither read nor
// written; in a fixed order a row's bits do not depend on the rows beside it, nor on how the rows
// are cut into tiles.
#include "kernels/cuda/gemm/gemm_internal.h"
#include "tests/kernels/cuda/gemm/device_matrix.h"
#include "tests/kernels/cuda/gemm/expert_rows.h"
#include "tests/kernels/cuda/gemm/gemm_reference.h"

namespace strait {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;
using gpu_test::Dense;
using gpu_test::DeviceMatrices;
using gpu_test::Expected;
using gpu_test::Gated;
using gpu_test::RelativeError;

// The tensor core cuts a sum of products of codes after about 14 bits of its largest term, 33 terms
// at a time, four times in 128 k; from there on sums are fp32's. A cut takes half a last bit on
// average, 2^-14 of the largest term, which is about the sum itself; cuts of terms of either sign
// mostly cancel: sqrt(132) * 2^-14 = 7e-4. The emulator, which cuts so, finds 2.3e-4, norm by norm. One
// k of 128 left out, or a scale of a neighbour, is 9 % and more.
constexpr double kCodesBound = 1e-3;
constexpr double kCodesBf16Bound = 0x1p-8 + kCodesBound;

// Rows of codes with their scales, as the kernel reads them and as numbers: any code but NaN, scales
// a factor of up to three apart, so that a wrong one shows.
class CodedRows {
 public:
  CodedRows(kernel_test::Rng& rng, int64_t rows, int64_t k)
      : k_(k), stride_(cuda::AlignedStride(k) + 16), scale_cols_((k + 127) / 128) {
    // NaN codes beside rows, and 128 rows of them after the last.
    std::vector<uint8_t> codes(static_cast<size_t>((rows + 128) * stride_), 0xff);
    std::uniform_real_distribution<float> scale(0.5f, 1.5f);
    for (int64_t i = 0; i < rows * scale_cols_; ++i) scales_.push_back(scale(rng) / 128);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        auto code = static_cast<uint8_t>(rng());
        if ((code & 0x7f) == 0x7f) --code;
        codes[static_cast<size_t>(row * stride_ + i)] = code;
        values_.push_back(static_cast<float>(reference::E4m3Value(code)) *
                          scales_[static_cast<size_t>(row * scale_cols_ + i / 128)]);
      }
    }
    codes_ = std::make_unique<Buffer<uint8_t>>(codes);
    d_scales_ = std::make_unique<Buffer<float>>(scales_);
  }

  // From row `first` on.
  void Set(cuda::GemmParams* p, int64_t first = 0) const {
    p->x_codes = codes_->data() + first * stride_;
    p->x_scales = d_scales_->data() + first * scale_cols_;
    p->x_stride = stride_;
  }
  const std::vector<float>& values() const { return values_; }  // [rows, k]
  std::vector<float> Rows(int64_t begin, int64_t end) const {
    return {values_.begin() + begin * k_, values_.begin() + end * k_};
  }

 private:
  const int64_t k_;
  const int64_t stride_;
  const int64_t scale_cols_;
  std::vector<float> scales_;
  std::vector<float> values_;
  std::unique_ptr<Buffer<uint8_t>> codes_;
  std::unique_ptr<Buffer<float>> d_scales_;
};

class CudaGemmW8A8Test : public gpu_test::GpuTest {
 protected:
  CudaGemmW8A8Test() : rng_(kernel_test::Seed()) {}

  void SetUp() override {
    gpu_test::GpuTest::SetUp();
    if (IsSkipped()) return;
    if (!cuda::MultipliesCodes()) GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
  }

  DeviceMatrices Weights(int64_t n, int64_t k, int groups = 1) {
    return DeviceMatrices(rng_, WeightType::kFp8E4m3, n, k, groups);
  }

  kernel_test::Rng rng_;
};

struct Shape {
  int64_t rows, n, k;
};

TEST_F(CudaGemmW8A8Test, DenseOfAnyShape) {
  STRAIT_TRACE_SEED();
  for (const auto& [rows, n, k] : {Shape{1, 1, 1},
                                   {1, 130, 128},
                                   {17, 37, 129},
                                   {64, 128, 256},
                                   {65, 257, 250},
                                   {128, 128, 1000},
                                   {129, 384, 136},
                                   {200, 70, 1416}}) {
    const DeviceMatrices w = Weights(n, k);
    const CodedRows x(rng_, rows, k);
    const std::vector<float> expected = Expected(x.values(), rows, w.stored());
    std::vector<float> twice = expected;
    for (float& value : twice) value *= 2;
    for (const int32_t splits : {1, 3}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << " splits " << splits);
      const Buffer<float> split(splits * rows * n);
      cuda::GemmParams p;
      x.Set(&p);
      p.num_rows = static_cast<int32_t>(rows);
      p.weight = w.matrix();
      p.num_splits = splits;
      p.split_sums = split.data();
      p.split_capacity = split.count();
      // Even and odd strides: pairs of outputs aligned and not.
      for (const int64_t y_stride : {n, n + 3, (n + 1) / 2 * 2 + 2}) {
        const Buffer<float> y((rows + 2) * y_stride);
        p.accumulate = false;
        p.y_bf16 = nullptr;
        p.y_fp32 = y.data();
        p.y_stride = y_stride;
        ASSERT_EQ(cuda::GemmW8A8(p, nullptr), cudaSuccess);
        EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, y_stride), expected), kCodesBound);
        p.accumulate = true;
        ASSERT_EQ(cuda::GemmW8A8(p, nullptr), cudaSuccess);
        EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, y_stride), twice), kCodesBound);
      }
      const Buffer<Bf16> y((rows + 2) * n);
      p.accumulate = false;
      p.y_fp32 = nullptr;
      p.y_bf16 = y.data();
      p.y_stride = n;
      ASSERT_EQ(cuda::GemmW8A8(p, nullptr), cudaSuccess);
      EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, n), expected), kCodesBf16Bound);
    }
  }
}

TEST_F(CudaGemmW8A8Test, GatedOfAnyShape) {
  STRAIT_TRACE_SEED();
  for (const auto& [rows, n, k] :
       {Shape{1, 40, 8}, {64, 64, 128}, {100, 140, 200}, {129, 129, 1000}, {20, 208, 160}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k);
    const DeviceMatrices gate = Weights(n, k);
    const DeviceMatrices up = Weights(n, k);
    const CodedRows x(rng_, rows, k);
    const int64_t y_stride = cuda::AlignedStride(n);
    const Buffer<Bf16> y((rows + 1) * y_stride);
    cuda::GemmParams p;
    x.Set(&p);
    p.num_rows = static_cast<int32_t>(rows);
    p.weight = gate.matrix();
    p.up = up.matrix();
    p.y_bf16 = y.data();
    p.y_stride = y_stride;
    ASSERT_EQ(cuda::GemmW8A8(p, nullptr), cudaSuccess);
    const std::vector<float> expected =
        Gated(Expected(x.values(), rows, gate.stored()), Expected(x.values(), rows, up.stored()));
    EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, y_stride), expected), kCodesBf16Bound);
  }
}

// Gathered rows, a gated product, then one without: the two that an expert is made of.
TEST_F(CudaGemmW8A8Test, ExpertsByAList) {
  STRAIT_TRACE_SEED();
  const int experts = 7;
  const int64_t k = 136;
  const int64_t n = 140;
  const int64_t tokens = 200;
  const DeviceMatrices gate = Weights(n, k, experts);
  const DeviceMatrices up = Weights(n, k, experts);
  const CodedRows x(rng_, tokens, k);
  const gpu_test::ExpertRows list(rng_, experts, tokens, cuda::kCodeTileRows);
  const int64_t rows = list.rows();
  const Buffer<int32_t> d_none(std::vector<int32_t>{0});
  cuda::GemmParams p;
  x.Set(&p);
  list.Set(&p);
  const int32_t* const num_tiles = p.num_tiles;
  p.weight = gate.matrix();
  p.weight_group_stride = gate.group_stride();
  p.scale_group_stride = gate.scale_group_stride();
  p.y_stride = n;
  for (const bool gated : {true, false}) {
    const Buffer<Bf16> y(rows * n);
    p.y_bf16 = y.data();
    p.up = gated ? up.matrix() : cuda::Matrix{};
    p.num_tiles = d_none.data();
    ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
    EXPECT_TRUE(Dense(y.Get(), 0, n, n).empty());  // no tile: nothing is written
    p.num_tiles = num_tiles;
    ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
    list.ForEach(x.values(), k, gpu_test::ToFloat(y.Get()), n,
                 [&](int e, int64_t count, const std::vector<float>& own_x,
                     const std::vector<float>& own_y) {
                   std::vector<float> expected = Expected(own_x, count, gate.stored(e));
                   if (gated) expected = Gated(expected, Expected(own_x, count, up.stored(e)));
                   EXPECT_LT(RelativeError(own_y, expected), kCodesBf16Bound) << "expert " << e;
                 });
  }
}

// Through Gemm(), as the layers call it; and more tiles than multiprocessors: blocks make several.
TEST_F(CudaGemmW8A8Test, InAFixedOrderARowsBitsAreItsOwn) {
  STRAIT_TRACE_SEED();
  const int64_t n = 4000;
  const int64_t k = 328;
  const int64_t most = 700;
  const DeviceMatrices w = Weights(n, k);
  const CodedRows x(rng_, most, k);
  std::vector<float> all;
  for (const int64_t rows : {most, int64_t{1}, int64_t{8}, int64_t{31}, int64_t{100}}) {
    const Buffer<float> y(rows * n);
    cuda::GemmParams p;
    x.Set(&p, most - rows);
    p.num_rows = static_cast<int32_t>(rows);
    p.weight = w.matrix();
    p.fixed_order = true;
    p.y_fp32 = y.data();
    p.y_stride = n;
    ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
    if (all.empty()) all = y.Get();
    EXPECT_TRUE(kernel_test::SameBits(y.Get(), {all.end() - rows * n, all.end()})) << rows;
  }
  EXPECT_LT(
      RelativeError({all.begin(), all.begin() + 3 * n}, Expected(x.Rows(0, 3), 3, w.stored())),
      kCodesBound);
}

}  // namespace
}  // namespace strait
