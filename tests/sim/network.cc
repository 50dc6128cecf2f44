// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/network.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "proto/base/limits.h"

namespace strait::sim {

namespace {

constexpr uint64_t kAnswerTimeoutUs =
    std::chrono::duration_cast<std::chrono::microseconds>(kAnswerTimeout).count();

}  // namespace

std::string FakeNcclId(uint64_t edge_id) {
  std::string id = "nccl " + std::to_string(edge_id);
  id.resize(limits::kNcclIdBytes);
  return id;
}

void Network::Break(const LinkPtr& link, const absl::Status& why) {
  if (link->state == Link::State::kDown) return;
  const bool was_up = link->state == Link::State::kUp;
  link->state = Link::State::kDown;
  const auto tell = [&](SimTransport* end) {
    if (end == nullptr || !end->alive_) return;
    end->run_(Delay(), [end, edge = link->edge, why] { end->events_.on_edge_down(edge, why); });
  };
  tell(link->from);
  if (was_up) tell(link->to);
}

void Network::BreakOne() {
  std::vector<LinkPtr> up;
  for (const auto& weak : links_) {
    const LinkPtr link = weak.lock();
    if (link && link->state == Link::State::kUp) up.push_back(link);
  }
  if (up.empty()) return;
  const LinkPtr& link = up[world_->Random(0, up.size() - 1)];
  world_->Trace("fault: edge from stage " + std::to_string(link->edge.from_stage_id) + " breaks");
  Break(link, absl::UnavailableError("connection reset"));
}

void Network::Reach(const LinkPtr& link, uint64_t delay_us, std::function<void()> reach) {
  const uint64_t now_us = world_->now_us();
  const uint64_t open_us = partition_->OpenAt(link->from->address(), link->edge.peer_address);
  if (open_us <= now_us + kAnswerTimeoutUs) return world_->At(open_us + delay_us, std::move(reach));
  world_->After(kAnswerTimeoutUs,
                [this, link] { Break(link, absl::UnavailableError("no answer")); });
}

SimTransport::SimTransport(Network* network, std::string address, TransportEvents events,
                           RunAfter run)
    : network_(network),
      address_(std::move(address)),
      events_(std::move(events)),
      run_(std::move(run)) {
  network_->by_address_[address_] = this;
}

void SimTransport::Kill() {
  if (!alive_) return;
  alive_ = false;
  network_->by_address_.erase(address_);
  const absl::Status gone = absl::UnavailableError("peer is gone");
  for (const auto& [id, link] : outgoing_) network_->Break(link, gone);
  for (const LinkPtr& link : incoming_) network_->Break(link, gone);
  outgoing_.clear();
  incoming_.clear();
}

void SimTransport::Connect(const Edge& edge) {
  Disconnect(edge.from_stage_id);
  // What travels is the simulator's, but who is told what is as with NCCL.
  if (edge.over_nccl && edge.nccl_id != FakeNcclId(edge.id)) {
    network_->world_->Violation("a stage is told the NCCL id of another edge");
  }
  auto link = std::make_shared<Link>();
  link->edge = edge;
  link->from = this;
  outgoing_[edge.from_stage_id] = link;
  network_->links_.push_back(link);
  network_->Reach(link, network_->Delay(), [network = network_, link] {
    if (link->state != Link::State::kDialing) return;
    const auto peer = network->by_address_.find(link->edge.peer_address);
    if (peer == network->by_address_.end()) {
      return network->Break(link, absl::UnavailableError("connection refused"));
    }
    SimTransport* to = peer->second;
    to->run_(0, [to, link] {
      if (link->state == Link::State::kDialing) to->Arrive(link);
    });
  });
}

void SimTransport::Arrive(const LinkPtr& link) {
  link->to = this;
  const auto it = expected_.find(link->edge.to_stage_id);
  if (it == expected_.end() || it->second.id < link->edge.id) {
    if (link->state == Link::State::kParked) return;
    link->state = Link::State::kParked;  // until it is expected
    incoming_.push_back(link);
    return;
  }
  const Edge& expected = it->second;
  if (expected.id != link->edge.id || expected.nonce != link->edge.nonce ||
      expected.from_stage_id != link->edge.from_stage_id) {
    return network_->Break(link, absl::AbortedError("not expected any more"));
  }
  if (link->state != Link::State::kParked) incoming_.push_back(link);
  link->state = Link::State::kUp;
  SimTransport* from = link->from;
  from->run_(network_->Delay(), [from, link] {
    if (link->state == Link::State::kUp) from->events_.on_edge_up(link->edge, {});
  });
}

absl::Status SimTransport::Send(uint64_t from_stage_id, HiddenStep hidden) {
  auto shared = std::make_shared<HiddenStep>(std::move(hidden));
  return Carry(from_stage_id, [shared](const TransportEvents& events, uint64_t to) {
    events.on_hidden(to, std::move(*shared));
  });
}

absl::Status SimTransport::SendSampled(uint64_t from_stage_id, SampledStep sampled) {
  return Carry(from_stage_id, [sampled](const TransportEvents& events, uint64_t to) {
    events.on_sampled(to, sampled);
  });
}

absl::Status SimTransport::Carry(uint64_t from_stage_id,
                                 std::function<void(const TransportEvents&, uint64_t to)> deliver) {
  const auto it = outgoing_.find(from_stage_id);
  if (it == outgoing_.end() || it->second->state != Link::State::kUp) {
    return absl::UnavailableError("the edge is not up");
  }
  const LinkPtr link = it->second;
  if (const auto spoiled = network_->spoiled_.find(address_); spoiled != network_->spoiled_.end()) {
    network_->spoiled_breaks_max_ = std::max(network_->spoiled_breaks_max_, ++spoiled->second);
    network_->Break(link, absl::UnavailableError("no route to host"));
    return absl::OkStatus();
  }
  const uint64_t open_us = network_->partition_->OpenAt(address_, link->edge.peer_address);
  link->last_delivery_us = std::max(link->last_delivery_us, open_us + network_->Delay());
  network_->world_->At(link->last_delivery_us, [link, deliver] {
    if (link->state != Link::State::kUp) return;
    SimTransport* to = link->to;
    // What was read before the break is delivered.
    to->run_(0, [to, link, deliver] { deliver(to->events_, link->edge.to_stage_id); });
  });
  return absl::OkStatus();
}

void SimTransport::Probe(uint64_t from_stage_id) {
  const LinkPtr link = outgoing_.at(from_stage_id);
  network_->Reach(link, 2 * network_->Delay(), [link] {
    if (link->state != Link::State::kUp) return;  // its end is told
    SimTransport* from = link->from;
    from->run_(0, [from, link] {
      if (link->state == Link::State::kUp) from->events_.on_edge_up(link->edge, {});
    });
  });
}

void SimTransport::Disconnect(uint64_t from_stage_id) {
  const auto it = outgoing_.find(from_stage_id);
  if (it == outgoing_.end()) return;
  network_->Break(it->second, absl::CancelledError("closed by the sender"));
  outgoing_.erase(it);
}

void SimTransport::Expect(const Edge& edge) {
  const uint64_t to_stage_id = edge.to_stage_id;
  expected_[to_stage_id] = edge;
  if (edge.over_nccl) {
    run_(0, [this, edge] { events_.on_nccl_id(edge, FakeNcclId(edge.id)); });
  }
  const std::vector<LinkPtr> links = incoming_;
  for (const LinkPtr& link : links) {
    if (link->edge.to_stage_id != to_stage_id || link->state == Link::State::kDown) continue;
    if (link->edge.id < edge.id) {
      network_->Break(link, absl::AbortedError("an older edge"));
    } else if (link->state == Link::State::kParked) {
      Arrive(link);
    }
  }
  std::erase_if(incoming_, [](const LinkPtr& l) { return l->state == Link::State::kDown; });
}

void SimTransport::Forget(uint64_t to_stage_id) {
  expected_.erase(to_stage_id);
  for (const LinkPtr& link : incoming_) {
    if (link->edge.to_stage_id == to_stage_id) {
      network_->Break(link, absl::AbortedError("the stage is gone"));
    }
  }
  std::erase_if(incoming_, [](const LinkPtr& l) { return l->state == Link::State::kDown; });
}

}  // namespace strait::sim
