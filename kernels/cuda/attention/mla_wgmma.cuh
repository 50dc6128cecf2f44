// SPDX-License-Identifier: Apache-2.0
//
// The shared memory layout that Hopper's warpgroup matrix products read; sm_90a only.
//
// Shapes:  a chunk is 64 rows of 64 bf16: 8 KiB, 1,024-byte aligned; row r is 128 bytes, its
//          16-byte piece p lies at piece p ^ (r % 8) (the copy engine's 128-byte swizzle).
//          A tile is chunks side by side: columns 64c.. lie in chunk c.
// Why:     the same chunk serves as keys (64 rows x 16 columns a product: "K-major") and as values
//          (16 rows x 64 columns a chunk: "MN-major"), so a latent row is loaded once for both.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device/ptx.cuh"

namespace strait::cuda::wgmma {

inline constexpr uint32_t kChunkBytes = 8192;
inline constexpr uint32_t kChunkRowBytes = 128;

// Offset in a chunk of the 16-byte piece `piece` of row `row`.
__device__ __forceinline__ uint32_t PieceOffset(uint32_t row, uint32_t piece) {
  return row * kChunkRowBytes + ((piece ^ (row % 8)) * 16);
}

// Matrix descriptors of 128-byte swizzled operands: lower word, which moves with the address, and
// the constant upper word (8 rows to the next 8: 1,024 bytes). One addition a product: what the
// products wait for otherwise is the arithmetic of their descriptors.
struct Operand {
  uint32_t low;
  __device__ __forceinline__ uint64_t At(uint32_t bytes) const {
    return static_cast<uint64_t>(0x40000000u | 1024 / 16) << 32 | (low + bytes / 16);
  }
};

// Rows of a chunk; step k, columns 16k..16k+15, lies at RowsStep(k).
__device__ __forceinline__ Operand Rows(uint32_t chunk) {
  return {__shfl_sync(0xffffffffu, (chunk & 0x3ffffu) / 16 | 1u << 16, 0)};
}
__host__ __device__ constexpr uint32_t RowsStep(int k) { return static_cast<uint32_t>(k) * 32; }

// Columns of neighbouring chunks; step k, rows 16k..16k+15, lies at ColumnsStep(k). Chunks of more
// rows are as much larger.
__device__ __forceinline__ Operand Columns(uint32_t chunk, uint32_t chunk_bytes = kChunkBytes) {
  return {__shfl_sync(0xffffffffu, (chunk & 0x3ffffu) / 16 | chunk_bytes / 16 << 16, 0)};
}
__host__ __device__ constexpr uint32_t ColumnsStep(int k) {
  return static_cast<uint32_t>(k) * 2048;
}

}  // namespace strait::cuda::wgmma
