// SPDX-License-Identifier: Apache-2.0
//
// MlaFp8Test is what tests of the kernels for tiles of few rows over fp8 cache rows have in common.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "tests/kernels/cuda/attention/mla_case.h"

namespace strait::cuda::mla_test {

class MlaFp8Test : public gpu_test::GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    int major = 0;
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    if (major != 9) GTEST_SKIP() << "a kernel of the Hopper path";
  }
  // Of the output; the kernel's own.
  virtual double Tolerance(const Shape& shape) const = 0;
  void Check(const Shape& shape, const std::vector<Tokens>& tokens, int32_t grid = 0) {
    SCOPED_TRACE(std::to_string(shape.heads) + " heads, " + std::to_string(grid) +
                 " thread blocks");
    const Case c(rng_, shape, tokens);
    c.Expect(c.Run(grid), Tolerance(shape));
  }
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng_);
  }
  kernel_test::Rng rng_{kernel_test::Seed()};
};

}  // namespace strait::cuda::mla_test
