// SPDX-License-Identifier: Apache-2.0
//
// A row of thread blocks for each piece, an entry a thread at a time.
//
// Intensity: none; four bytes are read and written an entry. A decode step brings at most one entry a
// sequence and layer, 62 kB for 256 sequences of 61 layers: the launch is what it costs. Not measured
// yet.
#include "kernels/cuda/attention/page_tables.h"

#include <algorithm>

#include "kernels/cuda/device/common.cuh"

namespace strait::cuda {
namespace {

constexpr uint32_t kThreads = 64;
constexpr uint64_t kEntriesEach =
    16 * kThreads;  // of a thread block, if that is not too many blocks
constexpr uint64_t kMaxBlocksEach = 128;

__global__ void __launch_bounds__(kThreads) AppendPieces(const PageTableParams p) {
  const PageTablePiece piece = p.pieces[blockIdx.y];
  const uint32_t total = piece.count * static_cast<uint32_t>(p.num_layers);
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const uint32_t layer = i / piece.count;
    p.tables[piece.first + int64_t{layer} * piece.stride + (i - layer * piece.count)] =
        p.entries[piece.source + i];
  }
}

}  // namespace

cudaError_t AppendToPageTables(const PageTableParams& p, cudaStream_t stream) {
  if (p.num_pieces < 0 || p.num_pieces > kMaxPageTablePieces || p.num_layers < 0) {
    return cudaErrorInvalidValue;
  }
  const uint64_t most = uint64_t{p.max_count} * static_cast<uint64_t>(p.num_layers);
  if (p.num_pieces == 0 || most == 0) return cudaSuccess;
  const uint64_t blocks_each = std::min((most + kEntriesEach - 1) / kEntriesEach, kMaxBlocksEach);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks_each), static_cast<unsigned>(p.num_pieces));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, AppendPieces, p);
}

}  // namespace strait::cuda
