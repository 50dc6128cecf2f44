// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/nccl_transport.h"

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/log.h"
#include "proto/rpc/clock.h"
#include "worker/transport/nccl_edge.h"

namespace strait {
namespace {

constexpr std::chrono::milliseconds kWatchdogPeriod(20);

}  // namespace

class NcclTransport::Impl {
 public:
  Impl(NcclTransportOptions options, const NcclOffer& offer, NcclEvents events)
      : context_{options, offer, std::move(events), std::make_shared<ArenaPool>(offer.device),
                 offer.gate ? offer.gate : std::make_shared<TeardownGate>()},
        watchdog_([this] { Watch(); }) {}

  ~Impl() {
    std::unique_lock lock(mu_);
    for (auto* edges : {&outgoing_, &incoming_}) {
      for (auto& [id, edge] : *edges) Drop(std::move(edge));
      edges->clear();
    }
    for (auto& edge : retired_) edge->Drop();
    changed_.wait(lock, [this] { return retired_.empty(); });
    stop_ = true;
    lock.unlock();
    changed_.notify_all();
    watchdog_.join();
  }

  void Open(const Edge& edge, NcclEdge::Role role) {
    const bool sends = role == NcclEdge::Role::kSend;
    const uint64_t stage_id = sends ? edge.from_stage_id : edge.to_stage_id;
    Close(stage_id, role);
    auto made = std::make_unique<NcclEdge>(&context_, edge, role);
    std::lock_guard lock(mu_);
    Edges(role)[stage_id] = std::move(made);
  }

  void Close(uint64_t stage_id, NcclEdge::Role role) {
    std::lock_guard lock(mu_);
    auto& edges = Edges(role);
    const auto it = edges.find(stage_id);
    if (it == edges.end()) return;
    Drop(std::move(it->second));
    edges.erase(it);
  }

  void Retire(uint64_t stage_id, NcclEdge::Role role) {
    std::lock_guard lock(mu_);
    auto& edges = Edges(role);
    const auto it = edges.find(stage_id);
    if (it == edges.end()) return;
    it->second->Retire();
    retired_.push_back(std::move(it->second));
    edges.erase(it);
    size_t lingering = 0;
    for (auto edge = retired_.rbegin(); edge != retired_.rend(); ++edge) {
      if ((*edge)->retired() && ++lingering > kMaxLingering) (*edge)->Drop();
    }
  }

  // Loop thread: nobody else takes edges out of the maps.
  NcclEdge* Find(uint64_t stage_id, NcclEdge::Role role) {
    std::lock_guard lock(mu_);
    auto& edges = Edges(role);
    const auto it = edges.find(stage_id);
    return it == edges.end() ? nullptr : it->second.get();
  }

 private:
  using EdgeMap = std::unordered_map<uint64_t, std::unique_ptr<NcclEdge>>;

  EdgeMap& Edges(NcclEdge::Role role) {
    return role == NcclEdge::Role::kSend ? outgoing_ : incoming_;
  }

  // REQUIRES: mu_ held.
  void Drop(std::unique_ptr<NcclEdge> edge) {
    edge->Drop();
    retired_.push_back(std::move(edge));
  }

  void Watch() {
    std::unique_lock lock(mu_);
    while (!changed_.wait_for(lock, kWatchdogPeriod, [this] { return stop_; })) {
      // Only this thread destroys edges. What they tell may call back here, so mu_ is not held meanwhile.
      std::vector<NcclEdge*> watched;
      for (auto* edges : {&outgoing_, &incoming_}) {
        for (auto& [id, edge] : *edges) watched.push_back(edge.get());
      }
      for (auto& edge : retired_) watched.push_back(edge.get());
      lock.unlock();
      const uint64_t now_us = MonotonicMicros();
      for (NcclEdge* const edge : watched) edge->Watch(now_us);
      lock.lock();
      std::erase_if(retired_, [](const auto& edge) { return edge->finished(); });
      if (retired_.empty()) changed_.notify_all();
    }
  }

  const NcclEdgeContext context_;
  std::mutex mu_;  // the watchdog reads what the loop writes
  std::condition_variable changed_;
  EdgeMap outgoing_;                                // guarded by mu_, by from_stage_id
  EdgeMap incoming_;                                // guarded by mu_, by to_stage_id
  std::vector<std::unique_ptr<NcclEdge>> retired_;  // guarded by mu_
  bool stop_ = false;                               // guarded by mu_
  std::thread watchdog_;
};

NcclTransport::NcclTransport(NcclTransportOptions options, const NcclOffer& offer,
                             NcclEvents events)
    : impl_(std::make_unique<Impl>(options, offer, WithMemory(std::move(events)))) {
  STRAIT_CHECK(offer.nccl != nullptr && offer.device != nullptr && options.hidden_row_bytes > 0);
}

NcclEvents NcclTransport::WithMemory(NcclEvents events) {
  events.transport.on_edge_up = [this, tell = std::move(events.transport.on_edge_up)](
                                    const Edge& edge, const HiddenMemory&) {
    tell(edge, [this, from = edge.from_stage_id](size_t bytes) {
      std::optional<HiddenBuffer> place = Place(from, bytes);
      return place ? *std::move(place) : HiddenBuffer(std::vector<std::byte>(bytes));
    });
  };
  return events;
}

NcclTransport::~NcclTransport() = default;

void NcclTransport::Connect(const Edge& edge) {
  STRAIT_CHECK(edge.over_nccl && edge.max_tokens > 0);
  impl_->Open(edge, NcclEdge::Role::kSend);
}

absl::Status NcclTransport::Send(uint64_t from_stage_id, HiddenStep hidden) {
  NcclEdge* const edge = impl_->Find(from_stage_id, NcclEdge::Role::kSend);
  if (edge == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("stage ", from_stage_id, " has no edge"));
  }
  return edge->Send(std::move(hidden));
}

absl::Status NcclTransport::SendSampled(uint64_t, SampledStep) {
  return absl::InternalError("sampled ids were given to an edge of hidden states");
}

void NcclTransport::Probe(uint64_t from_stage_id) {
  if (NcclEdge* const edge = impl_->Find(from_stage_id, NcclEdge::Role::kSend)) edge->Probe();
}

void NcclTransport::Disconnect(uint64_t from_stage_id) {
  impl_->Close(from_stage_id, NcclEdge::Role::kSend);
}

std::optional<HiddenBuffer> NcclTransport::Place(uint64_t from_stage_id, size_t bytes) {
  NcclEdge* const edge = impl_->Find(from_stage_id, NcclEdge::Role::kSend);
  return edge != nullptr ? edge->Place(bytes) : std::nullopt;
}

void NcclTransport::Expect(const Edge& edge) {
  STRAIT_CHECK(edge.over_nccl && edge.max_tokens > 0);
  impl_->Open(edge, NcclEdge::Role::kReceive);
}

void NcclTransport::Due(uint64_t to_stage_id, PipelineEpoch epoch, StepId step,
                        uint32_t num_tokens) {
  if (NcclEdge* const edge = impl_->Find(to_stage_id, NcclEdge::Role::kReceive)) {
    edge->Due(epoch, step, num_tokens);
  }
}

void NcclTransport::Consumed(uint64_t to_stage_id, PipelineEpoch, StepId step) {
  if (NcclEdge* const edge = impl_->Find(to_stage_id, NcclEdge::Role::kReceive)) {
    edge->Consumed(step);
  }
}

void NcclTransport::Forget(uint64_t to_stage_id) {
  impl_->Close(to_stage_id, NcclEdge::Role::kReceive);
}

void EndPoisonedProcess(const std::string& why) {
  Log(LogLevel::kError, "NCCL hangs, this process ends and must be started again", {{"why", why}});
  std::fflush(nullptr);
  std::_Exit(kPoisonedExit);
}

void NcclTransport::Retire(uint64_t stage_id) {
  impl_->Retire(stage_id, NcclEdge::Role::kSend);
  impl_->Retire(stage_id, NcclEdge::Role::kReceive);
}

std::string NcclVersionText(uint32_t version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

}  // namespace strait
