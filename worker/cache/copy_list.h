// SPDX-License-Identifier: Apache-2.0
//
// CutCopy checks the list of a copy and says which bytes of the pool are which bytes of the buffer.
//
// Thread:  pure functions.
// Shapes:  a pool of equal blocks, kBlockTokens rows of row_bytes each, by block id.
// Errors:  InvalidArgument, as BlockCopies has them.
// Limits:  kMaxCopyEntries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "worker/backend.h"
#include "worker/block_copies.h"

namespace strait {

struct CopyPiece {
  uint64_t pool_offset = 0;
  uint64_t buffer_offset = 0;
  uint64_t bytes = 0;
};

enum class CopyWay { kRead, kWrite };

// Pieces in the buffer's order and without gaps there; entries that follow each other in the pool,
// too, are one.
// `num_layers` of the stage; `num_blocks` of the worker's cache.
absl::StatusOr<std::vector<CopyPiece>> CutCopy(absl::Span<const BlockRows> list, CopyWay way,
                                               uint32_t num_layers, uint32_t num_blocks,
                                               uint32_t row_bytes, size_t buffer_bytes);

// ResourceExhausted beyond kMaxCopiesUnderWay.
absl::Status CheckCopiesUnderWay(size_t num_under_way);

}  // namespace strait
