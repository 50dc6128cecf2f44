// SPDX-License-Identifier: Apache-2.0
//
// The latent block byte by byte: how a cache row lies in memory, and the two headers that go with
// rows when they leave a stage's pool.
//
// Thread:  plain values, pure functions.
// Shapes:  all numbers little-endian, all offsets fixed, no byte without a meaning. Row:
//            kFp32, kBf16   latent[rank] rope_key[rope], fp32 or bf16
//            kFp8           codes[rank] e4m3, zeros to kRowAlign; scales[rank / kScaleCodes, rounded
//                           up] fp32, code times scale is the value; rope_key[rope] bf16
//            kInt4          codes[rank], two a byte, column 2i in the low half of byte i, a two's
//                           complement each, -8 to 7, zeros to kRowAlign; scales[rank / kInt4Codes,
//                           rounded up] fp16, code times scale is the value; rope_key[rope] bf16
//          and zeros to kRowAlign. rope_key is rotated for its absolute position. A block is
//          kBlockTokens rows of one layer; its row r holds the position p with p % kBlockTokens == r.
//          Transfer: TransferHeader, BlockHeader[num_blocks], then the rows of these blocks, packed
//          in the same order.
// Limits:  proto/base/limits.h; proto/wire/block_codec.h holds every field to them.
// Why:     pool, host memory and wire hold the same row bytes, so moving a row is copying it, and
//          one checksum of it is true everywhere. Plain C++20 without abseil: kernels, device code
//          among them, read rows by this header (besides proto/base/check.h the only one of proto
//          that they may include).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "proto/base/limits.h"

namespace strait {

// ---- Rows ----

// Numbers as they stand in a BlockHeader. kFp8: GPUs alone. kInt4: old rows under a policy; new rows
// are never written in it, and no kernel reads it yet.
enum class RowFormat : uint32_t { kFp32 = 0, kBf16 = 1, kFp8 = 2, kInt4 = 3 };
inline constexpr uint32_t kNumRowFormats = 4;

inline constexpr uint32_t kScaleCodes = 128;  // codes of an fp8 row that share a scale
inline constexpr uint32_t kInt4Codes = 32;    // codes of an int4 row that share a scale

constexpr uint32_t RoundUpToRowAlign(uint32_t bytes) {
  return (bytes + limits::kRowAlign - 1) / limits::kRowAlign * limits::kRowAlign;
}

// The latent begins the row.
inline constexpr uint32_t kLatentOffset = 0;

// Of the first `columns` of a latent, scales not counted.
constexpr uint32_t LatentBytes(RowFormat format, uint32_t columns) {
  return format == RowFormat::kInt4   ? (columns + 1) / 2
         : format == RowFormat::kFp8  ? columns
         : format == RowFormat::kBf16 ? columns * 2
                                      : columns * 4;
}

// Of the scales of these columns.
constexpr uint32_t ScaleBytes(RowFormat format, uint32_t columns) {
  return format == RowFormat::kInt4  ? (columns + kInt4Codes - 1) / kInt4Codes * 2
         : format == RowFormat::kFp8 ? (columns + kScaleCodes - 1) / kScaleCodes * 4
                                     : 0;
}

// Of an fp8 row.
constexpr uint32_t ScalesOffset(uint32_t rank) { return RoundUpToRowAlign(rank); }
// Of an int4 row.
constexpr uint32_t Int4ScalesOffset(uint32_t rank) {
  return RoundUpToRowAlign(LatentBytes(RowFormat::kInt4, rank));
}

// A multiple of 2: what a bf16 needs, and no more with int4.
constexpr uint32_t RopeKeyOffset(RowFormat format, uint32_t rank) {
  const uint32_t latent = LatentBytes(format, rank);
  const uint32_t scales = ScaleBytes(format, rank);
  return scales > 0 ? RoundUpToRowAlign(latent) + scales : latent;
}

// Where a row's zeros begin.
constexpr uint32_t RowEnd(RowFormat format, uint32_t rank, uint32_t rope) {
  return RopeKeyOffset(format, rank) + rope * (format == RowFormat::kFp32 ? 4 : 2);
}

// The distance between rows.
constexpr uint32_t RowBytes(RowFormat format, uint32_t rank, uint32_t rope) {
  return RoundUpToRowAlign(RowEnd(format, rank, rope));
}

constexpr uint64_t BlockBytes(RowFormat format, uint32_t rank, uint32_t rope) {
  return uint64_t{RowBytes(format, rank, rope)} * limits::kBlockTokens;
}

// V3's rows.
static_assert(RopeKeyOffset(RowFormat::kFp32, 512) == 2048);
static_assert(RowBytes(RowFormat::kFp32, 512, 64) == 2304);
static_assert(RopeKeyOffset(RowFormat::kBf16, 512) == 1024);
static_assert(RowBytes(RowFormat::kBf16, 512, 64) == 1152);
static_assert(ScalesOffset(512) == 512);
static_assert(RopeKeyOffset(RowFormat::kFp8, 512) == 528);
static_assert(RowBytes(RowFormat::kFp8, 512, 64) == 656);
static_assert(BlockBytes(RowFormat::kFp8, 512, 64) == 41984);
static_assert(Int4ScalesOffset(512) == 256);
static_assert(RopeKeyOffset(RowFormat::kInt4, 512) == 288);
static_assert(RowBytes(RowFormat::kInt4, 512, 64) == 416);
static_assert(BlockBytes(RowFormat::kInt4, 512, 64) == 26624);
// Where the latent of codes, or the row, is rounded up.
static_assert(ScalesOffset(36) == 48 && RopeKeyOffset(RowFormat::kFp8, 36) == 52);
static_assert(RowEnd(RowFormat::kFp8, 36, 24) == 100 && RowBytes(RowFormat::kFp8, 36, 24) == 112);
static_assert(Int4ScalesOffset(37) == 32 && RopeKeyOffset(RowFormat::kInt4, 37) == 36);
static_assert(RowEnd(RowFormat::kInt4, 37, 24) == 84 && RowBytes(RowFormat::kInt4, 37, 24) == 96);
// No row that the limits allow overflows, nor does a block.
static_assert(BlockBytes(RowFormat::kFp32, limits::kMaxLoraRank, limits::kMaxHeadDim) ==
              uint64_t{limits::kBlockTokens} * (limits::kMaxLoraRank + limits::kMaxHeadDim) * 4);
static_assert(BlockBytes(RowFormat::kFp32, limits::kMaxLoraRank, limits::kMaxHeadDim) <=
              limits::kMaxTransferBytes);

// ---- Headers ----

inline constexpr uint16_t kLatentBlockVersion = 1;         // of rows and of both headers
inline constexpr uint32_t kBlockMagic = 0x42'4C'54'53;     // "STLB" in memory
inline constexpr uint32_t kTransferMagic = 0x54'4C'54'53;  // "STLT" in memory

// What rows are a function of, besides tokens: rows are the same only where all four are.
struct BlockOrigin {
  uint64_t model = 0;     // fingerprint of the weights
  uint64_t basis = 0;     // of the basis that latents are rotated into; 0: unrotated
  uint64_t policy = 0;    // 0: exact
  uint64_t numerics = 0;  // of numerics_id
  friend bool operator==(const BlockOrigin&, const BlockOrigin&) = default;
};

// Stands for all tokens from position 0 to a sealed block's last row.
struct ContentKey {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const ContentKey&, const ContentKey&) = default;
};

// Of rows of one block outside the pool. Sealed: all kBlockTokens rows, and a content key. Else rows
// without a key: a tail's, which are fewer, or any that go from one worker to another as part of a
// sequence that both know: there nothing is looked up by its contents.
struct BlockHeader {
  uint32_t magic = kBlockMagic;
  uint16_t version = kLatentBlockVersion;
  uint16_t header_bytes = 96;
  BlockOrigin origin;
  ContentKey content_key;       // 0: not sealed
  uint32_t layer = 0;           // of the model
  uint32_t first_position = 0;  // of the first row; all rows are of one block
  uint32_t num_rows = 0;
  uint32_t rank = 0;  // latent columns stored
  uint32_t rope = 0;  // qk_rope_head_dim
  RowFormat row_format = RowFormat::kFp32;
  uint32_t row_bytes = 0;      // RowBytes(row_format, rank, rope)
  uint32_t payload_bytes = 0;  // num_rows * row_bytes
  uint64_t row_checksum = 0;   // XXH3-64 of the payload; of a sealed block made once, at seal

  friend bool operator==(const BlockHeader&, const BlockHeader&) = default;
};
inline constexpr size_t kBlockHeaderBytes = 96;

static_assert(offsetof(BlockHeader, magic) == 0);
static_assert(offsetof(BlockHeader, version) == 4);
static_assert(offsetof(BlockHeader, header_bytes) == 6);
static_assert(offsetof(BlockHeader, origin) == 8);
static_assert(offsetof(BlockOrigin, model) == 0 && offsetof(BlockOrigin, basis) == 8);
static_assert(offsetof(BlockOrigin, policy) == 16 && offsetof(BlockOrigin, numerics) == 24);
static_assert(offsetof(BlockHeader, content_key) == 40);
static_assert(offsetof(ContentKey, low) == 0 && offsetof(ContentKey, high) == 8);
static_assert(offsetof(BlockHeader, layer) == 56);
static_assert(offsetof(BlockHeader, first_position) == 60);
static_assert(offsetof(BlockHeader, num_rows) == 64);
static_assert(offsetof(BlockHeader, rank) == 68);
static_assert(offsetof(BlockHeader, rope) == 72);
static_assert(offsetof(BlockHeader, row_format) == 76);
static_assert(offsetof(BlockHeader, row_bytes) == 80);
static_assert(offsetof(BlockHeader, payload_bytes) == 84);
static_assert(offsetof(BlockHeader, row_checksum) == 88);
static_assert(sizeof(BlockHeader) == kBlockHeaderBytes && kBlockHeaderBytes % 16 == 0);

// Before the block headers of one message.
struct TransferHeader {
  uint32_t magic = kTransferMagic;
  uint16_t version = kLatentBlockVersion;
  uint16_t header_bytes = 48;
  uint64_t sequence_id = 0;
  uint64_t placement_term = 0;  // the placement epoch under which the rows were read
  uint64_t placement_counter = 0;
  uint32_t num_blocks = 0;
  uint32_t payload_bytes = 0;  // of all blocks: what follows their headers
  // XXH3-64 of the bytes before it, then of the block headers.
  uint64_t checksum = 0;

  friend bool operator==(const TransferHeader&, const TransferHeader&) = default;
};
inline constexpr size_t kTransferHeaderBytes = 48;

static_assert(offsetof(TransferHeader, magic) == 0);
static_assert(offsetof(TransferHeader, version) == 4);
static_assert(offsetof(TransferHeader, header_bytes) == 6);
static_assert(offsetof(TransferHeader, sequence_id) == 8);
static_assert(offsetof(TransferHeader, placement_term) == 16);
static_assert(offsetof(TransferHeader, placement_counter) == 24);
static_assert(offsetof(TransferHeader, num_blocks) == 32);
static_assert(offsetof(TransferHeader, payload_bytes) == 36);
static_assert(offsetof(TransferHeader, checksum) == 40);
static_assert(sizeof(TransferHeader) == kTransferHeaderBytes && kTransferHeaderBytes % 16 == 0);

// No padding: every byte of a header is a field's.
static_assert(std::has_unique_object_representations_v<BlockHeader> &&
              std::is_trivially_copyable_v<BlockHeader>);
static_assert(std::has_unique_object_representations_v<TransferHeader> &&
              std::is_trivially_copyable_v<TransferHeader>);

// Of both kinds of headers: where a transfer's rows begin.
constexpr size_t TransferHeadBytes(uint32_t num_blocks) {
  return kTransferHeaderBytes + size_t{num_blocks} * kBlockHeaderBytes;
}

}  // namespace strait
