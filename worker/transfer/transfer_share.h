// SPDX-License-Identifier: Apache-2.0
//
// TransferShare is what the importers and exporters of one worker share: the way to other workers, and
// how much may be under way on it.
//
// Borrows: RowTransfer; it outlives this.
// Thread:  loop thread only.
// Limits:  kTransferBytesUnderWay of rows asked for, and as many being made for others; kMaxAsksUnderWay.
// Errors:  CheckAsk: InvalidArgument. CheckFrame: DataLoss: not what was asked for; FailedPrecondition: rows of
//          another model, policy, numerics or shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "worker/backend.h"
#include "worker/transfer/row_transfer.h"

namespace strait {

class Exporter;

// Who asks for rows, and is given the answers.
class RowsTaker {
 public:
  virtual void OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) = 0;

 protected:
  ~RowsTaker() = default;
};

// Of what bulk asks for: the rest is for sequences that stand still, which must not wait behind it.
inline constexpr uint64_t kBulkBytesUnderWay = limits::kTransferBytesUnderWay / 2;
static_assert(kBulkBytesUnderWay >= limits::kTransferFrameBytes);

struct TransferShare {
  RowTransfer* transfer = nullptr;  // null: the worker neither gives nor takes rows
  uint64_t frame_bytes =
      limits::kTransferFrameBytes;  // that are asked for at once; of a block at least
  uint64_t asked_bytes = 0;         // of rows asked for, until they are in the cache
  uint64_t made_bytes = 0;          // of frames for peers, until they are answered
  size_t num_made = 0;              // such frames
  bool holds_copies = false;        // none begins: the cache is about to become smaller
  AskId last_ask;
  std::map<AskId, RowsTaker*> asks;            // not answered
  std::map<PeerAskId, Exporter*> unconfirmed;  // answered, and OnServed has not come
};

// What a stage's rows are, for the headers that go with them.
struct RowTraits {
  LayerRange layers;  // of the stage, or of the model
  RowShape shape;
  BlockOrigin origin;
};

// One piece of an ask as its header must say it, but for the checksum. REQUIRES: rows of one block.
BlockHeader PieceHeader(const RowTraits& traits, LayerIndex layer, uint32_t first_row,
                        uint32_t num_rows);

// What an ask must be in itself: layers of these, rows in one frame, keys of whole blocks or none.
absl::Status CheckAsk(const RowTraits& traits, const RowsAsk& ask);

// That a frame has exactly what was asked for, of rows as these. `any_numerics`: computed by whatever.
absl::Status CheckFrame(const RowTraits& traits, const RowsAsk& ask, bool any_numerics,
                        const RowsFrame& frame);

// visit(layer of the model, first row, number of rows) of each piece of an ask, in the order of its
// frame: layer by layer, cut at the borders of blocks.
template <class Visit>
void ForPieces(LayerRange layers, uint32_t first_row, uint32_t num_rows, Visit visit) {
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
    const uint32_t end = first_row + num_rows;
    for (uint32_t at = first_row; at < end;) {
      const uint32_t rest = limits::kBlockTokens - at % limits::kBlockTokens;
      const uint32_t count = rest < end - at ? rest : end - at;
      visit(layer, at, count);
      at += count;
    }
  }
}
// Of one layer. REQUIRES: num_rows > 0.
constexpr uint64_t PiecesPerLayer(uint32_t first_row, uint32_t num_rows) {
  return (uint64_t{first_row} + num_rows - 1) / limits::kBlockTokens -
         first_row / limits::kBlockTokens + 1;
}

}  // namespace strait
