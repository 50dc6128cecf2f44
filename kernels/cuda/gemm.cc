// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/gemm.h"

#include "kernels/cuda/gemm_internal.h"
#include "proto/check.h"

namespace strait::cuda {
namespace {

constexpr int32_t kFewRows = 64;     // up to here weights are read once by the few-rows kernel
constexpr int32_t kFixedRows = 32;   // rows a tile when the order of sums is fixed
constexpr int32_t kLargeTile = 128;  // rows of the tiled kernel
constexpr int32_t kSmallTile = 64;

int32_t FewRowsTile(int32_t num_rows) {
  int32_t tile = 8;
  while (tile < num_rows && tile < kFewRows) tile *= 2;
  return tile;
}

}  // namespace

cudaError_t Gemm(const GemmParams& p, cudaStream_t stream) {
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
  if (p.tiles != nullptr) {
    if (p.max_tiles == 0) return cudaSuccess;
    const bool few = p.tile_rows < kSmallTile || p.fixed_order;
    return few ? GemmFewRows(p, p.tile_rows, stream) : GemmTiles(p, p.tile_rows, stream);
  }
  if (p.num_rows == 0) return cudaSuccess;
  if (p.num_rows <= kFewRows || p.fixed_order) {
    const int32_t tile = FewRowsTile(p.num_rows);
    return GemmFewRows(p, p.fixed_order ? (tile < kFixedRows ? tile : kFixedRows) : tile, stream);
  }
  return GemmTiles(p, kLargeTile, stream);
}

int32_t ExpertTileRows(int64_t num_choices, int64_t num_experts, bool fixed_order) {
  const int64_t mean = num_choices / num_experts;
  if (mean <= 2) return 8;
  if (mean <= 8) return 16;
  if (mean <= 24 || fixed_order) return 32;
  return mean <= 96 ? kSmallTile : kLargeTile;
}

}  // namespace strait::cuda
