// SPDX-License-Identifier: Apache-2.0
//
// Defends: NCCL edges end with their epoch, whatever is under way on them, and the next epoch's come up. That holds
// although NCCL frees device memory when it tears down, which waits for every kernel of the process.
#include <gtest/gtest.h>

#include "tests/worker/transport/nccl_node.h"

namespace strait {
namespace {

TEST_F(NcclTransportTest, EpochEndsWithReceivesPosted) {
  for (const bool can_revoke : {true, false}) {
    Node from(&fabric_), to(&fabric_);
    from.faults.can_revoke = to.faults.can_revoke = can_revoke;
    uint64_t edge_id = kEdge;
    int taken = 0;
    for (int round = 0; round < 4; ++round, ++edge_id) {
      Open(from, to, kFrom, kTo, edge_id);
      if (round == 1) taken = to.device->pieces;
      for (uint64_t step = 1; step <= 5; ++step)
        to.transport->Due(kTo, kEpoch, StepId{step}, kMaxTokens);
      ASSERT_TRUE(from.Send(1, kMaxTokens).ok());
      ExpectHidden(to.Next(), 1, kMaxTokens);
      to.transport->Consumed(kTo, kEpoch, StepId{1});
      // Both sides learn of the new epoch, one before the other: what the other says meanwhile is
      // of an epoch that is over.
      (round % 2 == 0 ? from.transport->Disconnect(kFrom) : to.transport->Forget(kTo));
      (round % 2 == 0 ? to.transport->Forget(kTo) : from.transport->Disconnect(kFrom));
      while (from.nccl->comms + to.nccl->comms > 0) std::this_thread::sleep_for(1ms);
      for (Node* node : {&from, &to}) {
        while (node->CountOf(Event::kDown) > 0) EXPECT_EQ(node->Next().edge.id, edge_id);
      }
    }
    EXPECT_LE(to.device->pieces, taken + 1) << "memory is taken anew for every epoch";
    EXPECT_EQ(to.nccl->aborts > 0, !can_revoke);
    End(from);
    End(to);
    EXPECT_EQ(to.device->pieces, 0);
  }
}

TEST_F(NcclTransportTest, NewEdgeReplacesTheOldOneSilently) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  const uint64_t next = kEdge + 1;
  to.transport->Expect(EdgeOf(kFrom, kTo, next));
  Event id = to.Next();
  ASSERT_EQ(id.kind, Event::kId) << id.status;
  EXPECT_EQ(id.edge.id, next);
  Edge edge = EdgeOf(kFrom, kTo, next);
  edge.nccl_id = id.text;
  from.transport->Connect(edge);
  Event event = from.Next();
  // The sender may have seen its old edge end before it was told.
  if (event.kind == Event::kDown) {
    EXPECT_EQ(event.edge.id, kEdge);
    event = from.Next();
  }
  ASSERT_EQ(event.kind, Event::kUp) << event.status;
  to.transport->Due(kTo, kEpoch, StepId{1}, 2);
  ASSERT_TRUE(from.Send(1, 2).ok());
  ExpectHidden(to.Next(), 1, 2);
}

// ---- An edge that is made before its epoch ----

// Opens it while nobody needs it yet; it is up.
void OpenAhead(Node& from, Node& to) {
  Edge edge = EdgeOf(kFrom, kTo);
  edge.ahead = true;
  to.transport->Expect(edge);
  const Event id = to.Next();
  ASSERT_EQ(id.kind, Event::kId) << id.status;
  edge.nccl_id = id.text;
  from.transport->Connect(edge);
  const Event up = from.Next();
  ASSERT_EQ(up.kind, Event::kUp) << up.status;
}

TEST_F(NcclTransportTest, EdgeMadeAheadIsTakenOverWithoutAnotherInit) {
  for (const int polls : {0, 3}) {
    Node from(&fabric_), to(&fabric_);
    from.faults.polls = to.faults.polls = polls;
    // Meanwhile another pair of stages of these workers serves, edge by edge.
    Open(from, to, kFrom + 10, kTo + 10, kEdge - 1);
    OpenAhead(from, to);
    EXPECT_EQ(from.nccl->posted, 1) << "a row went over it before it was up";
    to.transport->Due(kTo + 10, kEpoch, StepId{1}, 2);
    ASSERT_TRUE(from.Send(1, 2, kFrom + 10).ok());
    ExpectHidden(to.Next(), 1, 2, kTo + 10);
    EXPECT_EQ(to.CountOf(Event::kHidden), 0) << "of no step";
    // The switch: what served goes, what was made goes on.
    from.transport->Disconnect(kFrom + 10);
    to.transport->Forget(kTo + 10);
    from.transport->Probe(kFrom);
    const Event up = from.Next();
    ASSERT_EQ(up.kind, Event::kUp) << up.status;
    EXPECT_EQ(up.edge.id, kEdge);
    for (uint64_t step = 1; step <= 3; ++step) {
      to.transport->Due(kTo, kEpoch, StepId{step}, kMaxTokens);
      ASSERT_TRUE(from.Send(step, kMaxTokens).ok());
      ExpectHidden(to.Next(), step, kMaxTokens);
      to.transport->Consumed(kTo, kEpoch, StepId{step});
    }
    EXPECT_EQ(from.nccl->inits, 2) << "of each pair of stages one";
    EXPECT_EQ(to.nccl->inits, 2);
    End(from);
    EXPECT_EQ(from.device->pieces, 0) << "also of the row of no step";
    End(to);
    EXPECT_EQ(to.device->pieces, 0);
  }
}

TEST_F(NcclTransportTest, EdgeMadeAheadThatFailsIsToldInsteadOfItsProof) {
  NcclTransportOptions options;
  options.init_timeout = 200ms;
  Node from(&fabric_, options), to(&fabric_, options);
  // The communicator is made, and nothing goes over it.
  from.faults.ops_hang = to.faults.ops_hang = true;
  Edge edge = EdgeOf(kFrom, kTo);
  edge.ahead = true;
  to.transport->Expect(edge);
  edge.nccl_id = to.Next().text;
  from.transport->Connect(edge);
  for (Node* node : {&from, &to}) {
    const Event down = node->Next();
    ASSERT_EQ(down.kind, Event::kDown);
    EXPECT_FALSE(down.status.ok());
  }
  EXPECT_EQ(from.CountOf(Event::kUp), 0);
}

TEST_F(NcclTransportTest, ProbeFindsTheErrorOfAnEdgeMadeAhead) {
  Node from(&fabric_), to(&fabric_);
  OpenAhead(from, to);
  from.faults.async_error = 6;
  from.transport->Probe(kFrom);
  const Event down = from.Next();
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(from.CountOf(Event::kUp), 0);
}

// ---- An edge that is retired ----

// Who tore one down made the new ones wait for half a second, with the pipeline standing still.
TEST_F(NcclTransportTest, RetiredEdgeLingersWhileOthersUseTheDeviceAndIsNotRevoked) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to, kFrom + 10, kTo + 10, kEdge - 1);
  to.transport->Due(kTo + 10, kEpoch, StepId{1}, 2);
  ASSERT_TRUE(from.Send(1, 2, kFrom + 10).ok());
  ExpectHidden(to.Next(), 1, 2, kTo + 10);
  OpenAhead(from, to);
  // One that waits for what comes next, and keeps whoever frees waiting.
  to.transport->Due(kTo, kEpoch, StepId{1}, 2);
  const int proofs = 1;
  while (to.nccl->posted < 2 + proofs) std::this_thread::sleep_for(1ms);
  to.transport->Retire(kTo + 10);
  std::this_thread::sleep_for(300ms);
  EXPECT_EQ(to.nccl->comms, 2);
  // The new edge posts at once all the same.
  ASSERT_TRUE(from.Send(1, 2).ok());
  ExpectHidden(to.Next(), 1, 2);
  while (to.nccl->comms == 2) std::this_thread::sleep_for(1ms);
  from.transport->Retire(kFrom + 10);
  while (from.nccl->comms == 2) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(from.nccl->revokes + to.nccl->revokes, 0);
  EXPECT_EQ(from.nccl->aborts + to.nccl->aborts, 0);
  EXPECT_EQ(from.CountOf(Event::kDown) + to.CountOf(Event::kDown), 0);
}

TEST_F(NcclTransportTest, RetiredEdgesGoWhenTheyAreManyAndWithTheirTransport) {
  NcclTransportOptions options;
  options.linger_idle = 3600s;
  Node from(&fabric_, options), to(&fabric_, options);
  const auto retire = [&](uint64_t i) {
    Open(from, to, 10 + i, 10 + i, kEdge + i);
    to.transport->Due(10 + i, kEpoch, StepId{1}, 2);
    ASSERT_TRUE(from.Send(1, 2, 10 + i).ok());
    ExpectHidden(to.Next(), 1, 2, 10 + i);
    from.transport->Retire(10 + i);
    to.transport->Retire(10 + i);
  };
  for (uint64_t i = 0; i < kMaxLingering; ++i) retire(i);
  std::this_thread::sleep_for(50ms);
  EXPECT_EQ(from.nccl->comms, static_cast<int>(kMaxLingering));
  // The oldest goes; others may go along, as they hold up the device together.
  retire(kMaxLingering);
  for (Node* node : {&from, &to}) {
    while (node->nccl->comms > static_cast<int>(kMaxLingering)) std::this_thread::sleep_for(1ms);
  }
  End(from);
  End(to);
}

TEST_F(NcclTransportTest, RetiredEdgeWithAnOperationUnderWayIsTornDownAsAnyOther) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  to.transport->Due(kTo, kEpoch, StepId{1}, 2);
  while (to.nccl->posted < 1) std::this_thread::sleep_for(1ms);
  to.transport->Retire(kTo);
  while (to.nccl->comms > 0) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(to.nccl->revokes, 1);
}

TEST_F(NcclTransportTest, FinalizeThatDoesNotEndIsFollowedByAbort) {
  NcclTransportOptions options;
  options.revoke_timeout = 50ms;
  Node from(&fabric_, options), to(&fabric_, options);
  Open(from, to);
  from.faults.finalize_hangs = true;
  from.transport->Retire(kFrom);
  while (from.nccl->comms > 0) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(from.nccl->aborts, 1);
}

// ---- A free waits for all that its process has on the device ----

// The middle one of three workers, in a pipeline whose last one dies: a receive is posted whose hidden
// states will never come.
class NcclEpochsTest : public NcclTransportTest {
 protected:
  static constexpr uint64_t kFirst = 1, kMiddle = 2, kLast = 3;

  static NcclTransportOptions Options() {
    NcclTransportOptions options;
    options.abort_timeout = 3s;  // then on_poisoned
    options.leave_timeout = 60s;
    return options;
  }
  NcclEpochsTest() {
    for (Node* node : {&first_, &middle_}) node->faults.can_revoke = false;
  }
  ~NcclEpochsTest() override {
    for (Node* node : {&first_, &middle_})
      node->faults.frees_wait = node->faults.abort_blocks = false;
  }

  void OpenAll(Node& last) {
    Open(first_, middle_, kFirst, kMiddle, 5);
    Open(middle_, last, kMiddle, kLast, 6);
    middle_.transport->Due(kMiddle, kEpoch, StepId{1}, 2);
    while (middle_.nccl->posted < 1) std::this_thread::sleep_for(1ms);
  }
  // Until `node` has so many communicators; or NCCL hangs.
  static void AwaitComms(Node& node, int count) {
    while (node.nccl->comms != count) {
      ASSERT_EQ(node.CountOf(Event::kPoisoned), 0) << node.nccl->comms << " communicators are left";
      std::this_thread::sleep_for(1ms);
    }
  }

  Node first_{&fabric_, Options()};
  Node middle_{&fabric_, Options()};
};

// The broken edge's abort waited for the receive of the one that was well, and the thread of that one,
// which should have aborted it, for CUDA.
TEST_F(NcclEpochsTest, BrokenEdgeIsTornDownTogetherWithTheOthersOfItsEpoch) {
  for (const bool can_revoke : {false, true}) {
    middle_.faults.can_revoke = can_revoke;
    auto last = std::make_unique<Node>(&fabric_);
    OpenAll(*last);
    last.reset();
    const Event down = middle_.Next();
    ASSERT_EQ(down.kind, Event::kDown);
    ASSERT_EQ(down.edge.to_stage_id, kLast);
    std::this_thread::sleep_for(20ms);  // the loop takes a while to do as WorkerCore does
    middle_.transport->Disconnect(kMiddle);
    middle_.transport->Forget(kMiddle);
    AwaitComms(middle_, 0);
    if (HasFatalFailure()) return;
    first_.transport->Disconnect(kFirst);
    AwaitComms(first_, 0);
    EXPECT_LE(first_.CountOf(Event::kDown), 1);
    if (first_.CountOf(Event::kDown) > 0) (void)first_.Next();
    middle_.nccl->posted = 0;
  }
}

// The same, where no edge broke: the coordinator heard of the death, and a new epoch drops one edge
// after the other.
TEST_F(NcclEpochsTest, EdgesThatAreDroppedOneByOneLeaveTogether) {
  Node last(&fabric_);
  OpenAll(last);
  ASSERT_TRUE(middle_.Send(1, 2, kMiddle).ok());
  while (middle_.nccl->posted < 2) std::this_thread::sleep_for(1ms);
  middle_.transport->Forget(kMiddle);
  std::this_thread::sleep_for(20ms);
  middle_.transport->Disconnect(kMiddle);
  AwaitComms(middle_, 0);
}

// An edge broke; the stage finished the step that it computed, and the next one's receive was posted
// before the loop heard of the break.
TEST_F(NcclEpochsTest, NothingIsPostedWhileAnotherEdgeIsTornDown) {
  auto last = std::make_unique<Node>(&fabric_);
  Open(first_, middle_, kFirst, kMiddle, 5);
  Open(middle_, *last, kMiddle, kLast, 6);
  middle_.faults.abort_blocks = true;
  last.reset();
  ASSERT_EQ(middle_.Next().kind, Event::kDown);
  while (middle_.nccl->aborts < 1) std::this_thread::sleep_for(1ms);
  middle_.transport->Due(kMiddle, kEpoch, StepId{1}, 2);
  std::this_thread::sleep_for(100ms);
  EXPECT_EQ(middle_.nccl->posted, 0);
  middle_.faults.abort_blocks = false;
  std::this_thread::sleep_for(20ms);
  middle_.transport->Disconnect(kMiddle);
  middle_.transport->Forget(kMiddle);
  AwaitComms(middle_, 0);
}

// An edge that goes on, as another stage's would, is only held up.
TEST_F(NcclEpochsTest, EdgeThatStaysGoesOnAfterTheTeardownOfAnother) {
  Node last(&fabric_);
  Open(first_, middle_, kFirst, kMiddle, 5);
  Open(middle_, last, kMiddle, kLast, 6);
  middle_.transport->Due(kMiddle, kEpoch, StepId{1}, 2);
  while (middle_.nccl->posted < 1) std::this_thread::sleep_for(1ms);
  middle_.transport->Disconnect(kMiddle);
  std::this_thread::sleep_for(20ms);
  EXPECT_EQ(middle_.nccl->aborts, 0) << "it would hang";
  ASSERT_TRUE(first_.Send(1, 2, kFirst).ok());
  ExpectHidden(middle_.Next(), 1, 2, kMiddle);
  AwaitComms(middle_, 1);
  middle_.transport->Consumed(kMiddle, kEpoch, StepId{1});
  middle_.transport->Due(kMiddle, kEpoch, StepId{2}, 3);
  ASSERT_TRUE(first_.Send(2, 3, kFirst).ok());
  ExpectHidden(middle_.Next(), 2, 3, kMiddle);
}

// The abort of the edge before freed memory while the new edge's receive was posted. What that receive
// waited for came only after this worker's own next send, which could not be launched.
TEST_F(NcclEpochsTest, NewEdgeIsMadeWhenTheOldOneIsTornDown) {
  Open(first_, middle_, kFirst, kMiddle, 5);
  middle_.faults.abort_blocks = true;
  middle_.transport->Forget(kMiddle);
  first_.transport->Disconnect(kFirst);
  while (middle_.nccl->aborts < 1) std::this_thread::sleep_for(1ms);
  middle_.transport->Expect(EdgeOf(kFirst, kMiddle, 7));
  Event id = middle_.Next(200ms);
  if (id.kind == Event::kNone) {
    EXPECT_EQ(middle_.nccl->inits, 1);
    middle_.faults.abort_blocks = false;
    id = middle_.Next();
  } else {
    ADD_FAILURE() << "made beside the old one";
  }
  ASSERT_EQ(id.kind, Event::kId) << id.status;
  Edge edge = EdgeOf(kFirst, kMiddle, 7);
  edge.nccl_id = id.text;
  first_.transport->Connect(edge);
  ASSERT_EQ(first_.Next().kind, Event::kUp);
  middle_.transport->Due(kMiddle, kEpoch, StepId{1}, 2);
  while (middle_.nccl->posted < 1) std::this_thread::sleep_for(1ms);
  middle_.faults.abort_blocks = false;
  AwaitComms(middle_, 1);
  if (HasFatalFailure()) return;
  ASSERT_TRUE(first_.Send(1, 2, kFirst).ok());
  ExpectHidden(middle_.Next(), 1, 2, kMiddle);
}

// What waits can be dropped, and what waits too long says for what: the coordinator then takes gRPC,
// until the hanging abort ends this process.
TEST_F(NcclEpochsTest, WaitForTheOldEdgeHasADeadline) {
  NcclTransportOptions impatient = Options();
  impatient.init_timeout = 2s;
  impatient.abort_timeout = 60s;
  Node middle(&fabric_, impatient);
  middle.faults.can_revoke = false;
  Open(first_, middle, kFirst, kMiddle, 5);
  middle.faults.abort_blocks = true;
  middle.transport->Forget(kMiddle);
  middle.transport->Expect(EdgeOf(kFirst, kMiddle, 7));
  middle.transport->Forget(kMiddle);
  middle.transport->Expect(EdgeOf(kFirst, kMiddle, 8));
  const Event down = middle.Next();
  const int inits = middle.nccl->inits;
  middle.faults.abort_blocks = false;
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.edge.id, 8u);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_NE(down.status.message().find("torn down"), std::string::npos) << down.status;
  EXPECT_EQ(inits, 1);
  End(middle);
}

}  // namespace
}  // namespace strait
