// SPDX-License-Identifier: Apache-2.0
//
// The two kernels behind Gemm(), chosen in gemm.cc.
#pragma once

#include "kernels/cuda/gemm.h"

namespace strait::cuda {

// What a block works on, known to the device.
struct GemmItem {
  int32_t group;
  int32_t begin;
  int32_t count;  // 0: nothing to do
};

#ifdef __CUDACC__
__device__ __forceinline__ GemmItem ItemOf(const GemmParams& p, int32_t tile_rows, int index) {
  if (p.tiles != nullptr) {
    if (index >= *p.num_tiles) return {0, 0, 0};
    const RowTile tile = p.tiles[index];
    return {tile.group, tile.begin, tile.count};
  }
  const int32_t tiles_each = (p.num_rows + tile_rows - 1) / tile_rows;
  const int32_t begin = index % tiles_each * tile_rows;
  return {index / tiles_each, begin, min(tile_rows, p.num_rows - begin)};
}
#endif

// tile_rows: 8, 16, 32 or 64.
cudaError_t GemmFewRows(const GemmParams& params, int32_t tile_rows, cudaStream_t stream);
// Neither gated nor by a list, of the same weight format and number of rows and groups.
cudaError_t GemmFewRowsPair(const GemmParams& a, const GemmParams& b, int32_t tile_rows,
                            cudaStream_t stream);
// tile_rows: 64 or 128.
cudaError_t GemmTiles(const GemmParams& params, int32_t tile_rows, cudaStream_t stream);

// Blocks in the second dimension.
inline int64_t NumItems(const GemmParams& p, int32_t tile_rows) {
  if (p.tiles != nullptr) return p.max_tiles;
  return int64_t{p.num_groups} * ((p.num_rows + tile_rows - 1) / tile_rows);
}

}  // namespace strait::cuda
