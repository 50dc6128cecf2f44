// SPDX-License-Identifier: Apache-2.0
//
// Defends: rows of workers with devices go from device to device once there is a link, and another way before, where none
// can be, and after it broke; what is damaged on the way is refused; who has shown no secret makes no worker dial; and
// nothing of NCCL or the device is left.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "grpcpp/generic/generic_stub.h"
#include "tests/worker/transfer/rows_node.h"
#include "tests/worker/transport/fake_nccl.h"
#include "worker/transfer/row_links.h"
#include "worker/transfer/row_pieces.h"
#include "worker/transport/teardown_gate.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint32_t kVersion = 22809;

// A worker with a device of its own.
struct Worker {
  explicit Worker(FakeFabric* fabric, const std::string& device_name, uint32_t version = kVersion,
                  RowLinksOptions options = {})
      : nccl(std::make_shared<FakeNccl>(fabric, &faults, version)),
        device(std::make_shared<FakeDevice>(fabric, &faults)) {
    device->device_name = device_name;
    auto made = RowLinks::Create(options, {nccl, device, "", std::make_shared<TeardownGate>()});
    EXPECT_TRUE(made.ok()) << made.status();
    node = std::make_unique<RowsNode>(GrpcRowTransferOptions{.links = *made});
  }
  ~Worker() {
    node.reset();
    EXPECT_EQ(nccl->comms, 0);
    EXPECT_EQ(device->streams, 0);
    EXPECT_EQ(device->events, 0);
  }
  RowTransferBytes bytes() const { return node->transfer->bytes(); }

  FakeFaults faults;
  std::shared_ptr<FakeNccl> nccl;
  std::shared_ptr<FakeDevice> device;
  std::unique_ptr<RowsNode> node;
};

class LinkedTransferTest : public testing::Test {
 protected:
  ~LinkedTransferTest() override {
    for (const std::string& problem : fabric_.Problems()) ADD_FAILURE() << problem;
  }

  static RowsAsk DeviceAsk(uint32_t num_rows = 200) {
    RowsAsk ask = AnAsk(num_rows);
    ask.bytes = BytesOf(HashRowTraits(ask.layers), RangeOf(ask));
    ask.on_device = true;
    return ask;
  }
  // As an Exporter does.
  static void AnswerAsked(Worker* from, PeerAskId id, const RowsFrame& frame,
                          bool may_be_device = true) {
    RowsFrame made{.sequence = frame.sequence,
                   .placement = frame.placement,
                   .pieces = frame.pieces,
                   .rows = {}};
    while (!from->node->transfer->TakeRows(id, frame.rows.size(), may_be_device, &made)) {
      std::this_thread::sleep_for(1ms);
    }
    std::memcpy(made.bytes().data(), frame.rows.data(), frame.rows.size());
    for (BlockHeader& piece : made.pieces) piece.row_checksum = 0;
    from->node->transfer->Answer(id, std::move(made));
  }
  static void ExpectRows(const absl::StatusOr<RowsFrame>& frame, const RowsFrame& expected) {
    ASSERT_TRUE(frame.ok()) << frame.status();
    EXPECT_EQ(frame->pieces, expected.pieces);
    ASSERT_EQ(frame->bytes().size(), expected.rows.size());
    EXPECT_EQ(std::memcmp(frame->bytes().data(), expected.rows.data(), expected.rows.size()), 0);
  }
  // What the ask is answered, if the other end answers with these rows.
  absl::StatusOr<RowsFrame> Fetch(Worker* to, Worker* from, const RowsAsk& ask) {
    to->node->transfer->Ask(AskId{++last_ask_}, from->node->address(), ask);
    AnswerAsked(from, from->node->Next<RowsNode::Asked>().id, AFrame(ask));
    auto rows = to->node->Next<RowsNode::Rows>();
    EXPECT_EQ(rows.id, AskId{last_ask_});
    return std::move(rows.frame);
  }
  // Until rows come over the link.
  void Link(Worker* to, Worker* from) {
    const RowsAsk ask = DeviceAsk();
    for (;;) {
      const absl::StatusOr<RowsFrame> frame = Fetch(to, from, ask);
      ExpectRows(frame, AFrame(ask));
      if (HasFailure() || frame->on_device()) return;
      std::this_thread::sleep_for(1ms);
    }
  }

  FakeFabric fabric_;
  uint64_t last_ask_ = 0;
};

TEST_F(LinkedTransferTest, RowsGoFromDeviceToDeviceOnceThereIsALink) {
  Worker to(&fabric_, "one");
  Worker from(&fabric_, "two");
  Link(&to, &from);
  const uint64_t before = to.bytes().came_by_nccl;
  EXPECT_GT(before, 0u);
  EXPECT_GT(to.bytes().came_shared, 0u) << "until the link was there";
  const RowsAsk ask = DeviceAsk(3000);
  for (int i = 0; i < 5; ++i) {
    const auto frame = Fetch(&to, &from, ask);
    ExpectRows(frame, AFrame(ask));
    EXPECT_TRUE(frame->on_device());
    EXPECT_EQ(to.node->transfer->shared_bytes_used(), 0u) << "nothing is offered beside a link";
  }
  EXPECT_EQ(to.bytes().came_by_nccl, before + 5 * ask.bytes);
  EXPECT_EQ(from.bytes().went_by_nccl, before + 5 * ask.bytes);
  EXPECT_EQ(to.nccl->inits, 1);
  EXPECT_EQ(from.nccl->inits, 1);
}

TEST_F(LinkedTransferTest, BothWaysAtOnceAndManyAtATime) {
  Worker one(&fabric_, "one");
  Worker two(&fabric_, "two");
  Link(&one, &two);
  Link(&two, &one);
  const RowsAsk ask = DeviceAsk(2000);
  const RowsFrame frame = AFrame(ask);
  constexpr size_t kAsks = 12;  // more than a link has places
  for (uint64_t id = 1; id <= kAsks; ++id) {
    one.node->transfer->Ask(AskId{1000 + id}, two.node->address(), ask);
    two.node->transfer->Ask(AskId{2000 + id}, one.node->address(), ask);
  }
  std::vector<PeerAskId> asked[2];
  for (size_t i = 0; i < kAsks; ++i) {
    asked[0].push_back(one.node->Next<RowsNode::Asked>().id);
    asked[1].push_back(two.node->Next<RowsNode::Asked>().id);
  }
  for (size_t i = 0; i < kAsks; ++i) {
    AnswerAsked(&one, asked[0][i], frame);
    AnswerAsked(&two, asked[1][i], frame);
    for (Worker* worker : {&one, &two}) {
      const auto rows = worker->node->Next<RowsNode::Rows>();
      ExpectRows(rows.frame, frame);
      EXPECT_TRUE(rows.frame->on_device());
    }
  }
}

TEST_F(LinkedTransferTest, WhereItIsOfNoUseThereIsNone) {
  const auto comes_otherwise = [&](Worker* to, Worker* from, const RowsAsk& ask) {
    for (int i = 0; i < 5; ++i) {
      const auto frame = Fetch(to, from, ask);
      ExpectRows(frame, AFrame(ask));
      EXPECT_FALSE(frame->on_device());
    }
    EXPECT_EQ(to->nccl->inits + from->nccl->inits, 0);
  };
  Worker one(&fabric_, "one");
  Worker same(&fabric_, "one");
  comes_otherwise(&one, &same, DeviceAsk());
  Worker older(&fabric_, "two", kVersion - 1);
  comes_otherwise(&one, &older, DeviceAsk());
  comes_otherwise(&older, &one, DeviceAsk());
  // Who asks wants the rows in host memory.
  Worker two(&fabric_, "two");
  RowsAsk host = DeviceAsk();
  host.on_device = false;
  comes_otherwise(&one, &two, host);
}

TEST_F(LinkedTransferTest, OneDeviceCanBeInsistedOn) {
  Worker to(&fabric_, "one", kVersion, {.on_one_device = true});
  Worker from(&fabric_, "one", kVersion, {.on_one_device = true});
  Link(&to, &from);
}

TEST_F(LinkedTransferTest, WhoWritesFromTheHostIsGivenHostMemory) {
  Worker to(&fabric_, "one");
  Worker from(&fabric_, "two");
  Link(&to, &from);
  const RowsAsk ask = DeviceAsk();
  to.node->transfer->Ask(AskId{900}, from.node->address(), ask);
  AnswerAsked(&from, from.node->Next<RowsNode::Asked>().id, AFrame(ask), /*may_be_device=*/false);
  const auto rows = to.node->Next<RowsNode::Rows>();
  ExpectRows(rows.frame, AFrame(ask));
  EXPECT_FALSE(rows.frame->on_device());
  Link(&to, &from);  // and the link goes on
}

TEST_F(LinkedTransferTest, DamagedRowsAreRefusedAndTheLinkGoesOn) {
  Worker to(&fabric_, "one");
  Worker from(&fabric_, "two");
  Link(&to, &from);
  from.faults.corrupts = true;
  const auto frame = Fetch(&to, &from, DeviceAsk());
  EXPECT_TRUE(absl::IsDataLoss(frame.status())) << frame.status();
  EXPECT_THAT(std::string(frame.status().message()), HasSubstr("another checksum"));
  from.faults.corrupts = false;
  const auto next = Fetch(&to, &from, DeviceAsk());
  ExpectRows(next, AFrame(DeviceAsk()));
  EXPECT_TRUE(next->on_device());
}

TEST_F(LinkedTransferTest, WhatNobodyWaitsForIsReceivedAllTheSame) {
  Worker to(&fabric_, "one");
  Worker from(&fabric_, "two");
  Link(&to, &from);
  for (uint64_t id = 801; id <= 804; ++id) {
    to.node->transfer->Ask(AskId{id}, from.node->address(), DeviceAsk());
    const PeerAskId asked = from.node->Next<RowsNode::Asked>().id;
    to.node->transfer->Forget(AskId{id});
    AnswerAsked(&from, asked, AFrame(DeviceAsk()));
  }
  const auto frame = Fetch(&to, &from, DeviceAsk(264));
  ExpectRows(frame, AFrame(DeviceAsk(264)));
  EXPECT_TRUE(frame->on_device());
}

TEST_F(LinkedTransferTest, AfterALinkBrokeRowsComeAnotherWay) {
  for (const bool hangs : {true, false}) {
    RowLinksOptions soon;
    soon.timeout = 100ms;
    Worker to(&fabric_, "one", kVersion, soon);
    Worker from(&fabric_, "two", kVersion, soon);
    Link(&to, &from);
    if (hangs) {
      from.faults.ops_hang = true;
    } else {
      from.faults.async_error = kNcclRemoteError;
    }
    // What was asked for is to be asked for again, or came before it was seen.
    for (int i = 0;; ++i) {
      const auto frame = Fetch(&to, &from, DeviceAsk());
      if (!frame.ok()) {
        EXPECT_TRUE(absl::IsResourceExhausted(frame.status())) << frame.status();
      } else if (!frame->on_device()) {
        ExpectRows(frame, AFrame(DeviceAsk()));
        break;
      }
      std::this_thread::sleep_for(1ms);
      ASSERT_LT(i, 1000);
    }
    from.faults.ops_hang = false;
    from.faults.async_error = kNcclSuccess;
  }
}

// The watchdog told it while it held what the end of the link needs, and both stood still for ever.
TEST_F(LinkedTransferTest, ACallThatHangsCostsTheLinkAndNoMore) {
  RowLinksOptions soon;
  soon.timeout = soon.call_timeout = 200ms;
  Worker to(&fabric_, "one", kVersion, soon);
  Worker from(&fabric_, "two", kVersion, soon);
  Link(&to, &from);
  from.faults.send_blocks = true;
  for (int i = 0;; ++i) {
    const auto frame = Fetch(&to, &from, DeviceAsk());
    if (frame.ok() && !frame->on_device()) break;
    ASSERT_FALSE(frame.ok()) << "it was not sent";
    std::this_thread::sleep_for(1ms);
    ASSERT_LT(i, 1000);
  }
  from.faults.send_blocks = false;
}

// A copy for host memory would be made from a pointer that the host cannot follow.
TEST_F(LinkedTransferTest, WhoAsksForHostMemoryIsGivenNoOther) {
  Worker to(&fabric_, "one");
  Worker from(&fabric_, "two");
  Link(&to, &from);
  RowsAsk host = DeviceAsk();
  host.on_device = false;
  to.node->transfer->Ask(AskId{900}, from.node->address(), host);
  AnswerAsked(&from, from.node->Next<RowsNode::Asked>().id, AFrame(host));
  const auto rows = to.node->Next<RowsNode::Rows>();
  ExpectRows(rows.frame, AFrame(host));
  EXPECT_FALSE(rows.frame->on_device());
}

TEST_F(LinkedTransferTest, AWorkerThatDiesLeavesNoLink) {
  Worker to(&fabric_, "one");
  auto from = std::make_unique<Worker>(&fabric_, "two");
  Link(&to, from.get());
  to.node->transfer->Ask(AskId{900}, from->node->address(), DeviceAsk());
  from.reset();
  const auto rows = to.node->Next<RowsNode::Rows>();
  EXPECT_FALSE(rows.frame.ok());
  EXPECT_TRUE(absl::IsUnavailable(rows.frame.status()) ||
              absl::IsResourceExhausted(rows.frame.status()))
      << rows.frame.status();
  while (to.nccl->comms > 0) std::this_thread::sleep_for(1ms);
}

TEST_F(LinkedTransferTest, BeyondItsLinksAWorkerUsesOtherWays) {
  Worker to(&fabric_, "one");
  std::vector<std::unique_ptr<Worker>> sources;
  for (size_t i = 0; i < kMaxRowLinks; ++i) {
    sources.push_back(std::make_unique<Worker>(&fabric_, "source " + std::to_string(i)));
    Link(&to, sources.back().get());
  }
  Worker one_more(&fabric_, "one more");
  for (int i = 0; i < 5; ++i) {
    const auto frame = Fetch(&to, &one_more, DeviceAsk());
    ExpectRows(frame, AFrame(DeviceAsk()));
    EXPECT_FALSE(frame->on_device());
  }
}

// Whoever reaches the port may open a stream and name any communicator, that is any address to dial.
TEST_F(LinkedTransferTest, WhoHasShownNoSecretMakesNobodyDial) {
  Worker from(&fabric_, "two");
  std::string id;
  ASSERT_EQ(from.nccl->MakeId(&id), kNcclSuccess);
  BoundedQueue<int> answers(16);
  const auto channel = rpc::MakeChannel(from.node->address(), rpc::Traffic::kTransfer);
  grpc::TemplatedGenericStub<v1::RowsRequest, grpc::ByteBuffer> stub(channel);
  rpc::StreamEvents<grpc::ByteBuffer> events;
  events.on_message = [&](const grpc::ByteBuffer&) { return answers.Push(0); };
  events.on_end = [](const absl::Status&) {};
  rpc::ClientStream<grpc::ByteBuffer, v1::RowsRequest> stranger(
      {.max_queued_messages = 16, .max_queued_bytes = 1 << 16, .max_message_bytes = 1 << 16},
      std::move(events), [&](grpc::ClientContext* context, auto* reactor) {
        stub.PrepareBidiStreamingCall(context, "/strait.v1.RowTransfer/Rows", grpc::StubOptions(),
                                      reactor);
      });
  v1::RowsRequest request = ToWire(1, DeviceAsk());
  request.set_link_hello("22809 elsewhere");
  ASSERT_TRUE(stranger.Send(request).ok());
  from.node->transfer->Answer(from.node->Next<RowsNode::Asked>().id,
                              absl::PermissionDeniedError("not the secret"));
  ASSERT_FALSE(answers.PopAll(30s).empty());
  ASSERT_TRUE(stranger.Send(LinkRequest(2, id)).ok());
  // Requests are read one after the other: when this one is here, that one was looked at.
  request.set_request_id(3);
  ASSERT_TRUE(stranger.Send(request).ok());
  (void)from.node->Next<RowsNode::Asked>();
  EXPECT_EQ(from.nccl->comms, 0);
  EXPECT_EQ(from.device->streams, 0);
}

}  // namespace
}  // namespace strait
