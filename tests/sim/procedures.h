// SPDX-License-Identifier: Apache-2.0
//
// Procedures follow what a cluster does beside steps and moves by the messages that the coordinator sends and gets: which
// stages get copies, which workers take others' places, which come; and the change of a pipeline's stages by Core's word.
//
// Thread:  the simulator's.
// Why:     by messages, since they are cheap to look at: status is made of everything that there is. Drains are in no
//          message: Drains knows their phases.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "tests/sim/procedure_counts.h"

namespace strait::sim {

class SimWorker;

// By instance: addresses of objects are others in each run.
struct ByInstance {
  bool operator()(const SimWorker* a, const SimWorker* b) const;
};

// One under way, and its phase.
struct LiveProcedure {
  Phase phase = Phase::kCopiesCome;
  SimWorker* own = nullptr;
  std::vector<SimWorker*> peers;  // empty: any other
};

class Procedures {
 public:
  explicit Procedures(ProcedureCounts* counts) : counts_(counts) {}

  void OnSent(SimWorker* to, const v1::ToWorker& message);
  void OnHeard(SimWorker* from, const v1::FromWorker& message);
  void OnGone(SimWorker* worker);  // or its stream
  void OnJoins(SimWorker* worker);
  // One that came and has no place yet is told to load: weights that it is to hold ready (`warm`), or a place's.
  bool AwaitsPlace(SimWorker* worker) const;
  void OnWarms(SimWorker* worker);
  // A change of stages, or none: whenever it may have gone on.
  void OnChange(const std::optional<ChangeUnderWay>& change,
                const std::function<SimWorker*(WorkerId)>& worker_of);
  // The phase of what brings rows of sequences that do not move, if there is such a thing now.
  std::optional<Phase> BringsRows() const;
  // From now on who loads takes another's place.
  void OnLost() { any_lost_ = true; }

  std::vector<LiveProcedure> Live() const;
  bool any() const {
    return !copies_.empty() || !begins_.empty() || !joins_.empty() || change_.has_value();
  }
  // Copies that a worker (null: any) was told to make, and has not answered.
  bool AwaitsCopies(const SimWorker* buddy = nullptr) const;

 private:
  struct Begin {
    SimWorker* worker = nullptr;
    Phase phase = Phase::kReplaceLoads;
    std::set<SimWorker*, ByInstance> keepers;  // of what it restores
  };
  struct Change {
    PipelineId pipeline;
    Phase phase = Phase::kScaleRoom;
    std::vector<SimWorker*> hosts;  // who gets its stages; each once
    std::vector<SimWorker*> left;   // who had some, and gets none
  };
  void EnterBegin(uint64_t stage_id, Phase phase);

  ProcedureCounts* const counts_;
  bool any_lost_ = false;
  std::map<uint64_t, SimWorker*> stages_;  // who has them
  // By buddy, of each stage: told and not answered.
  std::map<SimWorker*, std::map<uint64_t, uint32_t>, ByInstance> copies_;
  std::map<uint64_t, Begin> begins_;  // stages that take a place
  std::map<SimWorker*, Phase, ByInstance> joins_;
  std::map<std::string, SimWorker*> by_address_;
  std::optional<Change> change_;
};

}  // namespace strait::sim
