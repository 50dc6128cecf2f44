// SPDX-License-Identifier: Apache-2.0
#include "worker/cache/copy_list.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status CheckEntry(const BlockRows& entry, uint32_t num_layers, uint32_t num_blocks) {
  if (entry.layer >= num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", entry.layer, " of a stage with ", num_layers));
  }
  if (entry.block >= num_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("block ", entry.block, " of a pool with ", num_blocks));
  }
  if (entry.num_rows == 0 || entry.first_row >= limits::kBlockTokens ||
      entry.num_rows > limits::kBlockTokens - entry.first_row) {
    return absl::InvalidArgumentError(absl::StrCat(entry.num_rows, " rows from row ",
                                                   entry.first_row, " of block ", entry.block,
                                                   ", which has ", limits::kBlockTokens));
  }
  return absl::OkStatus();
}

absl::Status CheckNoRowTwice(std::vector<CopyPiece> pieces, uint64_t block_bytes) {
  std::sort(pieces.begin(), pieces.end(),
            [](const auto& a, const auto& b) { return a.pool_offset < b.pool_offset; });
  for (size_t i = 1; i < pieces.size(); ++i) {
    if (pieces[i].pool_offset < pieces[i - 1].pool_offset + pieces[i - 1].bytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a row of block ", pieces[i].pool_offset / block_bytes, " would be written twice"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<CopyPiece>> CutCopy(absl::Span<const BlockRows> list, CopyWay way,
                                               uint32_t num_layers, uint32_t num_blocks,
                                               uint32_t row_bytes, size_t buffer_bytes) {
  if (list.empty() || list.size() > kMaxCopyEntries) {
    return absl::InvalidArgumentError(
        absl::StrCat("a copy of ", list.size(), " entries, it may have 1 to ", kMaxCopyEntries));
  }
  const uint64_t block_bytes = uint64_t{limits::kBlockTokens} * row_bytes;
  std::vector<CopyPiece> pieces;
  uint64_t end = 0;
  for (const BlockRows& entry : list) {
    STRAIT_RETURN_IF_ERROR(CheckEntry(entry, num_layers, num_blocks));
    const uint64_t offset = entry.block * block_bytes + uint64_t{entry.first_row} * row_bytes;
    const uint64_t bytes = uint64_t{entry.num_rows} * row_bytes;
    if (!pieces.empty() && pieces.back().pool_offset + pieces.back().bytes == offset) {
      pieces.back().bytes += bytes;
    } else {
      pieces.push_back({offset, end, bytes});
    }
    end += bytes;
  }
  if (end != buffer_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a buffer of ", buffer_bytes, " bytes for rows of ", end));
  }
  if (way == CopyWay::kWrite) STRAIT_RETURN_IF_ERROR(CheckNoRowTwice(pieces, block_bytes));
  return pieces;
}

absl::Status CheckCopiesUnderWay(size_t num_under_way) {
  if (num_under_way < kMaxCopiesUnderWay) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat(num_under_way, " copies of a stage are under way: ask again after a Poll"));
}

}  // namespace strait
