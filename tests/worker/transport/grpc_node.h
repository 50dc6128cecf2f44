// SPDX-License-Identifier: Apache-2.0
//
// A worker's end of edges over gRPC, for tests: a transport and what it told.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "proto/rpc/queue.h"
#include "worker/transport/grpc_transport.h"

namespace strait {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;

inline constexpr uint32_t kRowBytes = 256;
inline constexpr PipelineEpoch kEpoch{.term = 1, .counter = 5};
inline constexpr uint64_t kEdge = 5;
inline constexpr uint64_t kFrom = 11;
inline constexpr uint64_t kTo = 12;

struct Event {
  enum Kind { kUp, kDown, kHidden } kind;
  Edge edge;
  absl::Status status;
  uint64_t to_stage_id = 0;
  HiddenStep hidden;
};

// A transport and what it told.
class Node {
 public:
  explicit Node(GrpcTransportOptions options = {}) {
    if (options.hidden_row_bytes == 0) options.hidden_row_bytes = kRowBytes;
    auto made = GrpcTransport::Create(
        options,
        {.on_edge_up = [this](const Edge& edge,
                              HiddenMemory) { events_.Push({.kind = Event::kUp, .edge = edge}); },
         .on_edge_down =
             [this](const Edge& edge, absl::Status status) {
               events_.Push({.kind = Event::kDown, .edge = edge, .status = std::move(status)});
             },
         .on_hidden =
             [this](uint64_t to, HiddenStep hidden) {
               events_.Push(
                   {.kind = Event::kHidden, .to_stage_id = to, .hidden = std::move(hidden)});
             }});
    EXPECT_TRUE(made.ok()) << made.status();
    transport = std::move(*made);
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(transport->port()); }
  Event Next(std::chrono::microseconds timeout = 30s) {
    if (ready_.empty()) ready_ = events_.PopAll(timeout);
    if (ready_.empty()) {
      ADD_FAILURE() << "no event";
      return {.kind = Event::kDown, .status = absl::InternalError("no event")};
    }
    Event event = std::move(ready_.front());
    ready_.pop_front();
    return event;
  }
  bool Silent(std::chrono::microseconds timeout) {
    if (ready_.empty()) ready_ = events_.PopAll(timeout);
    return ready_.empty();
  }

 private:
  BoundedQueue<Event> events_{1 << 20};
  std::deque<Event> ready_;

 public:
  std::unique_ptr<GrpcTransport> transport;  // its callbacks end first
};

inline Edge EdgeTo(const Node& node, uint64_t id = kEdge, uint64_t nonce = 0) {
  return {.id = id,
          .from_stage_id = kFrom,
          .to_stage_id = kTo,
          .peer_address = node.address(),
          .nonce = nonce};
}

inline HiddenStep Step(uint64_t id, uint32_t tokens, PipelineEpoch epoch = kEpoch) {
  HiddenStep step{.epoch = epoch, .step = StepId{id}, .num_tokens = tokens};
  step.data = std::vector<std::byte>(size_t{tokens} * kRowBytes);
  std::mt19937_64 random(id * 1000 + tokens);
  for (auto& byte : step.data.host()) byte = static_cast<std::byte>(random());
  return step;
}

inline void Open(Node& from, Node& to) {
  to.transport->Expect({kEdge, kFrom, kTo});
  from.transport->Connect(EdgeTo(to));
  ASSERT_EQ(from.Next().kind, Event::kUp);
}

}  // namespace strait
