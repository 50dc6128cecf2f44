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
#include "tests/sim/drains.h"
#include "tests/sim/gate.h"
#include "tests/sim/hash_model.h"
#include "tests/sim/moves.h"
#include "tests/sim/network.h"
#include "tests/sim/partition.h"
#include "tests/sim/procedures.h"
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
      : seed_(seed),
        options_(options),
        world_(seed, options.trace),
        scenario_(MakeScenario(options.shape, &world_)),
        partition_(&world_),
        network_(&world_, &partition_, scenario_.data_delay_us_max, scenario_.slow_message_chance),
        rows_(&world_, &partition_, scenario_.rows,
              [this](RowFault fault, SequenceId sequence) { OnRowFault(fault, sequence); }),
        core_(scenario_.options, scenario_.model),
        moves_(&world_, &scenario_, &core_),
        drains_(&world_, &scenario_, &core_, &procedure_counts_),
        procedures_(&procedure_counts_),
        clients_(&world_, &scenario_),
        gate_(&world_, [this](uint64_t us) { OnCoreRunsAgain(us); }) {}

  Outcome Run();

  void Dial(SimWorker* worker) override;
  void FromWorker(SimWorker* worker, v1::FromWorker message, bool lie) override;
  void HangUp(SimWorker* worker, absl::Status why) override {
    Close(streams_[worker], why, true, /*by_worker=*/true);
  }
  void Exit(SimWorker* worker) override;

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

  struct ProcedureAim {
    Phase phase = Phase::kCopiesCome;
    Fault fault = Fault::kKillOwn;
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
  // `by_worker`: it ends its stream itself. Else it, and in any case the core, learns of it when the way is open.
  void Close(const StreamPtr& stream, const absl::Status& why, bool core_learns,
             bool by_worker = false);
  // Its process is gone, and its stream with it.
  void StreamEnds(SimWorker* worker);
  void OnEvict(const EvictWorker& evict);

  json::Value Status() const;
  // It is a spare that has weights ready, or loads them.
  bool HoldsReady(WorkerId id) const;
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
  // `attempts`: where no pipeline can be scaled now, it is tried so often again.
  void ScaleOnce(uint32_t attempts);
  void OnScaled(const ScaleAnswered& answer);
  void MoveOnce(uint32_t attempts);
  void Flush();
  void Heal();

  // ---- Workers that go and come: cluster_procedures.cc ----
  void ScheduleProcedures();
  // What must hold of copies in idle moments: both sides' books agree; after a flush (`flushed`) nothing is left.
  void CheckCopies(bool flushed);
  void CollectProcedures();
  void JoinWorker(uint64_t memory_bytes);
  void JoinOnce();
  void DrainOnce();
  void LeaveOnce();
  void OnDrainEnded(const VerbEnded& ended);
  bool AnyLeaves() const;

  // ---- Faults of procedures: procedure_faults.cc ----
  void PartWorker(SimWorker* worker);
  std::vector<LiveProcedure> LiveProcedures() const;
  void CountProcedures(Fault of_own, Fault of_peer, const SimWorker& worker);
  void CountProcedures(Fault fault);
  void OnRowFault(RowFault fault, SequenceId sequence);
  void MakeProcedureAims(uint64_t seed);
  void CheckProcedureAims();
  SimWorker* PeerOf(const LiveProcedure& procedure);
  void Strike(const ProcedureAim& aim, SimWorker* own);
  void FindNoRoom(Phase phase, SimWorker* own);

  // ---- Faults: cluster_faults.cc ----
  void FaultOnce();
  void Corrupt();
  // Counts as faults of workers those that excuse an eviction.
  void KillWorker(SimWorker* worker);
  void BreakStream(SimWorker* worker);
  void StallWorker(SimWorker* worker);
  void HangWorker(SimWorker* worker);
  void StopCoordinator();
  void StopCoordinatorFor20s();
  // Of moves that are under way and have the worker at an end.
  void CountFault(MoveFault of_source, MoveFault of_destination, const SimWorker& worker);
  void CountFault(MoveFault fault);
  void MakeAims();
  // Those faults strike for which a move is in the right phase.
  void CheckAims();
  void BreakScale();
  void Strike(MoveFault fault, SequenceId sequence);
  // The move takes longer, and others need room: it is given up if they find none else.
  void CrowdDestination(SimWorker* source);
  SimWorker* AliveOf(const std::vector<WorkerId>& ids);

  // ---- What must hold: simulation.cc ----
  bool Settled() const;
  void CheckIdle();
  void CheckEnd();

  const uint64_t seed_;
  const SimulationOptions options_;
  World world_;
  const Scenario scenario_;
  Partition partition_;
  Network network_;
  RowNetwork rows_;
  Core core_;
  Moves moves_;
  ProcedureCounts procedure_counts_;
  Drains drains_;
  Procedures procedures_;
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
  uint32_t drains_left_ = 0;
  uint32_t leaves_left_ = 0;
  uint32_t joins_left_ = 0;
  std::vector<Aim> aims_;
  std::vector<ProcedureAim> procedure_aims_;
  bool scale_is_broken_ = false;
  bool faults_over_ = false;
  uint32_t worker_faults_ = 0;  // of workers and their links: only these excuse an eviction
  Outcome outcome_;
};

}  // namespace strait::sim
