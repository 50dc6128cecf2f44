// SPDX-License-Identifier: Apache-2.0
//
// Defends: hidden states cross an NCCL edge whole and in order, whatever NCCL does. A peer that is
// absent, silent or gone, and an NCCL that hangs, break that edge alone, are told once, and leave
// neither memory nor communicator behind; the loop thread is never inside NCCL.
#include "worker/transport/nccl_transport.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/worker/transport/nccl_node.h"

namespace strait {
namespace {

TEST_F(NcclTransportTest, StepsArriveWholeAndInOrder) {
  for (const int polls : {0, 3}) {  // calls that are done at once; that are in progress first
    Node from(&fabric_), to(&fabric_);
    from.faults.polls = to.faults.polls = polls;
    Open(from, to);
    std::mt19937 random(7);
    constexpr int kSteps = 60;
    std::vector<uint32_t> sizes;
    for (int i = 0; i < kSteps; ++i) sizes.push_back(1 + random() % kMaxTokens);
    sizes[0] = sizes[1] = sizes[2] = sizes[3] = kMaxTokens;
    int due = 0;
    int sent = 0;
    for (int seen = 0; seen < kSteps; ++seen) {
      // Plans and hidden states come in any order between the two.
      while (due < std::min<int>(kSteps, seen + 1 + random() % 12)) {
        to.transport->Due(kTo, kEpoch, StepId{2u * due + 1}, sizes[due]);
        ++due;
      }
      while (sent < std::min<int>(kSteps, seen + 1 + random() % 12)) {
        ASSERT_TRUE(from.Send(2 * sent + 1, sizes[sent]).ok());
        ++sent;
      }
      ExpectHidden(to.Next(), 2 * seen + 1, sizes[seen]);
      to.transport->Consumed(kTo, kEpoch, StepId{2u * seen + 1});
    }
    EXPECT_EQ(from.CountOf(Event::kDown) + to.CountOf(Event::kDown), 0);
    End(from);
    EXPECT_EQ(from.device->pieces, 0);
    End(to);
    EXPECT_EQ(to.device->pieces, 0);
  }
}

// Spinning on the device, the next step's receive would take multiprocessors from the computation of
// this one; and it might be waited for by that very computation, where it feeds what that samples.
TEST_F(NcclTransportTest, OneReceiveIsPostedAheadAndTheNextWhenItsStepWasComputed) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  to.transport->Due(kTo, kEpoch, StepId{1}, 3);
  to.transport->Due(kTo, kEpoch, StepId{3}, 4);
  while (to.nccl->posted < 1) std::this_thread::sleep_for(1ms);
  ASSERT_TRUE(from.Send(1, 3).ok());
  ExpectHidden(to.Next(), 1, 3);
  ASSERT_TRUE(from.Send(3, 4).ok());
  EXPECT_EQ(to.Next(50ms).kind, Event::kNone);
  EXPECT_EQ(to.nccl->posted, 1);
  to.transport->Consumed(kTo, kEpoch, StepId{1});
  ExpectHidden(to.Next(), 3, 4);
  // Nothing computes: before anything is sent.
  to.transport->Consumed(kTo, kEpoch, StepId{3});
  to.transport->Due(kTo, kEpoch, StepId{4}, 5);
  while (to.nccl->posted < 3) std::this_thread::sleep_for(1ms);
}

// A stage that computes slowly keeps what came; what is sent meanwhile waits in host memory.
TEST_F(NcclTransportTest, FullMemoryWaitsAtBothEnds) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  constexpr uint64_t kSteps = 12;
  for (uint64_t step = 1; step <= kSteps; ++step) {
    to.transport->Due(kTo, kEpoch, StepId{step}, kMaxTokens);
    ASSERT_TRUE(from.Send(step, kMaxTokens).ok());
  }
  std::vector<Event> kept;
  for (size_t i = 0; i < kArenaSteps; ++i) {
    kept.push_back(to.Next());
    to.transport->Consumed(kTo, kEpoch, StepId{i + 1});
  }
  EXPECT_EQ(to.nccl->posted, static_cast<int>(kArenaSteps)) << "more than there is memory for";
  EXPECT_EQ(to.CountOf(Event::kHidden), 0);
  for (size_t i = 0; i < kept.size(); ++i) ExpectHidden(std::move(kept[i]), i + 1, kMaxTokens);
  kept.clear();
  for (uint64_t step = kArenaSteps + 1; step <= kSteps; ++step) {
    ExpectHidden(to.Next(), step, kMaxTokens);
    to.transport->Consumed(kTo, kEpoch, StepId{step});
  }
  EXPECT_GT(from.device->uploads, 0);
}

TEST_F(NcclTransportTest, SendRefusesWhatCannotGo) {
  Node from(&fabric_), to(&fabric_);
  EXPECT_EQ(from.Send(1, 1).code(), absl::StatusCode::kFailedPrecondition);
  Open(from, to);
  EXPECT_EQ(from.Send(1, kMaxTokens + 1).code(), absl::StatusCode::kResourceExhausted);
  from.transport->Disconnect(kFrom);
  EXPECT_EQ(from.Send(1, 1).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(NcclTransportTest, SendersQueueIsBounded) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  const size_t most = limits::kDataQueueBytes / (size_t{kMaxTokens} * kRowBytes);
  absl::Status status;
  size_t sent = 0;
  while (status.ok() && sent < most + 10) status = from.Send(++sent, kMaxTokens);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_EQ(sent, most + 1);
}

TEST_F(NcclTransportTest, StepBeyondTheEdgesSizeBreaksIt) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  to.transport->Due(kTo, kEpoch, StepId{1}, kMaxTokens + 1);
  EXPECT_EQ(to.Next().status.code(), absl::StatusCode::kResourceExhausted);
}

// ---- Set-up that fails ----

TEST_F(NcclTransportTest, NobodyJoins) {
  NcclTransportOptions impatient;
  impatient.init_timeout = 50ms;
  Node to(&fabric_, impatient);
  to.transport->Expect(EdgeOf(kFrom, kTo));
  EXPECT_EQ(to.Next().kind, Event::kId);
  const Event down = to.Next();
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kDeadlineExceeded) << down.status;
  EXPECT_TRUE(down.edge.over_nccl);
  EXPECT_EQ(down.edge.to_stage_id, kTo);
  End(to);
  EXPECT_EQ(to.nccl->aborts, 1) << "what was never made cannot be revoked";
  EXPECT_EQ(to.CountOf(Event::kDown), 0) << "told twice";
}

TEST_F(NcclTransportTest, OtherVersionIsToldAtBothEnds) {
  Node from(&fabric_, {}, 22703), to(&fabric_, {}, 22809);
  to.transport->Expect(EdgeOf(kFrom, kTo));
  Edge edge = EdgeOf(kFrom, kTo);
  edge.nccl_id = to.Next().text;
  from.transport->Connect(edge);
  for (Node* node : {&from, &to}) {
    const Event down = node->Next();
    ASSERT_EQ(down.kind, Event::kDown);
    EXPECT_EQ(down.status.code(), absl::StatusCode::kUnavailable) << down.status;
  }
}

TEST_F(NcclTransportTest, SameRankTwice) {
  Node a(&fabric_), b(&fabric_), to(&fabric_);
  to.transport->Expect(EdgeOf(kFrom, kTo));
  Edge edge = EdgeOf(kFrom, kTo);
  edge.nccl_id = to.Next().text;
  a.transport->Connect(edge);
  EXPECT_EQ(a.Next().kind, Event::kUp);
  b.transport->Connect(edge);
  EXPECT_EQ(b.Next().kind, Event::kDown);
  // The first two do not notice.
  to.transport->Due(kTo, kEpoch, StepId{1}, 2);
  ASSERT_TRUE(a.Send(1, 2).ok());
  ExpectHidden(to.Next(), 1, 2);
}

TEST_F(NcclTransportTest, NoDeviceMemory) {
  Node to(&fabric_);
  to.faults.out_of_memory = true;
  to.transport->Expect(EdgeOf(kFrom, kTo));
  const Event down = to.Next();
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kResourceExhausted);
  End(to);
}

// ---- An edge in use that breaks ----

TEST_F(NcclTransportTest, WhatIsNotFetchedBreaksTheEdge) {
  NcclTransportOptions impatient;
  impatient.send_timeout = 50ms;
  Node from(&fabric_, impatient), to(&fabric_);
  Open(from, to);
  ASSERT_TRUE(from.Send(1, 2).ok());
  const Event down = from.Next();
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kDeadlineExceeded) << down.status;
  EXPECT_EQ(to.Next().kind, Event::kDown) << "the fake tells its peer, as sockets do";
  EXPECT_EQ(from.Send(2, 2).code(), absl::StatusCode::kUnavailable);
  End(from);
  End(to);
  EXPECT_EQ(from.CountOf(Event::kDown) + to.CountOf(Event::kDown), 0) << "told twice";
}

TEST_F(NcclTransportTest, HangingReceiveBreaksItsEdgeAlone) {
  NcclTransportOptions impatient;
  impatient.receive_timeout = 1s;
  Node a(&fabric_), b(&fabric_), to(&fabric_, impatient);
  Open(a, to);
  Open(b, to, 5, 6);
  to.faults.ops_hang = true;
  to.transport->Due(kTo, kEpoch, StepId{1}, 2);
  while (to.nccl->posted < 1) std::this_thread::sleep_for(1ms);
  to.faults.ops_hang = false;
  for (uint64_t step = 1; step <= 5; ++step) {
    to.transport->Due(6, kEpoch, StepId{step}, 3);
    ASSERT_TRUE(b.Send(step, 3, 5).ok());
  }
  int hidden = 0;
  int down = 0;
  while (hidden < 5 || down < 1) {
    const Event event = to.Next();
    ASSERT_NE(event.kind, Event::kNone);
    if (event.kind == Event::kHidden)
      to.transport->Consumed(6, kEpoch, StepId{static_cast<uint64_t>(++hidden)});
    if (event.kind != Event::kDown) continue;
    ++down;
    EXPECT_EQ(event.edge.to_stage_id, kTo);
    EXPECT_EQ(event.status.code(), absl::StatusCode::kDeadlineExceeded) << event.status;
  }
  // And after the other has been torn down.
  to.transport->Forget(kTo);
  to.transport->Due(6, kEpoch, StepId{6}, 3);
  ASSERT_TRUE(b.Send(6, 3, 5).ok());
  ExpectHidden(to.Next(), 6, 3, 6);
}

TEST_F(NcclTransportTest, IdleEdgeIsPatient) {
  NcclTransportOptions impatient;
  impatient.receive_timeout = impatient.send_timeout = 30ms;
  Node from(&fabric_, impatient), to(&fabric_, impatient);
  Open(from, to);
  EXPECT_EQ(from.Next(150ms).kind, Event::kNone) << "nothing is under way, so nothing is late";
  EXPECT_EQ(to.CountOf(Event::kDown), 0);
}

TEST_F(NcclTransportTest, AsynchronousErrorIsToldOnce) {
  for (const bool receives : {false, true}) {
    Node from(&fabric_), to(&fabric_);
    Open(from, to);
    if (receives) to.transport->Due(kTo, kEpoch, StepId{1}, 2);
    (receives ? to : from).faults.async_error = kNcclRemoteError;
    for (Node* node : {&from, &to}) {
      const Event down = node->Next();
      ASSERT_EQ(down.kind, Event::kDown);
      EXPECT_EQ(down.status.code(), absl::StatusCode::kUnavailable) << down.status;
      EXPECT_NE(down.status.message().find("fake error 6"), std::string::npos) << down.status;
    }
    (void)from.Send(1, 2);
    End(from);
    End(to);
    EXPECT_EQ(from.CountOf(Event::kDown) + to.CountOf(Event::kDown), 0);
    EXPECT_EQ(to.CountOf(Event::kHidden), 0);
  }
}

// A buffer that a stage still holds outlives its edge and even the transport.
TEST_F(NcclTransportTest, HiddenStatesOutliveTheTransport) {
  Node from(&fabric_), to(&fabric_);
  Open(from, to);
  to.transport->Due(kTo, kEpoch, StepId{1}, 4);
  ASSERT_TRUE(from.Send(1, 4).ok());
  Event event = to.Next();
  End(to);
  EXPECT_EQ(to.device->pieces, 1);
  ExpectHidden(std::move(event), 1, 4);
  event = {};
  EXPECT_EQ(to.device->pieces, 0);
}

// ---- NCCL itself hangs ----

TEST_F(NcclTransportTest, RevokeThatDoesNotEndIsFollowedByAbort) {
  NcclTransportOptions impatient;
  impatient.revoke_timeout = 30ms;
  Node from(&fabric_), to(&fabric_, impatient);
  Open(from, to);
  to.transport->Due(kTo, kEpoch, StepId{1}, 2);
  to.faults.revoke_hangs = true;
  to.transport->Forget(kTo);
  End(to);
  EXPECT_EQ(to.nccl->aborts, 1);
}

TEST_F(NcclTransportTest, CallThatDoesNotComeBackBreaksTheEdge) {
  NcclTransportOptions impatient;
  impatient.init_timeout = 2s;
  Node from(&fabric_, impatient), to(&fabric_);
  Open(from, to);
  from.faults.send_blocks = true;
  ASSERT_TRUE(from.Send(1, 2).ok());
  const Event down = from.Next();
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kDeadlineExceeded) << down.status;
  EXPECT_NE(down.status.message().find("ncclSend"), std::string::npos) << down.status;
  from.faults.send_blocks = false;
}

TEST_F(NcclTransportTest, AbortThatHangsPoisonsTheProcessAndNothingElse) {
  NcclTransportOptions impatient;
  impatient.abort_timeout = 3s;
  impatient.init_timeout = 2s;
  impatient.leave_timeout = 100ms;
  Node a(&fabric_), b(&fabric_), to(&fabric_, impatient);
  Open(a, to);
  Open(b, to, 5, 6);
  to.faults.can_revoke = false;
  to.faults.abort_blocks = true;
  to.transport->Forget(kTo);
  const Event poisoned = to.Next();
  ASSERT_EQ(poisoned.kind, Event::kPoisoned) << poisoned.status;
  EXPECT_NE(poisoned.text.find("ncclCommAbort"), std::string::npos) << poisoned.text;
  to.transport->Due(6, kEpoch, StepId{1}, 3);
  ASSERT_TRUE(b.Send(1, 3, 5).ok());
  ExpectHidden(to.Next(), 1, 3, 6);
  EXPECT_EQ(to.Next(400ms).kind, Event::kNone) << "told again";
  to.faults.abort_blocks = false;
}

}  // namespace
}  // namespace strait
