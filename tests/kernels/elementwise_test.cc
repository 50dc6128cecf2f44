// SPDX-License-Identifier: Apache-2.0
//
// Defends: norm, activation, sums, embedding and cache rows are what their formulas say, and have
// the same bits on every instruction set and number of threads.
#include "kernels/elementwise.h"

#include <limits>

#include "kernels/cpu/level.h"
#include "kernels/reference/kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using kernel_test::kEps;
using kernel_test::MakeContext;
using kernel_test::RandomFloats;
using kernel_test::SameBits;
using kernel_test::StoredWeight;
using kernel_test::Within;

class ElementwiseTest : public kernel_test::LevelTest {
 protected:
  // Runs fn(context, output) on this level with 1 and 3 threads and on the portable level; all must
  // give the same bits. Returns them.
  template <typename Fn>
  std::vector<float> SameEverywhere(const std::vector<float>& initial, Fn fn) {
    std::vector<float> first = initial;
    fn(*MakeContext(GetParam(), 1), first.data());
    for (auto& context : {MakeContext(GetParam(), 3), MakeContext(cpu::SimdLevel::kPortable, 1)}) {
      std::vector<float> again = initial;
      fn(*context, again.data());
      EXPECT_TRUE(SameBits(first, again));
    }
    return first;
  }
};
STRAIT_FOR_EACH_LEVEL(ElementwiseTest);

TEST_P(ElementwiseTest, RmsNorm) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  for (int64_t dim : {1, 7, 24, 129, 512}) {
    for (WeightType type : {WeightType::kFp32, WeightType::kBf16, WeightType::kFp16}) {
      const StoredWeight w(rng, type, 1, dim);
      const int64_t rows = 257;
      const std::vector<float> x = RandomFloats(rng, rows * (dim + 3), 3.0f);
      RmsNormParams p = {.x = x.data(),
                         .x_stride = dim + 3,
                         .weight = w.matrix().data,
                         .weight_type = type,
                         .eps = 1e-6f,
                         .y_stride = dim,
                         .num_rows = rows,
                         .dim = dim};
      const std::vector<float> y =
          SameEverywhere(std::vector<float>(rows * dim), [&](cpu::Context& context, float* out) {
            p.y = out;
            cpu::RmsNorm(context, p);
          });
      std::vector<float> expected(y.size());
      p.y = expected.data();
      reference::RmsNorm(p);
      // Values reach sqrt(dim) times a gain of about 4; dim/16 roundings enter through the root.
      const double bound = std::sqrt(static_cast<double>(dim)) * 5 * (dim / 32.0 + 6) * kEps;
      EXPECT_TRUE(Within(y, expected, bound)) << "dim " << dim;
    }
  }
}

TEST_P(ElementwiseTest, SiluMul) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  for (int64_t dim : {1, 24, 129, 5000}) {
    for (int64_t rows : {1, 3}) {
      std::vector<float> gate = RandomFloats(rng, rows * dim, 8.0f);
      gate[0] = -200.0f;  // beyond exp's range
      const std::vector<float> up = RandomFloats(rng, rows * dim);
      SiluMulParams p = {.gate = gate.data(),
                         .gate_stride = dim,
                         .up = up.data(),
                         .up_stride = dim,
                         .y_stride = dim,
                         .num_rows = rows,
                         .dim = dim};
      const std::vector<float> y =
          SameEverywhere(std::vector<float>(rows * dim), [&](cpu::Context& context, float* out) {
            p.y = out;
            cpu::SiluMul(context, p);
          });
      std::vector<float> expected(y.size());
      p.y = expected.data();
      reference::SiluMul(p);
      EXPECT_TRUE(Within(y, expected, 40.0 * 5 * 8 * kEps));  // |gate| < 40, |up| < 5
    }
  }
}

TEST_P(ElementwiseTest, AddAndExpertSum) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  constexpr int64_t kTokens = 37, kDim = 41;
  constexpr int32_t kChosen = 3;
  const std::vector<float> rows = RandomFloats(rng, 50 * kDim);
  const std::vector<float> addend = RandomFloats(rng, kTokens * kDim);
  const std::vector<float> weights = RandomFloats(rng, kTokens * kChosen);
  std::vector<int32_t> row_of(kTokens * kChosen);
  for (int32_t& row : row_of) row = static_cast<int32_t>(rng() % 50);
  const std::vector<float> initial = RandomFloats(rng, kTokens * kDim);
  for (const float* shared : {static_cast<const float*>(nullptr), addend.data()}) {
    for (bool accumulate : {false, true}) {
      ExpertSumParams p = {.expert_rows = rows.data(),
                           .row_of = row_of.data(),
                           .expert_weights = weights.data(),
                           .addend = shared,
                           .accumulate = accumulate,
                           .num_tokens = kTokens,
                           .num_experts_per_tok = kChosen,
                           .dim = kDim};
      const std::vector<float> y = SameEverywhere(initial, [&](cpu::Context& context, float* out) {
        p.y = out;
        cpu::ExpertSum(context, p);
      });
      std::vector<float> expected = initial;
      p.y = expected.data();
      reference::ExpertSum(p);
      EXPECT_TRUE(Within(y, expected, 60 * 6 * kEps));  // five terms of at most about 12
    }
  }
  const std::vector<float> sum = SameEverywhere(initial, [&](cpu::Context& context, float* out) {
    cpu::Add(context, {.x = addend.data(), .y = out, .count = kTokens * kDim});
  });
  std::vector<float> expected = initial;
  reference::Add({.x = addend.data(), .y = expected.data(), .count = kTokens * kDim});
  EXPECT_TRUE(SameBits(sum, expected));  // one addition each: exact rounding
}

TEST_P(ElementwiseTest, EmbeddingWidensRows) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  for (WeightType type : kernel_test::kAllTypes) {
    const StoredWeight table(rng, type, 131, 150);
    const std::vector<int32_t> ids = {130, 0, 7, 7, 128};
    EmbeddingParams p = {.table = table.matrix(), .token_ids = ids.data(), .num_tokens = 5};
    const std::vector<float> y =
        SameEverywhere(std::vector<float>(5 * 150), [&](cpu::Context& context, float* out) {
          p.y = out;
          cpu::Embedding(context, p);
        });
    std::vector<float> expected(y.size());
    p.y = expected.data();
    reference::Embedding(p);
    EXPECT_TRUE(SameBits(y, expected));
  }
}

TEST_P(ElementwiseTest, CacheAppendWritesItsRowsOnly) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  for (RowFormat format : {RowFormat::kFp32, RowFormat::kBf16}) {
    const CacheLayout layout = MakeCacheLayout(format, 24, 6);
    EXPECT_EQ(layout.row_bytes % 16, 0);
    std::vector<float> rows = RandomFloats(rng, 5 * 30);
    rows[0] = std::numeric_limits<float>::quiet_NaN();
    rows[1] = std::numeric_limits<float>::infinity();
    rows[2] = 3.39e38f;                           // rounds up to infinity in bf16
    rows[3] = std::bit_cast<float>(0x3f808000u);  // a tie
    rows[4] = std::bit_cast<float>(0x3f818000u);  // a tie, to even the other way
    const std::vector<uint32_t> pages0 = {3, 0xffffffff};
    const std::vector<uint32_t> pages1 = {0xffffffff, 1};
    const uint32_t* tables[] = {pages0.data(), pages1.data()};
    const std::vector<int32_t> positions = {0, 63, 64, 127, 90};
    const std::vector<int32_t> sequences = {0, 0, 1, 1, 1};
    std::vector<std::byte> pool(static_cast<size_t>(4 * layout.block_bytes), std::byte{0x5a});
    std::vector<std::byte> expected = pool;
    CacheAppendParams p = {.latent = rows.data(),
                           .latent_stride = 30,
                           .rope_key = rows.data() + 24,
                           .rope_key_stride = 30,
                           .positions = positions.data(),
                           .sequence_index = sequences.data(),
                           .page_tables = tables,
                           .blocks = pool.data(),
                           .layout = layout,
                           .num_tokens = 5};
    cpu::CacheAppend(*MakeContext(GetParam(), 2), p);
    p.blocks = expected.data();
    reference::CacheAppend(p);
    EXPECT_EQ(pool, expected);
  }
}

// exp within 1.5 units in the last place over its whole range, exact where it must be.
TEST_P(ElementwiseTest, ExponentialIsAccurate) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  std::vector<float> x;
  for (float v = -104.0f; v < 88.7f; v += 0.00173f) x.push_back(v);
  std::uniform_real_distribution<float> small(-1.0f, 1.0f);
  for (int i = 0; i < 20000; ++i) x.push_back(small(rng));
  const std::vector<float> y =
      SameEverywhere(std::vector<float>(x.size()), [&](cpu::Context& context, float* out) {
        context.table().exp_shifted(x.data(), 0.0f, out, static_cast<int64_t>(x.size()));
      });
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    const float rounded = static_cast<float>(exact);
    const double ulp =
        static_cast<double>(std::nextafter(rounded, std::numeric_limits<float>::infinity())) -
        rounded;
    ASSERT_LE(std::abs(y[i] - exact), 1.5 * ulp) << "exp(" << x[i] << ")";
  }
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<float> special = {
      0.0f, -0.0f, -kInf, kInf, -1000.0f, 1000.0f, std::numeric_limits<float>::quiet_NaN()};
  const std::vector<float> at =
      SameEverywhere(std::vector<float>(7), [&](cpu::Context& context, float* out) {
        context.table().exp_shifted(special.data(), 0.0f, out, 6);
      });
  EXPECT_EQ(at[0], 1.0f);
  EXPECT_EQ(at[1], 1.0f);
  EXPECT_EQ(at[2], 0.0f);
  EXPECT_EQ(at[3], kInf);
  EXPECT_EQ(at[4], 0.0f);
  EXPECT_EQ(at[5], kInf);
  float nan = 0;
  MakeContext(GetParam())->table().exp_shifted(&special[6], 0.0f, &nan, 1);
  EXPECT_TRUE(std::isnan(nan));
}

}  // namespace
}  // namespace strait
