// SPDX-License-Identifier: Apache-2.0
//
// How rows that are asked for are cut: a fetch into asks, an ask into pieces, each of one block and with a
// header of its own.
//
// Thread:  pure functions.
// Why:     both ends cut alike, and an ask that is repeated is cut as it was: so they sum up the same pieces
//          (proto/wire/rows_digest.h), and a receiver knows what a frame must be before it comes.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "proto/latent_block.h"
#include "worker/backend.h"
#include "worker/transfer/row_transfer.h"

namespace strait {

// What a stage's rows are, for the headers that go with them.
struct RowTraits {
  LayerRange layers;  // of the stage, or of the model
  RowShape shape;
  BlockOrigin origin;
};

// Rows [first, first + count) of layers of the model.
struct LayerRows {
  LayerRange layers;
  uint32_t first = 0;
  uint32_t count = 0;
};

inline LayerRows RangeOf(const RowsAsk& ask) { return {ask.layers, ask.first_row, ask.num_rows}; }

inline uint64_t BytesOf(const RowTraits& traits, const LayerRows& range) {
  return uint64_t{range.layers.size()} * range.count * traits.shape.row_bytes();
}
// REQUIRES: range.count > 0, and it ends within 32 bits.
constexpr uint64_t PiecesOf(const LayerRows& range) {
  const uint64_t blocks = (uint64_t{range.first} + range.count - 1) / limits::kBlockTokens -
                          range.first / limits::kBlockTokens + 1;
  return blocks * range.layers.size();
}

// visit(layer, first row, number of rows) of each piece, in the order of a frame: layer by layer, cut at
// the borders of blocks.
template <class Visit>
void ForPieces(const LayerRows& range, Visit visit) {
  const uint32_t end = range.first + range.count;
  for (LayerIndex layer = range.layers.begin; layer < range.layers.end; ++layer) {
    for (uint32_t at = range.first; at < end;) {
      const uint32_t rest = limits::kBlockTokens - at % limits::kBlockTokens;
      const uint32_t count = rest < end - at ? rest : end - at;
      visit(layer, at, count);
      at += count;
    }
  }
}

// A piece's header, but for the checksum.
BlockHeader PieceHeader(const RowTraits& traits, LayerIndex layer, uint32_t first, uint32_t count);

// The range in asks of at most frame_bytes, but of a block's rows at least: many layers at once where
// their rows fit, else each layer cut at the borders of blocks. REQUIRES: range.count > 0.
std::vector<LayerRows> CutRange(const RowTraits& traits, const LayerRows& range,
                                uint64_t frame_bytes);

// The same of whole blocks, by rising position: of each few blocks all layers. What has come when it ends early is
// of use. REQUIRES: the range begins and ends at blocks' borders.
std::vector<LayerRows> CutBlocks(const RowTraits& traits, const LayerRows& range,
                                 uint64_t frame_bytes);

// What an ask must be in itself: layers of these, rows in one frame, keys of whole blocks or none.
// InvalidArgument.
absl::Status CheckAsk(const RowTraits& traits, const RowsAsk& ask);

// Whether a frame has exactly what was asked for. DataLoss: others, or other bytes; FailedPrecondition: rows of
// another model, of numerics that are not `any_numerics`, or of another shape.
absl::Status CheckFrame(const RowTraits& traits, const RowsAsk& ask, bool any_numerics,
                        const RowsFrame& frame);

}  // namespace strait
