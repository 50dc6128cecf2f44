// SPDX-License-Identifier: Apache-2.0
//
// Defends: sampled ids cross an edge of their own beside hidden states, whole and in order; who
// does not know its nonce, or speaks of rows that are no ids, is refused on it.
#include <deque>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/rpc/queue.h"
#include "worker/transport/grpc_transport.h"
#include "worker/transport/sampled_rows.h"

namespace strait {
namespace {

using std::chrono_literals::operator""s;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint32_t kRowBytes = 256;
constexpr PipelineEpoch kEpoch{.term = 1, .counter = 5};
constexpr uint64_t kEdge = 5;
constexpr uint64_t kFirst = 11;
constexpr uint64_t kLast = 12;
constexpr uint64_t kNonce = 77;

struct Event {
  enum Kind { kUp, kDown, kHidden, kSampled } kind;
  Edge edge;
  absl::Status status;
  uint64_t to_stage_id = 0;
  HiddenStep hidden;
  SampledStep sampled;
};

class Node {
 public:
  Node() {
    auto made = GrpcTransport::Create(
        {.hidden_row_bytes = kRowBytes},
        {.on_edge_up = [this](const Edge& edge,
                              HiddenMemory) { Push({.kind = Event::kUp, .edge = edge}); },
         .on_edge_down =
             [this](const Edge& edge, absl::Status status) {
               Push({.kind = Event::kDown, .edge = edge, .status = std::move(status)});
             },
         .on_hidden =
             [this](uint64_t to, HiddenStep hidden) {
               Push({.kind = Event::kHidden, .to_stage_id = to, .hidden = std::move(hidden)});
             },
         .on_sampled =
             [this](uint64_t to, SampledStep sampled) {
               Push({.kind = Event::kSampled, .to_stage_id = to, .sampled = std::move(sampled)});
             }});
    EXPECT_TRUE(made.ok()) << made.status();
    transport = std::move(*made);
  }
  Event Next() {
    if (ready_.empty()) ready_ = events_.PopAll(30s);
    if (ready_.empty()) {
      ADD_FAILURE() << "no event";
      return {.kind = Event::kDown};
    }
    Event event = std::move(ready_.front());
    ready_.pop_front();
    return event;
  }

 private:
  void Push(Event event) { events_.Push(std::move(event)); }
  BoundedQueue<Event> events_{1 << 20};
  std::deque<Event> ready_;

 public:
  std::unique_ptr<GrpcTransport> transport;  // its callbacks end first
};

// From the node's stage `from` to stage `to` on `node`.
Edge EdgeTo(const Node& node, uint64_t from, uint64_t to, bool sampled, uint64_t nonce = kNonce) {
  return {.id = kEdge,
          .from_stage_id = from,
          .to_stage_id = to,
          .peer_address = "127.0.0.1:" + std::to_string(node.transport->port()),
          .nonce = nonce,
          .sampled = sampled};
}

TEST(SampledEdge, TheRingOfTwoStagesCarriesBothKinds) {
  Node first, last;
  last.transport->Expect(EdgeTo(last, kFirst, kLast, false));
  first.transport->Expect(EdgeTo(first, kLast, kFirst, true));
  first.transport->Connect(EdgeTo(last, kFirst, kLast, false));
  last.transport->Connect(EdgeTo(first, kLast, kFirst, true));
  EXPECT_EQ(first.Next().kind, Event::kUp);
  const Event up = last.Next();
  EXPECT_EQ(up.kind, Event::kUp);
  EXPECT_TRUE(up.edge.sampled);
  for (uint64_t step = 1; step <= 3; ++step) {
    HiddenStep hidden{kEpoch, StepId{step}, 2, std::vector<std::byte>(2 * kRowBytes)};
    ASSERT_TRUE(first.transport->Send(kFirst, std::move(hidden)).ok());
    EXPECT_EQ(last.Next().kind, Event::kHidden);
    last.transport->Consumed(kLast, kEpoch, StepId{step});
    const auto token = static_cast<TokenId>(step * 1'000'000'007);
    ASSERT_TRUE(last.transport->SendSampled(kLast, {kEpoch, StepId{step}, {token, 1}}).ok());
    const Event event = first.Next();
    ASSERT_EQ(event.kind, Event::kSampled);
    EXPECT_EQ(event.to_stage_id, kFirst);
    EXPECT_EQ(event.sampled.step.value, step);
    EXPECT_EQ(event.sampled.epoch, kEpoch);
    EXPECT_THAT(event.sampled.tokens, ElementsAre(token, 1));
    first.transport->Consumed(kFirst, kEpoch, StepId{step});
  }
  // Ids must rise, as everywhere: both ends hear of the break.
  ASSERT_TRUE(last.transport->SendSampled(kLast, {kEpoch, StepId{3}, {1}}).ok());
  EXPECT_EQ(first.Next().kind, Event::kDown);
  const Event down = last.Next();
  EXPECT_EQ(down.kind, Event::kDown);
  EXPECT_THAT(std::string(down.status.message()), HasSubstr("they must rise"));
  EXPECT_EQ(first.transport->Stats().frames_refused, 1u);
}

TEST(SampledEdge, AStrangerIsRefused) {
  Node first, stranger;
  first.transport->Expect(EdgeTo(first, kLast, kFirst, true));
  stranger.transport->Connect(EdgeTo(first, kLast, kFirst, true, kNonce + 1));
  const Event refused = stranger.Next();
  EXPECT_EQ(refused.kind, Event::kDown);
  EXPECT_EQ(refused.status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(first.transport->Stats().opens_refused, 1u);
  // And the right one is let in after that.
  stranger.transport->Connect(EdgeTo(first, kLast, kFirst, true));
  EXPECT_EQ(stranger.Next().kind, Event::kUp);
  // The worker goes: its edge with it.
  first.transport->Forget(kFirst);
  EXPECT_EQ(stranger.Next().kind, Event::kDown);
  stranger.transport->Disconnect(kLast);
  EXPECT_FALSE(stranger.transport->SendSampled(kLast, {kEpoch, StepId{1}, {1}}).ok());
}

TEST(SampledEdge, RowsReadBackAsTheyWere) {
  const SampledStep sampled{kEpoch, StepId{9}, {0, 1, 0xFFFF'FFFE}};
  const HiddenStep rows = ToRows(sampled);
  EXPECT_EQ(rows.num_tokens, 3u);
  EXPECT_EQ(rows.data.size(), 12u);
  const SampledStep back = FromRows(rows);
  EXPECT_EQ(back.epoch, sampled.epoch);
  EXPECT_EQ(back.step, sampled.step);
  EXPECT_EQ(back.tokens, sampled.tokens);
}

}  // namespace
}  // namespace strait
