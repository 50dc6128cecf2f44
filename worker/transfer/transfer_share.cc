// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/transfer_share.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "worker/block_copies.h"

namespace strait {

BlockHeader PieceHeader(const RowTraits& traits, LayerIndex layer, uint32_t first_row,
                        uint32_t num_rows) {
  BlockHeader header;
  header.origin = traits.origin;
  header.layer = layer;
  header.first_position = first_row;
  header.num_rows = num_rows;
  header.rank = traits.shape.rank;
  header.rope = traits.shape.rope;
  header.row_format = traits.shape.format;
  header.row_bytes = traits.shape.row_bytes();
  header.payload_bytes = num_rows * header.row_bytes;
  return header;
}

absl::Status CheckAsk(const RowTraits& traits, const RowsAsk& ask) {
  if (ask.layers.begin < traits.layers.begin || ask.layers.end > traits.layers.end ||
      ask.layers.begin >= ask.layers.end || ask.num_rows == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(ask.num_rows, " rows of layers ", ask.layers.begin, " to ", ask.layers.end,
                     ", here are layers ", traits.layers.begin, " to ", traits.layers.end));
  }
  const uint64_t bytes = uint64_t{ask.layers.size()} * ask.num_rows * traits.shape.row_bytes();
  const uint64_t pieces = ask.layers.size() * PiecesPerLayer(ask.first_row, ask.num_rows);
  if (bytes > limits::kTransferFrameBytes || pieces > limits::kMaxTransferBlocks ||
      pieces > kMaxCopyEntries) {
    return absl::InvalidArgumentError(absl::StrCat(pieces, " pieces of ", bytes,
                                                   " bytes in one frame, at most ",
                                                   limits::kTransferFrameBytes, " bytes"));
  }
  const bool is_whole = ask.first_row % limits::kBlockTokens == 0 &&
                        ask.num_rows == ask.keys.size() * limits::kBlockTokens;
  if (ask.keys.empty() || (is_whole && ask.keys.size() <= kMaxAskKeys)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(ask.keys.size(), " keys of ", ask.num_rows, " rows from row ", ask.first_row,
                   ": a key is of a whole block, and an ask has at most ", kMaxAskKeys));
}

namespace {

absl::Status OtherRows(const BlockHeader& theirs, const BlockHeader& ours) {
  if (theirs.origin == ours.origin) {
    return absl::FailedPreconditionError(
        absl::StrCat("rows of ", theirs.row_bytes, " bytes with rank ", theirs.rank, " in format ",
                     static_cast<uint32_t>(theirs.row_format), ", those here have ", ours.row_bytes,
                     ", ", ours.rank, " and ", static_cast<uint32_t>(ours.row_format)));
  }
  return absl::FailedPreconditionError(
      theirs.origin.numerics != ours.origin.numerics
          ? "rows of other numerics: both ends must run the same backend"
          : "rows of another model or policy");
}

}  // namespace

absl::Status CheckFrame(const RowTraits& traits, const RowsAsk& ask, bool any_numerics,
                        const RowsFrame& frame) {
  if (frame.sequence != ask.sequence || frame.placement != ask.placement) {
    return absl::DataLossError(absl::StrCat("a frame of sequence ", frame.sequence.value,
                                            " for placement ", ToString(frame.placement)));
  }
  const uint64_t bytes = uint64_t{ask.layers.size()} * ask.num_rows * traits.shape.row_bytes();
  if (frame.rows.size() != bytes ||
      frame.pieces.size() != ask.layers.size() * PiecesPerLayer(ask.first_row, ask.num_rows)) {
    return absl::DataLossError(absl::StrCat("a frame of ", frame.pieces.size(), " pieces and ",
                                            frame.rows.size(), " bytes, asked for were ", bytes));
  }
  absl::Status status;
  auto piece = frame.pieces.begin();
  const auto check = [&](LayerIndex layer, uint32_t first, uint32_t count) {
    BlockHeader theirs = *piece++;
    if (!status.ok()) return;
    BlockHeader ours = PieceHeader(traits, layer, first, count);
    theirs.row_checksum = 0;
    if (any_numerics) theirs.origin.numerics = ours.origin.numerics;
    if (ask.keys.empty()) {
      theirs.content_key = {};
    } else {
      ours.content_key = ask.keys[(first - ask.first_row) / limits::kBlockTokens];
    }
    if (theirs == ours) return;
    if (theirs.layer != layer || theirs.first_position != first || theirs.num_rows != count) {
      status = absl::DataLossError(absl::StrCat(
          "rows ", theirs.first_position, " to ", theirs.first_position + theirs.num_rows,
          " of layer ", theirs.layer, " came, asked for were ", first, " to ", first + count,
          " of layer ", layer));
    } else if (theirs.content_key != ours.content_key) {
      status = absl::DataLossError(absl::StrCat(
          "a block with another key than was asked for, rows ", first, " of layer ", layer));
    } else {
      status = OtherRows(theirs, ours);
    }
  };
  ForPieces(ask.layers, ask.first_row, ask.num_rows, check);
  return status;
}

}  // namespace strait
