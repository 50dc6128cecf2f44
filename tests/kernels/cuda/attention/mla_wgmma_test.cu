// SPDX-License-Identifier: Apache-2.0
//
// Defends: the shared memory layout and the matrix descriptors of mla_wgmma.cuh mean what the
// attention kernel takes them for. One 64 x 64 x 16-a-step tile each, so that a failure here says
// that the layout is wrong and not the kernel.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/cuda/attention/mla_wgmma.cuh"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait::cuda {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;

// scores[64, 64] = a[64, 64] b[64, 64]^T; values[64, 256] = a[64, 64] v[64, 256]; of_registers[64, 128]:
// the first 128 columns of values, a in registers.
__global__ void ProductKernel(const Bf16* a, const Bf16* b, const Bf16* v, float* scores,
                              float* values, float* of_registers) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(1024) unsigned char chunks[6][wgmma::kChunkBytes];  // a, b, v[4]
  for (int i = threadIdx.x; i < 6 * 64 * 8; i += 128) {
    const int chunk = i / 512;
    const int row = i / 8 % 64;
    const int piece = i % 8;
    const Bf16* from = chunk == 0   ? a + row * 64 + piece * 8
                       : chunk == 1 ? b + row * 64 + piece * 8
                                    : v + row * 256 + (chunk - 2) * 64 + piece * 8;
    *reinterpret_cast<uint4*>(chunks[chunk] + wgmma::PieceOffset(row, piece)) =
        *reinterpret_cast<const uint4*>(from);
  }
  wgmma::FenceProxy();
  __syncthreads();
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(chunks));
  float s[32];
  float o[128];
  const wgmma::Operand left = wgmma::Rows(start);
  const wgmma::Operand rows = wgmma::Rows(start + wgmma::kChunkBytes);
  const wgmma::Operand columns = wgmma::Columns(start + 2 * wgmma::kChunkBytes);
  wgmma::Begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma::MultiplyRows(s, left.At(wgmma::RowsStep(k)), rows.At(wgmma::RowsStep(k)), k != 0);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma::MultiplyColumns(o, left.At(wgmma::RowsStep(k)), columns.At(wgmma::ColumnsStep(k)),
                           k != 0);
  }
  wgmma::Commit();
  wgmma::Wait<0>();
  wgmma::Pin(s);
  wgmma::Pin(o);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 32; ++i) {
    scores[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = s[i];
  }
  for (int i = 0; i < 128; ++i) {
    values[(row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + column + i % 2] = o[i];
  }
  float o_half[64];
  uint32_t a_pairs[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int at = (threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8) * 64 + k * 16 +
                     threadIdx.x % 4 * 2 + i / 2 * 8;
      a_pairs[k][i] = *reinterpret_cast<const uint32_t*>(a + at);
    }
  }
  wgmma::Begin();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma::MultiplyColumns(o_half, a_pairs[k], columns.At(wgmma::ColumnsStep(k)), k != 0);
  }
  wgmma::Commit();
  wgmma::Wait<0>();
  wgmma::Pin(o_half);
  wgmma::Pin(a_pairs);
  for (int i = 0; i < 64; ++i) {
    of_registers[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + column + i % 2] = o_half[i];
  }
#endif
}

class MlaWgmmaTest : public gpu_test::GpuTest {};

TEST_F(MlaWgmmaTest, OneTileOfScoresAndOfValues) {
  STRAIT_TRACE_SEED();
  int major = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  if (major != 9) GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
  kernel_test::Rng rng(kernel_test::Seed());
  const std::vector<float> a = gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, 64 * 64));
  const std::vector<float> b = gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, 64 * 64));
  const std::vector<float> v = gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, 64 * 256));
  std::vector<float> scores(64 * 64);
  std::vector<float> values(64 * 256);
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < 64; ++k) {
      for (int j = 0; j < 64; ++j) scores[i * 64 + j] += a[i * 64 + k] * b[j * 64 + k];
      for (int j = 0; j < 256; ++j) values[i * 256 + j] += a[i * 64 + k] * v[k * 256 + j];
    }
  }
  const Buffer<Bf16> device_a(gpu_test::ToBf16(a));
  const Buffer<Bf16> device_b(gpu_test::ToBf16(b));
  const Buffer<Bf16> device_v(gpu_test::ToBf16(v));
  const Buffer<float> device_scores(64 * 64);
  const Buffer<float> device_values(64 * 256);
  const Buffer<float> device_of_registers(64 * 128);
  ProductKernel<<<1, 128>>>(device_a.data(), device_b.data(), device_v.data(), device_scores.data(),
                            device_values.data(), device_of_registers.data());
  ASSERT_EQ(cudaGetLastError(), cudaSuccess);
  // Products of bf16 are exact in fp32; only the order of 64 additions differs.
  EXPECT_LT(gpu_test::RelativeError(device_scores.Get(), scores), 1e-5);
  EXPECT_LT(gpu_test::RelativeError(device_values.Get(), values), 1e-5);
  std::vector<float> left;
  for (int i = 0; i < 64 * 128; ++i) left.push_back(values[i / 128 * 256 + i % 128]);
  EXPECT_LT(gpu_test::RelativeError(device_of_registers.Get(), left), 1e-5);
}

}  // namespace
}  // namespace strait::cuda
