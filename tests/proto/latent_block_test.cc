// SPDX-License-Identifier: Apache-2.0
//
// Defends: the bytes of rows and headers, spelled out here a second time; what is written is read
// back; no damaged, foreign or impossible header is taken, and the refusal names the field.
#include "proto/latent_block.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "proto/wire/block_codec.h"

namespace strait {
namespace {

using testing::HasSubstr;
using Bytes = std::vector<std::byte>;

Bytes Rows(size_t count, uint8_t salt) {
  Bytes rows(count);
  for (size_t i = 0; i < count; ++i) rows[i] = static_cast<std::byte>(i * 7 + salt);
  return rows;
}

// V3's fp8 rows of positions 128 to 191 in layer 3; sealed.
BlockHeader Sealed() {
  BlockHeader h;
  h.origin = {0x0102030405060708, 0x1112131415161718, 0x2122232425262728, 0x3132333435363738};
  h.content_key = {0x4142434445464748, 0x5152535455565758};
  h.layer = 3;
  h.first_position = 128;
  h.num_rows = 64;
  h.rank = 512;
  h.rope = 64;
  h.row_format = RowFormat::kFp8;
  SealBlockHeader(Rows(64 * 656, 1), &h);
  return h;
}

// Positions 200 and 201 of the same.
BlockHeader Tail() {
  BlockHeader h = Sealed();
  h.content_key = {};
  h.first_position = 200;
  h.num_rows = 2;
  SealBlockHeader(Rows(2 * 656, 2), &h);
  return h;
}

TransferHeader Transfer() {
  TransferHeader h;
  h.sequence_id = 0x6162636465666768;
  h.placement_term = 0x7172737475767778;
  h.placement_counter = 0x0908070605040302;
  return h;
}

Bytes Encoded(const BlockHeader& h) {
  Bytes bytes(kBlockHeaderBytes);
  EXPECT_TRUE(EncodeBlockHeader(h, absl::MakeSpan(bytes)).ok());
  return bytes;
}

Bytes Encoded(const std::vector<BlockHeader>& blocks) {
  Bytes bytes(TransferHeadBytes(static_cast<uint32_t>(blocks.size())));
  const absl::Status status = EncodeTransferHead(Transfer(), blocks, absl::MakeSpan(bytes));
  EXPECT_TRUE(status.ok()) << status;
  return bytes;
}

template <class T>
T At(const Bytes& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

TEST(LatentBlockTest, RowsOfV3) {
  EXPECT_EQ(RowBytes(RowFormat::kFp32, 512, 64), 2304u);
  EXPECT_EQ(RowBytes(RowFormat::kBf16, 512, 64), 1152u);
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 512, 64), 656u);  // 512 + 4 * 4 + 64 * 2
  EXPECT_EQ(BlockBytes(RowFormat::kFp32, 512, 64), 147456u);
  EXPECT_EQ(BlockBytes(RowFormat::kBf16, 512, 64), 73728u);
  EXPECT_EQ(BlockBytes(RowFormat::kFp8, 512, 64), 41984u);
  EXPECT_EQ(RowBytes(RowFormat::kInt4, 512, 64), 416u);  // 512 / 2 + 16 * 2 + 64 * 2
  EXPECT_EQ(BlockBytes(RowFormat::kInt4, 512, 64), 26624u);
}

TEST(LatentBlockTest, OddRowsAreRoundedUp) {
  EXPECT_EQ(RowBytes(RowFormat::kFp32, 36, 24), 240u);
  EXPECT_EQ(RowEnd(RowFormat::kBf16, 36, 24), 120u);
  EXPECT_EQ(RowBytes(RowFormat::kBf16, 36, 24), 128u);
  EXPECT_EQ(RopeKeyOffset(RowFormat::kFp32, 36), 144u);
  EXPECT_EQ(RopeKeyOffset(RowFormat::kBf16, 36), 72u);
  EXPECT_EQ(ScalesOffset(36), 48u);
  EXPECT_EQ(RopeKeyOffset(RowFormat::kFp8, 36), 52u);
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 36, 24), 112u);   // 36 to 48, 4, 48: 100
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 128, 16), 176u);  // 128 + 4 + 32: 164
  EXPECT_EQ(RowBytes(RowFormat::kFp8, 144, 16), 192u);  // 144 + 8 + 32: 184
  EXPECT_EQ(RopeKeyOffset(RowFormat::kFp8, 129), 144u + 8);
  EXPECT_EQ(Int4ScalesOffset(36), 32u);                  // 18 to 32
  EXPECT_EQ(RopeKeyOffset(RowFormat::kInt4, 36), 36u);   // two scales
  EXPECT_EQ(RowBytes(RowFormat::kInt4, 36, 24), 96u);    // 36 + 48: 84
  EXPECT_EQ(RowBytes(RowFormat::kInt4, 128, 16), 112u);  // 64 + 8 + 32: 104
  EXPECT_EQ(RopeKeyOffset(RowFormat::kInt4, 33), 32u + 4);
  EXPECT_EQ(RopeKeyOffset(RowFormat::kInt4, 1), 16u + 2);
}

// Every plane of a row begins behind the one before, where its numbers may lie; a row is a block's 64th.
TEST(LatentBlockTest, PlanesOfARowDoNotMeet) {
  for (uint32_t f = 0; f < kNumRowFormats; ++f) {
    const auto format = static_cast<RowFormat>(f);
    const bool codes = format == RowFormat::kFp8 || format == RowFormat::kInt4;
    for (uint32_t rank = 1; rank <= 600; ++rank) {
      const uint32_t latent = LatentBytes(format, rank);
      const uint32_t key = RopeKeyOffset(format, rank);
      ASSERT_EQ(ScaleBytes(format, rank) > 0, codes);
      ASSERT_GE(key, latent + ScaleBytes(format, rank));
      ASSERT_EQ(key % (format == RowFormat::kFp32 ? 4 : 2), 0u);
      if (codes) {
        const uint32_t scales =
            format == RowFormat::kFp8 ? ScalesOffset(rank) : Int4ScalesOffset(rank);
        ASSERT_EQ(key, scales + ScaleBytes(format, rank));
        ASSERT_GE(scales, latent);
        ASSERT_LT(scales, latent + limits::kRowAlign);
      } else {
        ASSERT_EQ(key, latent);
      }
      ASSERT_EQ(RowBytes(format, rank, 24) % limits::kRowAlign, 0u);
      ASSERT_EQ(BlockBytes(format, rank, 24), 64u * RowBytes(format, rank, 24));
    }
  }
}

TEST(LatentBlockTest, EveryByteOfABlockHeader) {
  const Bytes bytes = Encoded(Sealed());
  ASSERT_EQ(bytes.size(), 96u);
  EXPECT_EQ(std::memcmp(bytes.data(), "STLB", 4), 0);
  EXPECT_EQ(At<uint16_t>(bytes, 4), 1);
  EXPECT_EQ(At<uint16_t>(bytes, 6), 96);
  // Little-endian: the low byte first.
  EXPECT_EQ(bytes[8], std::byte{0x08});
  EXPECT_EQ(bytes[15], std::byte{0x01});
  EXPECT_EQ(At<uint64_t>(bytes, 8), 0x0102030405060708u);
  EXPECT_EQ(At<uint64_t>(bytes, 16), 0x1112131415161718u);
  EXPECT_EQ(At<uint64_t>(bytes, 24), 0x2122232425262728u);
  EXPECT_EQ(At<uint64_t>(bytes, 32), 0x3132333435363738u);
  EXPECT_EQ(At<uint64_t>(bytes, 40), 0x4142434445464748u);
  EXPECT_EQ(At<uint64_t>(bytes, 48), 0x5152535455565758u);
  EXPECT_EQ(At<uint32_t>(bytes, 56), 3u);      // layer
  EXPECT_EQ(At<uint32_t>(bytes, 60), 128u);    // first_position
  EXPECT_EQ(At<uint32_t>(bytes, 64), 64u);     // num_rows
  EXPECT_EQ(At<uint32_t>(bytes, 68), 512u);    // rank
  EXPECT_EQ(At<uint32_t>(bytes, 72), 64u);     // rope
  EXPECT_EQ(At<uint32_t>(bytes, 76), 2u);      // row_format
  EXPECT_EQ(At<uint32_t>(bytes, 80), 656u);    // row_bytes
  EXPECT_EQ(At<uint32_t>(bytes, 84), 41984u);  // payload_bytes
  EXPECT_EQ(At<uint64_t>(bytes, 88), Sealed().row_checksum);
}

TEST(LatentBlockTest, EveryByteOfATransferHead) {
  const Bytes bytes = Encoded({Sealed(), Tail()});
  ASSERT_EQ(bytes.size(), 48u + 2 * 96);
  EXPECT_EQ(std::memcmp(bytes.data(), "STLT", 4), 0);
  EXPECT_EQ(At<uint16_t>(bytes, 4), 1);
  EXPECT_EQ(At<uint16_t>(bytes, 6), 48);
  EXPECT_EQ(At<uint64_t>(bytes, 8), 0x6162636465666768u);
  EXPECT_EQ(At<uint64_t>(bytes, 16), 0x7172737475767778u);
  EXPECT_EQ(At<uint64_t>(bytes, 24), 0x0908070605040302u);
  EXPECT_EQ(At<uint32_t>(bytes, 32), 2u);
  EXPECT_EQ(At<uint32_t>(bytes, 36), 66u * 656);
  EXPECT_EQ(std::memcmp(bytes.data() + 48, Encoded(Sealed()).data(), 96), 0);
  EXPECT_EQ(std::memcmp(bytes.data() + 144, Encoded(Tail()).data(), 96), 0);
}

// The checksum of a transfer head by its specification.
void Rehash(Bytes* head) {
  Bytes covered(head->begin(), head->begin() + 40);
  covered.insert(covered.end(), head->begin() + 48, head->end());
  const uint64_t checksum = XXH3_64bits(covered.data(), covered.size());
  std::memcpy(head->data() + 40, &checksum, sizeof(checksum));
}

TEST(LatentBlockTest, ChecksumsAreXxh3) {
  const Bytes rows = Rows(64 * 656, 1);
  EXPECT_EQ(Sealed().row_checksum, XXH3_64bits(rows.data(), rows.size()));
  const Bytes head = Encoded({Sealed(), Tail()});
  Bytes rehashed = head;
  Rehash(&rehashed);
  EXPECT_EQ(rehashed, head);
  // And stay what they are, whatever release of the library makes them.
  EXPECT_EQ(Sealed().row_checksum, 13939842051258201420u);
  EXPECT_EQ(At<uint64_t>(head, 40), 3312451720669086271u);
}

TEST(LatentBlockTest, RoundTrip) {
  for (const BlockHeader& h : {Sealed(), Tail()}) {
    const auto decoded = DecodeBlockHeader(Encoded(h));
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, h);
  }
  const auto decoded = DecodeTransferHead(Encoded({Sealed(), Tail()}));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->blocks, (std::vector<BlockHeader>{Sealed(), Tail()}));
  EXPECT_EQ(decoded->header.sequence_id, Transfer().sequence_id);
  EXPECT_EQ(decoded->header.placement_term, Transfer().placement_term);
  EXPECT_EQ(decoded->header.placement_counter, Transfer().placement_counter);
  EXPECT_EQ(decoded->header.num_blocks, 2u);
  EXPECT_EQ(decoded->header.payload_bytes, 66u * 656);
}

TEST(LatentBlockTest, TheLargestAndTheSmallestAreTaken) {
  BlockHeader h = Sealed();
  h.layer = 1023;
  h.first_position = (1u << 22) - 64;
  h.rank = 8192;
  h.rope = 1024;
  h.row_format = RowFormat::kFp32;
  SealBlockHeader(Rows(64 * 9216 * 4, 0), &h);
  EXPECT_TRUE(DecodeBlockHeader(Encoded(h)).ok());
  h = Tail();
  h.layer = 0;
  h.first_position = 0;
  h.num_rows = 1;
  h.rank = 1;
  h.rope = 1;
  SealBlockHeader(Rows(32, 0), &h);  // 1 to 16, 4, 2: 22
  EXPECT_TRUE(DecodeBlockHeader(Encoded(h)).ok());
}

TEST(LatentBlockTest, Int4BlocksAreTaken) {
  BlockHeader h = Sealed();
  h.row_format = RowFormat::kInt4;
  for (const uint32_t rank : {1u, 16u, 37u, 512u, 8192u}) {
    h.rank = rank;
    SealBlockHeader(Rows(64 * RowBytes(RowFormat::kInt4, rank, 64), 3), &h);
    const Bytes bytes = Encoded(h);
    EXPECT_EQ(At<uint32_t>(bytes, 76), 3u);
    const auto decoded = DecodeBlockHeader(bytes);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, h);
  }
  h.rank = 8193;
  SealBlockHeader(Rows(64 * RowBytes(RowFormat::kInt4, 8193, 64), 3), &h);
  Bytes bytes(kBlockHeaderBytes);
  EXPECT_THAT(EncodeBlockHeader(h, absl::MakeSpan(bytes)).message(), HasSubstr("rank is 8193"));
}

struct Wrong {
  const char* field;
  std::function<void(BlockHeader*)> spoil;
  absl::StatusCode code = absl::StatusCode::kDataLoss;
};

const std::vector<Wrong>& WrongBlocks() {
  static const std::vector<Wrong> wrong = {
      {"magic", [](BlockHeader* h) { h->magic = kTransferMagic; }},
      {"version", [](BlockHeader* h) { h->version = 2; }, absl::StatusCode::kFailedPrecondition},
      {"version", [](BlockHeader* h) { h->version = 0; }, absl::StatusCode::kFailedPrecondition},
      {"header_bytes", [](BlockHeader* h) { h->header_bytes = 112; }},
      {"layer", [](BlockHeader* h) { h->layer = 1024; }},
      {"layer", [](BlockHeader* h) { h->layer = ~0u; }},
      {"first_position", [](BlockHeader* h) { h->first_position = 1u << 22; }},
      {"first_position", [](BlockHeader* h) { h->first_position = ~0u - 63; }},
      {"num_rows", [](BlockHeader* h) { h->first_position = 129; }},  // over the block's end
      {"num_rows", [](BlockHeader* h) { h->num_rows = 0; }},
      {"num_rows", [](BlockHeader* h) { h->num_rows = 65; }},
      {"num_rows", [](BlockHeader* h) { h->num_rows = ~0u; }},
      {"payload_bytes", [](BlockHeader* h) { h->num_rows = 63; }},
      {"rank", [](BlockHeader* h) { h->rank = 0; }},
      {"rank", [](BlockHeader* h) { h->rank = 8193; }},
      {"rank", [](BlockHeader* h) { h->rank = ~0u; }},
      {"row_bytes", [](BlockHeader* h) { h->rank = 256; }},
      {"rope", [](BlockHeader* h) { h->rope = 0; }},
      {"rope", [](BlockHeader* h) { h->rope = 1025; }},
      {"row_format", [](BlockHeader* h) { h->row_format = static_cast<RowFormat>(4); }},
      {"row_format", [](BlockHeader* h) { h->row_format = static_cast<RowFormat>(~0u); }},
      {"row_bytes", [](BlockHeader* h) { h->row_format = RowFormat::kBf16; }},
      {"row_bytes", [](BlockHeader* h) { h->row_format = RowFormat::kInt4; }},
      {"row_bytes", [](BlockHeader* h) { h->row_bytes = 672; }},
      {"payload_bytes", [](BlockHeader* h) { h->payload_bytes -= 656; }},
      {"payload_bytes", [](BlockHeader* h) { h->payload_bytes = 0; }},
  };
  return wrong;
}

TEST(LatentBlockTest, AnImpossibleBlockIsRefusedByItsField) {
  for (const Wrong& wrong : WrongBlocks()) {
    BlockHeader h = Sealed();
    wrong.spoil(&h);
    Bytes bytes(kBlockHeaderBytes);
    const absl::Status encoded = EncodeBlockHeader(h, absl::MakeSpan(bytes));
    EXPECT_EQ(encoded.code(), wrong.code == absl::StatusCode::kDataLoss
                                  ? absl::StatusCode::kInvalidArgument
                                  : wrong.code);
    EXPECT_THAT(encoded.message(), HasSubstr(std::string("block header: ") + wrong.field));
    std::memcpy(bytes.data(), &h, sizeof(h));
    const absl::Status decoded = DecodeBlockHeader(bytes).status();
    EXPECT_EQ(decoded.code(), wrong.code) << decoded;
    EXPECT_THAT(decoded.message(), HasSubstr(std::string("block header: ") + wrong.field));
  }
  BlockHeader tail = Tail();
  tail.content_key.high = 1;
  const absl::Status status = EncodeBlockHeader(tail, absl::MakeSpan(Bytes(96).data(), 96));
  EXPECT_THAT(status.message(), HasSubstr("content_key is not 0"));
}

TEST(LatentBlockTest, AFullBlockMayGoWithoutAKey) {
  BlockHeader h = Sealed();
  h.content_key = {};
  Bytes bytes(kBlockHeaderBytes);
  EXPECT_TRUE(EncodeBlockHeader(h, absl::MakeSpan(bytes)).ok());
  EXPECT_TRUE(DecodeBlockHeader(bytes).ok());
}

TEST(LatentBlockTest, OneBitOfDamageIsFound) {
  const Bytes good = Encoded({Sealed(), Tail()});
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    Bytes bytes = good;
    bytes[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
    const absl::Status status = DecodeTransferHead(bytes).status();
    ASSERT_FALSE(status.ok()) << "bit " << bit;
    const char* field = bit < 32           ? "magic"
                        : bit < 48         ? "version"
                        : bit < 64         ? "header_bytes"
                        : bit / 8 / 4 == 8 ? ""  // num_blocks, or the size that it stands for
                                           : "checksum";
    EXPECT_THAT(status.message(), HasSubstr(std::string("transfer header: ") + field));
  }
}

TEST(LatentBlockTest, ATransferOfAnotherSizeIsRefused) {
  const Bytes good = Encoded({Sealed(), Tail()});
  for (size_t bytes = 0; bytes < good.size(); ++bytes) {
    EXPECT_FALSE(DecodeTransferHead(absl::MakeSpan(good).subspan(0, bytes)).ok());
  }
  Bytes longer = good;
  longer.resize(good.size() + 96);
  EXPECT_THAT(DecodeTransferHead(longer).status().message(), HasSubstr("size in bytes"));
}

// Who makes a checksum of nonsense is refused all the same.
TEST(LatentBlockTest, AnImpossibleBlockOfATransferIsRefused) {
  for (const Wrong& wrong : WrongBlocks()) {
    BlockHeader h = Sealed();
    wrong.spoil(&h);
    Bytes head = Encoded({Tail(), Sealed()});
    std::memcpy(head.data() + 144, &h, sizeof(h));
    Rehash(&head);
    const absl::Status status = DecodeTransferHead(head).status();
    EXPECT_EQ(status.code(), wrong.code);
    EXPECT_THAT(status.message(), HasSubstr(std::string("block header: ") + wrong.field));
  }
  for (const uint32_t payload_bytes : {0u, 66u * 656 + 1, ~0u}) {
    Bytes head = Encoded({Sealed(), Tail()});
    std::memcpy(head.data() + 36, &payload_bytes, sizeof(payload_bytes));
    Rehash(&head);
    EXPECT_THAT(DecodeTransferHead(head).status().message(), HasSubstr("header: payload_bytes"));
  }
  for (const uint32_t num_blocks : {0u, 4097u, ~0u}) {
    Bytes head = Encoded({Sealed(), Tail()});
    std::memcpy(head.data() + 32, &num_blocks, sizeof(num_blocks));
    Rehash(&head);
    EXPECT_THAT(DecodeTransferHead(head).status().message(), HasSubstr("header: num_blocks"));
  }
}

TEST(LatentBlockTest, AnImpossibleTransferIsRefused) {
  Bytes to(TransferHeadBytes(1));
  EXPECT_THAT(EncodeTransferHead(Transfer(), {}, absl::MakeSpan(to)).message(),
              HasSubstr("num_blocks"));
  const std::vector<BlockHeader> many(limits::kMaxTransferBlocks + 1, Tail());
  Bytes room(TransferHeadBytes(limits::kMaxTransferBlocks + 1));
  EXPECT_THAT(EncodeTransferHead(Transfer(), many, absl::MakeSpan(room)).message(),
              HasSubstr("num_blocks"));
  EXPECT_THAT(EncodeTransferHead(Transfer(), {Sealed(), Tail()}, absl::MakeSpan(to)).message(),
              HasSubstr("size in bytes"));
  const std::vector<BlockHeader> heavy(limits::kMaxTransferBytes / Sealed().payload_bytes + 1,
                                       Sealed());
  room.resize(TransferHeadBytes(static_cast<uint32_t>(heavy.size())));
  EXPECT_THAT(EncodeTransferHead(Transfer(), heavy, absl::MakeSpan(room)).message(),
              HasSubstr("payload_bytes"));
}

TEST(LatentBlockTest, RowsAreHeldToTheirChecksum) {
  const Bytes rows = Rows(64 * 656, 1);
  EXPECT_TRUE(CheckRows(Sealed(), rows).ok());
  EXPECT_THAT(CheckRows(Sealed(), Rows(64 * 656, 2)).message(), HasSubstr("row_checksum"));
  EXPECT_THAT(CheckRows(Sealed(), absl::MakeSpan(rows).subspan(656)).message(),
              HasSubstr("payload_bytes"));
  for (const size_t at : {size_t{0}, rows.size() / 2, rows.size() - 1}) {
    Bytes damaged = rows;
    damaged[at] ^= std::byte{1};
    EXPECT_EQ(CheckRows(Sealed(), damaged).code(), absl::StatusCode::kDataLoss);
  }
}

}  // namespace
}  // namespace strait
