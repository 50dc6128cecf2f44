// SPDX-License-Identifier: Apache-2.0
//
// Defends: the wide products of mla_wgmma.cuh read shared memory and give their sums as the Hopper
// product takes them for. One step of 64 k each, so that a failure here says that the layout is
// wrong and not the kernel.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "kernels/cuda/attention/mla_wgmma.cuh"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait::cuda {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;

// y[64, kColumns] = x[64, 64] w[kColumns, 64]^T. The tile lies one step into the memory, as stages do.
template <int kColumns>
__global__ void ProductKernel(const Bf16* x, const Bf16* w, float* y) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(1024) unsigned char tile[1024 + (64 + kColumns) * 128];
  for (int i = threadIdx.x; i < (64 + kColumns) * 8; i += 128) {
    const int row = i / 8;
    const int piece = i % 8;
    const Bf16* from = row < 64 ? x + row * 64 : w + (row - 64) * 64;
    *reinterpret_cast<uint4*>(tile + 1024 + wgmma::PieceOffset(row, piece)) =
        *reinterpret_cast<const uint4*>(from + piece * 8);
  }
  wgmma::FenceProxy();
  __syncthreads();
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  float sums[kColumns / 2];
  const wgmma::Operand left = wgmma::Rows(start);
  const wgmma::Operand right = wgmma::Rows(start + 64 * 128);
  wgmma::Begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t offset = 1024 + wgmma::RowsStep(k);
    wgmma::MultiplyRows(sums, left.At(offset), right.At(offset), k != 0);
  }
  wgmma::Commit();
  wgmma::Wait<0>();
  wgmma::Pin(sums);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int column = threadIdx.x % 4 * 2;
  for (int i = 0; i < kColumns / 2; ++i) {
    y[(row + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + column + i % 2] = sums[i];
  }
#endif
}

// y[64, 128] = x[64, 128] w[128, 128]^T of e4m3 codes: a row of codes is as long as one of 64 bf16.
__global__ void CodesKernel(const uint8_t* x, const uint8_t* w, float* y) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(1024) unsigned char tile[1024 + (64 + 128) * 128];
  for (int i = threadIdx.x; i < (64 + 128) * 8; i += 128) {
    const int row = i / 8;
    const int piece = i % 8;
    const uint8_t* from = row < 64 ? x + row * 128 : w + (row - 64) * 128;
    *reinterpret_cast<uint4*>(tile + 1024 + wgmma::PieceOffset(row, piece)) =
        *reinterpret_cast<const uint4*>(from + piece * 16);
  }
  wgmma::FenceProxy();
  __syncthreads();
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  float sums[64];
  const wgmma::Operand left = wgmma::Rows(start);
  const wgmma::Operand right = wgmma::Rows(start + 64 * 128);
  wgmma::Begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t offset = 1024 + wgmma::RowsStep(k);
    wgmma::MultiplyCodes(sums, left.At(offset), right.At(offset), k != 0);
  }
  wgmma::Commit();
  wgmma::Wait<0>();
  wgmma::Pin(sums);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 64; ++i) {
    y[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + column + i % 2] = sums[i];
  }
#endif
}

class GemmWgmmaTest : public gpu_test::GpuTest {
 protected:
  template <int kColumns>
  void Check() {
    STRAIT_TRACE_SEED();
    int major = 0;
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    if (major != 9) GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
    kernel_test::Rng rng(kernel_test::Seed());
    const std::vector<float> x = gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, 64 * 64));
    const std::vector<float> w =
        gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, kColumns * 64));
    std::vector<float> y(64 * kColumns);
    for (int i = 0; i < 64; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        for (int k = 0; k < 64; ++k) y[i * kColumns + j] += x[i * 64 + k] * w[j * 64 + k];
      }
    }
    const Buffer<Bf16> device_x(gpu_test::ToBf16(x));
    const Buffer<Bf16> device_w(gpu_test::ToBf16(w));
    const Buffer<float> device_y(64 * kColumns);
    ProductKernel<kColumns><<<1, 128>>>(device_x.data(), device_w.data(), device_y.data());
    ASSERT_EQ(cudaGetLastError(), cudaSuccess);
    // Products of bf16 are exact in fp32; only the order of 64 additions differs.
    EXPECT_LT(gpu_test::RelativeError(device_y.Get(), y), 1e-5);
  }
};

TEST_F(GemmWgmmaTest, Columns64) { Check<64>(); }
TEST_F(GemmWgmmaTest, Columns128) { Check<128>(); }
TEST_F(GemmWgmmaTest, Columns256) { Check<256>(); }

TEST_F(GemmWgmmaTest, Codes) {
  STRAIT_TRACE_SEED();
  int major = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  if (major != 9) GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
  kernel_test::Rng rng(kernel_test::Seed());
  // Halves, ones and twos: every sum of 128 products is exact in the bits that are kept.
  const std::pair<uint8_t, float> codes[] = {{0x00, 0.0f}, {0x30, 0.5f},  {0x38, 1.0f},
                                             {0x40, 2.0f}, {0xb0, -0.5f}, {0xb8, -1.0f},
                                             {0xc0, -2.0f}};
  std::vector<uint8_t> x, w;
  std::vector<float> x_values, w_values;
  for (int i = 0; i < 64 * 128; ++i) {
    const auto& [code, value] = codes[rng() % 7];
    x.push_back(code);
    x_values.push_back(value);
  }
  for (int i = 0; i < 128 * 128; ++i) {
    const auto& [code, value] = codes[rng() % 7];
    w.push_back(code);
    w_values.push_back(value);
  }
  std::vector<float> y(64 * 128);
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 128; ++j) {
      for (int k = 0; k < 128; ++k) y[i * 128 + j] += x_values[i * 128 + k] * w_values[j * 128 + k];
    }
  }
  const Buffer<uint8_t> device_x(x);
  const Buffer<uint8_t> device_w(w);
  const Buffer<float> device_y(64 * 128);
  CodesKernel<<<1, 128>>>(device_x.data(), device_w.data(), device_y.data());
  ASSERT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(device_y.Get(), y);
}

}  // namespace
}  // namespace strait::cuda
