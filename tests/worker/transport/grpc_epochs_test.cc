// SPDX-License-Identifier: Apache-2.0
//
// Defends: an edge is of no epoch. While both of its ends stay, steps of any epoch travel over it; what an
// older one left there is in nobody's way; a newer edge between the same stages ends it.
#include "tests/worker/transport/grpc_node.h"

namespace strait {
namespace {

TEST(GrpcTransport, ANewerEdgeEndsTheOldOne) {
  Node from, to;
  Open(from, to);
  to.transport->Expect({kEdge + 1, kFrom, kTo});
  Event event = from.Next();
  ASSERT_EQ(event.kind, Event::kDown);
  EXPECT_EQ(event.status.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(to.Silent(50ms));  // its own doing: nothing to tell
  EXPECT_FALSE(from.transport->Send(kFrom, Step(1, 1)).ok());
  from.transport->Connect(EdgeTo(to, kEdge + 1));
  ASSERT_EQ(from.Next().kind, Event::kUp);
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 1)).ok());
  EXPECT_EQ(to.Next().kind, Event::kHidden);
}

TEST(GrpcTransport, AnEdgeOutlivesEpochs) {
  Node from, to;
  Open(from, to);
  const PipelineEpoch next{1, 6};
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 3)).ok());
  ASSERT_TRUE(from.transport->Send(kFrom, Step(2, 3)).ok());
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 2, next)).ok());
  EXPECT_EQ(to.Next().hidden.epoch, kEpoch);
  EXPECT_EQ(to.Next().hidden.step.value, 2u);
  Event event = to.Next();
  ASSERT_EQ(event.kind, Event::kHidden);
  EXPECT_EQ(event.hidden.epoch, next);
  EXPECT_EQ(event.hidden.step.value, 1u);
  EXPECT_TRUE(event.hidden.data.host() == Step(1, 2).data.host());
  // Back to what is over: the sender contradicts itself.
  ASSERT_TRUE(from.transport->Send(kFrom, Step(3, 1)).ok());
  event = to.Next();
  ASSERT_EQ(event.kind, Event::kDown);
  EXPECT_EQ(event.status.code(), absl::StatusCode::kInvalidArgument) << event.status;
}

// Regression: the sender saw its stream end, entered an epoch and opened the edge again before this side
// had noticed. It was refused as wrong (FailedPrecondition) and counted as an error of its stage.
TEST(GrpcTransport, AnEdgeOpenedAgainTakesThePlaceOfItsOldStream) {
  GrpcTransportOptions options;
  options.receive_bytes_max = 2 * kRowBytes;
  Node from, again, to(options);
  Open(from, to);
  for (uint64_t step = 1; step <= 2; ++step) {
    ASSERT_TRUE(from.transport->Send(kFrom, Step(step, 1)).ok());
    EXPECT_EQ(to.Next().hidden.step.value, step);
  }
  again.transport->Connect(EdgeTo(to));
  const Event up = again.Next();
  ASSERT_EQ(up.kind, Event::kUp) << up.status;
  EXPECT_EQ(from.Next().status.code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(to.Silent(50ms)) << "its edge goes on";
  const PipelineEpoch next{1, 6};
  for (uint64_t step = 1; step <= 2; ++step) {
    ASSERT_TRUE(again.transport->Send(kFrom, Step(step, 1, next)).ok());
  }
  EXPECT_EQ(to.Next().hidden.epoch, next);
  EXPECT_TRUE(to.Silent(100ms)) << "what the old stream delivered is not consumed yet";
  to.transport->Consumed(kTo, next, StepId{0});
  EXPECT_EQ(to.Next().hidden.step.value, 2u);
}

// The same, where this side has noticed and told it, and was not yet told of the next epoch.
TEST(GrpcTransport, AnEdgeOpenedAgainWaitsWhereItsEndWasTold) {
  Node again, to;
  {
    Node from;
    Open(from, to);
  }
  ASSERT_EQ(to.Next().kind, Event::kDown);
  again.transport->Connect(EdgeTo(to));
  EXPECT_TRUE(again.Silent(100ms));
  to.transport->Expect({kEdge, kFrom, kTo});
  const Event up = again.Next();
  EXPECT_EQ(up.kind, Event::kUp) << up.status;
}

// What a stage refused of an epoch that is over must not keep the next one's from being read.
TEST(GrpcTransport, ANewEpochFreesWhatTheOldOneLeft) {
  GrpcTransportOptions options;
  options.receive_bytes_max = 2 * kRowBytes;
  Node from, to(options);
  Open(from, to);
  const PipelineEpoch next{1, 6};
  for (uint64_t step = 1; step <= 2; ++step) {
    ASSERT_TRUE(from.transport->Send(kFrom, Step(step, 1)).ok());
    EXPECT_EQ(to.Next().hidden.step.value, step);
  }
  ASSERT_TRUE(from.transport->Send(kFrom, Step(1, 1, next)).ok());
  EXPECT_TRUE(to.Silent(100ms));  // full
  to.transport->Consumed(kTo, next, StepId{0});
  EXPECT_EQ(to.Next().hidden.epoch, next);
}

}  // namespace
}  // namespace strait
