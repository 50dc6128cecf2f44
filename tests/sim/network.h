// SPDX-License-Identifier: Apache-2.0
//
// Network and SimTransport: the Transport seam in virtual time. In-order delivery on every edge,
// delays from the seed, edges that break.
//
// Owns:    Network owns the links; a SimTransport is one worker's end.
// Thread:  one.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/sim/partition.h"
#include "tests/sim/world.h"
#include "worker/transport/transport.h"

namespace strait::sim {

class SimTransport;

// What the receiving end of an edge makes of it where it is NCCL: known to whoever knows the edge.
std::string FakeNcclId(uint64_t edge_id);

// One opened edge.
struct Link {
  enum class State { kDialing, kParked, kUp, kDown };
  Edge edge;
  State state = State::kDialing;
  SimTransport* from = nullptr;
  SimTransport* to = nullptr;  // once it arrived there
  uint64_t last_delivery_us = 0;
};
using LinkPtr = std::shared_ptr<Link>;

class Network {
 public:
  Network(World* world, const Partition* partition, uint64_t delay_us_max, double slow_chance)
      : world_(world),
        partition_(partition),
        delay_us_max_(delay_us_max),
        slow_chance_(slow_chance) {}

  void Break(const LinkPtr& link, const absl::Status& why);
  // A random link that is up breaks; nothing if there is none.
  void BreakOne();
  // Links from this address come up but carry nothing: each breaks when it is first used.
  void Spoil(const std::string& address) { spoiled_[address]; }
  void Mend(const std::string& address) { spoiled_.erase(address); }
  bool IsSpoiled(const std::string& address) const { return spoiled_.contains(address); }
  // Breaks of one spoiled address, the most there were.
  uint32_t spoiled_breaks_max() const { return spoiled_breaks_max_; }

 private:
  friend class SimTransport;
  uint64_t Delay() {
    const uint64_t delay_us = world_->Random(10, delay_us_max_);
    return world_->Chance(slow_chance_) ? delay_us * 100 : delay_us;
  }
  // `reach` runs so much later, or when the two ends are parted no more; if that takes too long, the edge breaks.
  void Reach(const LinkPtr& link, uint64_t delay_us, std::function<void()> reach);

  World* const world_;
  const Partition* const partition_;
  const uint64_t delay_us_max_;
  const double slow_chance_;
  std::map<std::string, SimTransport*> by_address_;
  std::vector<std::weak_ptr<Link>> links_;
  std::map<std::string, uint32_t> spoiled_;  // breaks of each
  uint32_t spoiled_breaks_max_ = 0;
};

class SimTransport : public Transport {
 public:
  // `run` puts a callback into its worker's own time (which may be stalled) after a delay.
  using RunAfter = std::function<void(uint64_t delay_us, std::function<void()>)>;
  SimTransport(Network* network, std::string address, TransportEvents events, RunAfter run);

  void Connect(const Edge& edge) override;
  absl::Status Send(uint64_t from_stage_id, HiddenStep hidden) override;
  absl::Status SendSampled(uint64_t from_stage_id, SampledStep sampled) override;
  void Probe(uint64_t from_stage_id) override;
  void Disconnect(uint64_t from_stage_id) override;
  void Expect(const Edge& edge) override;
  void Forget(uint64_t to_stage_id) override;
  void Consumed(uint64_t, PipelineEpoch, StepId) override {}

  const std::string& address() const { return address_; }
  // The process is gone: peers learn it after a while.
  void Kill();

 private:
  friend class Network;
  void Arrive(const LinkPtr& link);
  // `deliver` runs at the other end, in its time and in order.
  absl::Status Carry(uint64_t from_stage_id,
                     std::function<void(const TransportEvents&, uint64_t to)> deliver);

  Network* const network_;
  const std::string address_;
  const TransportEvents events_;
  const RunAfter run_;
  bool alive_ = true;
  std::map<uint64_t, LinkPtr> outgoing_;  // by from_stage_id
  std::map<uint64_t, Edge> expected_;     // by to_stage_id
  std::vector<LinkPtr> incoming_;         // parked and up
};

}  // namespace strait::sim
