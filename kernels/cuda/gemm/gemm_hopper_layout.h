// SPDX-License-Identifier: Apache-2.0
//
// HopperLayout and TileUnitAt: where things lie in the shared memory of the Hopper products
// (gemm_hopper.cu, gemm_cluster.cu), which row of a weight is which row of its tile, and in what
// order tiles are made. Plain functions, so that a machine without a GPU can test them.
//
// Shapes:  a stage holds 64 k: x [kTileRows] rows, the weight's tile [kColumns] rows, both of 128
//          bytes, their 16-byte pieces XORed with the row (mla_wgmma.cuh); with fp8 also the codes,
//          [kColumns, 64] bytes in the order of the threads that copied them.
//          Two consumer warpgroups: with 128 rows each has 64 of them and all columns, with 64 each
//          has all rows and half of the columns. kOwn is a warpgroup's columns.
//          Gated: of each kOwn rows of the tile the first half are of `weight`, the other of `up`, so
//          that a thread has both sums of an output.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define STRAIT_BOTH __host__ __device__
#else
#define STRAIT_BOTH
#endif

namespace strait::cuda::hopper_gemm {

inline constexpr int kStepColumns = 64;  // of K
inline constexpr int kTileRowBytes = 128;
inline constexpr int kMostBytes = 227 * 1024;  // that a block may have
inline constexpr int kMaxStages = 8;
inline constexpr int kBarrierBytes = 2 * kMaxStages * 8;
inline constexpr int kSwath = 16;  // tiles of rows that are worked on side by side

template <bool kFp8, int kTileRows, int kColumns>
struct HopperLayout {
  static_assert(kTileRows == 64 || kTileRows == 128);
  static_assert(kColumns == 128 || (kColumns == 256 && !kFp8), "two sums a column would not fit");
  static constexpr int kOwn = kTileRows == 128 ? kColumns : kColumns / 2;
  static constexpr int kXBytes = kTileRows * kTileRowBytes;
  static constexpr int kWeightBytes = kColumns * kTileRowBytes;
  static constexpr int kCodeBytes = kFp8 ? kColumns * kStepColumns : 0;
  static constexpr int kStageBytes = kXBytes + kWeightBytes + kCodeBytes;
  static constexpr int kFit = (kMostBytes - 1024 - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  // Steps whose copies are on their way: a consumer gives a stage back when it has started the next
  // step's products, so the feeder can be at most two stages short of the ring ahead.
  static constexpr int kLag = kStages - 2;
  static constexpr int kBytes = kStages * kStageBytes + kBarrierBytes + 1024;
  static_assert(kStageBytes % 1024 == 0 && kLag >= 1 && kBytes <= kMostBytes);
};

// Which row of a weight a row of the tile is, counted from the tile's first column.
struct TileRow {
  bool up;
  int column;
};

template <bool kGated, int kOwn>
STRAIT_BOTH constexpr TileRow TileRowOf(int row) {
  if (!kGated) return {false, row};
  constexpr int kHalf = kOwn / 2;
  return {row % kOwn >= kHalf, row / kOwn * kHalf + row % kHalf};
}

// A tile of the product: an item (RowTile or rows of a group), a tile of columns, a share of K.
struct TileUnit {
  int item;
  int column;
  int share;
};

// Blocks take neighbouring indices at the same time: kItems items by some columns, so that what
// they read of x and of the weight is read by several of them and stays in L2.
template <int kItems = kSwath>
STRAIT_BOTH constexpr TileUnit TileUnitAt(int index, int num_items, int num_columns) {
  const int share = index / (num_items * num_columns);
  const int in_share = index - share * (num_items * num_columns);
  const int first = in_share / (kItems * num_columns) * kItems;
  const int width = num_items - first < kItems ? num_items - first : kItems;
  const int in_swath = in_share - first * num_columns;
  return {first + in_swath % width, in_swath / width, share};
}

}  // namespace strait::cuda::hopper_gemm

#undef STRAIT_BOTH
