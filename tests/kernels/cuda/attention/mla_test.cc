// SPDX-License-Identifier: Apache-2.0
//
// Defends: latent attention on the GPU is its float64 twin's, for every shape, row format and path:
// ragged batches, empty sequences, 1 to 4 tokens and whole chunks, split or not; unused rows hold
// NaN, ends of page tables wild ids. Deterministic results are those of the sequence alone.
#include "kernels/cuda/attention/mla.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/cuda/attention/mla_case.h"

namespace strait::cuda {
namespace {

using mla_test::Case;
using mla_test::Shape;
using mla_test::Tokens;

std::string PathName(const Shape& shape) {
  return std::string(shape.path == MlaPath::kHopper ? "Hopper" : "portable") +
         (shape.format == RowFormat::kFp8 ? " fp8" : " bf16") + " heads " +
         std::to_string(shape.heads) + " rank " + std::to_string(shape.rank) + " rope " +
         std::to_string(shape.rope) + (shape.deterministic ? " deterministic" : "");
}

class MlaTest : public gpu_test::GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    ASSERT_EQ(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  }
  std::vector<MlaPath> Paths() const {
    if (major_ == 9) return {MlaPath::kPortable, MlaPath::kHopper};
    return {MlaPath::kPortable};
  }
  void Check(const Shape& shape, const std::vector<Tokens>& tokens, int32_t grid = 0) {
    SCOPED_TRACE(PathName(shape));
    const Case c(rng_, shape, tokens);
    c.Expect(c.Run(grid));
  }
  int32_t Pick(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng_);
  }
  kernel_test::Rng rng_{kernel_test::Seed()};
  int major_ = 0;
};

constexpr RowFormat kFormats[] = {RowFormat::kBf16, RowFormat::kFp8};

TEST_F(MlaTest, OneBlockOneToken) {
  STRAIT_TRACE_SEED();
  for (const MlaPath path : Paths()) {
    for (const RowFormat format : kFormats) {
      Shape shape{.heads = 64, .format = format, .path = path};
      Check(shape, {{1, 63}});
      Check(shape, {{1, 20}});      // rows behind are NaN
      Check(shape, {{1, 150}}, 1);  // three blocks, not split
    }
  }
}

TEST_F(MlaTest, RaggedBatchesOfAllHeadCounts) {
  STRAIT_TRACE_SEED();
  for (const MlaPath path : Paths()) {
    for (const RowFormat format : kFormats) {
      for (const int32_t heads : {1, 5, 16, 20, 64, 128}) {
        Shape shape{.heads = heads, .format = format, .path = path};
        shape.out_fp32 = heads % 2 == 0;
        shape.block_lse = heads == 16 || heads == 128;
        std::vector<Tokens> tokens = {{1, 0}, {1, 5, true}, {4, 300}, {2, 62}, {3, 0}};
        tokens.push_back({1, Pick(0, 1500)});
        tokens.push_back({Pick(1, 4), Pick(0, 400)});
        Check(shape, tokens);
        Check(shape, tokens, 3);
      }
    }
  }
}

TEST_F(MlaTest, OneLongSequenceIsSplitAndMerged) {
  STRAIT_TRACE_SEED();
  for (const MlaPath path : Paths()) {
    for (const RowFormat format : kFormats) {
      Check({.heads = 16, .format = format, .path = path}, {{1, 20000 + Pick(0, 64)}});
      Check({.heads = 128, .format = format, .path = path, .out_fp32 = true},
            {{1, 3000 + Pick(0, 64)}});
    }
  }
}

TEST_F(MlaTest, PrefillOfChunksAgainstCachedPrefixes) {
  STRAIT_TRACE_SEED();
  for (const MlaPath path : Paths()) {
    for (const RowFormat format : kFormats) {
      Check({.heads = 16, .format = format, .path = path},
            {{130, 200}, {61, 0}, {1, 700}, {100, 1000}});
      Check({.heads = 128, .format = format, .path = path}, {{30, 100}, {9, 0}}, 20);
    }
  }
}

TEST_F(MlaTest, BlocksThatSayTheirPositions) {
  STRAIT_TRACE_SEED();
  for (const MlaPath path : Paths()) {
    Shape shape{.heads = 16, .path = path};
    shape.positions = true;
    shape.block_lse = true;
    // 500 rows lie at positions up to 757; some are ahead of the first token
    Check(shape, {{4, 496}, {1, 1999}});
  }
}

TEST_F(MlaTest, SmallShapesTakeThePortablePath) {
  STRAIT_TRACE_SEED();
  for (const RowFormat format : kFormats) {
    for (const auto& [rank, rope] : {std::pair{32, 8}, {64, 16}, {128, 32}, {256, 64}, {384, 64}}) {
      EXPECT_EQ(MlaAutoPath(format, rank, rope), MlaPath::kPortable);
      Check({.heads = 6, .rank = rank, .rope = rope, .format = format, .path = MlaPath::kAuto},
            {{1, 100}, {4, 60}, {30, 10}, {1, 900}});
    }
  }
}

TEST_F(MlaTest, DeterministicResultsAreThoseOfTheSequenceAlone) {
  STRAIT_TRACE_SEED();
  for (const MlaPath path : Paths()) {
    for (const RowFormat format : kFormats) {
      for (const int32_t heads : {16, 128}) {
        Shape shape{.heads = heads, .format = format, .path = path, .deterministic = true};
        SCOPED_TRACE(PathName(shape));
        const Case batch(rng_, shape,
                         {{1, Pick(0, 2000)}, {3, 1022}, {1, Pick(2000, 5000)}, {20, 1010}});
        const Case::Result together = batch.Run();
        batch.Expect(together);
        size_t at = 0;
        for (size_t s = 0; s < 4; ++s) {
          const Case::Result alone = batch.Alone(s).Run(Pick(2, 132));
          const std::vector<float> part(
              together.out.begin() + static_cast<int64_t>(at),
              together.out.begin() + static_cast<int64_t>(at + alone.out.size()));
          EXPECT_TRUE(kernel_test::SameBits(part, alone.out)) << "sequence " << s;
          at += alone.out.size();
        }
      }
    }
  }
}

TEST_F(MlaTest, PartsOfADeterministicBatchGiveTheSameBits) {
  for (const MlaPath path : Paths()) {
    for (const RowFormat format : kFormats) {
      for (const int32_t heads : {16, 20, 128}) {
        Shape shape{.heads = heads, .format = format, .path = path, .deterministic = true};
        SCOPED_TRACE(PathName(shape));
        const Case batch(
            rng_, shape,
            {{40, 1000}, {1, 5 * 1024 + 7}, {9, 2040}, {70, 4090}, {1, 3}, {8, 4 * 1024}});
        const Case::Result together = batch.Run();
        batch.Expect(together);
        for (const int32_t grid : {0, 7}) {
          const Case::Result parts = batch.Run(grid, 1);
          EXPECT_TRUE(kernel_test::SameBits(parts.out, together.out)) << grid << " thread blocks";
          EXPECT_TRUE(kernel_test::SameBits(parts.lse, together.lse)) << grid << " thread blocks";
        }
      }
    }
  }
}

// Ragged ends, new rows, one block alone, stretches of odd length; clusters (128 heads) and not.
TEST_F(MlaTest, ListsOfUnitsGiveTheBitsOfRowMajorBlocks) {
  STRAIT_TRACE_SEED();
  if (major_ != 9) GTEST_SKIP() << "units need the Hopper path";
  for (const int32_t heads : {16, 64, 128}) {
    Shape shape{.heads = heads, .out_fp32 = true};
    shape.block_lse = heads == 16;
    SCOPED_TRACE(PathName(shape));
    const Case rows(rng_, shape,
                    {{1, 0}, {1, 5, true}, {2, 62}, {1, Pick(200, 1500)}, {3, Pick(0, 400)}});
    const Case units = rows.InUnits(rng_);
    for (const int32_t grid : {0, 6, 1}) {
      const Case::Result of_rows = rows.Run(grid);
      const Case::Result of_units = units.Run(grid);
      EXPECT_TRUE(kernel_test::SameBits(of_rows.out, of_units.out)) << grid << " thread blocks";
      EXPECT_TRUE(kernel_test::SameBits(of_rows.lse, of_units.lse)) << grid << " thread blocks";
      units.Expect(of_units);
    }
  }
  const Case rows(rng_, {.heads = 16, .deterministic = true}, {{1, 1500}, {20, 1010}});
  const Case::Result of_rows = rows.Run();
  EXPECT_TRUE(kernel_test::SameBits(of_rows.out, rows.InUnits(rng_).Run().out));
}

// Their feeder rounds code times scale to bf16 and hands over what a pool of bf16 holds.
TEST_F(MlaTest, Fp8RowsGiveTheBitsOfTheirWidenedNumbers) {
  STRAIT_TRACE_SEED();
  if (major_ != 9) GTEST_SKIP() << "the portable path sums in another order for each";
  for (const int32_t heads : {16, 64, 128}) {
    Shape shape{.heads = heads, .format = RowFormat::kFp8, .out_fp32 = true};
    shape.block_lse = heads == 16;
    SCOPED_TRACE(PathName(shape));
    const Case rows(rng_, shape,
                    {{1, 0}, {1, 5, true}, {2, 62}, {1, Pick(200, 1500)}, {3, Pick(0, 400)}});
    const Case wide = rows.InBf16();
    for (const int32_t grid : {0, 6, 1}) {
      const Case::Result of_rows = rows.Run(grid);
      const Case::Result of_wide = wide.Run(grid);
      EXPECT_TRUE(kernel_test::SameBits(of_rows.out, of_wide.out)) << grid << " thread blocks";
      EXPECT_TRUE(kernel_test::SameBits(of_rows.lse, of_wide.lse)) << grid << " thread blocks";
      EXPECT_TRUE(kernel_test::SameBits(of_rows.block_lse, of_wide.block_lse)) << grid;
    }
  }
}

TEST_F(MlaTest, WrongShapesAreRefused) {
  MlaParams p;
  p.rank = 520;
  p.rope = 64;
  p.num_heads = 16;
  p.block_bytes = 64 * 1168;
  p.plan.limits.num_thread_blocks = 1;
  EXPECT_EQ(LaunchMla(p, nullptr), cudaErrorInvalidValue);
  p.rank = 256;
  p.path = MlaPath::kHopper;
  EXPECT_EQ(LaunchMla(p, nullptr), cudaErrorInvalidValue);
  p.units = true;
  p.path = MlaPath::kPortable;
  EXPECT_EQ(LaunchMla(p, nullptr), cudaErrorInvalidValue);
  p.rank = 512;
  p.path = MlaPath::kHopper;
  p.format = RowFormat::kFp8;
  EXPECT_EQ(LaunchMla(p, nullptr), cudaErrorInvalidValue);
  p.units = false;
  p.path = MlaPath::kAuto;
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kInt4}) {
    p.format = format;
    EXPECT_EQ(LaunchMla(p, nullptr), cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace strait::cuda
