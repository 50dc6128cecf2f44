// SPDX-License-Identifier: Apache-2.0
#include "proto/wire/block_codec.h"

#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

// The structs are the wire's bytes.
static_assert(std::endian::native == std::endian::little);

constexpr char kBlock[] = "latent block header";
constexpr char kTransfer[] = "transfer header";

absl::Status Bad(absl::StatusCode code, const char* header, const char* field, uint64_t value,
                 const std::string& expected) {
  return absl::Status(code,
                      absl::StrCat(header, ": ", field, " is ", value, ", expected ", expected));
}

absl::Status InRange(absl::StatusCode code, const char* header, const char* field, uint64_t value,
                     uint64_t least, uint64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return Bad(code, header, field, value, absl::StrCat(least, " to ", most));
}

absl::Status Equal(absl::StatusCode code, const char* header, const char* field, uint64_t value,
                   uint64_t expected) {
  if (value == expected) return absl::OkStatus();
  return Bad(code, header, field, value, absl::StrCat(expected));
}

// What both headers begin with; before anything else is believed.
template <class Header>
absl::Status CheckBeginning(absl::StatusCode code, const char* name, const Header& h) {
  const Header expected;
  STRAIT_RETURN_IF_ERROR(Equal(code, name, "magic", h.magic, expected.magic));
  if (h.version != kLatentBlockVersion) {
    return Bad(absl::StatusCode::kFailedPrecondition, name, "version", h.version,
               absl::StrCat(kLatentBlockVersion, ": both ends must run the same release"));
  }
  return Equal(code, name, "header_bytes", h.header_bytes, sizeof(Header));
}

absl::Status CheckFields(absl::StatusCode code, const BlockHeader& h) {
  STRAIT_RETURN_IF_ERROR(CheckBeginning(code, kBlock, h));
  STRAIT_RETURN_IF_ERROR(InRange(code, kBlock, "layer", h.layer, 0, limits::kMaxHiddenLayers - 1));
  STRAIT_RETURN_IF_ERROR(InRange(code, kBlock, "num_rows", h.num_rows, 1,
                                 limits::kBlockTokens - h.first_position % limits::kBlockTokens));
  STRAIT_RETURN_IF_ERROR(InRange(code, kBlock, "first_position", h.first_position, 0,
                                 limits::kMaxPositionEmbeddings - h.num_rows));
  STRAIT_RETURN_IF_ERROR(InRange(code, kBlock, "rank", h.rank, 1, limits::kMaxLoraRank));
  STRAIT_RETURN_IF_ERROR(InRange(code, kBlock, "rope", h.rope, 1, limits::kMaxHeadDim));
  STRAIT_RETURN_IF_ERROR(InRange(code, kBlock, "row_format", static_cast<uint32_t>(h.row_format), 0,
                                 kNumRowFormats - 1));
  STRAIT_RETURN_IF_ERROR(
      Equal(code, kBlock, "row_bytes", h.row_bytes, RowBytes(h.row_format, h.rank, h.rope)));
  STRAIT_RETURN_IF_ERROR(
      Equal(code, kBlock, "payload_bytes", h.payload_bytes, h.num_rows * h.row_bytes));
  if (h.num_rows != limits::kBlockTokens && h.content_key != ContentKey()) {
    return absl::Status(code, absl::StrCat(kBlock, ": content_key is not 0 with ", h.num_rows,
                                           " rows: only a full block has one"));
  }
  return absl::OkStatus();
}

// `head` is TransferHeadBytes of some number.
uint64_t HeadChecksum(absl::Span<const std::byte> head) {
  XXH3_state_t state;
  STRAIT_CHECK(XXH3_64bits_reset(&state) == XXH_OK);
  STRAIT_CHECK(XXH3_64bits_update(&state, head.data(), offsetof(TransferHeader, checksum)) ==
               XXH_OK);
  STRAIT_CHECK(XXH3_64bits_update(&state, head.data() + kTransferHeaderBytes,
                                  head.size() - kTransferHeaderBytes) == XXH_OK);
  return XXH3_64bits_digest(&state);
}

absl::Status CheckSize(absl::StatusCode code, const char* header, size_t bytes, size_t expected) {
  return Equal(code, header, "the size in bytes", bytes, expected);
}

}  // namespace

void SealBlockHeader(absl::Span<const std::byte> rows, BlockHeader* header) {
  header->row_bytes = RowBytes(header->row_format, header->rank, header->rope);
  header->payload_bytes = header->num_rows * header->row_bytes;
  STRAIT_CHECK(rows.size() == header->payload_bytes, "rows of another size than their header's");
  header->row_checksum = XXH3_64bits(rows.data(), rows.size());
}

absl::Status CheckRows(const BlockHeader& header, absl::Span<const std::byte> rows) {
  constexpr absl::StatusCode kCode = absl::StatusCode::kDataLoss;
  STRAIT_RETURN_IF_ERROR(Equal(kCode, kBlock, "payload_bytes", header.payload_bytes, rows.size()));
  return Equal(kCode, kBlock, "row_checksum", header.row_checksum,
               XXH3_64bits(rows.data(), rows.size()));
}

absl::Status EncodeBlockHeader(const BlockHeader& header, absl::Span<std::byte> to) {
  constexpr absl::StatusCode kCode = absl::StatusCode::kInvalidArgument;
  STRAIT_RETURN_IF_ERROR(CheckSize(kCode, kBlock, to.size(), kBlockHeaderBytes));
  STRAIT_RETURN_IF_ERROR(CheckFields(kCode, header));
  std::memcpy(to.data(), &header, kBlockHeaderBytes);
  return absl::OkStatus();
}

absl::StatusOr<BlockHeader> DecodeBlockHeader(absl::Span<const std::byte> from) {
  constexpr absl::StatusCode kCode = absl::StatusCode::kDataLoss;
  STRAIT_RETURN_IF_ERROR(CheckSize(kCode, kBlock, from.size(), kBlockHeaderBytes));
  BlockHeader header;
  std::memcpy(&header, from.data(), kBlockHeaderBytes);
  STRAIT_RETURN_IF_ERROR(CheckFields(kCode, header));
  return header;
}

absl::Status EncodeTransferHead(const TransferHeader& header, absl::Span<const BlockHeader> blocks,
                                absl::Span<std::byte> to) {
  constexpr absl::StatusCode kCode = absl::StatusCode::kInvalidArgument;
  STRAIT_RETURN_IF_ERROR(
      InRange(kCode, kTransfer, "num_blocks", blocks.size(), 1, limits::kMaxTransferBlocks));
  TransferHeader h;
  h.sequence_id = header.sequence_id;
  h.placement_term = header.placement_term;
  h.placement_counter = header.placement_counter;
  h.num_blocks = static_cast<uint32_t>(blocks.size());
  STRAIT_RETURN_IF_ERROR(CheckSize(kCode, kTransfer, to.size(), TransferHeadBytes(h.num_blocks)));
  uint64_t payload_bytes = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    STRAIT_RETURN_IF_ERROR(EncodeBlockHeader(
        blocks[i], to.subspan(TransferHeadBytes(static_cast<uint32_t>(i)), kBlockHeaderBytes)));
    payload_bytes += blocks[i].payload_bytes;
  }
  STRAIT_RETURN_IF_ERROR(
      InRange(kCode, kTransfer, "payload_bytes", payload_bytes, 1, limits::kMaxTransferBytes));
  h.payload_bytes = static_cast<uint32_t>(payload_bytes);
  std::memcpy(to.data(), &h, kTransferHeaderBytes);
  h.checksum = HeadChecksum(to);
  std::memcpy(to.data(), &h, kTransferHeaderBytes);
  return absl::OkStatus();
}

absl::StatusOr<TransferHead> DecodeTransferHead(absl::Span<const std::byte> from) {
  constexpr absl::StatusCode kCode = absl::StatusCode::kDataLoss;
  if (from.size() < kTransferHeaderBytes) {
    return CheckSize(kCode, kTransfer, from.size(), kTransferHeaderBytes);
  }
  TransferHead head;
  TransferHeader& h = head.header;
  std::memcpy(&h, from.data(), kTransferHeaderBytes);
  STRAIT_RETURN_IF_ERROR(CheckBeginning(kCode, kTransfer, h));
  STRAIT_RETURN_IF_ERROR(
      InRange(kCode, kTransfer, "num_blocks", h.num_blocks, 1, limits::kMaxTransferBlocks));
  STRAIT_RETURN_IF_ERROR(CheckSize(kCode, kTransfer, from.size(), TransferHeadBytes(h.num_blocks)));
  STRAIT_RETURN_IF_ERROR(Equal(kCode, kTransfer, "checksum", h.checksum, HeadChecksum(from)));
  uint64_t payload_bytes = 0;
  head.blocks.reserve(h.num_blocks);
  for (uint32_t i = 0; i < h.num_blocks; ++i) {
    STRAIT_ASSIGN_OR_RETURN(const BlockHeader block, DecodeBlockHeader(from.subspan(
                                                         TransferHeadBytes(i), kBlockHeaderBytes)));
    payload_bytes += block.payload_bytes;
    head.blocks.push_back(block);
  }
  STRAIT_RETURN_IF_ERROR(
      InRange(kCode, kTransfer, "payload_bytes", payload_bytes, 1, limits::kMaxTransferBytes));
  STRAIT_RETURN_IF_ERROR(Equal(kCode, kTransfer, "payload_bytes", h.payload_bytes, payload_bytes));
  return head;
}

}  // namespace strait
