// SPDX-License-Identifier: Apache-2.0
//
// Eight threads a row of keys: its place in the pool, and its rope key.
//
// Intensity: none; 128 bytes read and written a row.
#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/cuda/device/common.cuh"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadsEach = 8;  // 16 bytes of a rope key
constexpr int64_t kRowBytes = RowBytes(RowFormat::kBf16, kMhaRank, kMhaRope);
constexpr int64_t kRopeOffset = RopeKeyOffset(RowFormat::kBf16, kMhaRank);

struct Gather {
  MhaPiece pieces[kMhaMaxPieces];
  int32_t num_pieces;
  int32_t num_rows;
  const MlaSegment* segments;
  const std::byte* blocks;
  int32_t* rows;
  Bf16* rope_keys;
};

__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ Gather p) {
  StartNext();
  const int32_t index = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x) / kThreadsEach;
  const int32_t part = threadIdx.x % kThreadsEach;
  int piece = 0;
  while (piece + 1 < p.num_pieces && p.pieces[piece + 1].first_key <= index) ++piece;
  WaitForEarlier();
  if (index >= p.num_rows) return;
  const MhaPiece& of = p.pieces[piece];
  const int32_t position = of.span_position + min(index - of.first_key, of.num_keys - 1);
  const int64_t block = p.segments[of.sequence].page_table[position / kMlaBlockRows];
  const int64_t row = block * kMlaBlockRows + position % kMlaBlockRows;
  const std::byte* const rope = p.blocks + row * kRowBytes + kRopeOffset;
  reinterpret_cast<uint4*>(p.rope_keys + int64_t{index} * kMhaRope)[part] =
      reinterpret_cast<const uint4*>(rope)[part];
  if (part == 0) p.rows[index] = static_cast<int32_t>(row);
}

}  // namespace

cudaError_t MhaGather(const MhaGatherParams& params, cudaStream_t stream) {
  if (params.num_pieces == 0) return cudaSuccess;
  if (params.num_pieces < 0 || params.num_pieces > kMhaMaxPieces ||
      params.block_bytes != kMlaBlockRows * kRowBytes) {
    return cudaErrorInvalidValue;
  }
  Gather p = {};
  for (int i = 0; i < params.num_pieces; ++i) {
    p.pieces[i] = params.pieces[i];
    if (p.pieces[i].first_key != p.num_rows || p.pieces[i].num_keys <= 0) {
      return cudaErrorInvalidValue;
    }
    p.num_rows += MhaKeyRows(p.pieces[i].num_keys);
  }
  p.num_pieces = params.num_pieces;
  p.segments = params.segments;
  p.blocks = params.blocks;
  p.rows = params.rows;
  p.rope_keys = params.rope_keys;
  const int32_t rows_each = kThreads / kThreadsEach;
  return LaunchChained(GatherKernel,
                       dim3(static_cast<unsigned>((p.num_rows + rows_each - 1) / rows_each)),
                       kThreads, 0, stream, p);
}

}  // namespace strait::cuda
