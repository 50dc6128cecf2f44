// SPDX-License-Identifier: Apache-2.0
//
// What tests of products compare with: the reference twin's results, and how far a GPU's may be.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/reference/kernels.h"

namespace strait::gpu_test {

// Products of bf16 are exact in fp32; sums of up to 8,192 of them in fp32 by the tensor core, whose
// additions cut instead of rounding: 2^-22 a step, far below sqrt(8192) steps of it.
inline constexpr double kFp32Bound = 3e-5;
// One rounding to bf16 moves no element by more than 2^-8 of it, and so no norm (cutting, twice that, would be seen:
// 2^-7 / sqrt(3) of the norm). A tighter bound would hold for many elements only, and some tests have 16.
inline constexpr double kBf16Bound = 0x1p-8 + kFp32Bound;

inline std::vector<float> Expected(const std::vector<float>& x, int64_t rows,
                                   const WeightMatrix& weight) {
  std::vector<float> y(static_cast<size_t>(rows * weight.rows));
  const auto make = [&](int64_t begin, int64_t end) {
    GemmParams p;
    p.x = x.data() + begin * weight.cols;
    p.x_stride = weight.cols;
    p.num_rows = end - begin;
    p.weight = weight;
    p.y = y.data() + begin * weight.rows;
    p.y_stride = weight.rows;
    reference::Gemm(p);
  };
  // The twin is slow: as many threads as there are processors and rows.
  const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  const int64_t share = std::max<int64_t>(1, (rows + processors - 1) / processors);
  std::vector<std::thread> threads;
  for (int64_t begin = share; begin < rows; begin += share) {
    threads.emplace_back(make, begin, std::min(rows, begin + share));
  }
  make(0, std::min(rows, share));
  for (std::thread& thread : threads) thread.join();
  return y;
}

inline std::vector<float> Gated(const std::vector<float>& gate, const std::vector<float>& up) {
  std::vector<float> y(gate.size());
  SiluMulParams p;
  p.gate = gate.data();
  p.up = up.data();
  p.y = y.data();
  p.num_rows = 1;
  p.gate_stride = p.up_stride = p.y_stride = p.dim = static_cast<int64_t>(gate.size());
  reference::SiluMul(p);
  return y;
}

// y without what lies between its rows, which must be as it was.
template <class T>
std::vector<float> Dense(const std::vector<T>& y, int64_t rows, int64_t n, int64_t stride) {
  std::vector<float> dense;
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const auto value = static_cast<float>(y[static_cast<size_t>(i)]);
    if (i / stride < rows && i % stride < n) {
      dense.push_back(value);
    } else {
      EXPECT_TRUE(std::isnan(value)) << "written beside a row: " << i;
    }
  }
  return dense;
}

}  // namespace strait::gpu_test
