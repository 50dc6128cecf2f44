// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a CUDA product is made of before a GPU sees it. Every tile, row of a tile and step
// of K is made exactly once; partial sums fit in their room; a fixed order never changes kernel with
// the number of rows; warps of a team have pieces.
#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

#include "kernels/cuda/gemm/gemm_hopper_layout.h"
#include "kernels/cuda/gemm/gemm_internal.h"

namespace strait::cuda {
namespace {

constexpr int32_t kMultiprocessors = 132;

using hopper_gemm::HopperLayout;
using hopper_gemm::kSwath;
using hopper_gemm::TileRow;
using hopper_gemm::TileRowOf;
using hopper_gemm::TileUnit;
using hopper_gemm::TileUnitAt;

template <int kItems>
void CheckEveryTileIsMadeOnce() {
  for (const int items : {1, 2, 15, 16, 17, 33, 64}) {
    for (const int columns : {1, 3, 8, 56}) {
      for (const int shares : {1, 2, 5}) {
        std::set<std::tuple<int, int, int>> seen;
        for (int i = 0; i < items * columns * shares; ++i) {
          const TileUnit unit = TileUnitAt<kItems>(i, items, columns);
          ASSERT_TRUE(unit.item >= 0 && unit.item < items) << unit.item;
          ASSERT_TRUE(unit.column >= 0 && unit.column < columns) << unit.column;
          ASSERT_TRUE(unit.share >= 0 && unit.share < shares) << unit.share;
          EXPECT_TRUE(seen.insert({unit.item, unit.column, unit.share}).second);
        }
      }
    }
  }
}

TEST(CudaGemmPlanTest, EveryTileIsMadeOnce) {
  CheckEveryTileIsMadeOnce<kSwath>();
  CheckEveryTileIsMadeOnce<kSwath / 2>();
}

// What a round of blocks or clusters reads: few different row tiles and few different column tiles.
TEST(CudaGemmPlanTest, NeighboursShareWhatTheyRead) {
  std::set<int> items;
  std::set<int> columns;
  for (int i = 0; i < kMultiprocessors; ++i) {
    const TileUnit unit = TileUnitAt(i, 64, 64);
    items.insert(unit.item);
    columns.insert(unit.column);
  }
  EXPECT_LE(items.size(), 16u);
  EXPECT_LE(columns.size(), 9u);
  items.clear();
  columns.clear();
  for (int i = 0; i < kMultiprocessors / 2; ++i) {
    const TileUnit unit = TileUnitAt<kSwath / 2>(i, 32, 64);
    items.insert(unit.item);
    columns.insert(unit.column);
  }
  EXPECT_LE(items.size(), 8u);
  EXPECT_LE(columns.size(), 9u);
}

template <bool kGated, int kColumns, int kOwn>
void CheckTileRows() {
  constexpr int kEach = kGated ? kColumns / 2 : kColumns;
  std::set<std::pair<bool, int>> seen;
  for (int row = 0; row < kColumns; ++row) {
    const TileRow at = TileRowOf<kGated, kOwn>(row);
    ASSERT_TRUE(at.column >= 0 && at.column < kEach) << row;
    EXPECT_TRUE(kGated || !at.up);
    EXPECT_TRUE(seen.insert({at.up, at.column}).second) << row;
    // A thread's copies step over rows by 16 or 32 and take the first one's place for granted.
    for (const int stride : {16, 32}) {
      const TileRow first = TileRowOf<kGated, kOwn>(row / stride * stride);
      EXPECT_EQ(first.up, at.up) << row;
      EXPECT_EQ(first.column + row % stride, at.column) << row;
    }
    // Both sums of an output belong to one thread: half of a warpgroup's columns apart.
    if (kGated && row % kOwn < kOwn / 2) {
      const TileRow other = TileRowOf<kGated, kOwn>(row + kOwn / 2);
      EXPECT_TRUE(other.up && other.column == at.column) << row;
      EXPECT_EQ(at.column, row / kOwn * (kOwn / 2) + row % kOwn) << row;
    }
  }
}

TEST(CudaGemmPlanTest, EveryRowOfATileIsOneOfAWeight) {
  CheckTileRows<false, 256, 256>();
  CheckTileRows<false, 256, 128>();
  CheckTileRows<false, 128, 64>();
  CheckTileRows<true, 256, 256>();
  CheckTileRows<true, 256, 128>();
  CheckTileRows<true, 128, 128>();
  CheckTileRows<true, 128, 64>();
}

TEST(CudaGemmPlanTest, StagesCoverLatency) {
  // 32 KiB of weights (fp8: of codes) a block on their way keep HBM busy.
  EXPECT_GE((HopperLayout<false, 64, 256>::kLag * HopperLayout<false, 64, 256>::kWeightBytes),
            65536);
  EXPECT_GE((HopperLayout<false, 64, 128>::kLag * HopperLayout<false, 64, 128>::kWeightBytes),
            65536);
  EXPECT_GE((HopperLayout<true, 64, 128>::kLag * HopperLayout<true, 64, 128>::kCodeBytes), 32768);
  EXPECT_GE((HopperLayout<false, 128, 256>::kLag), 2);
  EXPECT_GE((HopperLayout<true, 128, 128>::kLag), 3);
}

TEST(CudaGemmPlanTest, WarpsOfATeamHavePieces) {
  for (const bool fp8 : {false, true}) {
    for (int k = 1; k <= 40000; ++k) {
      const int warps = WarpsEach(k, fp8);
      const int pieces = (k + GemmPiece(fp8) - 1) / GemmPiece(fp8);
      ASSERT_TRUE(warps == 1 || warps == 2 || warps == 4 || warps == 8) << k;
      const int turns = (pieces + warps - 1) / warps * warps;
      EXPECT_LE(7 * (turns - pieces), turns) << k << ": too many turns without a piece";
    }
  }
  EXPECT_EQ(WarpsEach(2048, false), 8);
  EXPECT_EQ(WarpsEach(1408, false), 4);
  EXPECT_EQ(WarpsEach(1536, false), 4);
  EXPECT_EQ(WarpsEach(128, false), 1);
  EXPECT_EQ(WarpsEach(7168, true), 4);
  EXPECT_EQ(WarpsEach(2048, true), 8);
  EXPECT_EQ(WarpsEach(1536, true), 2);
}

GemmParams Product(int32_t rows, int32_t n, int32_t k, bool fp8, bool gated, bool fixed) {
  static const float scale = 1;
  GemmParams p;
  p.num_rows = rows;
  p.weight = {&scale, fp8 ? &scale : nullptr, n, k, static_cast<int32_t>(AlignedStride(k))};
  if (gated) p.up = p.weight;
  p.fixed_order = fixed;
  return p;
}

TEST(CudaGemmPlanTest, SharesOfKAreWholeAndFitTheirRoom) {
  float room = 0;
  for (const bool hopper : {false, true}) {
    for (const bool fp8 : {false, true}) {
      for (const int32_t rows : {17, 64, 65, 128, 300, 2048}) {
        for (const int32_t n : {1, 130, 576, 2048, 7168}) {
          for (const int32_t k : {40, 256, 300, 1408, 2048, 7168, 18432}) {
            GemmParams p = Product(rows, n, k, fp8, false, false);
            p.split_sums = &room;
            p.split_capacity = 1 << 20;
            const GemmPlan plan = PlanGemm(p, hopper, kMultiprocessors);
            SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << " hopper "
                                            << hopper << " splits " << plan.num_splits);
            ASSERT_GE(plan.num_splits, 1);
            p.num_splits = plan.num_splits;
            const int shares = NumShares(p);
            EXPECT_LE(shares, plan.num_splits);
            if (shares > 1) {
              EXPECT_LE(int64_t{shares} * rows * n, p.split_capacity);
            }
            const int steps = (k + kGemmStep - 1) / kGemmStep;
            const int each = StepsEach(p);
            EXPECT_EQ(each % 2, 0) << "half an fp8 scale";
            EXPECT_GT(steps - (shares - 1) * each, 0) << "a share without a step";
            EXPECT_GE(shares * each, steps);
          }
        }
      }
    }
  }
}

TEST(CudaGemmPlanTest, AFixedOrderHasOneKernel) {
  for (const bool gated : {false, true}) {
    for (int32_t rows = 1; rows < 3000; rows += 7) {
      const GemmPlan plan =
          PlanGemm(Product(rows, 512, 2048, false, gated, true), true, kMultiprocessors);
      EXPECT_EQ(plan.kind, GemmKind::kFewRows) << rows;
      EXPECT_EQ(plan.num_splits, 1) << rows;
    }
  }
}

// Whatever a layer asks for: with codes of x, no number of rows changes the kernel, and in a fixed
// order K is never cut.
TEST(CudaGemmPlanTest, CodesHaveOneKernel) {
  float room = 0;
  static const uint8_t code = 0;
  for (const bool fixed : {false, true}) {
    for (const int32_t rows : {1, 2, 16, 17, 64, 65, 300, 2048}) {
      GemmParams p = Product(rows, 576, 7168, true, false, fixed);
      p.x_codes = &code;
      p.split_sums = fixed ? nullptr : &room;
      p.split_capacity = 8 << 20;
      const GemmPlan plan = PlanGemm(p, true, kMultiprocessors);
      EXPECT_EQ(plan.kind, GemmKind::kW8A8) << rows;
      EXPECT_EQ(plan.num_splits > 1, !fixed && rows < 2048) << rows;
      EXPECT_LE(int64_t{plan.num_splits} * rows * 576, p.split_capacity);
    }
  }
  EXPECT_FALSE(WorthQuantizing(1, false));
  EXPECT_TRUE(WorthQuantizing(17, false));
  EXPECT_TRUE(WorthQuantizing(1, true));
  EXPECT_FALSE(WorthQuantizingExperts(8, 256, false));
  EXPECT_TRUE(WorthQuantizingExperts(16384, 256, false));
  EXPECT_TRUE(WorthQuantizingExperts(8, 256, true));
}

GemmPlan PlanOf(const GemmParams& p, bool hopper = true) {
  return PlanGemm(p, hopper, kMultiprocessors);
}

TEST(CudaGemmPlanTest, ManyRowsTakeTheHopperKernelsWhereTheyMay) {
  const GemmParams p = Product(2048, 3072, 2048, false, false, false);
  EXPECT_EQ(PlanOf(p).kind, GemmKind::kCluster);
  EXPECT_EQ(PlanOf(p, false).kind, GemmKind::kTiles);
  EXPECT_EQ(PlanOf(Product(8192, 3072, 2048, false, true, false)).kind, GemmKind::kCluster);
  EXPECT_EQ(PlanOf(Product(2048, 512, 128, false, false, false)).kind, GemmKind::kTiles);
  // Codes of weights are widened by the feeders of one block.
  const GemmPlan codes = PlanOf(Product(8192, 3072, 2048, true, false, false));
  EXPECT_EQ(codes.kind, GemmKind::kHopper);
  EXPECT_EQ(codes.columns, 128);
  // 48 tiles of 128 columns fill a third of the device in one round, 24 of 256 less, 12 clusters too.
  const GemmPlan few = PlanOf(Product(300, 2048, 2048, false, false, false));
  EXPECT_EQ(few.kind, GemmKind::kHopper);
  EXPECT_EQ(few.columns, 128);
  // Up to 128 rows would leave one block of a cluster idle: two rounds of 79 clusters, one of blocks.
  const GemmPlan one = PlanOf(Product(128, 20000, 2048, false, false, false));
  EXPECT_EQ(one.kind, GemmKind::kHopper);
  EXPECT_EQ(one.columns, 256);
}

// With a list the tiles are given, and with room for partial sums K is cut where that pays.
TEST(CudaGemmPlanTest, AClusterTakesWhatFitsIt) {
  static const RowTile tiles = {};
  GemmParams list = Product(0, 1408, 2048, false, true, false);
  list.tiles = &tiles;
  list.max_tiles = 200;
  list.num_groups = 66;
  list.weight_group_stride = int64_t{1408} * 2048;
  for (const int32_t rows : {64, 128, kClusterTileRows}) {
    list.tile_rows = rows;
    const GemmPlan plan = PlanOf(list);
    EXPECT_EQ(plan.kind, rows == kClusterTileRows ? GemmKind::kCluster : GemmKind::kHopper);
    EXPECT_EQ(plan.tile_rows, rows);
  }
  EXPECT_DEATH((void)PlanOf(list, false), "no kernel takes");
  float room = 0;
  GemmParams narrow = Product(300, 576, 7168, false, false, false);
  narrow.split_sums = &room;
  narrow.split_capacity = 8 << 20;
  EXPECT_EQ(PlanOf(narrow).kind, GemmKind::kHopper);
  EXPECT_GT(PlanOf(narrow).num_splits, 1);
  // Rows of a group that do not begin at 16 bytes have no tensor map.
  GemmParams groups = Product(2048, 4096, 2048, false, false, false);
  groups.num_groups = 4;
  groups.weight_group_stride = int64_t{4096} * 2048;
  EXPECT_EQ(PlanOf(groups).kind, GemmKind::kCluster);
  groups.weight_group_stride += 4;
  EXPECT_EQ(PlanOf(groups).kind, GemmKind::kHopper);
}

}  // namespace
}  // namespace strait::cuda
