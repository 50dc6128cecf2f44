// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/gemm.h"

#include <algorithm>

#include "kernels/cuda/gemm_internal.h"
#include "proto/check.h"

namespace strait::cuda {
namespace {

constexpr int32_t kFewRows = 16;     // up to here the few-rows kernel, beyond it tiles
constexpr int32_t kFixedRows = 32;   // rows a tile when the order of sums is fixed
constexpr int32_t kLargeTile = 128;  // rows of the tiled kernel
constexpr int32_t kSmallTile = 64;
constexpr int32_t kTileColumns = 128;
constexpr int64_t kWantedBlocks = 128;  // of the tiled kernel, to be worth the device
constexpr int32_t kMaxSplits = 16;

int32_t FewRowsTile(int32_t num_rows) {
  int32_t tile = 8;
  while (tile < num_rows && tile < kFixedRows) tile *= 2;
  return tile;
}

void Check(const GemmParams& p) {
  STRAIT_CHECK((p.y_bf16 == nullptr) != (p.y_fp32 == nullptr), "one output");
  STRAIT_CHECK(p.up.empty() || p.y_bf16 != nullptr, "gated products are bf16");
  STRAIT_CHECK(!p.accumulate || p.y_fp32 != nullptr, "only fp32 accumulates");
  STRAIT_CHECK(p.x_stride % 8 == 0 && p.x_group_stride % 8 == 0);
  STRAIT_CHECK(reinterpret_cast<uintptr_t>(p.x) % 16 == 0);
  STRAIT_CHECK(reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0);
  STRAIT_CHECK(p.weight.stride % kMatrixAlign == 0 && p.weight.stride >= p.weight.cols);
  STRAIT_CHECK(p.up.empty() || (p.up.rows == p.weight.rows && p.up.cols == p.weight.cols &&
                                p.up.stride == p.weight.stride &&
                                (p.up.scales == nullptr) == (p.weight.scales == nullptr)));
}

// Rows a tile of the few-rows kernel; 0: too many rows for it.
int32_t FewRowsTileOf(const GemmParams& p) {
  if (p.num_rows > kFewRows && !p.fixed_order) return 0;
  const int32_t tile = FewRowsTile(p.num_rows);
  return p.fixed_order ? std::min(tile, kFixedRows) : tile;
}

// Into how many shares K is cut, so that a product of few outputs fills the device.
int32_t NumSplits(const GemmParams& p, int32_t tile_rows) {
  if (p.split_sums == nullptr || p.num_groups != 1 || !p.up.empty()) return 1;
  const int64_t blocks =
      NumItems(p, tile_rows) * ((p.weight.rows + kTileColumns - 1) / kTileColumns);
  int64_t splits = std::min<int64_t>(kWantedBlocks / blocks, p.weight.cols / (2 * kScaleBlock));
  splits = std::min(splits, p.split_capacity / (int64_t{p.num_rows} * p.weight.rows));
  return static_cast<int32_t>(std::clamp<int64_t>(splits, 1, kMaxSplits));
}

}  // namespace

cudaError_t Gemm(const GemmParams& p, cudaStream_t stream) {
  Check(p);
  if (p.tiles != nullptr) {
    if (p.max_tiles == 0) return cudaSuccess;
    const bool few = p.tile_rows < kSmallTile || p.fixed_order;
    return few ? GemmFewRows(p, p.tile_rows, stream) : GemmTiles(p, p.tile_rows, stream);
  }
  if (p.num_rows == 0) return cudaSuccess;
  const int32_t few = FewRowsTileOf(p);
  if (few > 0) return GemmFewRows(p, few, stream);
  const int32_t tile = p.num_rows <= kSmallTile ? kSmallTile : kLargeTile;
  GemmParams split = p;
  split.num_splits = NumSplits(p, tile);
  return GemmTiles(split, tile, stream);
}

cudaError_t GemmPair(const GemmParams& a, const GemmParams& b, cudaStream_t stream) {
  const bool alike = a.tiles == nullptr && b.tiles == nullptr && a.up.empty() && b.up.empty() &&
                     a.num_rows == b.num_rows && a.num_rows > 0 && a.num_groups == 1 &&
                     b.num_groups == 1 && a.fixed_order == b.fixed_order &&
                     (a.weight.scales == nullptr) == (b.weight.scales == nullptr);
  const int32_t tile = alike ? FewRowsTileOf(a) : 0;
  if (tile > 0) {
    Check(a);
    Check(b);
    return GemmFewRowsPair(a, b, tile, stream);
  }
  const cudaError_t error = Gemm(a, stream);
  return error != cudaSuccess ? error : Gemm(b, stream);
}

int32_t ExpertTileRows(int64_t num_choices, int64_t num_experts, bool fixed_order) {
  const int64_t mean = num_choices / num_experts;
  if (mean <= 3) return 8;
  if (fixed_order) return mean <= 8 ? 16 : kFixedRows;
  if (mean <= 8) return 16;
  return mean <= 48 ? kSmallTile : kLargeTile;
}

}  // namespace strait::cuda
