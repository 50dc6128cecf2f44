// SPDX-License-Identifier: Apache-2.0
//
// A thread block for each kBlockBytes of the longest piece, 16 bytes a thread at a time.
//
// Intensity: none; each byte is read and written once. 4 MiB should take some microseconds, a link to
// the host takes 80 for them. Not measured yet.
#include "kernels/cuda/attention/block_pieces.h"

#include <algorithm>

#include "kernels/cuda/device/common.cuh"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockBytes = 32 << 10;
constexpr int64_t kMaxBlocksEach = 32;
constexpr int64_t kUnit = sizeof(uint4);

template <bool kGather>
__global__ void __launch_bounds__(kThreads)
    MovePieces(const __grid_constant__ BlockPiecesParams p) {
  const BlockPiece& piece = p.pieces[blockIdx.y];
  auto* const in_pool = reinterpret_cast<uint4*>(p.blocks + piece.pool_offset);
  auto* const packed = reinterpret_cast<uint4*>(p.packed + piece.packed_offset);
  const uint4* const from = kGather ? in_pool : packed;
  uint4* const to = kGather ? packed : in_pool;
  const int64_t count = piece.bytes / kUnit;
#pragma unroll 4
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    to[i] = from[i];
  }
}

template <bool kGather>
cudaError_t Launch(const BlockPiecesParams& p, cudaStream_t stream) {
  if (p.num_pieces == 0) return cudaSuccess;
  if (p.num_pieces < 0 || p.num_pieces > kMaxBlockPieces ||
      reinterpret_cast<uintptr_t>(p.blocks) % kUnit != 0 ||
      reinterpret_cast<uintptr_t>(p.packed) % kUnit != 0) {
    return cudaErrorInvalidValue;
  }
  int64_t longest = 0;
  for (int32_t i = 0; i < p.num_pieces; ++i) {
    const BlockPiece& piece = p.pieces[i];
    if (piece.bytes < 0 || (piece.pool_offset | piece.packed_offset | piece.bytes) % kUnit != 0) {
      return cudaErrorInvalidValue;
    }
    longest = std::max(longest, piece.bytes);
  }
  const int64_t blocks_each = std::clamp(longest / kBlockBytes, int64_t{1}, kMaxBlocksEach);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks_each), static_cast<unsigned>(p.num_pieces));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, MovePieces<kGather>, p);
}

}  // namespace

cudaError_t GatherBlockPieces(const BlockPiecesParams& params, cudaStream_t stream) {
  return Launch<true>(params, stream);
}
cudaError_t ScatterBlockPieces(const BlockPiecesParams& params, cudaStream_t stream) {
  return Launch<false>(params, stream);
}

}  // namespace strait::cuda
