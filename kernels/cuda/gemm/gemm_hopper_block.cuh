// SPDX-License-Identifier: Apache-2.0
//
// What the blocks of both Hopper products (gemm_hopper.cu, gemm_cluster.cu) are made of: their ring
// of stages, what they work through, the copies of x, and the warpgroups that multiply. Codes times
// codes (gemm_w8a8.cu) have the ring and the warpgroups' sizes from here.
//
// Shapes:  a block's tile is kTileRows rows of x by kColumns rows of weights (gemm_hopper_layout.h).
//          kBlocks blocks, neighbours in the grid, take the tiles of one item of kTileRows * kBlocks
//          rows and the same weights: block `rank` its rows kTileRows * rank and on.
// Why:     a stage is given back to every block whose copies go into it: with several, a barrier
//          `empty` counts the consumers of all of them.
#pragma once

#include "kernels/cuda/attention/mla_wgmma.cuh"
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_hopper_layout.h"
#include "kernels/cuda/gemm/gemm_hopper_write.cuh"

namespace strait::cuda::hopper_gemm {

static_assert(kStepColumns == kGemmStep && kScaleBlock == 2 * kStepColumns);

inline constexpr int kConsumers = 256;
inline constexpr int kFeeders = 128;
inline constexpr int kThreads = kConsumers + kFeeders;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A stage of the ring and how often the ring has come round.
template <class L>
struct Ring {
  uint32_t memory;  // 1,024-byte aligned
  int stage = 0;
  uint32_t parity = 0;

  __device__ explicit Ring(uint32_t memory_in) : memory(memory_in) {}
  __device__ void Advance() {
    if (++stage == L::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ uint32_t x() const { return memory + stage * L::kStageBytes; }
  __device__ uint32_t weights() const { return x() + L::kXBytes; }
  __device__ uint32_t codes() const { return weights() + L::kWeightBytes; }
  __device__ uint32_t full() const { return memory + L::kStages * L::kStageBytes + stage * 8; }
  __device__ uint32_t empty() const { return full() + kMaxStages * 8; }
};

// What a block works through, the same for feeders and consumers.
template <bool kGated, int kTileRows, int kColumns, int kBlocks>
struct Work {
  static constexpr int kEach = kGated ? kColumns / 2 : kColumns;  // outputs a tile
  static constexpr int kItemRows = kTileRows * kBlocks;
  int num_items;
  int num_columns;
  int num_units;
  int steps_each;

  __device__ explicit Work(const GemmParams& p, int num_shares) {
    num_items = p.tiles != nullptr ? *p.num_tiles
                                   : p.num_groups * ((p.num_rows + kItemRows - 1) / kItemRows);
    num_columns = (p.weight.rows + kEach - 1) / kEach;
    num_units = num_items * num_columns * num_shares;
    steps_each = StepsEach(p);
  }
  __device__ int first() const { return blockIdx.x / kBlocks; }
  __device__ int stride() const { return gridDim.x / kBlocks; }
  __device__ TileUnit At(int unit) const {
    return TileUnitAt<kSwath / kBlocks>(unit, num_items, num_columns);
  }
  // The rows of an item that are block `rank`'s; of the last ones there may be none.
  __device__ __forceinline__ GemmItem RowsOf(const GemmParams& p, int index, int rank) const {
    GemmItem item = ItemOf(p, kItemRows, index);
    if constexpr (kBlocks > 1) {
      item.begin += rank * kTileRows;
      item.count = Clamp(item.count - rank * kTileRows, kTileRows);
    }
    return item;
  }
  __device__ int Steps(const GemmParams& p, int share) const {
    const int steps = (p.weight.cols + kStepColumns - 1) / kStepColumns;
    return min(steps - share * steps_each, steps_each);
  }
};

// The copies of x for one item's rows: a thread copies 16 bytes of every kStride-th row.
template <int kTileRows>
struct XFeeder {
  static constexpr int kPieces = kTileRowBytes / 16;
  static constexpr int kStride = kFeeders / kPieces;
  static constexpr int kCopies = kTileRows / kStride;

  const int piece;
  const int first;
  const int count;
  const Bf16* rows[kCopies];

  __device__ __forceinline__ XFeeder(const GemmParams& p, const GemmItem& item, int thread)
      : piece(thread % kPieces), first(thread / kPieces), count(item.count) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // Beyond the item's rows nothing is read; without any, the product's first row lends its place.
      const int m = first + i * kStride;
      const int index = count > 0 ? item.begin + (m < count ? m : 0) : 0;
      const int64_t row = p.x_rows != nullptr ? p.x_rows[index] : index;
      rows[i] = p.x + item.group * p.x_group_stride + row * p.x_stride;
    }
  }
  // Starts the copies of columns k0 and on; rows and k that do not exist: zeros.
  __device__ __forceinline__ void Copy(uint32_t to, int k0, int k_end) const {
    const int k = k0 + piece * 8;
    const int present = Clamp((k_end - k) * 2, 16);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = first + i * kStride;
      CopyAsync(to + wgmma::PieceOffset(m, piece), rows[i] + (present > 0 ? k : 0),
                m < count ? present : 0);
    }
  }
};

template <bool kFp8, bool kGated, int kTileRows, int kColumns, int kBlocks>
struct Consumer {
  using L = HopperLayout<kFp8, kTileRows, kColumns>;
  static constexpr int kSums = L::kOwn / 2;  // a thread's
  static constexpr int kOutputs = kGated ? L::kOwn / 2 : L::kOwn;
  static_assert(kBlocks == 1 || kTileRows == 128, "a warpgroup has rows of its own");

  const GemmParams& p;
  const int rank;
  const int lane = threadIdx.x % 32;
  const int group = threadIdx.x / 128;  // of the warpgroups
  TilePlace place;

  __device__ Consumer(const GemmParams& params, int rank_in) : p(params), rank(rank_in) {
    place.row = threadIdx.x % 128 / 32 * 16 + lane / 4 + (kTileRows == 128 ? group * 64 : 0);
    place.column = lane % 4 * 2 + (kTileRows == 64 ? group * kOutputs : 0);
  }

  __device__ __forceinline__ void GiveBack(Ring<L>& ring) const {
    if constexpr (kBlocks == 1) {
      if (lane == 0) wgmma::BarrierArrive(ring.empty());
    } else {
      if (lane < kBlocks) cluster::BarrierArrive(ring.empty(), lane);
    }
    ring.Advance();
  }

  __device__ __forceinline__ void Run(uint32_t memory, int num_shares) const {
    const Work<kGated, kTileRows, kColumns, kBlocks> work(p, num_shares);
    const wgmma::Operand x =
        wgmma::Rows(memory + (kTileRows == 128 ? group * 64 * kTileRowBytes : 0));
    const wgmma::Operand weights =
        wgmma::Rows(memory + L::kXBytes + (kTileRows == 64 ? group * L::kOwn * kTileRowBytes : 0));
    const int scale_cols = (p.weight.cols + kScaleBlock - 1) / kScaleBlock;
    Ring<L> ring(memory);      // the stage to read next
    Ring<L> returned(memory);  // the next to be given back
    for (int unit = work.first(); unit < work.num_units; unit += work.stride()) {
      const TileUnit at = work.At(unit);
      const GemmItem item = work.RowsOf(p, at.item, rank);
      const int n0 = at.column * work.kEach;
      const int num_steps = work.Steps(p, at.share);
      // A warpgroup without rows gives back the stages that the other block's copies go into, too.
      if (kBlocks > 1 && group * 64 >= item.count) {
        for (int step = 0; step < num_steps; ++step) {
          wgmma::BarrierWait(ring.full(), ring.parity);
          __syncwarp();
          ring.Advance();
          GiveBack(returned);
        }
        continue;
      }
      const int64_t scale_at = item.group * p.scale_group_stride +
                               int64_t{n0 / kScaleBlock} * scale_cols +
                               at.share * work.steps_each / 2;
      float sums[kSums];
      float scaled[kFp8 ? kSums : 1];
      if constexpr (kFp8) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) scaled[i] = 0;
      }
      const auto multiply = [&](int accumulate) {
        wgmma::BarrierWait(ring.full(), ring.parity);
        __syncwarp();
        wgmma::Begin();
#pragma unroll
        for (int k = 0; k < kStepColumns / 16; ++k) {
          const uint32_t offset = ring.stage * L::kStageBytes + wgmma::RowsStep(k);
          wgmma::MultiplyRows(sums, x.At(offset), weights.At(offset), k == 0 ? accumulate : 1);
        }
        wgmma::Commit();
        ring.Advance();
      };
      if constexpr (kFp8) {
        for (int step = 0; step < num_steps; step += 2) {
          const float scale = p.weight.scales[scale_at + step / 2];
          const float up_scale = kGated ? p.up.scales[scale_at + step / 2] : scale;
          multiply(0);
          const bool two = step + 1 < num_steps;
          if (two) multiply(1);
          wgmma::Wait<0>();
          wgmma::Pin(sums);
          GiveBack(returned);
          if (two) GiveBack(returned);
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            scaled[i] = fmaf(sums[i], kGated && i >= kSums / 2 ? up_scale : scale, scaled[i]);
          }
        }
      } else {
        multiply(0);
        for (int step = 1; step < num_steps; ++step) {
          multiply(1);
          wgmma::Wait<1>();
          GiveBack(returned);
        }
        wgmma::Wait<0>();
        wgmma::Pin(sums);
        GiveBack(returned);
      }
      if constexpr (kFp8) {
        WriteTile<kGated>(p, scaled, place, item, n0, at.share, num_shares);
      } else {
        WriteTile<kGated>(p, sums, place, item, n0, at.share, num_shares);
      }
    }
  }
};

#endif  // sm_90a

}  // namespace strait::cuda::hopper_gemm
