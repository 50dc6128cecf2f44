// SPDX-License-Identifier: Apache-2.0
//
// Defends: every form of the Hopper products is the reference's, whatever the number of rows,
// columns and k, with rows gathered, experts without rows, K split, outputs of any alignment; what
// lies beside a matrix, a row or an item is neither read nor written; a row's bits do not depend on
// the rows beside it, nor on whether one block or a cluster made it; a block that makes many tiles
// makes each as it would alone.
#include <algorithm>
#include <cmath>
#include <utility>

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
using gpu_test::kBf16Bound;
using gpu_test::kFp32Bound;
using gpu_test::RelativeError;
using gpu_test::RoundedToBf16;
using kernel_test::RandomFloats;

struct Form {
  WeightType type;
  int32_t tile_rows, columns;
};

constexpr Form kForms[] = {
    {WeightType::kBf16, 64, 128},
    {WeightType::kBf16, 64, 256},
    {WeightType::kBf16, 128, 128},
    {WeightType::kBf16, 128, 256},
    {WeightType::kFp8E4m3, 64, 128},
    {WeightType::kFp8E4m3, 128, 128},
    {WeightType::kBf16, cuda::kClusterTileRows, 256},
};

cudaError_t Multiply(const cuda::GemmParams& p, const Form& form) {
  return form.tile_rows == cuda::kClusterTileRows
             ? cuda::GemmCluster(p, nullptr)
             : cuda::GemmHopper(p, form.tile_rows, form.columns, nullptr);
}

class CudaGemmHopperTest : public gpu_test::GpuTest {
 protected:
  CudaGemmHopperTest() : rng_(kernel_test::Seed()) {}

  void SetUp() override {
    gpu_test::GpuTest::SetUp();
    if (IsSkipped()) return;
    int major = 0;
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    if (major != 9) GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
  }

  // Rows of x, NaN between them and in as many rows after them as a tile has.
  static std::vector<Bf16> WithNanAfter(const std::vector<float>& x, int64_t k, int64_t stride) {
    std::vector<Bf16> padded = gpu_test::PaddedRows(x, k, stride);
    padded.insert(padded.end(), static_cast<size_t>(cuda::kClusterTileRows * stride),
                  __float2bfloat16(NAN));
    return padded;
  }

  kernel_test::Rng rng_;
};

struct Shape {
  int64_t rows, n, k;
};

TEST_F(CudaGemmHopperTest, DenseOfAnyShape) {
  STRAIT_TRACE_SEED();
  for (const Form& form : kForms) {
    for (const auto& [rows, n, k] : {Shape{1, 1, 8},
                                     {1, 256, 64},
                                     {63, 37, 72},
                                     {64, 128, 128},
                                     {65, 129, 200},
                                     {127, 255, 1000},
                                     {128, 256, 256},
                                     {129, 384, 136},
                                     {257, 255, 130},
                                     {300, 514, 1416},
                                     {300, 300, 40}}) {
      for (const int32_t splits : {1, 3}) {
        if (splits > 1 && form.tile_rows == cuda::kClusterTileRows) continue;
        SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << " type "
                                        << static_cast<int>(form.type) << " tile " << form.tile_rows
                                        << " x " << form.columns << " splits " << splits);
        const DeviceMatrices w(rng_, form.type, n, k);
        const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, rows * k));
        const std::vector<float> expected = Expected(x, rows, w.stored());
        const int64_t x_stride = cuda::AlignedStride(k) + 8;
        const Buffer<Bf16> dx(WithNanAfter(x, k, x_stride));
        const Buffer<float> split(splits * rows * n);
        cuda::GemmParams p;
        p.x = dx.data();
        p.x_stride = x_stride;
        p.num_rows = static_cast<int32_t>(rows);
        p.weight = w.matrix();
        p.num_splits = splits;
        p.split_sums = split.data();
        p.split_capacity = split.count();
        // Even and odd strides: pairs of outputs aligned and not.
        for (const int64_t y_stride : {n, n + 3, (n + 1) / 2 * 2 + 2}) {
          const Buffer<float> y((rows + 2) * y_stride);
          p.y_fp32 = y.data();
          p.y_bf16 = nullptr;
          p.y_stride = y_stride;
          ASSERT_EQ(Multiply(p, form), cudaSuccess);
          EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, y_stride), expected), kFp32Bound);
          p.accumulate = true;
          ASSERT_EQ(Multiply(p, form), cudaSuccess);
          std::vector<float> twice = expected;
          for (float& value : twice) value *= 2;
          EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, y_stride), twice), kFp32Bound);

          const Buffer<Bf16> y_bf16((rows + 2) * y_stride);
          p.accumulate = false;
          p.y_fp32 = nullptr;
          p.y_bf16 = y_bf16.data();
          ASSERT_EQ(Multiply(p, form), cudaSuccess);
          EXPECT_LT(RelativeError(Dense(y_bf16.Get(), rows, n, y_stride), expected), kBf16Bound);
        }
      }
    }
  }
}

TEST_F(CudaGemmHopperTest, GatedOfAnyShape) {
  STRAIT_TRACE_SEED();
  for (const Form& form : kForms) {
    for (const auto& [rows, n, k] :
         {Shape{1, 1, 8}, {64, 64, 64}, {100, 140, 200}, {129, 129, 1000}, {300, 208, 96}}) {
      SCOPED_TRACE(testing::Message()
                   << rows << " x " << n << " x " << k << " type " << static_cast<int>(form.type)
                   << " tile " << form.tile_rows << " x " << form.columns);
      const DeviceMatrices gate(rng_, form.type, n, k);
      const DeviceMatrices up(rng_, form.type, n, k);
      const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, rows * k));
      const Buffer<Bf16> dx(WithNanAfter(x, k, cuda::AlignedStride(k)));
      const int64_t y_stride = cuda::AlignedStride(n);
      const Buffer<Bf16> y((rows + 1) * y_stride);
      cuda::GemmParams p;
      p.x = dx.data();
      p.x_stride = cuda::AlignedStride(k);
      p.num_rows = static_cast<int32_t>(rows);
      p.weight = gate.matrix();
      p.up = up.matrix();
      p.y_bf16 = y.data();
      p.y_stride = y_stride;
      ASSERT_EQ(Multiply(p, form), cudaSuccess);
      const std::vector<float> expected =
          Gated(Expected(x, rows, gate.stored()), Expected(x, rows, up.stored()));
      EXPECT_LT(RelativeError(Dense(y.Get(), rows, n, y_stride), expected), kBf16Bound);
    }
  }
}

// Gathered rows, a gated product, then one without: the two that an expert is made of.
TEST_F(CudaGemmHopperTest, ExpertsByAList) {
  STRAIT_TRACE_SEED();
  const int experts = 9;
  const int64_t k = 136;
  const int64_t n = 140;
  const int64_t tokens = 200;
  for (const Form& form : kForms) {
    SCOPED_TRACE(testing::Message() << "type " << static_cast<int>(form.type) << " tile "
                                    << form.tile_rows << " x " << form.columns);
    const DeviceMatrices gate(rng_, form.type, n, k, experts);
    const DeviceMatrices up(rng_, form.type, n, k, experts);
    const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, tokens * k));
    const Buffer<Bf16> dx(WithNanAfter(x, k, 144));
    const gpu_test::ExpertRows list(rng_, experts, tokens, form.tile_rows);
    const int64_t rows = list.rows();
    cuda::GemmParams p;
    p.x = dx.data();
    p.x_stride = 144;
    list.Set(&p);
    p.weight = gate.matrix();
    p.weight_group_stride = gate.group_stride();
    p.scale_group_stride = gate.scale_group_stride();
    p.y_stride = n;
    for (const bool gated : {true, false}) {
      const Buffer<Bf16> y(rows * n);
      p.y_bf16 = y.data();
      p.up = gated ? up.matrix() : cuda::Matrix{};
      ASSERT_EQ(Multiply(p, form), cudaSuccess);
      list.ForEach(x, k, gpu_test::ToFloat(y.Get()), n,
                   [&](int e, int64_t count, const std::vector<float>& own_x,
                       const std::vector<float>& own_y) {
                     std::vector<float> expected = Expected(own_x, count, gate.stored(e));
                     if (gated) expected = Gated(expected, Expected(own_x, count, up.stored(e)));
                     EXPECT_LT(RelativeError(own_y, expected), kBf16Bound) << "expert " << e;
                   });
    }
  }
}

// No tile at all: nothing is written, and the kernel ends.
TEST_F(CudaGemmHopperTest, AnEmptyListWritesNothing) {
  STRAIT_TRACE_SEED();
  const DeviceMatrices w(rng_, WeightType::kBf16, 64, 64, 2);
  const Buffer<Bf16> x(64 * 64);
  const Buffer<Bf16> y(64 * 64);
  const Buffer<cuda::RowTile> tiles(4);
  const Buffer<int32_t> count(std::vector<int32_t>{0});
  cuda::GemmParams p;
  p.x = x.data();
  p.x_stride = 64;
  p.weight = w.matrix();
  p.num_groups = 2;
  p.weight_group_stride = w.group_stride();
  p.tiles = tiles.data();
  p.num_tiles = count.data();
  p.max_tiles = 4;
  p.y_bf16 = y.data();
  p.y_stride = 64;
  for (const Form& form : kForms) {
    if (form.type != WeightType::kBf16) continue;
    p.tile_rows = form.tile_rows;
    ASSERT_EQ(Multiply(p, form), cudaSuccess);
    const std::vector<float> all = gpu_test::ToFloat(y.Get());
    EXPECT_TRUE(std::all_of(all.begin(), all.end(), [](float v) { return std::isnan(v); }))
        << "tile " << form.tile_rows << " x " << form.columns;
  }
}

// Lists whose last tiles leave a block of the cluster without rows, with one, or a warpgroup of it.
TEST_F(CudaGemmHopperTest, AClusterGivesTheBitsOfOneBlock) {
  STRAIT_TRACE_SEED();
  const std::vector<int> counts = {0, 1, 64, 65, 127, 0, 128, 129, 192, 193, 256, 257, 385, 600, 0};
  const auto experts = static_cast<int>(counts.size());
  const int64_t tokens = 500;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{300, 136}, {77, 1000}, {512, 64}}) {
    const DeviceMatrices gate(rng_, WeightType::kBf16, n, k, experts);
    const DeviceMatrices up(rng_, WeightType::kBf16, n, k, experts);
    const int64_t x_stride = cuda::AlignedStride(k) + 8;
    const Buffer<Bf16> x(WithNanAfter(RoundedToBf16(RandomFloats(rng_, tokens * k)), k, x_stride));
    // The same tokens in tiles of both sizes.
    kernel_test::Rng same = rng_;
    const gpu_test::ExpertRows blocks(rng_, counts, tokens, 128);
    const gpu_test::ExpertRows clusters(same, counts, tokens, cuda::kClusterTileRows);
    for (const bool gated : {true, false}) {
      SCOPED_TRACE(testing::Message() << n << " x " << k << " gated " << gated);
      cuda::GemmParams p;
      p.x = x.data();
      p.x_stride = x_stride;
      p.weight = gate.matrix();
      p.up = gated ? up.matrix() : cuda::Matrix{};
      p.weight_group_stride = gate.group_stride();
      p.y_stride = n;
      const Buffer<Bf16> of_blocks(blocks.rows() * n);
      const Buffer<Bf16> of_clusters(blocks.rows() * n);
      blocks.Set(&p);
      p.y_bf16 = of_blocks.data();
      ASSERT_EQ(cuda::GemmHopper(p, 128, 256, nullptr), cudaSuccess);
      clusters.Set(&p);
      p.y_bf16 = of_clusters.data();
      ASSERT_EQ(cuda::GemmCluster(p, nullptr), cudaSuccess);
      const std::vector<float> expected = gpu_test::ToFloat(of_blocks.Get());
      EXPECT_TRUE(kernel_test::SameBits(gpu_test::ToFloat(of_clusters.Get()), expected));
      EXPECT_TRUE(std::none_of(expected.begin(), expected.end(), [](float v) { return v != v; }));
    }
  }
}

TEST_F(CudaGemmHopperTest, ClustersOfSeveralGroups) {
  STRAIT_TRACE_SEED();
  const int groups = 3;
  const int64_t rows = 270;
  const int64_t n = 260;
  const int64_t k = 256;
  const DeviceMatrices w(rng_, WeightType::kBf16, n, k, groups);
  const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, groups * rows * k));
  const Buffer<Bf16> dx(WithNanAfter(x, k, k));
  const Buffer<float> y(groups * rows * n);
  cuda::GemmParams p;
  p.x = dx.data();
  p.x_stride = k;
  p.x_group_stride = rows * k;
  p.num_rows = static_cast<int32_t>(rows);
  p.weight = w.matrix();
  p.num_groups = groups;
  p.weight_group_stride = w.group_stride();
  p.y_fp32 = y.data();
  p.y_stride = n;
  p.y_group_stride = rows * n;
  ASSERT_EQ(cuda::GemmCluster(p, nullptr), cudaSuccess);
  const std::vector<float> all = y.Get();
  for (int g = 0; g < groups; ++g) {
    const std::vector<float> own(x.begin() + g * rows * k, x.begin() + (g + 1) * rows * k);
    EXPECT_LT(RelativeError({all.begin() + g * rows * n, all.begin() + (g + 1) * rows * n},
                            Expected(own, rows, w.stored(g))),
              kFp32Bound)
        << "group " << g;
  }
}

TEST_F(CudaGemmHopperTest, ExpertsOfManyRowsGoToClusters) {
  EXPECT_EQ(cuda::ExpertTileRows(int64_t{2048} * 6, 64, false, false), cuda::kClusterTileRows);
  EXPECT_EQ(cuda::ExpertTileRows(int64_t{2048} * 6, 64, true, false), 128);
  EXPECT_EQ(cuda::ExpertTileRows(int64_t{1024} * 6, 64, false, false), 128);
}

TEST_F(CudaGemmHopperTest, ARowsBitsDoNotDependOnOthers) {
  STRAIT_TRACE_SEED();
  for (const Form& form : kForms) {
    // More tiles than multiprocessors with all rows: blocks make several, one after the other.
    const int64_t n = 4000;
    const int64_t k = 328;
    const int64_t most = 900;
    const DeviceMatrices w(rng_, form.type, n, k);
    const std::vector<float> x = RoundedToBf16(RandomFloats(rng_, most * k));
    const Buffer<Bf16> dx(WithNanAfter(x, k, 336));
    std::vector<float> all;
    for (const int64_t rows : {most, int64_t{1}, int64_t{31}, int64_t{100}}) {
      const Buffer<float> y(rows * n);
      cuda::GemmParams p;
      p.x = dx.data() + (most - rows) * 336;
      p.x_stride = 336;
      p.num_rows = static_cast<int32_t>(rows);
      p.weight = w.matrix();
      p.y_fp32 = y.data();
      p.y_stride = n;
      ASSERT_EQ(Multiply(p, form), cudaSuccess);
      if (all.empty()) all = y.Get();
      EXPECT_TRUE(kernel_test::SameBits(y.Get(), {all.end() - rows * n, all.end()}))
          << rows << " rows, type " << static_cast<int>(form.type) << " tile " << form.tile_rows
          << " x " << form.columns;
    }
    const std::vector<float> first(x.begin(), x.begin() + 3 * k);
    EXPECT_LT(RelativeError({all.begin(), all.begin() + 3 * n}, Expected(first, 3, w.stored())),
              kFp32Bound);
  }
}

}  // namespace
}  // namespace strait
