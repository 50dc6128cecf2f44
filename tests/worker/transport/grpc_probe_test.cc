// SPDX-License-Identifier: Apache-2.0
//
// Defends: an edge is up when its receiver answered over it, and a path that carries nothing, from the start or from
// some moment on, is told soon and as what it is.
#include <gmock/gmock.h>

#include "tests/worker/transport/grpc_node.h"
#include "tests/worker/transport/stopped_path.h"

namespace strait {
namespace {

using testing::HasSubstr;

GrpcTransportOptions Soon() {
  GrpcTransportOptions options;
  options.answer_timeout = 500ms;
  return options;
}

Edge Over(const StoppedPath& path) {
  return {.id = kEdge, .from_stage_id = kFrom, .to_stage_id = kTo, .peer_address = path.address()};
}

TEST(GrpcProbe, AnAddressThatNobodyListensToIsToldAtOnce) {
  Node from;
  int port;
  {
    Node gone;
    port = gone.transport->port();
  }
  from.transport->Connect({.id = kEdge,
                           .from_stage_id = kFrom,
                           .to_stage_id = kTo,
                           .peer_address = "127.0.0.1:" + std::to_string(port)});
  const Event down = from.Next(kAnswerTimeout + 1s);
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kUnavailable) << down.status;
}

// The bug: a path that took the connection and passed nothing looked like a busy receiver, for 30 s.
TEST(GrpcProbe, APathThatPassesNothingIsNoBusyReceiver) {
  Node from(Soon()), to;
  StoppedPath path(to.transport->port());
  path.Stop();
  from.transport->Connect(Over(path));
  const Event down = from.Next(10s);  // the accept timeout is 30 s
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kDeadlineExceeded) << down.status;
}

TEST(GrpcProbe, AReceiverThatDoesNotExpectTheEdgeYetAnswersAllTheSame) {
  Node from(Soon()), to;
  from.transport->Connect(EdgeTo(to));
  EXPECT_TRUE(from.Silent(1s)) << "it waits longer than for an answer";
  to.transport->Expect({kEdge, kFrom, kTo});
  EXPECT_EQ(from.Next().kind, Event::kUp);
}

// The bug: an edge that outlived an epoch was taken for one that works.
TEST(GrpcProbe, AnEdgeThatGoesOnIsAskedWhetherItStillCarriesSomething) {
  Node from(Soon()), to;
  StoppedPath path(to.transport->port());
  to.transport->Expect({kEdge, kFrom, kTo});
  from.transport->Connect(Over(path));
  ASSERT_EQ(from.Next().kind, Event::kUp);
  for (int i = 0; i < 3; ++i) {
    from.transport->Probe(kFrom);
    ASSERT_EQ(from.Next().kind, Event::kUp);
  }
  path.Stop();
  from.transport->Probe(kFrom);
  const Event down = from.Next(10s);  // a stall is told after 30 s
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kDeadlineExceeded) << down.status;
  EXPECT_THAT(std::string(down.status.message()), HasSubstr("stage 11 to stage 12"));
  EXPECT_THAT(std::string(down.status.message()), HasSubstr("no answer within 500 ms"));
}

TEST(GrpcProbe, AnEdgeThatIsDroppedMeanwhileTellsNothing) {
  Node from(Soon()), to;
  StoppedPath path(to.transport->port());
  to.transport->Expect({kEdge, kFrom, kTo});
  from.transport->Connect(Over(path));
  ASSERT_EQ(from.Next().kind, Event::kUp);
  path.Stop();
  from.transport->Probe(kFrom);
  from.transport->Probe(kFrom);
  from.transport->Disconnect(kFrom);
  EXPECT_TRUE(from.Silent(1s));
}

// The bug: between two steps nobody noticed for 15 s, and then the stage that waited was blamed for the step.
TEST(GrpcProbe, ALinkThatStopsShowsBeforeAStepIsLate) {
  Node from, to;
  StoppedPath path(to.transport->port());
  to.transport->Expect({kEdge, kFrom, kTo});
  from.transport->Connect(Over(path));
  ASSERT_EQ(from.Next().kind, Event::kUp);
  path.Stop();
  const Event down = from.Next(9s);  // less than CoreOptions::step_timeout_us
  ASSERT_EQ(down.kind, Event::kDown);
  EXPECT_EQ(down.status.code(), absl::StatusCode::kUnavailable) << down.status;
}

}  // namespace
}  // namespace strait
