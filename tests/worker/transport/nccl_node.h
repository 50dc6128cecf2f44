// SPDX-License-Identifier: Apache-2.0
//
// Node is a worker's end of NCCL edges over the fakes; what is sent is a pattern that tells its
// step. NcclTransportTest joins them, and looks that nobody broke NCCL's rules.
//
// Thread:  the test's is the loop thread.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "proto/base/limits.h"
#include "proto/rpc/queue.h"
#include "tests/worker/transport/fake_nccl.h"
#include "worker/transport/nccl_transport.h"

namespace strait {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;

inline constexpr uint32_t kRowBytes = 40;
inline constexpr uint32_t kMaxTokens = 64;
inline constexpr uint64_t kFrom = 3;
inline constexpr uint64_t kTo = 4;
inline constexpr PipelineEpoch kEpoch{1, 5};
inline constexpr uint64_t kEdge = 5;

struct Event {
  enum Kind { kNone, kUp, kDown, kHidden, kId, kPoisoned } kind = kNone;
  Edge edge;
  absl::Status status;
  HiddenStep hidden;
  std::string text;
};

inline std::byte Pattern(uint64_t step, size_t i) {
  return static_cast<std::byte>(step * 31 + i * 7);
}

// A worker's end.
class Node {
 public:
  explicit Node(FakeFabric* fabric, NcclTransportOptions options = {}, uint32_t version = 22809)
      : nccl(std::make_shared<FakeNccl>(fabric, &faults, version)),
        device(std::make_shared<FakeDevice>(fabric, &faults)) {
    fabric->loop_thread = std::this_thread::get_id();
    options.hidden_row_bytes = kRowBytes;
    NcclEvents events;
    events.transport.on_edge_up = [this](const Edge& edge, HiddenMemory memory) {
      {
        std::lock_guard lock(mu_);
        memory_[edge.from_stage_id] = std::move(memory);
      }
      Put({Event::kUp, edge});
    };
    events.transport.on_edge_down = [this](const Edge& edge, absl::Status why) {
      Put({Event::kDown, edge, std::move(why)});
    };
    events.transport.on_hidden = [this](uint64_t to, HiddenStep step) {
      Event event{Event::kHidden};
      event.edge.to_stage_id = to;
      event.hidden = std::move(step);
      Put(std::move(event));
    };
    events.transport.on_nccl_id = [this](const Edge& edge, std::string id) {
      Event event{Event::kId, edge};
      event.text = std::move(id);
      Put(std::move(event));
    };
    events.on_poisoned = [this](const std::string& why) {
      Event event{Event::kPoisoned};
      event.text = why;
      Put(std::move(event));
    };
    transport = std::make_unique<NcclTransport>(options, NcclOffer{nccl, device}, events);
  }

  Event Next(std::chrono::milliseconds patience = 30s) {
    if (ready_.empty()) ready_ = queue_.PopAll(patience);
    if (ready_.empty()) return {};
    Event event = std::move(ready_.front());
    ready_.pop_front();
    return event;
  }
  // What came up to now.
  int CountOf(Event::Kind kind) {
    for (Event& event : queue_.PopAll(0s)) ready_.push_back(std::move(event));
    int count = 0;
    for (const Event& event : ready_) count += event.kind == kind;
    return count;
  }
  absl::Status Send(uint64_t step, uint32_t tokens, uint64_t from = kFrom,
                    PipelineEpoch epoch = kEpoch) {
    HiddenMemory memory;
    {
      std::lock_guard lock(mu_);
      memory = memory_[from];
    }
    const size_t bytes = size_t{tokens} * kRowBytes;
    HiddenBuffer data = memory ? memory(bytes) : HiddenBuffer(std::vector<std::byte>(bytes));
    for (size_t i = 0; i < data.size(); ++i) data.data()[i] = Pattern(step, i);
    return transport->Send(from, {epoch, StepId{step}, tokens, std::move(data)});
  }

  FakeFaults faults;
  std::shared_ptr<FakeNccl> nccl;
  std::shared_ptr<FakeDevice> device;

 private:
  void Put(Event event) { queue_.Push(std::move(event)); }
  std::mutex mu_;
  std::map<uint64_t, HiddenMemory> memory_;  // guarded by mu_, by from_stage_id
  BoundedQueue<Event> queue_{1 << 20};
  std::deque<Event> ready_;

 public:
  std::unique_ptr<NcclTransport> transport;  // ends before what its events use
};

inline Edge EdgeOf(uint64_t from, uint64_t to, uint64_t id = kEdge) {
  Edge edge;
  edge.from_stage_id = from;
  edge.to_stage_id = to;
  edge.id = id;
  edge.over_nccl = true;
  edge.max_tokens = kMaxTokens;
  return edge;
}

// The control channel's part: the receiver's id is told to the sender.
inline void Open(Node& from, Node& to, uint64_t from_id = kFrom, uint64_t to_id = kTo,
                 uint64_t edge_id = kEdge) {
  to.transport->Expect(EdgeOf(from_id, to_id, edge_id));
  const Event id = to.Next();
  ASSERT_EQ(id.kind, Event::kId) << id.status;
  ASSERT_EQ(id.text.size(), limits::kNcclIdBytes);
  Edge edge = EdgeOf(from_id, to_id, edge_id);
  edge.nccl_id = id.text;
  from.transport->Connect(edge);
  const Event up = from.Next();
  ASSERT_EQ(up.kind, Event::kUp) << up.status;
}

inline void ExpectHidden(Event event, uint64_t step, uint32_t tokens, uint64_t to = kTo) {
  ASSERT_EQ(event.kind, Event::kHidden) << event.status;
  EXPECT_EQ(event.edge.to_stage_id, to);
  EXPECT_EQ(event.hidden.step.value, step);
  EXPECT_EQ(event.hidden.num_tokens, tokens);
  EXPECT_TRUE(event.hidden.data.on_device());
  ASSERT_EQ(event.hidden.data.size(), size_t{tokens} * kRowBytes);
  for (size_t i = 0; i < event.hidden.data.size(); ++i) {
    ASSERT_EQ(event.hidden.data.data()[i], Pattern(step, i)) << "byte " << i << " of " << step;
  }
}

class NcclTransportTest : public testing::Test {
 protected:
  ~NcclTransportTest() override {
    for (const std::string& problem : fabric_.Problems()) ADD_FAILURE() << problem;
  }
  // Ends a node; nothing of NCCL or the device may be left.
  static void End(Node& node) {
    node.transport.reset();
    EXPECT_EQ(node.nccl->comms, 0);
    EXPECT_EQ(node.device->streams, 0);
    EXPECT_EQ(node.device->events, 0);
  }

  FakeFabric fabric_;
};

}  // namespace strait
