// SPDX-License-Identifier: Apache-2.0
//
// Defends: products of the CUDA backend are the reference's for every form (dense, gated, a matrix
// a head, experts by a list), both weight formats, every kernel, and sizes that nothing divides;
// padding is never used, every output is written, and with a fixed order a row's bits do not depend
// on the other rows.
#include "kernels/cuda/gemm/gemm.h"

#include <algorithm>

#include "tests/kernels/cuda/gemm/device_matrix.h"
#include "tests/kernels/cuda/gemm/expert_rows.h"
#include "tests/kernels/cuda/gemm/gemm_reference.h"

namespace strait {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;
using gpu_test::DeviceMatrices;
using gpu_test::Expected;
using gpu_test::Gated;
using gpu_test::kBf16Bound;
using gpu_test::kFp32Bound;
using gpu_test::PaddedRows;
using gpu_test::RelativeError;
using gpu_test::RoundedToBf16;
using kernel_test::RandomFloats;

class CudaGemmTest : public gpu_test::GpuTest {
 protected:
  CudaGemmTest() : rng_(kernel_test::Seed()) {}

  kernel_test::Rng rng_;
};

struct Shape {
  int64_t rows, n, k;
};

TEST_F(CudaGemmTest, Dense) {
  STRAIT_TRACE_SEED();
  for (const WeightType type : {WeightType::kBf16, WeightType::kFp8E4m3}) {
    for (const auto& [rows, n, k] : {Shape{1, 16, 128},
                                     {1, 2048, 7168},
                                     {3, 37, 72},
                                     {8, 100, 100},
                                     {9, 576, 2048},
                                     {17, 130, 40},
                                     {33, 257, 1000},
                                     {33, 64, 4096},
                                     {61, 130, 2100},
                                     {64, 640, 96},
                                     {65, 129, 208},
                                     {130, 300, 72},
                                     {257, 520, 1416},
                                     {258, 520, 1416}}) {
      for (const bool fixed : {false, true}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << " type "
                                        << static_cast<int>(type) << " fixed " << fixed);
        const DeviceMatrices w(rng_, type, n, k);
        const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, rows * k));
        const int64_t x_stride = cuda::AlignedStride(k) + 8;
        const Buffer<Bf16> dx(PaddedRows(x, k, x_stride));
        const Buffer<float> y(rows * n);
        cuda::GemmParams p;
        p.x = dx.data();
        p.x_stride = x_stride;
        p.num_rows = static_cast<int32_t>(rows);
        p.weight = w.matrix();
        p.y_fp32 = y.data();
        p.y_stride = n;
        p.fixed_order = fixed;
        p.portable = rows % 4 >= 2;
        const Buffer<float> split(1 << 20);
        p.split_sums = rows % 2 == 0 ? nullptr : split.data();
        p.split_capacity = split.count();
        ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
        const std::vector<float> expected = Expected(x, rows, w.stored());
        EXPECT_LT(RelativeError(y.Get(), expected), kFp32Bound);

        p.accumulate = true;
        ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
        std::vector<float> twice = expected;
        for (float& value : twice) value *= 2;
        EXPECT_LT(RelativeError(y.Get(), twice), kFp32Bound);

        const Buffer<Bf16> y_bf16(rows * n);
        p.accumulate = false;
        p.y_fp32 = nullptr;
        p.y_bf16 = y_bf16.data();
        ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
        EXPECT_LT(RelativeError(gpu_test::ToFloat(y_bf16.Get()), expected), kBf16Bound);
      }
    }
  }
}

TEST_F(CudaGemmTest, GatedInPlaceOfThreeKernels) {
  STRAIT_TRACE_SEED();
  for (const WeightType type : {WeightType::kBf16, WeightType::kFp8E4m3}) {
    for (const auto& [rows, n, k] : {Shape{1, 1408, 2048},
                                     {5, 36, 72},
                                     {16, 100, 160},
                                     {64, 48, 160},
                                     {100, 140, 200},
                                     {300, 208, 96},
                                     {101, 140, 520},
                                     {102, 140, 520}}) {
      SCOPED_TRACE(testing::Message()
                   << rows << " x " << n << " x " << k << " type " << static_cast<int>(type));
      const DeviceMatrices gate(rng_, type, n, k);
      const DeviceMatrices up(rng_, type, n, k);
      const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, rows * k));
      const Buffer<Bf16> dx(PaddedRows(x, k, cuda::AlignedStride(k)));
      const int64_t y_stride = cuda::AlignedStride(n);
      const Buffer<Bf16> y(rows * y_stride);
      cuda::GemmParams p;
      p.x = dx.data();
      p.x_stride = cuda::AlignedStride(k);
      p.num_rows = static_cast<int32_t>(rows);
      p.portable = rows % 4 >= 2;
      p.weight = gate.matrix();
      p.up = up.matrix();
      p.y_bf16 = y.data();
      p.y_stride = y_stride;
      ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
      const std::vector<float> got = gpu_test::ToFloat(y.Get());
      std::vector<float> dense;
      for (int64_t r = 0; r < rows; ++r) {
        dense.insert(dense.end(), got.begin() + r * y_stride, got.begin() + r * y_stride + n);
        for (int64_t i = n; i < y_stride; ++i) {
          ASSERT_TRUE(std::isnan(got[static_cast<size_t>(r * y_stride + i)])) << "padding written";
        }
      }
      const std::vector<float> expected =
          Gated(Expected(x, rows, gate.stored()), Expected(x, rows, up.stored()));
      EXPECT_LT(RelativeError(dense, expected), kBf16Bound);
    }
  }
}

TEST_F(CudaGemmTest, PairIsTwoProducts) {
  STRAIT_TRACE_SEED();
  for (const WeightType type : {WeightType::kBf16, WeightType::kFp8E4m3}) {
    for (const int64_t rows : {1, 12, 33, 64, 70}) {
      const int64_t k = 200;
      const DeviceMatrices a(rng_, type, 130, k);
      const DeviceMatrices b(rng_, type, 72, k);
      const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, rows * k));
      const Buffer<Bf16> dx(PaddedRows(x, k, 208));
      const Buffer<Bf16> y_a(rows * 130);
      const Buffer<float> y_b(rows * 72);
      cuda::GemmParams p;
      p.x = dx.data();
      p.x_stride = 208;
      p.num_rows = static_cast<int32_t>(rows);
      p.weight = a.matrix();
      p.y_bf16 = y_a.data();
      p.y_stride = 130;
      cuda::GemmParams q = p;
      q.weight = b.matrix();
      q.y_bf16 = nullptr;
      q.y_fp32 = y_b.data();
      q.y_stride = 72;
      ASSERT_EQ(cuda::GemmPair(p, q, nullptr), cudaSuccess);
      EXPECT_LT(RelativeError(gpu_test::ToFloat(y_a.Get()), Expected(x, rows, a.stored())),
                kBf16Bound);
      EXPECT_LT(RelativeError(y_b.Get(), Expected(x, rows, b.stored())), kFp32Bound);
    }
  }
}

// The absorbed query and the value up-projection: head h has its matrix, its columns of x and of y.
TEST_F(CudaGemmTest, AMatrixAHead) {
  STRAIT_TRACE_SEED();
  for (const int64_t rows : {1, 7, 70, 150}) {
    const int heads = 6;
    const int64_t k = 20;
    const int64_t n = 48;
    const int64_t x_head = 48;  // nope 20, rope 24, padded
    const DeviceMatrices w(rng_, WeightType::kBf16, n, k, heads);
    const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, rows * heads * x_head));
    const Buffer<Bf16> dx(gpu_test::ToBf16(x));
    const Buffer<Bf16> y(rows * heads * n);
    cuda::GemmParams p;
    p.x = dx.data();
    p.x_stride = heads * x_head;
    p.x_group_stride = x_head;
    p.num_rows = static_cast<int32_t>(rows);
    p.num_groups = heads;
    p.weight = w.matrix();
    p.weight_group_stride = w.group_stride();
    p.y_bf16 = y.data();
    p.y_stride = heads * n;
    p.y_group_stride = n;
    ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
    const std::vector<float> got = gpu_test::ToFloat(y.Get());
    for (int h = 0; h < heads; ++h) {
      std::vector<float> own_x;
      std::vector<float> own_y;
      for (int64_t r = 0; r < rows; ++r) {
        const auto x_at = x.begin() + (r * heads + h) * x_head;
        own_x.insert(own_x.end(), x_at, x_at + k);
        const auto y_at = got.begin() + (r * heads + h) * n;
        own_y.insert(own_y.end(), y_at, y_at + n);
      }
      EXPECT_LT(RelativeError(own_y, Expected(own_x, rows, w.stored(h))), kBf16Bound) << h;
    }
  }
}

TEST_F(CudaGemmTest, ExpertsByAList) {
  STRAIT_TRACE_SEED();
  const int experts = 12;
  const int64_t k = 136;
  const int64_t n = 140;
  const int64_t tokens = 200;
  for (const WeightType type : {WeightType::kBf16, WeightType::kFp8E4m3}) {
    for (const int tile : {8, 16, 32, 64, 128}) {
      SCOPED_TRACE(testing::Message() << "tile " << tile << " type " << static_cast<int>(type));
      const DeviceMatrices gate(rng_, type, n, k, experts);
      const DeviceMatrices up(rng_, type, n, k, experts);
      const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, tokens * k));
      const Buffer<Bf16> dx(PaddedRows(x, k, 144));
      const gpu_test::ExpertRows list(rng_, experts, tokens, tile);
      const int64_t rows = list.rows();
      const Buffer<Bf16> y(rows * n);
      cuda::GemmParams p;
      p.x = dx.data();
      p.x_stride = 144;
      list.Set(&p);
      p.weight = gate.matrix();
      p.up = up.matrix();
      p.weight_group_stride = gate.group_stride();
      p.scale_group_stride = gate.scale_group_stride();
      p.y_bf16 = y.data();
      p.y_stride = n;
      ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
      list.ForEach(x, k, gpu_test::ToFloat(y.Get()), n,
                   [&](int e, int64_t count, const std::vector<float>& own_x,
                       const std::vector<float>& own_y) {
                     EXPECT_LT(RelativeError(own_y, Gated(Expected(own_x, count, gate.stored(e)),
                                                          Expected(own_x, count, up.stored(e)))),
                               kBf16Bound)
                         << "expert " << e;
                   });
      const Buffer<Bf16> again(rows * n);
      p.y_bf16 = again.data();
      p.list_again = true;  // how early the list is read changes nothing
      ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
      EXPECT_TRUE(
          kernel_test::SameBits(gpu_test::ToFloat(again.Get()), gpu_test::ToFloat(y.Get())));
    }
  }
}

// Deep enough that a ring begins with known tiles before it has seen the list.
TEST_F(CudaGemmTest, KnownTilesChangeNoBit) {
  STRAIT_TRACE_SEED();
  const int64_t n = 40;
  const int32_t rows = 7;
  for (const WeightType type : {WeightType::kBf16, WeightType::kFp8E4m3}) {
    const int64_t k = type == WeightType::kBf16 ? 2048 : 4096;
    const DeviceMatrices gate(rng_, type, n, k, 4);
    const DeviceMatrices up(rng_, type, n, k, 4);
    const Buffer<Bf16> x(gpu_test::ToBf16(RandomFloats(rng_, rows * k)));
    const Buffer<cuda::RowTile> tiles(
        std::vector<cuda::RowTile>{{2, 3, 2}, {3, 5, 2}, {0, 0, 1}, {1, 1, 2}, {1 << 30, 0, 8}});
    const Buffer<int32_t> num_tiles(std::vector<int32_t>{4});
    cuda::GemmParams p;
    p.x = x.data();
    p.x_stride = k;
    p.weight = gate.matrix();
    p.up = up.matrix();
    p.num_groups = 4;
    p.weight_group_stride = gate.group_stride();
    p.scale_group_stride = gate.scale_group_stride();
    p.tiles = tiles.data();
    p.num_tiles = num_tiles.data();
    p.max_tiles = 5;
    p.tile_rows = 8;
    p.y_stride = n;
    const Buffer<Bf16> listed(rows * n);
    p.y_bf16 = listed.data();
    ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
    const Buffer<Bf16> known(rows * n);
    p.y_bf16 = known.data();
    p.known = {2, 3, 2};
    p.num_known = 2;
    ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
    const std::vector<float> expected = gpu_test::ToFloat(listed.Get());
    EXPECT_FALSE(std::any_of(expected.begin(), expected.end(), [](float y) { return y != y; }));
    EXPECT_TRUE(kernel_test::SameBits(gpu_test::ToFloat(known.Get()), expected));
  }
}

TEST_F(CudaGemmTest, FixedOrderGivesARowTheSameBitsInEveryBatch) {
  STRAIT_TRACE_SEED();
  for (const WeightType type : {WeightType::kBf16, WeightType::kFp8E4m3}) {
    const int64_t n = 130;
    const int64_t k = 1000;
    const int64_t most = 257;
    const DeviceMatrices w(rng_, type, n, k);
    const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, most * k));
    const Buffer<Bf16> dx(PaddedRows(x, k, 1008));
    std::vector<float> all;
    for (const int64_t rows : {int64_t{257}, int64_t{1}, int64_t{8}, int64_t{31}, int64_t{64}}) {
      const Buffer<float> y(rows * n);
      cuda::GemmParams p;
      p.x = dx.data() + (most - rows) * 1008;
      p.x_stride = 1008;
      p.num_rows = static_cast<int32_t>(rows);
      p.weight = w.matrix();
      p.y_fp32 = y.data();
      p.y_stride = n;
      p.fixed_order = true;
      ASSERT_EQ(cuda::Gemm(p, nullptr), cudaSuccess);
      if (all.empty()) all = y.Get();
      EXPECT_TRUE(kernel_test::SameBits(y.Get(), {all.end() - rows * n, all.end()}))
          << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace strait
