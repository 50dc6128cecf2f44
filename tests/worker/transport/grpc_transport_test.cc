// SPDX-License-Identifier: Apache-2.0
//
// Defends: hidden states arrive whole, verified and in order, or the edge is told to be down; a
// peer that lies, stalls or dies is ended and counted, and disturbs nobody else.
#include <algorithm>
#include <thread>

#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/rpc/channel.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "tests/worker/transport/grpc_node.h"
#include "xxhash.h"

namespace strait {
namespace {

using testing::HasSubstr;

TEST(GrpcTransport, StepsArriveWholeAndInOrder) {
  Node from, to;
  Open(from, to);
  // 8,192 tokens are two chunks; sizes around the chunk's edge too.
  const std::vector<uint32_t> sizes = {1, 8192, 3, 4096, 4097, 4095, 1, 1};
  for (size_t i = 0; i < sizes.size(); ++i) {
    ASSERT_TRUE(from.transport->Send(kFrom, Step(2 * i + 1, sizes[i])).ok());
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    Event event = to.Next();
    ASSERT_EQ(event.kind, Event::kHidden);
    EXPECT_EQ(event.to_stage_id, kTo);
    EXPECT_EQ(event.hidden.step.value, 2 * i + 1);
    EXPECT_EQ(event.hidden.num_tokens, sizes[i]);
    EXPECT_EQ(event.hidden.epoch, kEpoch);
    EXPECT_TRUE(event.hidden.data.host() == Step(2 * i + 1, sizes[i]).data.host());
  }
  EXPECT_EQ(from.transport->Stats().bytes_sent, to.transport->Stats().bytes_received);
}

TEST(GrpcTransport, SenderMayOpenBeforeItIsExpected) {
  Node from, to;
  from.transport->Connect(EdgeTo(to));
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 5)).ok());
  EXPECT_TRUE(to.Silent(100ms));
  // An older edge is expected first: the sender goes on waiting.
  to.transport->Expect({kEdge - 1, kFrom, kTo});
  EXPECT_TRUE(from.Silent(100ms));
  to.transport->Expect({kEdge, kFrom, kTo});
  EXPECT_EQ(from.Next().kind, Event::kUp);
  EXPECT_EQ(to.Next().hidden.step.value, 1u);
}

TEST(GrpcTransport, OlderEdgeIsAborted) {
  Node from, to;
  to.transport->Expect({kEdge + 1, kFrom, kTo});
  from.transport->Connect(EdgeTo(to));
  Event event = from.Next();
  ASSERT_EQ(event.kind, Event::kDown);
  EXPECT_EQ(event.status.code(), absl::StatusCode::kAborted) << event.status;
  EXPECT_EQ(to.transport->Stats().opens_refused, 1u);
}

TEST(GrpcTransport, OnlyTheExpectedStageIsLetIn) {
  Node from, to, other;
  to.transport->Expect({kEdge, 99, kTo});
  from.transport->Connect(EdgeTo(to));
  EXPECT_EQ(from.Next().status.code(), absl::StatusCode::kFailedPrecondition);
  to.transport->Expect({kEdge + 1, 0, kTo});
  from.transport->Connect(EdgeTo(to, kEdge + 1));
  EXPECT_EQ(from.Next().kind, Event::kUp);
  Edge edge = EdgeTo(to, kEdge + 1);
  edge.from_stage_id = 99;
  other.transport->Connect(edge);
  EXPECT_EQ(other.Next().status.code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 1)).ok());
  EXPECT_EQ(to.Next().kind, Event::kHidden);
}

// Regression: whoever came first and said the right numbers, which are easy to guess, got the edge,
// and the stage that it belonged to was refused and blamed.
TEST(GrpcTransport, AStrangerCannotTakeAnEdge) {
  Node from, to, stranger;
  to.transport->Expect({kEdge, kFrom, kTo, "", 0xfeed});
  for (const uint64_t guess : {0, 1}) {
    stranger.transport->Connect(EdgeTo(to, kEdge, guess));
    EXPECT_EQ(stranger.Next().status.code(), absl::StatusCode::kPermissionDenied);
  }
  EXPECT_EQ(to.transport->Stats().opens_refused, 2u);
  from.transport->Connect(EdgeTo(to, kEdge, 0xfeed));
  ASSERT_EQ(from.Next().kind, Event::kUp);
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 3)).ok());
  EXPECT_EQ(to.Next().hidden.step.value, 1u);
}

TEST(GrpcTransport, AStrangerWhoWaitsIsNotTakenForTheSender) {
  Node from, to, stranger;
  stranger.transport->Connect(EdgeTo(to, kEdge, 1));
  EXPECT_TRUE(stranger.Silent(100ms));  // parked, first in the row
  from.transport->Connect(EdgeTo(to, kEdge, 0xfeed));
  EXPECT_TRUE(from.Silent(100ms));
  to.transport->Expect({kEdge, kFrom, kTo, "", 0xfeed});
  EXPECT_EQ(from.Next().kind, Event::kUp);
  EXPECT_EQ(stranger.Next().status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_TRUE(to.Silent(50ms));
}

TEST(GrpcTransport, NobodyThereIsToldOnce) {
  Node from;
  from.transport->Connect(
      {.id = kEdge, .from_stage_id = kFrom, .to_stage_id = kTo, .peer_address = "127.0.0.1:1"});
  Event event = from.Next();
  ASSERT_EQ(event.kind, Event::kDown);
  EXPECT_EQ(event.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(from.transport->Send(kFrom, Step(1, 1)).ok());
  EXPECT_TRUE(from.Silent(100ms));
}

TEST(GrpcTransport, DeathOfEitherEndIsToldToTheOther) {
  Node to;
  {
    Node from;
    Open(from, to);
  }
  Event event = to.Next();
  ASSERT_EQ(event.kind, Event::kDown);
  EXPECT_EQ(event.edge.from_stage_id, kFrom);
  EXPECT_EQ(event.edge.id, kEdge);

  Node from;
  {
    Node mortal;
    Open(from, mortal);
    for (int i = 1; i < 50; ++i) (void)from.transport->Send(kFrom, Step(i, 8192));
  }
  event = from.Next();
  EXPECT_EQ(event.kind, Event::kDown);
  EXPECT_FALSE(from.transport->Send(kFrom, Step(100, 1)).ok());
  EXPECT_TRUE(from.Silent(100ms));
}

TEST(GrpcTransport, ReceiverThatConsumesNothingIsReadNoFurther) {
  GrpcTransportOptions options;
  options.receive_bytes_max = 8 * kRowBytes * 1024;
  Node from, to(options);
  Open(from, to);
  constexpr int kSteps = 200;
  for (int i = 1; i <= kSteps; ++i) ASSERT_TRUE(from.transport->Send(kFrom, Step(i, 1024)).ok());
  int seen = 0;
  while (!to.Silent(300ms)) {
    ++seen;
    ASSERT_EQ(to.Next().hidden.step.value, static_cast<uint64_t>(seen));
  }
  EXPECT_EQ(seen, 8);
  while (seen < kSteps) {
    to.transport->Consumed(kTo, kEpoch, StepId{static_cast<uint64_t>(seen)});
    ASSERT_EQ(to.Next().hidden.step.value, static_cast<uint64_t>(++seen));
  }
}

TEST(GrpcTransport, SenderIsToldWhenTooMuchWaits) {
  GrpcTransportOptions options;
  options.receive_bytes_max = 1;
  Node from, to(options);
  Open(from, to);
  absl::Status status;
  int sent = 0;
  HiddenStep step = Step(1, 8192);
  for (; sent < 1000 && status.ok(); ++sent) {
    HiddenStep copy{step.epoch, step.step, step.num_tokens, step.data.host()};
    copy.step = StepId{static_cast<uint64_t>(sent) + 1};
    status = from.transport->Send(kFrom, std::move(copy));
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_GT(sent, 100);
}

TEST(GrpcTransport, StalledPeerBreaksTheEdge) {
  GrpcTransportOptions options;
  options.receive_bytes_max = 1;
  GrpcTransportOptions impatient;
  impatient.stall_timeout = 400ms;
  Node from(impatient), to(options);
  Open(from, to);
  int i = 1;
  while (i < 100 && from.transport->Send(kFrom, Step(i, 8192)).ok()) ++i;
  Event event = from.Next();
  ASSERT_EQ(event.kind, Event::kDown);
  EXPECT_EQ(event.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(from.transport->Stats().stalls, 1u);
}

TEST(GrpcTransport, AcceptanceHasADeadlineOnBothSides) {
  GrpcTransportOptions impatient;
  impatient.accept_timeout = 300ms;
  Node patient, from(impatient), to;
  from.transport->Connect(EdgeTo(to));
  EXPECT_EQ(from.Next().status.code(), absl::StatusCode::kDeadlineExceeded);
  Node soon(impatient);
  patient.transport->Connect(EdgeTo(soon));
  EXPECT_EQ(patient.Next().status.code(), absl::StatusCode::kFailedPrecondition);
}

TEST(GrpcTransport, DroppedEdgeIsSilent) {
  Node from, to;
  Open(from, to);
  from.transport->Disconnect(kFrom);
  EXPECT_EQ(to.Next().kind, Event::kDown);
  EXPECT_TRUE(from.Silent(100ms));
  EXPECT_EQ(from.transport->Send(kFrom, Step(1, 1)).code(), absl::StatusCode::kFailedPrecondition);
  from.transport->Disconnect(kFrom);
}

TEST(GrpcTransport, TakenAddressNamesTheFlag) {
  Node node;
  auto taken =
      GrpcTransport::Create({.listen_address = node.address(), .hidden_row_bytes = kRowBytes}, {});
  EXPECT_EQ(taken.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(taken.status().message()), HasSubstr("--listen"));
}

// ---- A sender that lies: written with the generated classes, byte by byte as it likes. ----

class Hostile : public testing::Test {
 protected:
  void SetUp() override {
    node_.transport->Expect({kEdge, kFrom, kTo});
    stub_ = v1::StageTransport::NewStub(rpc::MakeChannel(node_.address(), rpc::Traffic::kData));
  }
  void TearDown() override {
    // Whatever happened, an honest sender is served.
    node_.transport->Expect({kEdge + 1, kFrom, kTo});
    Node honest;
    honest.transport->Connect(EdgeTo(node_, kEdge + 1));
    ASSERT_EQ(honest.Next().kind, Event::kUp);
    ASSERT_TRUE(honest.transport->Send(kFrom, Step(1, 3)).ok());
    Event event = node_.Next();
    while (event.kind == Event::kDown) event = node_.Next();
    ASSERT_EQ(event.kind, Event::kHidden);
    EXPECT_TRUE(event.hidden.data.host() == Step(1, 3).data.host());
  }

  static v1::HiddenMessage GoodOpen() {
    v1::HiddenMessage message;
    v1::HiddenOpen& open = *message.mutable_open();
    open.set_to_stage_id(kTo);
    open.set_from_stage_id(kFrom);
    open.set_edge_id(kEdge);
    open.set_hidden_size(kRowBytes / 4);
    open.set_element_bytes(4);
    return message;
  }
  static v1::HiddenMessage GoodChunk(uint64_t step, uint32_t tokens, uint64_t offset,
                                     size_t bytes) {
    v1::HiddenMessage message;
    v1::HiddenChunk& chunk = *message.mutable_chunk();
    chunk.set_step_id(step);
    chunk.set_num_tokens(tokens);
    chunk.set_offset_bytes(offset);
    chunk.set_payload(std::string(bytes, 'h'));
    chunk.set_checksum(XXH3_64bits(chunk.payload().data(), bytes));
    return message;
  }
  // How the receiver ends the stream after these messages.
  absl::StatusCode Outcome(const std::vector<v1::HiddenMessage>& messages) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + 20s);
    auto stream = stub_->Hidden(&context);
    for (const auto& message : messages) (void)stream->Write(message);
    v1::HiddenReply reply;
    while (stream->Read(&reply)) {
    }
    return static_cast<absl::StatusCode>(stream->Finish().error_code());
  }

  Node node_;
  std::unique_ptr<v1::StageTransport::Stub> stub_;
};

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

TEST_F(Hostile, ChunkBeforeOpen) { EXPECT_EQ(Outcome({GoodChunk(1, 1, 0, kRowBytes)}), kInvalid); }
TEST_F(Hostile, EmptyMessage) { EXPECT_EQ(Outcome({v1::HiddenMessage()}), kInvalid); }
TEST_F(Hostile, SecondOpen) { EXPECT_EQ(Outcome({GoodOpen(), GoodOpen()}), kInvalid); }
TEST_F(Hostile, OtherRowSize) {
  auto open = GoodOpen();
  open.mutable_open()->set_hidden_size(0xffffffff);
  EXPECT_EQ(Outcome({open}), absl::StatusCode::kFailedPrecondition);
  open.mutable_open()->set_hidden_size(kRowBytes / 2);
  open.mutable_open()->set_element_bytes(2);
  EXPECT_EQ(Outcome({open}), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(node_.transport->Stats().opens_refused, 2u);
}
TEST_F(Hostile, NoTokens) { EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(1, 0, 0, 1)}), kInvalid); }
TEST_F(Hostile, TooManyTokens) {
  EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(1, 0xffffffff, 0, 1)}), kInvalid);
}
TEST_F(Hostile, EmptyPayload) { EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(1, 1, 0, 0)}), kInvalid); }
TEST_F(Hostile, MoreBytesThanTokens) {
  EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(1, 1, 0, kRowBytes + 1)}), kInvalid);
}
TEST_F(Hostile, OffsetThatLeavesAGap) {
  EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(1, 2, kRowBytes, kRowBytes)}), kInvalid);
}
TEST_F(Hostile, OffsetThatOverflows) {
  EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(1, 2, 0, kRowBytes),
                     GoodChunk(1, 2, ~uint64_t{0} - kRowBytes + 1, kRowBytes)}),
            kInvalid);
}
TEST_F(Hostile, ChunkOfAnotherStepInside) {
  EXPECT_EQ(
      Outcome({GoodOpen(), GoodChunk(1, 2, 0, kRowBytes), GoodChunk(2, 2, kRowBytes, kRowBytes)}),
      kInvalid);
}
TEST_F(Hostile, TokensThatChange) {
  EXPECT_EQ(
      Outcome({GoodOpen(), GoodChunk(1, 2, 0, kRowBytes), GoodChunk(1, 3, kRowBytes, kRowBytes)}),
      kInvalid);
}
TEST_F(Hostile, StepsThatFall) {
  EXPECT_EQ(Outcome({GoodOpen(), GoodChunk(0, 1, 0, kRowBytes)}), kInvalid);
}
TEST_F(Hostile, WrongChecksum) {
  auto chunk = GoodChunk(1, 1, 0, kRowBytes);
  chunk.mutable_chunk()->set_checksum(chunk.chunk().checksum() + 1);
  EXPECT_EQ(Outcome({GoodOpen(), chunk}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(node_.transport->Stats().frames_refused, 1u);
  EXPECT_EQ(node_.Next().kind, Event::kDown);
}
TEST_F(Hostile, OversizedMessage) {
  auto chunk = GoodChunk(1, 8192, 0, limits::kHiddenChunkBytes + (128 << 10));
  EXPECT_EQ(Outcome({GoodOpen(), chunk}), absl::StatusCode::kResourceExhausted);
}
TEST_F(Hostile, OlderEdge) {
  auto open = GoodOpen();
  open.mutable_open()->set_edge_id(kEdge - 1);
  EXPECT_EQ(Outcome({open}), absl::StatusCode::kAborted);
}

TEST(GrpcTransport, PartOfAStepIsNotWaitedForForever) {
  GrpcTransportOptions options;
  options.stall_timeout = 300ms;
  Node node(options);
  node.transport->Expect({kEdge, kFrom, kTo});
  auto stub = v1::StageTransport::NewStub(rpc::MakeChannel(node.address(), rpc::Traffic::kData));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + 20s);
  auto stream = stub->Hidden(&context);
  v1::HiddenMessage open;
  open.mutable_open()->set_to_stage_id(kTo);
  open.mutable_open()->set_from_stage_id(kFrom);
  open.mutable_open()->set_edge_id(kEdge);
  open.mutable_open()->set_hidden_size(kRowBytes / 4);
  open.mutable_open()->set_element_bytes(4);
  ASSERT_TRUE(stream->Write(open));
  v1::HiddenMessage chunk;
  chunk.mutable_chunk()->set_step_id(1);
  chunk.mutable_chunk()->set_num_tokens(8192);
  chunk.mutable_chunk()->set_payload("a little");
  chunk.mutable_chunk()->set_checksum(XXH3_64bits("a little", 8));
  ASSERT_TRUE(stream->Write(chunk));
  v1::HiddenReply reply;
  EXPECT_TRUE(stream->Read(&reply));
  EXPECT_FALSE(reply.accepted()) << "at first, that it came";
  EXPECT_TRUE(stream->Read(&reply));
  EXPECT_TRUE(reply.accepted());
  EXPECT_FALSE(stream->Read(&reply));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(node.Next().kind, Event::kDown);
  EXPECT_EQ(node.transport->Stats().stalls, 1u);
}

TEST(GrpcTransport, TooManyParkedSendersAreRefused) {
  Node to;
  std::vector<std::unique_ptr<Node>> senders;
  Node from;
  for (uint64_t i = 0; i <= kMaxParkedOpens; ++i) {
    Edge edge = EdgeTo(to);
    edge.from_stage_id = 100 + i;
    from.transport->Connect(edge);
  }
  EXPECT_EQ(from.Next().status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(from.Silent(100ms));
}

}  // namespace
}  // namespace strait
