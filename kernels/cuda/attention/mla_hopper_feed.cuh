// SPDX-License-Identifier: Apache-2.0
//
// The warpgroup of the Hopper attention kernel that brings cache blocks into shared memory.
#pragma once

#include "kernels/cuda/attention/mla_hopper_shared.cuh"

namespace strait::cuda::mla::hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where a block's chunks lie in the tensor map: side by side in its rows, or each a unit of its own.
struct RowMajorBlock {
  uint32_t id;
  __device__ __forceinline__ int column(int chunk) const { return chunk * 64; }
  __device__ __forceinline__ int group(int) const { return static_cast<int>(id); }
};
struct UnitBlock {
  uint32_t ids[kChunks];  // of the chunks that are asked for
  __device__ __forceinline__ int column(int) const { return 0; }
  __device__ __forceinline__ int group(int chunk) const { return static_cast<int>(ids[chunk]); }
};

// The bf16 feeder's one thread: half a tile, when that half is free. Of two thread blocks that share
// their cache each copies about half of it, to both.
template <bool kShared, class Block>
__device__ __forceinline__ void FeedHalf(const MlaParams& p, const Shared& s, uint32_t rank,
                                         int tile, int half, uint32_t phase, const Block& block,
                                         bool present) {
  wgmma::BarrierWait(s.empty(tile, half), phase ^ 1);
#pragma unroll
  for (int quarter = half * 2; quarter < half * 2 + 2; ++quarter) {
    const bool rope = tile != half && quarter % 2 == 1;
    const uint32_t full = s.full(tile, quarter);
    if (!present) {
      wgmma::BarrierArrive(full);
      continue;
    }
    wgmma::BarrierExpect(full, (2 + (rope ? 1 : 0)) * wgmma::kChunkBytes);
    const auto load = [&](int chunk) {
      const uint32_t to = s.tile(tile) + chunk * wgmma::kChunkBytes;
      if constexpr (kShared) {
        cluster::LoadBox(to, &p.pool_map, block.column(chunk), 0, block.group(chunk), full, 3);
      } else {
        wgmma::LoadBox(to, &p.pool_map, block.column(chunk), 0, block.group(chunk), full);
      }
    };
    if (!kShared || rank == 0) load(quarter * 2);
    if (!kShared || rank == 1) load(quarter * 2 + 1);
    if (rope && (!kShared || tile == static_cast<int>(rank))) load(kRopeChunk);
  }
}

// One warp; lane 0 starts the copies, all lanes read the page table ahead. Halves are filled in the
// order in which the consumers free them. Where two thread blocks share their cache, each asks for
// one block of the next pair to be brought to L2: that takes a third off the time that a copy takes.
// Alone it would cost more than it gives: the copy engine and L2 then do everything twice.
template <bool kShared>
__device__ __forceinline__ void FeedBf16(const MlaParams& p, const Shared& s) {
  const int lane = threadIdx.x % 32;
  const uint32_t rank = kShared ? cluster::Rank() : 0;
  Phases phases;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int present_end = min(work.block_end, (cache_rows + kMlaBlockRows - 1) / kMlaBlockRows);
    const auto page = [&](int first) {
      return first + lane < present_end ? segment.page_table[first + lane] : 0u;
    };
    const auto ahead = [&](int block, uint32_t id) {
      if (block < present_end) PrefetchToL2(p.blocks + id * p.block_bytes, kTileBytes);
    };
    uint32_t pages = page(work.block_begin);
    uint32_t next_pages = page(work.block_begin + 32);
    for (int block = work.block_begin; block < work.block_end; block += 2) {
      const int at = (block - work.block_begin) % 32;
      if (at == 0 && block != work.block_begin) {
        pages = next_pages;
        next_pages = page(block + 32);
      }
      const RowMajorBlock first = {__shfl_sync(0xffffffffu, pages, at)};
      const RowMajorBlock second = {__shfl_sync(0xffffffffu, pages, at + 1)};
      const uint32_t source = at + 2 < 32 ? pages : next_pages;
      const uint32_t ahead_id = __shfl_sync(0xffffffffu, source, (at + 2) % 32);
      const uint32_t ahead_second_id = __shfl_sync(0xffffffffu, source, (at + 3) % 32);
      const bool pair = block + 1 < work.block_end;
      if (lane == 0) {
        const bool present = block < present_end;
        const bool second_present = block + 1 < present_end;
        if (block >= work.settled_blocks) WaitForEarlier();
        FeedHalf<kShared>(p, s, rank, 0, 0, phases.first, first, present);
        if (pair) {
          if (block + 1 >= work.settled_blocks) WaitForEarlier();
          FeedHalf<kShared>(p, s, rank, 1, 1, phases.second, second, second_present);
        }
        if (kShared && rank == 0) ahead(block + 2, ahead_id);
        FeedHalf<kShared>(p, s, rank, 0, 1, phases.first, first, present);
        if (pair) FeedHalf<kShared>(p, s, rank, 1, 0, phases.second, second, second_present);
        if (kShared && rank == 1) ahead(block + 3, ahead_second_id);
      }
      phases.Advance(pair);
      __syncwarp();
    }
  }
}

// The same of blocks that are lists of units: nine entries of the page table a block, the rope unit's
// last. Lanes hold those of a pair, one each, and read two pairs ahead; L2 is asked for the next pair
// by nine lanes of either thread block, a unit each.
template <bool kShared>
__device__ __forceinline__ void FeedUnits(const MlaParams& p, const Shared& s) {
  const int lane = threadIdx.x % 32;
  const int lane_block = lane / kChunks;  // of the pair; two and more: none
  const uint32_t rank = kShared ? cluster::Rank() : 0;
  Phases phases;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int present_end = min(work.block_end, (cache_rows + kMlaBlockRows - 1) / kMlaBlockRows);
    const auto lane_is_in = [&](int block) {
      return lane_block < 2 && block + lane_block < present_end;
    };
    const auto read = [&](int block) {
      return lane_is_in(block) ? segment.page_table[block * kChunks + lane] : 0u;
    };
    uint32_t now = read(work.block_begin);
    uint32_t next = read(work.block_begin + 2);
    for (int block = work.block_begin; block < work.block_end; block += 2) {
      const uint32_t after = read(block + 4);
      const auto feed = [&](int tile, int half, uint32_t phase) {
        UnitBlock units;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          if (chunk != kRopeChunk && chunk / kHalfChunks != half) continue;
          units.ids[chunk] = __shfl_sync(0xffffffffu, now, tile * kChunks + chunk);
        }
        if (lane != 0) return;
        if (tile == half && block + tile >= work.settled_blocks) WaitForEarlier();
        FeedHalf<kShared>(p, s, rank, tile, half, phase, units, block + tile < present_end);
      };
      const auto ahead = [&](int tile) {
        if (lane_block == tile && lane_is_in(block + 2)) {
          PrefetchToL2(p.blocks + next * int64_t{wgmma::kChunkBytes}, wgmma::kChunkBytes);
        }
      };
      const bool pair = block + 1 < work.block_end;
      feed(0, 0, phases.first);
      if (pair) feed(1, 1, phases.second);
      if (kShared && rank == 0) ahead(0);
      feed(0, 1, phases.first);
      if (pair) feed(1, 0, phases.second);
      if (kShared && rank == 1) ahead(1);
      phases.Advance(pair);
      now = next;
      next = after;
      __syncwarp();
    }
  }
}

#endif  // sm_90a

}  // namespace strait::cuda::mla::hopper
