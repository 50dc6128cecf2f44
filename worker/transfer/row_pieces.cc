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

std::vector<RowRange> CutRange(const RowTraits& traits, const RowRange& range,
                               uint64_t frame_bytes) {
  constexpr uint64_t kMostPieces = std::min<uint64_t>(limits::kMaxTransferBlocks, kMaxCopyEntries);
  std::vector<RowRange> cuts;
  const auto [begin, end] = range.layers;
  const RowRange layer_rows = {{begin, begin + 1}, range.first, range.count};
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

absl::Status CheckPieces(const RowTraits& traits, const RowRange& range, bool any_numerics,
                         const RowsFrame& frame) {
  if (frame.rows.size() != BytesOf(traits, range) || frame.pieces.size() != PiecesOf(range)) {
    return absl::DataLossError(absl::StrCat("a frame of ", frame.pieces.size(), " pieces and ",
                                            frame.rows.size(), " bytes, asked for were ",
                                            PiecesOf(range), " and ", BytesOf(traits, range)));
  }
  absl::Status status;
  auto piece = frame.pieces.begin();
  ForPieces(range, [&](LayerIndex layer, uint32_t first, uint32_t count) {
    BlockHeader theirs = *piece++;
    const BlockHeader ours = PieceHeader(traits, layer, first, count);
    theirs.row_checksum = 0;
    theirs.content_key = {};
    if (any_numerics) theirs.origin.numerics = ours.origin.numerics;
    if (theirs == ours || !status.ok()) return;
    if (theirs.layer != layer || theirs.first_position != first || theirs.num_rows != count) {
      status = absl::DataLossError(absl::StrCat(
          "rows ", theirs.first_position, " to ", theirs.first_position + theirs.num_rows,
          " of layer ", theirs.layer, " came, asked for were ", first, " to ", first + count,
          " of layer ", layer));
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
