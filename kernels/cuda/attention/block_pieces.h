// SPDX-License-Identifier: Apache-2.0
//
// Gathers pieces of a pool of latent blocks into one packed buffer, and scatters them back.
//
// Borrows: pool and buffer, until the stream has passed the launch. Pieces are copied with it.
// Thread:  any.
// Shapes:  device memory; offsets and sizes are multiples of 16 bytes, both bases 16-byte aligned.
// Stream:  launches on the one given, begins when what is before it has ended.
// Errors:  cudaErrorInvalidValue: a piece that is no multiple of 16 bytes, more than
//          kMaxBlockPieces; else what the launch returned.
// Limits:  kMaxBlockPieces a launch: they travel as its parameter, so no list has to be on the
//          device, or outlive the call.
// Why:     a block of 64 rows is 42 to 74 kB: a copy engine takes about as long to begin one as to
//          move it, so small pieces go through one launch and are then one copy.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace strait::cuda {

inline constexpr int32_t kMaxBlockPieces = 128;

struct BlockPiece {
  int64_t pool_offset = 0;
  int64_t packed_offset = 0;
  int64_t bytes = 0;
};

struct BlockPiecesParams {
  BlockPiece pieces[kMaxBlockPieces];
  int32_t num_pieces = 0;
  std::byte* blocks = nullptr;  // the pool
  std::byte* packed = nullptr;
};
static_assert(sizeof(BlockPiecesParams) <= 4096);  // a launch's parameters

cudaError_t GatherBlockPieces(const BlockPiecesParams& params, cudaStream_t stream);
cudaError_t ScatterBlockPieces(const BlockPiecesParams& params, cudaStream_t stream);

}  // namespace strait::cuda
