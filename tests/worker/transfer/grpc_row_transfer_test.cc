// SPDX-License-Identifier: Apache-2.0
//
// Defends: every ask is answered once over gRPC, with the rows byte for byte or with the reason; a peer that dies,
// hangs, lies or does not read costs its own asks and nothing else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <thread>

#include "tests/worker/transfer/rows_node.h"
#include "tests/worker/transport/stopped_path.h"
#include "worker/transfer/rows_server.h"

namespace strait {
namespace {

using testing::HasSubstr;

// A frame of so many bytes of rows.
RowsFrame BigFrame(uint32_t num_rows) {
  RowsAsk ask = AnAsk(num_rows);
  ask.layers = {2, 3};
  return AFrame(ask);
}

TEST(GrpcRowTransferTest, RowsGoThereByteForByte) {
  RowsNode to;
  RowsNode from;
  const RowsAsk ask = AnAsk();
  to.transfer->Ask(AskId{1}, from.address(), ask);
  const auto asked = from.Next<RowsNode::Asked>();
  EXPECT_EQ(asked.ask.secret, ask.secret);
  EXPECT_EQ(asked.ask.layers, ask.layers);
  RowsFrame frame = AFrame(ask);
  for (BlockHeader& piece : frame.pieces) piece.row_checksum = 0;  // made by the transfer
  from.transfer->Answer(asked.id, frame);
  const auto served = from.Next<RowsNode::Served>();
  EXPECT_EQ(served.id, asked.id);
  EXPECT_EQ(served.pieces, AFrame(ask).pieces);
  const auto rows = to.Next<RowsNode::Rows>();
  EXPECT_EQ(rows.id, AskId{1});
  ASSERT_TRUE(rows.frame.ok()) << rows.frame.status();
  ExpectEqual(*rows.frame, AFrame(ask));
}

TEST(GrpcRowTransferTest, ManyLargeFramesGoInAnyOrder) {
  RowsNode to;
  RowsNode from;
  constexpr uint32_t kRows = limits::kTransferFrameBytes / kHashRowBytes / 64 * 64 - 64;
  const RowsFrame frame = BigFrame(kRows);
  std::vector<PeerAskId> asked;
  for (uint64_t id = 1; id <= 12; ++id) to.transfer->Ask(AskId{id}, from.address(), AnAsk());
  for (int i = 0; i < 12; ++i) asked.push_back(from.Next<RowsNode::Asked>().id);
  for (auto it = asked.rbegin(); it != asked.rend(); ++it) from.transfer->Answer(*it, frame);
  std::set<uint64_t> told;
  for (int i = 0; i < 12; ++i) {
    const auto rows = to.Next<RowsNode::Rows>();
    ASSERT_TRUE(rows.frame.ok()) << rows.frame.status();
    ExpectEqual(*rows.frame, frame);
    told.insert(rows.id.value);
  }
  EXPECT_EQ(told.size(), 12u);
}

TEST(GrpcRowTransferTest, ThePeersErrorIsTold) {
  RowsNode to;
  RowsNode from;
  for (const absl::Status& why :
       {absl::PermissionDeniedError("not the secret"), absl::OutOfRangeError("not finished"),
        absl::NotFoundError("no stage"), absl::ResourceExhaustedError("ask again")}) {
    to.transfer->Ask(AskId{7}, from.address(), AnAsk());
    from.transfer->Answer(from.Next<RowsNode::Asked>().id, why);
    EXPECT_EQ(to.Next<RowsNode::Rows>().frame.status(), why);
  }
  EXPECT_TRUE(from.Silent(20ms));
}

TEST(GrpcRowTransferTest, AForgottenAskIsNotAnswered) {
  RowsNode to;
  RowsNode from;
  to.transfer->Ask(AskId{1}, from.address(), AnAsk());
  const auto first = from.Next<RowsNode::Asked>();
  to.transfer->Forget(AskId{1});
  to.transfer->Ask(AskId{2}, from.address(), AnAsk());
  const auto second = from.Next<RowsNode::Asked>();
  from.transfer->Answer(first.id, AFrame(AnAsk()));
  from.transfer->Answer(second.id, AFrame(AnAsk()));
  EXPECT_EQ(to.Next<RowsNode::Rows>().id, AskId{2});
}

TEST(GrpcRowTransferTest, NobodyThereIsUnavailable) {
  RowsNode to;
  to.transfer->Ask(AskId{1}, "127.0.0.1:1", AnAsk());
  EXPECT_TRUE(absl::IsUnavailable(to.Next<RowsNode::Rows>().frame.status()));
}

TEST(GrpcRowTransferTest, AfterAPeerDiedTheNextOneAnswersOverANewStream) {
  RowsNode to;
  auto from = std::make_unique<RowsNode>();
  const int port = from->server->port;
  const std::string address = from->address();
  for (uint64_t id = 1; id <= 3; ++id) to.transfer->Ask(AskId{id}, address, AnAsk());
  const auto asked = from->Next<RowsNode::Asked>();
  from->transfer->Answer(asked.id, AFrame(AnAsk()));
  EXPECT_TRUE(to.Next<RowsNode::Rows>().frame.ok());
  from.reset();
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(absl::IsUnavailable(to.Next<RowsNode::Rows>().frame.status()));
  }
  RowsNode again({}, port);
  // The first tries may meet the old stream's end.
  for (uint64_t id = 10;; ++id) {
    to.transfer->Ask(AskId{id}, address, AnAsk());
    if (again.Silent(200ms)) {
      EXPECT_TRUE(absl::IsUnavailable(to.Next<RowsNode::Rows>().frame.status()));
      continue;
    }
    again.transfer->Answer(again.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
    const auto rows = to.Next<RowsNode::Rows>();
    EXPECT_EQ(rows.id, AskId{id});
    EXPECT_TRUE(rows.frame.ok()) << rows.frame.status();
    break;
  }
}

TEST(GrpcRowTransferTest, APathThatPassesNothingIsUnavailable) {
  RowsNode to({.answer_timeout = 500ms});
  RowsNode from;
  StoppedPath path(from.server->port);
  to.transfer->Ask(AskId{1}, path.address(), AnAsk());
  from.transfer->Answer(from.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
  EXPECT_TRUE(to.Next<RowsNode::Rows>().frame.ok());
  path.Stop();
  to.transfer->Ask(AskId{2}, path.address(), AnAsk());
  const auto rows = to.Next<RowsNode::Rows>();
  EXPECT_TRUE(absl::IsUnavailable(rows.frame.status())) << rows.frame.status();
  EXPECT_THAT(rows.frame.status().message(), HasSubstr("no answer for 500 ms"));
}

TEST(GrpcRowTransferTest, BytesThatAreNoFrameAreDataLoss) {
  // By the row that is asked for.
  EvilPeer evil([](const v1::RowsRequest& request) -> std::optional<std::string> {
    const RowsFrame frame = AFrame(FromWire(request));
    std::string bytes = BytesOf(*EncodeFrame(request.request_id(), frame, Buffers()));
    switch (request.first_row()) {
      case 0:
        return bytes.substr(0, bytes.size() - 1);
      case 1:
        bytes.back() = static_cast<char>(bytes.back() ^ 1);
        return bytes;
      case 2:
        return bytes + "more";
      case 3: {  // no rows, and no error
        v1::RowsReply reply;
        reply.set_request_id(request.request_id());
        return reply.SerializeAsString();
      }
      case 4: {
        v1::RowsReply reply;
        reply.ParseFromString(bytes);
        reply.set_rows(std::string(limits::kTransferFrameBytes + 1, 'x'));
        return reply.SerializeAsString();
      }
      default:
        return bytes;
    }
  });
  RowsNode to;
  for (uint32_t what = 0; what <= 5; ++what) {
    RowsAsk ask = AnAsk();
    ask.first_row = what;
    to.transfer->Ask(AskId{what + 1}, evil.address(), ask);
    const auto rows = to.Next<RowsNode::Rows>();
    EXPECT_EQ(rows.id, AskId{what + 1});
    if (what < 5) {
      EXPECT_TRUE(absl::IsDataLoss(rows.frame.status())) << what << ": " << rows.frame.status();
    } else {
      ASSERT_TRUE(rows.frame.ok()) << rows.frame.status();
      ExpectEqual(*rows.frame, AFrame(ask));
    }
  }
}

TEST(GrpcRowTransferTest, WhatIsNoReplyEndsTheStream) {
  EvilPeer evil([](const v1::RowsRequest& request) -> std::optional<std::string> {
    if (request.first_row() == 0) return std::nullopt;  // another ask that is lost with it
    if (request.first_row() == 1) return "what?";
    if (request.first_row() == 2) {
      v1::RowsReply reply;  // more than a message may have
      reply.set_request_id(request.request_id());
      reply.set_rows(std::string(limits::kMaxTransferMessageBytes + 1, 'x'));
      return reply.SerializeAsString();
    }
    return BytesOf(*EncodeFrame(request.request_id(), AFrame(FromWire(request)), Buffers()));
  });
  RowsNode to;
  uint64_t id = 0;
  for (const uint32_t what : {1, 2}) {
    RowsAsk ask = AnAsk();
    ask.first_row = 0;
    to.transfer->Ask(AskId{++id}, evil.address(), ask);
    ask.first_row = what;
    to.transfer->Ask(AskId{++id}, evil.address(), ask);
    for (int i = 0; i < 2; ++i) {
      const auto rows = to.Next<RowsNode::Rows>();
      EXPECT_TRUE(absl::IsUnavailable(rows.frame.status())) << rows.frame.status();
    }
    ask.first_row = 3;
    to.transfer->Ask(AskId{++id}, evil.address(), ask);
    const auto rows = to.Next<RowsNode::Rows>();
    EXPECT_EQ(rows.id, AskId{id});
    EXPECT_TRUE(rows.frame.ok()) << rows.frame.status();
  }
}

TEST(GrpcRowTransferTest, WhoAsksForTooMuchAtOnceIsToldSo) {
  RowsNode to;
  RowsNode from;
  for (uint64_t id = 1; id <= kMaxAsksUnderWay + 5; ++id) {
    to.transfer->Ask(AskId{id}, from.address(), AnAsk());
  }
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(absl::IsResourceExhausted(to.Next<RowsNode::Rows>().frame.status()));
  }
  for (size_t i = 0; i < kMaxAsksUnderWay; ++i) {
    from.transfer->Answer(from.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
  }
  for (size_t i = 0; i < kMaxAsksUnderWay; ++i) {
    EXPECT_TRUE(to.Next<RowsNode::Rows>().frame.ok());
  }
  // And then it may ask again.
  to.transfer->Ask(AskId{1000}, from.address(), AnAsk());
  from.transfer->Answer(from.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
  EXPECT_TRUE(to.Next<RowsNode::Rows>().frame.ok());
}

// Requests of a peer that is no RowsClient.
class RawClient {
 public:
  explicit RawClient(const std::string& address)
      : RawClient(rpc::MakeChannel(address, rpc::Traffic::kTransfer)) {}
  explicit RawClient(const std::shared_ptr<grpc::Channel>& channel) {
    stub_ = v1::RowTransfer::NewStub(channel);
    rpc::StreamOptions options{
        .max_queued_messages = 10'000, .max_queued_bytes = 1 << 28, .max_message_bytes = 1 << 20};
    stream_ = std::make_unique<rpc::ClientStream<v1::RowsReply, v1::RowsRequest>>(
        options,
        rpc::StreamEvents<v1::RowsReply>{
            .on_message = [this](const v1::RowsReply&) { return !stopped; },
            .on_end = [this](const absl::Status& status) { ended.Push(status); }},
        [&](grpc::ClientContext* context, auto* reactor) {
          stub_->async()->Rows(context, reactor);
        });
  }
  void Send(uint64_t request_id) {
    v1::RowsRequest request = ToWire(request_id, AnAsk());
    (void)stream_->Send(request);
  }
  void Resume() { stream_->Resume(); }
  std::atomic<bool> stopped = false;
  BoundedQueue<absl::Status> ended{10};

 private:
  std::unique_ptr<v1::RowTransfer::Stub> stub_;
  std::unique_ptr<rpc::ClientStream<v1::RowsReply, v1::RowsRequest>> stream_;
};

TEST(GrpcRowTransferTest, RequestsThatDoNotRiseEndTheStream) {
  RowsNode from;
  RawClient raw(from.address());
  raw.Send(2);
  from.transfer->Answer(from.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
  raw.Send(2);
  const auto ended = raw.ended.PopAll(30s);
  ASSERT_EQ(ended.size(), 1u);
  EXPECT_TRUE(absl::IsInvalidArgument(ended[0])) << ended[0];
}

TEST(GrpcRowTransferTest, StrangersDoNotKeepOthersOut) {
  RowsNode from;
  RowsNode known;
  const auto answer = [&] {
    from.transfer->Answer(from.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
  };
  known.transfer->Ask(AskId{1}, from.address(), AnAsk());
  answer();
  EXPECT_TRUE(known.Next<RowsNode::Rows>().frame.ok());
  // Each asks, is refused, and stays.
  const auto channel = rpc::MakeChannel(from.address(), rpc::Traffic::kTransfer);
  std::vector<std::unique_ptr<RawClient>> strangers;
  for (size_t i = 0; i < kMaxRowStreams + 3; ++i) {
    strangers.push_back(std::make_unique<RawClient>(channel));
    strangers.back()->Send(1);
    from.transfer->Answer(from.Next<RowsNode::Asked>().id,
                          absl::PermissionDeniedError("not the secret"));
  }
  RowsNode to;
  to.transfer->Ask(AskId{1}, from.address(), AnAsk());
  answer();
  EXPECT_TRUE(to.Next<RowsNode::Rows>().frame.ok());
  known.transfer->Ask(AskId{2}, from.address(), AnAsk());
  answer();
  EXPECT_TRUE(known.Next<RowsNode::Rows>().frame.ok());
  // Those that came first made room.
  EXPECT_EQ(strangers.front()->ended.PopAll(30s).size(), 1u);
  EXPECT_TRUE(strangers.back()->ended.PopAll(0s).empty());
}

TEST(GrpcRowTransferTest, APeerThatDoesNotReadIsCutOff) {
  RowsNode from({.stall_timeout = 300ms});
  RawClient raw(from.address());
  raw.stopped = true;
  constexpr uint32_t kRows = limits::kTransferFrameBytes / kHashRowBytes / 64 * 64 - 64;
  const RowsFrame frame = BigFrame(kRows);
  for (uint64_t id = 1; id <= 10; ++id) {
    raw.Send(id);
    from.transfer->Answer(from.Next<RowsNode::Asked>().id, frame);
  }
  EXPECT_GE(from.transfer->WaitingBytes(), uint64_t{8} * limits::kTransferFrameBytes / 2);
  while (from.transfer->num_stalls() == 0) std::this_thread::sleep_for(10ms);
  raw.stopped = false;
  raw.Resume();
  EXPECT_EQ(raw.ended.PopAll(30s).size(), 1u);
  while (from.transfer->WaitingBytes() > 0) std::this_thread::sleep_for(10ms);
}

TEST(GrpcRowTransferTest, AnswersToAPeerThatIsGoneAreDropped) {
  RowsNode from;
  std::vector<PeerAskId> asked;
  {
    RowsNode to;
    for (uint64_t id = 1; id <= 3; ++id) to.transfer->Ask(AskId{id}, from.address(), AnAsk());
    for (int i = 0; i < 3; ++i) asked.push_back(from.Next<RowsNode::Asked>().id);
  }
  for (const PeerAskId id : asked) from.transfer->Answer(id, AFrame(AnAsk()));
  from.transfer->Answer(PeerAskId{12345}, absl::NotFoundError("nobody"));
  RowsNode to;
  to.transfer->Ask(AskId{1}, from.address(), AnAsk());
  from.transfer->Answer(from.Next<RowsNode::Asked>().id, AFrame(AnAsk()));
  EXPECT_TRUE(to.Next<RowsNode::Rows>().frame.ok());
}

}  // namespace
}  // namespace strait
