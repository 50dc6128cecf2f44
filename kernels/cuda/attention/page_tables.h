// SPDX-License-Identifier: Apache-2.0
//
// Appends entries to page tables that stay on the device from step to step.
//
// Borrows: every pointer, until the stream has passed the launch.
// Thread:  any.
// Stream:  launches on the one given, begins when what is before it has ended. The kernels after it
//          may begin before its end and read tables before their wait (mla.h): a copy must lie between.
// Errors:  cudaErrorInvalidValue: a count below zero, more than kMaxPageTablePieces; else what the
//          launch returned.
// Limits:  kMaxPageTablePieces a launch; num_layers * count of a piece within 32 bits.
// Why:     a block that is full means a new entry in each layer: 61 places a sequence, which are one
//          launch here and would be as many copies.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace strait::cuda {

inline constexpr int32_t kMaxPageTablePieces = 65535;  // of a grid's second dimension

// Entries for the tables of one sequence, as many in each layer.
struct PageTablePiece {
  int64_t first = 0;    // of `tables`: where the first layer's go
  int64_t source = 0;   // of `entries`: [num_layers, count]
  uint32_t stride = 0;  // from a layer's table to the next one's
  uint32_t count = 0;   // in each layer
};

struct PageTableParams {
  const PageTablePiece* pieces = nullptr;  // [num_pieces] device; places do not overlap
  const uint32_t* entries = nullptr;       // device
  uint32_t* tables = nullptr;              // device
  int32_t num_pieces = 0;
  int32_t num_layers = 0;
  uint32_t max_count = 0;  // of all pieces
};

cudaError_t AppendToPageTables(const PageTableParams& params, cudaStream_t stream);

}  // namespace strait::cuda
