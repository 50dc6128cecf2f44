// SPDX-License-Identifier: Apache-2.0
//
// Defends: a linear layer is what its formula says, and a row of its result has the same bits
// whatever other rows, threads or instruction set there are.
#include "kernels/gemm.h"

#include <utility>

#include "kernels/reference/kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using kernel_test::kAllTypes;
using kernel_test::kEps;
using kernel_test::MakeContext;
using kernel_test::RandomFloats;
using kernel_test::SameBits;
using kernel_test::StoredWeight;

struct Shape {
  int64_t m, n, k;
};

class GemmTest : public kernel_test::LevelTest {};
STRAIT_FOR_EACH_LEVEL(GemmTest);

// Greatest sum of |x w| over the outputs: what rounding errors are relative to.
double GreatestAbsoluteSum(const GemmParams& p) {
  double greatest = 0;
  for (int64_t m = 0; m < p.num_rows; ++m) {
    const float* x = p.x + (p.x_rows ? p.x_rows[m] : m) * p.x_stride;
    for (int64_t n = 0; n < p.weight.rows; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < p.weight.cols; ++k) {
        sum += std::abs(x[k] * reference::WeightValue(p.weight, n, k));
      }
      greatest = std::max(greatest, sum);
    }
  }
  return greatest;
}

TEST_P(GemmTest, MatchesReference) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam(), 2);
  for (const Shape s : {Shape{1, 1, 7},
                        {1, 5, 24},
                        {2, 9, 40},
                        {3, 5, 129},
                        {4, 24, 16},
                        {5, 130, 300},
                        {130, 25, 257},
                        {257, 5, 24},
                        {17, 49, 513},
                        {1, 300, 144}}) {
    for (WeightType type : kAllTypes) {
      for (bool accumulate : {false, true}) {
        const StoredWeight weight(rng, type, s.n, s.k);
        const int64_t x_stride = s.k + 3;
        const int64_t y_stride = s.n + 2;
        std::vector<float> x = RandomFloats(rng, (s.m + 2) * x_stride);
        std::vector<int32_t> x_rows(static_cast<size_t>(s.m));
        for (int32_t& row : x_rows) row = static_cast<int32_t>(rng() % (s.m + 2));
        std::vector<float> y = RandomFloats(rng, s.m * y_stride);
        std::vector<float> expected = y;
        GemmParams p = {.x = x.data(),
                        .x_stride = x_stride,
                        .x_rows = x_rows.data(),
                        .num_rows = s.m,
                        .weight = weight.matrix(),
                        .y = y.data(),
                        .y_stride = y_stride,
                        .accumulate = accumulate};
        cpu::Gemm(*context, p);
        // A lane makes K/16 roundings, the tree 4, accumulation and the final rounding one each.
        const double bound =
            (static_cast<double>(s.k) / 16 + 8) * kEps * (GreatestAbsoluteSum(p) + 4);
        p.y = expected.data();
        reference::Gemm(p);
        EXPECT_TRUE(kernel_test::Within(y, expected, bound))
            << s.m << "x" << s.n << "x" << s.k << " type " << static_cast<int>(type);
        for (int64_t m = 0; m < s.m; ++m) {  // what lies between rows stays
          EXPECT_TRUE(SameBits(&y[m * y_stride + s.n], &expected[m * y_stride + s.n], 2));
        }
      }
    }
  }
}

// Every number of rows from 1 to 257 gives the row that it gives alone, with 1, 2 and 3 threads,
// and all of it equals the portable level's.
TEST_P(GemmTest, RowsDoNotDependOnTheirCompany) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  auto one = MakeContext(GetParam(), 1);
  auto two = MakeContext(GetParam(), 2);
  auto three = MakeContext(GetParam(), 3);
  constexpr int64_t kMost = 257;
  for (WeightType type : kAllTypes) {
    for (int64_t k : {7, 24, 129, 300}) {
      const int64_t n = k == 300 ? 31 : 5;
      const StoredWeight weight(rng, type, n, k);
      const std::vector<float> x = RandomFloats(rng, kMost * k);
      std::vector<float> alone(kMost * n);
      for (int64_t m = 0; m < kMost; ++m) {
        cpu::Gemm(*one, {.x = &x[m * k],
                         .x_stride = k,
                         .num_rows = 1,
                         .weight = weight.matrix(),
                         .y = &alone[m * n],
                         .y_stride = n});
      }
      std::vector<float> y(kMost * n);
      cpu::Gemm(*portable, {.x = x.data(),
                            .x_stride = k,
                            .num_rows = kMost,
                            .weight = weight.matrix(),
                            .y = y.data(),
                            .y_stride = n});
      ASSERT_TRUE(SameBits(alone, y)) << "against portable, K " << k;
      for (cpu::Context* context : {one.get(), two.get(), three.get()}) {
        // The portable level is slow: a few numbers of rows stand for all.
        const int64_t step = GetParam() == cpu::SimdLevel::kPortable ? 64 : 1;
        for (int64_t m = 1; m <= kMost; m += step) {
          std::fill(y.begin(), y.end(), 0.0f);
          cpu::Gemm(*context, {.x = x.data(),
                               .x_stride = k,
                               .num_rows = m,
                               .weight = weight.matrix(),
                               .y = y.data(),
                               .y_stride = n});
          ASSERT_TRUE(SameBits(alone.data(), y.data(), m * n))
              << m << " rows, K " << k << ", type " << static_cast<int>(type) << ", "
              << context->num_threads() << " threads";
        }
      }
    }
  }
}

TEST_P(GemmTest, GroupsEqualSeparateCalls) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam(), 3);
  constexpr int64_t kTokens = 20;
  constexpr int64_t kDepth = 65;
  constexpr int64_t kOut = 37;
  const std::vector<float> x = RandomFloats(rng, kTokens * kDepth);
  std::vector<std::unique_ptr<StoredWeight>> weights;
  std::vector<std::vector<int32_t>> rows;
  std::vector<std::vector<float>> together, separate;
  std::vector<GemmParams> groups;
  for (int64_t expert = 0; expert < 9; ++expert) {
    weights.push_back(std::make_unique<StoredWeight>(rng, kAllTypes[expert % 4], kOut, kDepth));
    rows.emplace_back();
    for (int64_t i = 0; i < expert; ++i)
      rows.back().push_back(static_cast<int32_t>(rng() % kTokens));
    together.emplace_back(static_cast<size_t>(expert * kOut));
  }
  separate = together;
  for (size_t expert = 0; expert < rows.size(); ++expert) {
    GemmParams p = {.x = x.data(),
                    .x_stride = kDepth,
                    .x_rows = rows[expert].data(),
                    .num_rows = static_cast<int64_t>(rows[expert].size()),
                    .weight = weights[expert]->matrix(),
                    .y = together[expert].data(),
                    .y_stride = kOut};
    groups.push_back(p);
    p.y = separate[expert].data();
    cpu::Gemm(*context, p);
  }
  cpu::GroupedGemm(*context, groups);
  for (size_t expert = 0; expert < rows.size(); ++expert) {
    EXPECT_TRUE(SameBits(together[expert], separate[expert])) << "expert " << expert;
  }
}

// Subnormal products round to -0 in a lane; padding must not turn it into +0 on one path only.
TEST_P(GemmTest, SignedZerosAndSubnormals) {
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  auto context = MakeContext(GetParam());
  const std::vector<float> tiny(5 * 7, -1e-30f);
  std::vector<float> x(5 * 7, 1e-30f);
  for (int64_t i = 0; i < 7; ++i) x[i] = 3e-12f;  // products near the least subnormal
  const WeightMatrix weight = {tiny.data(), nullptr, WeightType::kFp32, 5, 7};
  std::vector<float> a(25), b(25), alone(5);
  const GemmParams p = {
      .x = x.data(), .x_stride = 7, .num_rows = 5, .weight = weight, .y = a.data(), .y_stride = 5};
  cpu::Gemm(*context, p);
  GemmParams q = p;
  q.y = b.data();
  cpu::Gemm(*portable, q);
  EXPECT_TRUE(SameBits(a, b));
  for (int64_t m = 0; m < 5; ++m) {
    q = p;
    q.x += m * 7;
    q.num_rows = 1;
    q.y = alone.data();
    cpu::Gemm(*context, q);
    EXPECT_TRUE(SameBits(alone.data(), &a[m * 5], 5));
  }
  EXPECT_LT(a[0], 0.0f);  // subnormals are not flushed
}

// A run of fp8 codes without NaN is widened in a shorter way: each finite code must come out exact,
// and a NaN must reach its own output and change nothing in the rows that are read with it.
TEST_P(GemmTest, Fp8CodesAreExactBesideNan) {
  auto context = MakeContext(GetParam());
  constexpr int64_t kRows = 6;                        // a whole tile at every level, and a rest
  constexpr int64_t kDepth = 2 * kFp8BlockSize + 48;  // whole blocks, and a shorter one
  std::vector<uint8_t> codes(kRows * kDepth);
  for (int64_t i = 0; i < kRows * kDepth; ++i) {
    codes[i] = static_cast<uint8_t>(i * 37 + i / kDepth);
    if ((codes[i] & 0x7f) == 0x7f) codes[i] = 0x80;
  }
  const float scales[3] = {0.37f, 1.91e-7f, 512.0f};
  const WeightMatrix w = {codes.data(), scales, WeightType::kFp8E4m3, kRows, kDepth};
  const auto multiply = [&](const std::vector<float>& x) {
    std::vector<float> y(kRows);
    cpu::Gemm(*context, {.x = x.data(),
                         .x_stride = kDepth,
                         .num_rows = 1,
                         .weight = w,
                         .y = y.data(),
                         .y_stride = kRows});
    return y;
  };
  for (int64_t k = 0; k < kDepth; ++k) {
    std::vector<float> x(kDepth, 0.0f);
    x[k] = 1.0f;
    const std::vector<float> y = multiply(x);
    for (int64_t n = 0; n < kRows; ++n) {
      ASSERT_EQ(y[n], reference::WeightValue(w, n, k)) << "code " << int{codes[n * kDepth + k]};
    }
  }
  kernel_test::Rng rng(1);
  const std::vector<float> x = RandomFloats(rng, kDepth);
  const std::vector<float> clean = multiply(x);
  for (uint8_t nan : {uint8_t{0x7f}, uint8_t{0xff}}) {
    for (int64_t at = 0; at < kRows * kDepth; ++at) {
      const uint8_t before = std::exchange(codes[at], nan);
      const std::vector<float> y = multiply(x);
      for (int64_t n = 0; n < kRows; ++n) {
        if (n == at / kDepth) {
          ASSERT_TRUE(std::isnan(y[n])) << "row " << n << ", column " << at % kDepth;
        } else {
          ASSERT_TRUE(SameBits(&y[n], &clean[n], 1)) << "row " << n << ", NaN at " << at;
        }
      }
      codes[at] = before;
    }
  }
}

// Every fp8 code and fp16 number is widened exactly.
TEST_P(GemmTest, StoredTypesAreExact) {
  auto context = MakeContext(GetParam());
  std::vector<uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
  const float scales[2] = {0.37f, 1.91e-7f};
  std::vector<uint16_t> halves(65536);
  for (int i = 0; i < 65536; ++i) halves[i] = static_cast<uint16_t>(i);
  for (const WeightMatrix& w :
       {WeightMatrix{codes.data(), scales, WeightType::kFp8E4m3, 1, 256},
        WeightMatrix{halves.data(), nullptr, WeightType::kFp16, 1, 65536},
        WeightMatrix{halves.data(), nullptr, WeightType::kBf16, 1, 65536}}) {
    std::vector<float> y(static_cast<size_t>(w.cols));
    const int32_t row = 0;
    cpu::Embedding(*context, {.table = w, .token_ids = &row, .y = y.data(), .num_tokens = 1});
    for (int64_t i = 0; i < w.cols; ++i) {
      const double expected = reference::WeightValue(w, 0, i);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(y[i])) << i;
      } else {
        ASSERT_EQ(y[i], expected) << i;
      }
    }
  }
}

}  // namespace
}  // namespace strait
