// SPDX-License-Identifier: Apache-2.0
//
// CacheMemory is the device memory of a worker's latent blocks: one array of blocks that all stages
// of the worker share. A part of the Backend seam.
//
// Thread:  Resize: loop thread. num_blocks, free_bytes: any.
// Shapes:  blocks 0 … num_blocks() - 1 of one size, at equal distances (proto/latent_block.h).
// Stream:  Resize waits for what it needs; REQUIRES that no step is begun on any stage of the
//          worker, and that no copy of rows is under way, where it makes the array smaller.
// Errors:  ResourceExhausted says needed and available bytes; the array is as before.
// Limits:  what the worker's memory has left beside weights and workspaces.
// Why:     blocks belong to a worker, not to a stage: so one stage's cache can shrink for another's
//          weights, and a stage can hand its rows to its successor without a copy.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"

namespace strait {

// All rows of `from` go to `to`.
struct BlockMove {
  BlockId from = 0;
  BlockId to = 0;
};

class CacheMemory {
 public:
  virtual ~CacheMemory() = default;

  // Makes the array longer, or moves blocks and gives the memory behind its new end back. Moves are
  // made one after the other; none has an end twice. REQUIRES: no moves where it grows.
  virtual absl::Status Resize(uint32_t num_blocks, absl::Span<const BlockMove> moves) = 0;
  virtual uint32_t num_blocks() const = 0;
};

}  // namespace strait
