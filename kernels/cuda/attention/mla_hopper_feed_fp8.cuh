// SPDX-License-Identifier: Apache-2.0
//
// The feeding warpgroup of the Hopper attention kernel where rows are fp8: it widens a quarter of a tile
// (64 rows of 128 codes) to bf16 and hands it over at once, in the order in which the consumers free
// halves and need them. Codes wait in registers for the half that they go to, those of one half always
// on their way: a half that is free is full again as soon as its codes are widened. L2 is asked for a
// pair of blocks while the pair before is widened.
#pragma once

#include "kernels/cuda/attention/mla_hopper_shared.cuh"

namespace strait::cuda::mla::hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kFp8RowBytes = RowBytes(RowFormat::kFp8, 512, 64);
constexpr int kFp8ScalesAt = ScalesOffset(512);
constexpr int kFp8RopeAt = RopeKeyOffset(RowFormat::kFp8, 512);

// A pair's four halves in the order in which they are free, and needed: 1 left, 2 right, 1 right, 2 left.
__device__ __forceinline__ int HalfOf(int step) { return (step ^ step / 2) & 1; }

struct HalfAfter {
  int block;  // relative to the pair's first
  int half;
  __device__ __forceinline__ HalfAfter(int step, bool both) {
    const int next = step + (both ? 1 : 2);
    block = next >= 4 ? 2 : next % 2;
    half = HalfOf(next % 4);
  }
};

// WidenRow16's numbers in fewer instructions.
__device__ __forceinline__ void Widen16(const uint4& codes, float scale, uint4& low, uint4& high) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t out[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t halves[2];
    E4m3QuadToHalves(words[i], halves[0], halves[1]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      __half2 pair_of_halves;
      __builtin_memcpy(&pair_of_halves, &halves[k], sizeof(pair_of_halves));
      const float2 pair = __half22float2(pair_of_halves);
      out[2 * i + k] = PackBf16(pair.x * scale, pair.y * scale);
    }
  }
  low = make_uint4(out[0], out[1], out[2], out[3]);
  high = make_uint4(out[4], out[5], out[6], out[7]);
}

// This warp's part of a quarter is written: products see it once all four warps have said so.
__device__ __forceinline__ void GiveQuarter(uint32_t full) {
  wgmma::FenceProxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) wgmma::BarrierArrive(full);
}

// A warp takes 16 rows; a lane, of two rows that are eight apart, 16 codes of either half of a quarter:
// neighbouring rows are swizzled to different banks. What rows that are not present hold does not
// matter, nor what is left in registers for a block that is not: consumers mask and clear those.
__device__ __forceinline__ void FeedFp8(const MlaParams& p, const Shared& s) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % 4;
  const int row = warp * 16 + lane / 4;
  const int codes_at = row * kFp8RowBytes + lane % 4 * 16;
  const int scales_at = row * kFp8RowBytes + kFp8ScalesAt;
  const uint32_t even = wgmma::PieceOffset(row, lane % 4 * 2);
  const uint32_t odd = even ^ 16;
  const int rope_row = warp * 16 + lane / 8;  // and those 4, 8, 12 behind it
  const int rope_at = rope_row * kFp8RowBytes + kFp8RopeAt + lane % 8 * 16;
  const uint32_t rope_to = kRopeChunk * wgmma::kChunkBytes + wgmma::PieceOffset(rope_row, lane % 8);
  Phases phases;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork& work = p.plan.work[w];
    const MlaSegment& segment = p.segments[work.sequence];
    const uint32_t* const page_table = segment.page_table;
    const int block_end = work.block_end;
    const int settled = work.settled_blocks;
    const int present_end =
        min(block_end, (CacheRows(work, segment) + kMlaBlockRows - 1) / kMlaBlockRows);
    const auto page = [&](int block) { return block < present_end ? page_table[block] : 0u; };
    const auto memory_of = [&](uint32_t id) { return p.blocks + id * p.block_bytes; };
    const auto ahead = [&](int block, uint32_t id) {
      constexpr int kPart = 16 * kFp8RowBytes;  // a warp's
      if (lane == 0 && block < present_end) PrefetchToL2(memory_of(id) + warp * kPart, kPart);
    };
    uint4 codes[8];   // of a half: [quarter, half of its columns, row]
    float scales[4];  // [quarter, row]
    const auto load = [&](const std::byte* from, int half) {
      if (from == nullptr) return;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        codes[i] = *reinterpret_cast<const uint4*>(from + codes_at + half * 256 + i / 2 * 64 +
                                                   i % 2 * 8 * kFp8RowBytes);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scales[i] = *reinterpret_cast<const float*>(from + scales_at + (half * 2 + i / 2) * 4 +
                                                    i % 2 * 8 * kFp8RowBytes);
      }
    };
    const auto block_of = [&](int block, uint32_t id) -> const std::byte* {
      if (block >= present_end) return nullptr;
      if (block >= settled) WaitForEarlier();
      return memory_of(id);
    };
    // What waits in registers goes to `half` of `tile`; then that of block `next` follows.
    const auto feed = [&](int tile, int half, int block, uint32_t id, int next, uint32_t next_id,
                          int next_half) {
      const bool rope = tile != half;
      const uint32_t to = s.tile(tile);
      const std::byte* const from = block_of(next, next_id);
      wgmma::BarrierWait(s.empty(tile, half), phases.of(tile) ^ 1);
      if (rope && block < present_end) {
        const std::byte* const rope_from = memory_of(id) + rope_at;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          wgmma::CopyPiece(to + (rope_to ^ i % 2 * 64) + i * 4 * wgmma::kChunkRowBytes,
                           rope_from + i * 4 * kFp8RowBytes);
        }
      }
#pragma unroll
      for (int quarter = 0; quarter < 2; ++quarter) {
        const uint32_t chunks = to + (half * 4 + quarter * 2) * wgmma::kChunkBytes;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t at = chunks + k / 2 * wgmma::kChunkBytes + k % 2 * 1024;
          uint4 low;
          uint4 high;
          Widen16(codes[quarter * 4 + k], scales[quarter * 2 + k % 2], low, high);
          wgmma::StorePiece(at + even, low);
          wgmma::StorePiece(at + odd, high);
        }
        if (rope && quarter == 1) wgmma::WaitCopies();
        GiveQuarter(s.full(tile, half * 2 + quarter));
      }
      load(from, next_half);
    };
    int block = work.block_begin;
    uint32_t first = page(block);
    uint32_t second = page(block + 1);
    uint32_t next_first = page(block + 2);
    uint32_t next_second = page(block + 3);
    load(block_of(block, first), 0);
    ahead(block, first);
    ahead(block + 1, second);
    for (; block < block_end; block += 2) {
      const bool both = block + 1 < block_end;
      const uint32_t after_first = page(block + 4);
      const uint32_t after_second = page(block + 5);
      ahead(block + 2, next_first);
      ahead(block + 3, next_second);
      // One copy of the code for all four: what the feeder runs through should not drive out of the
      // instruction caches what the consumers do.
#pragma unroll 1
      for (int step = 0; step < 4; step += both ? 1 : 2) {
        const HalfAfter next(step, both);
        feed(step % 2, HalfOf(step), block + step % 2, step % 2 == 0 ? first : second,
             block + next.block,
             next.block == 0   ? first
             : next.block == 1 ? second
                               : next_first,
             next.half);
      }
      phases.Advance(both);
      first = next_first;
      second = next_second;
      next_first = after_first;
      next_second = after_second;
    }
  }
}

#endif  // sm_90a

}  // namespace strait::cuda::mla::hopper
