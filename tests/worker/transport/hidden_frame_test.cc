// SPDX-License-Identifier: Apache-2.0
//
// Defends: the hand-written frames are the bytes that the .proto says, and nothing else is read as
// a frame.
#include "worker/transport/hidden_frame.h"

#include <random>

#include "gtest/gtest.h"
#include "proto/base/limits.h"
#include "xxhash.h"

namespace strait {
namespace {

std::string Bytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string out;
  for (const auto& slice : slices) {
    out.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return out;
}

// Cut into slices of at most `piece` bytes, as a network may.
grpc::ByteBuffer Buffer(const std::string& bytes, size_t piece = 1 << 30) {
  std::vector<grpc::Slice> slices;
  for (size_t i = 0; i < bytes.size(); i += piece) slices.emplace_back(bytes.substr(i, piece));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::shared_ptr<const HiddenStep> RandomStep(std::mt19937_64& random, uint32_t tokens,
                                             size_t bytes) {
  auto step = std::make_shared<HiddenStep>();
  step->step = StepId{random() >> (random() % 64)};
  step->num_tokens = tokens;
  for (size_t i = 0; i < bytes; ++i) step->data.host().push_back(static_cast<std::byte>(random()));
  return step;
}

TEST(HiddenFrame, WritesWhatTheProtoSays) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < 50; ++round) {
    auto step = RandomStep(random, 1 + random() % limits::kMaxStepTokens, 1 + random() % 5000);
    const uint64_t offset = random() % step->data.size();
    const auto size = static_cast<uint32_t>(1 + random() % (step->data.size() - offset));
    v1::HiddenMessage message;
    ASSERT_TRUE(message.ParseFromString(Bytes(EncodeChunk(step, offset, size))));
    const v1::HiddenChunk& chunk = message.chunk();
    EXPECT_EQ(chunk.step_id(), step->step.value);
    EXPECT_EQ(chunk.num_tokens(), step->num_tokens);
    EXPECT_EQ(chunk.offset_bytes(), offset);
    ASSERT_EQ(chunk.payload().size(), size);
    EXPECT_EQ(memcmp(chunk.payload().data(), step->data.data() + offset, size), 0);
    EXPECT_EQ(chunk.checksum(), XXH3_64bits(chunk.payload().data(), size));
  }
}

TEST(HiddenFrame, ReadsWhatTheProtoSaysInAnySlices) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  for (size_t piece : {1, 2, 7, 64, 1 << 20}) {
    v1::HiddenMessage message;
    v1::HiddenChunk& chunk = *message.mutable_chunk();
    chunk.set_step_id(random());
    chunk.set_num_tokens(17);
    chunk.set_offset_bytes(random());
    chunk.set_payload(std::string(1000, 'p'));
    chunk.set_checksum(XXH3_64bits(chunk.payload().data(), chunk.payload().size()));
    auto frame = HiddenFrame::Parse(Buffer(message.SerializeAsString(), piece));
    ASSERT_TRUE(frame.ok()) << frame.status();
    ASSERT_FALSE(frame->is_open());
    EXPECT_EQ(frame->chunk().step_id, chunk.step_id());
    EXPECT_EQ(frame->chunk().num_tokens, 17u);
    EXPECT_EQ(frame->chunk().offset_bytes, chunk.offset_bytes());
    std::vector<std::byte> data(3);
    ASSERT_TRUE(frame->AppendPayload(&data).ok());
    ASSERT_EQ(data.size(), 1003u);
    EXPECT_EQ(data[3], std::byte{'p'});

    v1::HiddenMessage open;
    open.mutable_open()->set_to_stage_id(3);
    open.mutable_open()->set_edge_id(9);
    frame = HiddenFrame::Parse(Buffer(open.SerializeAsString(), piece));
    ASSERT_TRUE(frame.ok());
    ASSERT_TRUE(frame->is_open());
    EXPECT_EQ(frame->open().edge_id(), 9u);
  }
}

TEST(HiddenFrame, AFlippedBitIsDataLoss) {
  std::mt19937_64 random(7);
  auto step = RandomStep(random, 1, 256);
  std::string bytes = Bytes(EncodeChunk(step, 0, 256));
  bytes.back() ^= 1;
  auto frame = HiddenFrame::Parse(Buffer(bytes));
  ASSERT_TRUE(frame.ok());
  std::vector<std::byte> data;
  EXPECT_EQ(frame->AppendPayload(&data).code(), absl::StatusCode::kDataLoss);
}

TEST(HiddenFrame, RefusesWhatContradictsItself) {
  std::mt19937_64 random(8);
  const std::string good = Bytes(EncodeChunk(RandomStep(random, 5, 300), 0, 300));
  for (size_t cut = 0; cut < good.size(); ++cut) {
    EXPECT_FALSE(HiddenFrame::Parse(Buffer(good.substr(0, cut))).ok()) << cut;
  }
  EXPECT_FALSE(HiddenFrame::Parse(Buffer(good + "x")).ok());
  EXPECT_FALSE(
      HiddenFrame::Parse(Buffer(std::string("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x01"))).ok());
  EXPECT_FALSE(HiddenFrame::Parse(Buffer(std::string(20, '\xff'))).ok());

  v1::HiddenMessage message;
  message.mutable_chunk()->set_num_tokens(limits::kMaxStepTokens + 1);
  message.mutable_chunk()->set_payload("x");
  EXPECT_FALSE(HiddenFrame::Parse(Buffer(message.SerializeAsString())).ok());
  message.mutable_chunk()->set_num_tokens(1);
  message.mutable_chunk()->set_payload(std::string(limits::kHiddenChunkBytes + 1, 'x'));
  EXPECT_FALSE(HiddenFrame::Parse(Buffer(message.SerializeAsString())).ok());
}

TEST(HiddenFrame, RandomBytesNeverCrash) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const std::string good = Bytes(EncodeChunk(RandomStep(random, 5, 40), 0, 40));
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes = good;
    for (uint64_t k = 1 + random() % 4; k > 0; --k)
      bytes[random() % 16] = static_cast<char>(random());
    auto frame = HiddenFrame::Parse(Buffer(bytes, 1 + random() % 50));
    std::vector<std::byte> data;
    if (frame.ok() && !frame->is_open()) (void)frame->AppendPayload(&data);
    EXPECT_LE(data.size(), bytes.size());
  }
}

}  // namespace
}  // namespace strait
