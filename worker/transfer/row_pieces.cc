// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/row_pieces.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace strait {

BlockHeader PieceHeader(const RowTraits& traits, LayerIndex layer, uint32_t first, uint32_t count) {
  BlockHeader header;
  header.origin = traits.origin;
  header.layer = layer;
  header.first_position = first;
  header.num_rows = count;
  header.rank = traits.shape.rank;
  header.rope = traits.shape.rope;
  header.row_format = traits.shape.format;
  header.row_bytes = traits.shape.row_bytes();
  header.payload_bytes = count * header.row_bytes;
  return header;
}

std::vector<LayerRows> CutRange(const RowTraits& traits, const LayerRows& range,
                                uint64_t frame_bytes) {
  constexpr uint64_t kMostPieces = std::min<uint64_t>(limits::kMaxTransferBlocks, kMaxCopyEntries);
  std::vector<LayerRows> cuts;
  const auto [begin, end] = range.layers;
  const LayerRows layer_rows = {{begin, begin + 1}, range.first, range.count};
  const uint64_t layer_bytes = BytesOf(traits, layer_rows);
  const uint64_t layer_pieces = PiecesOf(layer_rows);
  if (layer_bytes <= frame_bytes && layer_pieces <= kMostPieces) {
    const auto most =
        static_cast<uint32_t>(std::min(frame_bytes / layer_bytes, kMostPieces / layer_pieces));
    for (LayerIndex layer = begin; layer < end; layer += most) {
      cuts.push_back({{layer, std::min(layer + most, end)}, range.first, range.count});
    }
    return cuts;
  }
  const uint64_t block_bytes = uint64_t{traits.shape.row_bytes()} * limits::kBlockTokens;
  const auto most_blocks =
      static_cast<uint32_t>(std::clamp<uint64_t>(frame_bytes / block_bytes, 1, kMostPieces));
  const uint32_t rows_end = range.first + range.count;
  for (LayerIndex layer = begin; layer < end; ++layer) {
    for (uint32_t at = range.first; at < rows_end;) {
      const uint32_t border = (at / limits::kBlockTokens + most_blocks) * limits::kBlockTokens;
      const uint32_t to = std::min(rows_end, border);
      cuts.push_back({{layer, layer + 1}, at, to - at});
      at = to;
    }
  }
  return cuts;
}

std::vector<LayerRows> CutBlocks(const RowTraits& traits, const LayerRows& range,
                                 uint64_t frame_bytes) {
  constexpr uint64_t kMostPieces = std::min<uint64_t>(limits::kMaxTransferBlocks, kMaxCopyEntries);
  const uint64_t block_bytes = uint64_t{traits.shape.row_bytes()} * limits::kBlockTokens;
  const uint64_t most = std::clamp<uint64_t>(frame_bytes / block_bytes, 1, kMostPieces);
  const auto [begin, end] = range.layers;
  const auto layers = static_cast<uint32_t>(std::min<uint64_t>(end - begin, most));
  const auto blocks = static_cast<uint32_t>(std::clamp<uint64_t>(most / layers, 1, kMaxAskKeys));
  std::vector<LayerRows> cuts;
  for (uint32_t done = 0; done < range.count; done += blocks * limits::kBlockTokens) {
    const uint32_t count = std::min(range.count - done, blocks * limits::kBlockTokens);
    for (LayerIndex layer = begin; layer < end; layer += layers) {
      cuts.push_back({{layer, std::min(layer + layers, end)}, range.first + done, count});
    }
  }
  return cuts;
}

absl::Status CheckAsk(const RowTraits& traits, const RowsAsk& ask) {
  if (ask.layers.begin < traits.layers.begin || ask.layers.end > traits.layers.end ||
      ask.layers.begin >= ask.layers.end || ask.num_rows == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(ask.num_rows, " rows of layers ", ask.layers.begin, " to ", ask.layers.end,
                     ", here are layers ", traits.layers.begin, " to ", traits.layers.end));
  }
  // Of a sequence's rows it is the sequence that says how many there are.
  if (!ask.keys.empty() &&
      uint64_t{ask.first_row} + ask.num_rows > limits::kMaxPositionEmbeddings) {
    return absl::InvalidArgumentError(
        absl::StrCat(ask.num_rows, " rows from row ", ask.first_row, ": no sequence is that long"));
  }
  const uint64_t bytes = BytesOf(traits, RangeOf(ask));
  const uint64_t pieces = PiecesOf(RangeOf(ask));
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

absl::Status CheckFrame(const RowTraits& traits, const RowsAsk& ask, bool any_numerics,
                        const RowsFrame& frame) {
  const LayerRows range = RangeOf(ask);
  if (frame.sequence != ask.sequence || frame.placement != ask.placement) {
    return absl::DataLossError(absl::StrCat("a frame of sequence ", frame.sequence.value,
                                            " for placement ", ToString(frame.placement)));
  }
  if (frame.bytes().size() != BytesOf(traits, range) || frame.pieces.size() != PiecesOf(range)) {
    return absl::DataLossError(absl::StrCat("a frame of ", frame.pieces.size(), " pieces and ",
                                            frame.bytes().size(), " bytes, asked for were ",
                                            PiecesOf(range), " and ", BytesOf(traits, range)));
  }
  absl::Status status;
  auto piece = frame.pieces.begin();
  ForPieces(range, [&](LayerIndex layer, uint32_t first, uint32_t count) {
    BlockHeader theirs = *piece++;
    BlockHeader ours = PieceHeader(traits, layer, first, count);
    theirs.row_checksum = 0;
    if (ask.keys.empty()) {
      theirs.content_key = {};
    } else {
      ours.content_key = ask.keys[(first - ask.first_row) / limits::kBlockTokens];
    }
    if (any_numerics) theirs.origin.numerics = ours.origin.numerics;
    if (theirs == ours || !status.ok()) return;
    if (theirs.layer != layer || theirs.first_position != first || theirs.num_rows != count) {
      status = absl::DataLossError(absl::StrCat(
          "rows ", theirs.first_position, " to ", theirs.first_position + theirs.num_rows,
          " of layer ", theirs.layer, " came, asked for were ", first, " to ", first + count,
          " of layer ", layer));
    } else if (theirs.content_key != ours.content_key) {
      status = absl::DataLossError(absl::StrCat("another block than was asked for came, rows from ",
                                                first, " of layer ", layer));
    } else if (theirs.origin == ours.origin) {
      status = absl::FailedPreconditionError(absl::StrCat(
          "rows of ", theirs.row_bytes, " bytes, rank ", theirs.rank, ", format ",
          static_cast<uint32_t>(theirs.row_format), "; this stage's have ", ours.row_bytes, ", ",
          ours.rank, ", ", static_cast<uint32_t>(ours.row_format)));
    } else {
      status = absl::FailedPreconditionError(
          theirs.origin.numerics != ours.origin.numerics
              ? "rows of other numerics: both ends must run the same backend"
              : "rows of another model or policy");
    }
  });
  return status;
}

}  // namespace strait
