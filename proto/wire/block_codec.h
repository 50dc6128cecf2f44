// SPDX-License-Identifier: Apache-2.0
//
// Writes and reads the headers of latent blocks (proto/latent_block.h), and holds every field to
// its limit on both ways.
//
// Thread:  pure functions.
// Errors:  each names the header and the field. Decode: FailedPrecondition: another version;
//          DataLoss: all else, and nothing of the bytes is to be used. Encode: InvalidArgument.
// Limits:  proto/base/limits.h: kMaxTransferBlocks, kMaxTransferBytes, those of the model.
// Why:     fingerprints, sequence and epoch are any number here: whether a block is of what the
//          receiver runs, and wanted, only the receiver knows, and it must ask before it uses rows.
//          Checksums find damage, not malice: links are authenticated elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/latent_block.h"

namespace strait {

// Fills row_bytes and payload_bytes from the other fields, and row_checksum from the rows.
// REQUIRES: the sizes follow from the fields: rows.size() is payload_bytes. Checked.
void SealBlockHeader(absl::Span<const std::byte> rows, BlockHeader* header);

// One header alone, as it lies beside rows in host memory. `to`, `from`: kBlockHeaderBytes.
absl::Status EncodeBlockHeader(const BlockHeader& header, absl::Span<std::byte> to);
absl::StatusOr<BlockHeader> DecodeBlockHeader(absl::Span<const std::byte> from);

// All headers of a transfer. `to`, `from`: TransferHeadBytes(num_blocks), not a byte more.
// Encode takes sequence and epoch from `header`; counts, sizes and checksum it makes itself.
absl::Status EncodeTransferHead(const TransferHeader& header, absl::Span<const BlockHeader> blocks,
                                absl::Span<std::byte> to);
struct TransferHead {
  TransferHeader header;
  std::vector<BlockHeader> blocks;  // [num_blocks]
};
absl::StatusOr<TransferHead> DecodeTransferHead(absl::Span<const std::byte> from);

// Whether `rows` are what the header was made for: their size and their checksum. DataLoss if not.
absl::Status CheckRows(const BlockHeader& header, absl::Span<const std::byte> rows);

}  // namespace strait
