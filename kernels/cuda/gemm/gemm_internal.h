// SPDX-License-Identifier: Apache-2.0
//
// The kernels behind Gemm(), chosen in gemm.cc, and what they share.
#pragma once

#include "kernels/cuda/gemm/gemm.h"

namespace strait::cuda {

struct LatentAppendParams;

// What a block works on, known to the device.
struct GemmItem {
  int32_t group;
  int32_t begin;
  int32_t count;  // 0: nothing to do
};

#ifdef __CUDACC__
#define STRAIT_BOTH __host__ __device__
__device__ __forceinline__ int Clamp(int64_t value, int most) {
  return value < 0 ? 0 : value > most ? most : static_cast<int>(value);
}

// early: this grid has not waited for those before it, and L1 may hold what the list was once.
__device__ __forceinline__ GemmItem ItemOf(const GemmParams& p, int32_t tile_rows, int index,
                                           bool early = false) {
  if (p.tiles != nullptr) {
    if (early) {
      if (index < p.num_known) {
        return {p.known.group + index, p.known.begin + index * p.known.count, p.known.count};
      }
      const RowTile* const tile = p.tiles + index;
      return {__ldcg(&tile->group), __ldcg(&tile->begin), __ldcg(&tile->count)};
    }
    if (index >= *p.num_tiles) return {0, 0, 0};
    const RowTile tile = p.tiles[index];
    return {tile.group, tile.begin, tile.count};
  }
  const int32_t tiles_each = (p.num_rows + tile_rows - 1) / tile_rows;
  const int32_t begin = index % tiles_each * tile_rows;
  return {index / tiles_each, begin, min(tile_rows, p.num_rows - begin)};
}
#else
#define STRAIT_BOTH
#endif

inline constexpr int kGemmWarps = 8;  // of a block of few rows

// Elements of K that a warp of few rows takes at a time: 256 bytes of a row of weights.
STRAIT_BOTH constexpr int GemmPiece(bool fp8) { return fp8 ? 256 : 128; }

// How many warps share the pieces of an output's K, 8, 4, 2 or 1: few of their turns are without a
// piece, and half the warps must save more than a twentieth. A function of the weight alone, as the
// order of sums is.
STRAIT_BOTH constexpr int WarpsEach(int k, bool fp8) {
  const int pieces = (k + GemmPiece(fp8) - 1) / GemmPiece(fp8);
  int best = kGemmWarps;
  int best_value = 0;
  for (int warps = kGemmWarps, worth = 20; warps > 0; warps /= 2, --worth) {
    const int turns = (pieces + warps - 1) / warps;
    const int value = 1000 * worth * pieces / (turns * warps);
    if (value > best_value) {
      best = warps;
      best_value = value;
    }
  }
  return best;
}

inline constexpr int32_t kClusterColumns = 256;  // rows of weights in a tile of the cluster kernel

inline constexpr int kGemmStep = 64;  // elements of K that the tiled kernels take at a time

// Steps of K that one block makes: all, unless the product is split; whole fp8 scales.
STRAIT_BOTH inline int StepsEach(const GemmParams& p) {
  const int steps = (p.weight.cols + kGemmStep - 1) / kGemmStep;
  const int each = (steps + p.num_splits - 1) / p.num_splits;
  return (each + 1) / 2 * 2;
}

// Shares of K that this makes, each of at least one step.
inline int NumShares(const GemmParams& p) {
  const int each = StepsEach(p);
  return ((p.weight.cols + kGemmStep - 1) / kGemmStep + each - 1) / each;
}
#undef STRAIT_BOTH

// Items of all groups.
inline int64_t NumItems(const GemmParams& p, int32_t tile_rows) {
  if (p.tiles != nullptr) return p.max_tiles;
  return int64_t{p.num_groups} * ((p.num_rows + tile_rows - 1) / tile_rows);
}

enum class GemmKind { kFewRows, kTiles, kHopper, kCluster, kW8A8 };

// How a product is made; a function of its parameters and the device alone.
struct GemmPlan {
  GemmKind kind;
  int32_t tile_rows;
  int32_t columns;  // rows of weights in a tile; 0: few rows
  int32_t num_splits;
};

// hopper: the device and the caller allow that kernel.
GemmPlan PlanGemm(const GemmParams& params, bool hopper, int32_t multiprocessors);

// Multiprocessors of the device that was current at the first call.
int Multiprocessors();

// Whether the current device's code has deep rings of the few-rows kernel (true without a device).
// Where shared memory is too small for them, 32 rows of gated pairs do not fit beside any ring.
bool DeepGemmRings();

// tile_rows: 8, 16 or 32.
cudaError_t GemmFewRows(const GemmParams& params, int32_t tile_rows, cudaStream_t stream);
// Neither gated nor by a list, of the same weight format and number of rows and groups.
cudaError_t GemmFewRowsPair(const GemmParams& a, const GemmParams& b, int32_t tile_rows,
                            cudaStream_t stream);
// Not gated, of bf16, all rows in one tile.
cudaError_t GemmFewRowsBeside(const LatentAppendParams& append, const GemmParams& p,
                              int32_t tile_rows, cudaStream_t stream);
// tile_rows: 64 or 128. num_splits is the caller's.
cudaError_t GemmTiles(const GemmParams& params, int32_t tile_rows, cudaStream_t stream);
// The same on Hopper. columns: rows of weights in a tile, 128 or 256 (fp8: 128).
cudaError_t GemmHopper(const GemmParams& params, int32_t tile_rows, int32_t columns,
                       cudaStream_t stream);
// The same for bf16 weights, by clusters of two blocks: items, and so a list's tiles, of
// kClusterTileRows; num_splits 1. REQUIRES: with several groups, weight_group_stride a multiple of 8.
cudaError_t GemmCluster(const GemmParams& params, cudaStream_t stream);
cudaError_t GemmW8A8(const GemmParams& params, cudaStream_t stream);
// y (+)= the shares of split_sums, in order.
cudaError_t AddGemmShares(const GemmParams& params, int num_shares, cudaStream_t stream);

}  // namespace strait::cuda
