// SPDX-License-Identifier: Apache-2.0
//
// Defends: rows on the wire are plain protobuf, what is cut off or damaged anywhere is found, and nothing that a peer
// may send reads beyond it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "tests/worker/transfer/rows_node.h"

namespace strait {
namespace {

using testing::HasSubstr;

RowsFrame Sealed() {
  RowsFrame frame = AFrame(AnAsk());
  for (BlockHeader& piece : frame.pieces) piece.row_checksum = 0;
  SealFrame(&frame);
  return frame;
}
std::string Encoded(const RowsFrame& frame, uint64_t request_id = 300) {
  const auto message = EncodeFrame(request_id, frame, Buffers());
  EXPECT_TRUE(message.ok()) << message.status();
  return BytesOf(*message);
}

TEST(RowsMessageTest, AFrameIsWhatTheGeneratedClassReads) {
  const RowsFrame frame = Sealed();
  ExpectEqual(frame, AFrame(AnAsk()));  // sealed as its maker would have
  const std::string bytes = Encoded(frame);
  v1::RowsReply reply;
  ASSERT_TRUE(reply.ParseFromString(bytes));
  EXPECT_EQ(reply.request_id(), 300u);
  EXPECT_EQ(reply.rows(), frame.rows);
  EXPECT_EQ(reply.head().size(), TransferHeadBytes(static_cast<uint32_t>(frame.pieces.size())));
  EXPECT_EQ(reply.SerializeAsString(), bytes);
  const auto parsed = RowsReply::Parse(BufferOf(bytes));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->request_id(), 300u);
  const auto opened = parsed->Open(Buffers().get());
  ASSERT_TRUE(opened.ok()) << opened.status();
  ExpectEqual(*opened, frame);
}

TEST(RowsMessageTest, AFrameInManySlicesIsTheSame) {
  const RowsFrame frame = Sealed();
  const std::string bytes = Encoded(frame);
  std::mt19937 rng(1);
  for (int i = 0; i < 50; ++i) {
    std::vector<grpc::Slice> slices;
    for (size_t at = 0; at < bytes.size();) {
      const size_t count = std::min<size_t>(bytes.size() - at, rng() % 700);
      slices.emplace_back(bytes.substr(at, count));
      at += count;
    }
    const auto parsed = RowsReply::Parse(grpc::ByteBuffer(slices.data(), slices.size()));
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    const auto opened = parsed->Open(Buffers().get());
    ASSERT_TRUE(opened.ok()) << opened.status();
    ExpectEqual(*opened, frame);
  }
}

TEST(RowsMessageTest, AnErrorIsTold) {
  const auto parsed =
      RowsReply::Parse(EncodeError(5, absl::OutOfRangeError("not finished: row 7")));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->request_id(), 5u);
  EXPECT_EQ(parsed->Open(Buffers().get()).status(), absl::OutOfRangeError("not finished: row 7"));
}

TEST(RowsMessageTest, WhatIsCutOffAnywhereIsFound) {
  const std::string bytes = Encoded(Sealed());
  for (size_t length = 0; length < bytes.size(); length += length < 1'000 ? 1 : 97) {
    const auto parsed = RowsReply::Parse(BufferOf(bytes.substr(0, length)));
    if (!parsed.ok()) continue;
    EXPECT_EQ(parsed->Open(Buffers().get()).status().code(), absl::StatusCode::kDataLoss) << length;
  }
  const auto longer = RowsReply::Parse(BufferOf(bytes + "x"));
  EXPECT_TRUE(!longer.ok() || absl::IsDataLoss(longer->Open(Buffers().get()).status()));
}

TEST(RowsMessageTest, OneByteOfDamageIsFound) {
  const RowsFrame frame = Sealed();
  const std::string bytes = Encoded(frame);
  std::mt19937 rng(2);
  for (size_t at = 3; at < bytes.size(); at += at < 1'500 ? 1 : 1 + rng() % 50) {
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << rng() % 8));
    const auto parsed = RowsReply::Parse(BufferOf(damaged));
    if (!parsed.ok()) continue;
    // A header may say that it is of another version.
    const absl::Status status = parsed->Open(Buffers().get()).status();
    EXPECT_TRUE(absl::IsDataLoss(status) || absl::IsFailedPrecondition(status))
        << "byte " << at << ": " << status;
  }
}

TEST(RowsMessageTest, WhatNobodyWritesIsRefused) {
  v1::RowsReply reply;
  reply.set_error_code(5);
  EXPECT_THAT(RowsReply::Parse(BufferOf(reply.SerializeAsString())).status().message(),
              HasSubstr("does not begin"));
  EXPECT_FALSE(RowsReply::Parse(BufferOf("")).ok());
  reply.set_request_id(1);
  reply.set_error_code(0);
  reply.set_rows(std::string(limits::kTransferFrameBytes + 1, 'x'));
  const auto parsed = RowsReply::Parse(BufferOf(reply.SerializeAsString()));
  ASSERT_TRUE(parsed.ok());
  EXPECT_THAT(parsed->Open(Buffers().get()).status().message(), HasSubstr("more than a frame"));
  EXPECT_FALSE(ParseRequest(BufferOf(std::string(5'000, 'x'))).ok());
  EXPECT_FALSE(ParseRequest(BufferOf("xyz")).ok());
  RowsFrame frame = Sealed();
  frame.pieces.clear();
  EXPECT_FALSE(EncodeFrame(1, frame, Buffers()).ok());
}

TEST(RowsMessageTest, ARequestIsWhatWasAsked) {
  const RowsAsk ask = AnAsk();
  const auto parsed = ParseRequest(BufferOf(ToWire(9, ask).SerializeAsString()));
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed->request_id(), 9u);
  const RowsAsk back = FromWire(*parsed);
  EXPECT_EQ(back.stage_id, ask.stage_id);
  EXPECT_EQ(back.epoch, ask.epoch);
  EXPECT_EQ(back.sequence, ask.sequence);
  EXPECT_EQ(back.placement, ask.placement);
  EXPECT_EQ(back.secret, ask.secret);
  EXPECT_EQ(back.layers, ask.layers);
  EXPECT_EQ(back.first_row, ask.first_row);
  EXPECT_EQ(back.num_rows, ask.num_rows);
}

}  // namespace
}  // namespace strait
