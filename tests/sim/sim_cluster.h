// SPDX-License-Identifier: Apache-2.0
//
// SimCluster is one run: the coordinator's loop and streams, what happens to it by the seed, and what
// must hold.
//
// Owns:    all of it.
// Thread:  one.
// Errors:  Outcome::violation.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/json.h"
#include "tests/sim/client.h"
#include "tests/sim/gate.h"
#include "tests/sim/hash_model.h"
#include "tests/sim/moves.h"
#include "tests/sim/network.h"
#include "tests/sim/row_network.h"
#include "tests/sim/scenario.h"
#include "tests/sim/sim_worker.h"
#include "tests/sim/simulation.h"
#include "tests/sim/world.h"

namespace strait::sim {

inline constexpr uint64_t kTickUs = 50'000;

class SimCluster final : public Control {
 public:
  SimCluster(uint64_t seed, const SimulationOptions& options)
      : options_(options),
        world_(seed, options.trace),
        scenario_(MakeScenario(options.shape, &world_)),
        network_(&world_, scenario_.data_delay_us_max, scenario_.slow_message_chance),
        rows_(&world_, scenario_.rows,
              [this](RowFault fault, SequenceId sequence) { moves_.OnRowFault(fault, sequence); }),
        core_(scenario_.options, scenario_.model),
        moves_(&world_, &scenario_, &core_),
        clients_(&world_, &scenario_),
        gate_(&world_, [this](uint64_t us) { OnCoreRunsAgain(us); }) {}

  Outcome Run();

  void Dial(SimWorker* worker) override;
  void FromWorker(SimWorker* worker, v1::FromWorker message, bool lie) override;
  void HangUp(SimWorker* worker, absl::Status why) override { Close(streams_[worker], why, true); }

 private:
  struct Stream {
    SimWorker* worker = nullptr;
    WorkerId id;
    bool open = true;
    bool silent = false;        // no more is read of it
    uint64_t to_worker_us = 0;  // of the last delivery
    uint64_t to_core_us = 0;
  };
  using StreamPtr = std::shared_ptr<Stream>;

  // A fault that waits until a move is in that phase.
  struct Aim {
    MovePhase phase = MovePhase::kReserve;
    MoveFault fault = MoveFault::kKillSource;
    uint64_t delay_us = 0;
  };

  // ---- The coordinator's loop and its streams: sim_cluster.cc ----
  uint64_t Delay();
  // Whether a report is of what the core takes for the present.
  bool EpochIsActive(const v1::StageReport& report) const;
  void Pump();      // what the loop does after events
  void PumpSoon();  // now, or together with the events of the next moment
  void Tick();
  void OnCoreRunsAgain(uint64_t us);
  void Deliver(SendToWorker message);
  void Close(const StreamPtr& stream, const absl::Status& why, bool core_learns);
  void OnEvict(const EvictWorker& evict);

  json::Value Status() const;
  void StartWorker(uint64_t memory_bytes, uint64_t weights = kHashWeights);
  void Attach(const StreamPtr& stream);
  void Receive(const StreamPtr& stream, const v1::FromWorker& message, bool lie);
  void Lose(const StreamPtr& stream, const absl::Status& why);
  void CheckSound();
  // A worker with other weights dials: it must be refused, and vanishes.
  void AttachForeign(const StreamPtr& stream);

  // ---- What happens: cluster_events.cc ----
  void SubmitOne();
  void CancelSoon(RequestId id, std::optional<uint32_t> index, uint64_t delay_us);
  void ScaleOnce();
  void OnScaled(const ScaleAnswered& answer);
  void MoveOnce(uint32_t attempts);
  void Flush();
  void Heal();

  // ---- Faults: cluster_faults.cc ----
  void Fault();
  void Corrupt();
  // Counts as faults of workers those that excuse an eviction.
  void KillWorker(SimWorker* worker);
  void BreakStream(SimWorker* worker);
  void StallWorker(SimWorker* worker);
  void StopCoordinator();
  // Of moves that are under way and have the worker at an end.
  void CountFault(MoveFault of_source, MoveFault of_destination, const SimWorker& worker);
  void CountFault(MoveFault fault);
  void MakeAims();
  // Those faults strike for which a move is in the right phase.
  void CheckAims();
  void Strike(MoveFault fault, SequenceId sequence);
  SimWorker* AliveOf(const std::vector<WorkerId>& ids);

  // ---- What must hold: simulation.cc ----
  bool Settled() const;
  void CheckIdle();
  void CheckEnd();

  const SimulationOptions options_;
  World world_;
  const Scenario scenario_;
  Network network_;
  RowNetwork rows_;
  Core core_;
  Moves moves_;
  Clients clients_;
  Gate gate_;
  std::vector<std::unique_ptr<SimWorker>> workers_;
  std::map<SimWorker*, StreamPtr> streams_;  // the newest of each
  std::map<WorkerId, StreamPtr> by_id_;
  std::set<RequestId> submitted_unready_;  // while no pipeline served
  uint64_t last_worker_id_ = 0;
  uint64_t last_ready_us_ = 0;
  bool pump_is_due_ = false;
  uint32_t requests_left_ = 0;
  uint32_t scales_left_ = 0;
  std::set<ScaleId> scales_;  // not answered
  uint32_t moves_left_ = 0;
  std::vector<Aim> aims_;
  bool faults_over_ = false;
  uint32_t worker_faults_ = 0;  // of workers and their links: only these excuse an eviction
  Outcome outcome_;
};

}  // namespace strait::sim
