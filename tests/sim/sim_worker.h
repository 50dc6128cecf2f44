// SPDX-License-Identifier: Apache-2.0
//
// SimWorker is a worker process in virtual time: the real WorkerCore between a simulated stream to the
// coordinator, a simulated Transport, a simulated RowTransfer and a HashBackend. It is what worker/service is: an adapter.
//
// Owns:    its core, its backend.
// Borrows: World, Network, RowNetwork, the Control that carries its stream.
// Thread:  the simulator's; its own time stands still while it is stalled, and while a backend
//          computes that takes no step ahead. One that does is a device beside it.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "strait/v1/cluster.pb.h"
#include "tests/sim/event_counts.h"
#include "tests/sim/hash_backend.h"
#include "tests/sim/network.h"
#include "tests/sim/restore_check.h"
#include "tests/sim/row_network.h"
#include "tests/sim/scenario.h"
#include "tests/sim/world.h"
#include "worker/core/worker_core.h"

namespace strait::sim {

class SimWorker;

// The coordinator's end of control streams.
class Control {
 public:
  virtual ~Control() = default;
  // Opens a new stream; an older one of this worker has ended.
  virtual void Dial(SimWorker* worker) = 0;
  virtual void FromWorker(SimWorker* worker, v1::FromWorker message, bool lie) = 0;
  // The worker ends its stream.
  virtual void HangUp(SimWorker* worker, absl::Status why) = 0;
  // Its process ends, as it was told to or since nobody drains it any more.
  virtual void Exit(SimWorker* worker) = 0;
};

class SimWorker final : private WorkerPorts {
 public:
  // `check_always`: integrity after every event, not only when asked.
  SimWorker(World* world, Network* network, RowNetwork* rows, Control* control,
            const Scenario* scenario, uint64_t instance, uint64_t memory_bytes, uint64_t weights,
            bool check_always);

  v1::Hello Hello() const;
  void Receive(const v1::ToWorker& message);  // in its own time
  void StreamEnded();                         // likewise: keeps its stages and dials again

  // ---- Faults ----
  // `silent`: who waits for its answers finds out by waiting.
  void Kill(bool silent = false);
  void Stall(uint64_t us);
  // No step, load or copy ends for so long; the process answers.
  void Hang(uint64_t us);
  bool hangs() const { return world_->now_us() < hung_until_us_; }
  // As SIGTERM: it asks to be drained, and ends when it is told to, when its stream ends, or when it is tired of waiting.
  void Leave();
  void FailNextLoad(absl::Status why = absl::DataLossError("a bad disk"));
  void FailNextStep();
  // A stage that is in no epoch yet has no room for the next rows that it is to fetch.
  void FailNextLanding() { landing_finds_no_room_ = true; }
  void LieOnce() { lie_next_ = true; }
  // Some bytes of its host memory change. False: it has taken none.
  bool CorruptHost();
  // Of a copy of another worker's block, likewise.
  bool CorruptReplica();
  void FailNextCopy() { backend_.copy_faults.fail_next = true; }

  // Runs `what` in this worker's time, `delay_us` from now or when it is free; never once it is
  // dead.
  void RunAfter(uint64_t delay_us, std::function<void()> what);

  bool alive() const { return alive_; }
  bool lied() const { return lied_; }
  bool is_leaving() const { return leaving_; }
  uint64_t instance() const { return instance_; }
  std::string address() const { return transport_.address(); }
  uint64_t memory_bytes() const { return memory_bytes_; }
  // Has weights that the others have not.
  bool is_foreign() const { return backend_.weights() != kHashWeights; }
  // Begun while another one was; and ids that went from one to the other without the host.
  uint64_t steps_ahead() const { return steps_ahead_; }
  uint64_t late_ids() const { return backend_.late_ids; }
  const EventCounts& event_counts() const { return counts_; }
  uint64_t rows_restored() const { return restores_.num_rows(); }  // and looked at
  const ReplicaStore& replicas() const { return core_.replicas(); }
  absl::Status CheckIntegrity() const { return core_.CheckIntegrity(); }
  // Of rows that move, what has not ended; empty: nothing.
  std::string TransfersLeft() const;
  size_t num_stages() const { return core_.num_stages(); }
  // Latent blocks held by all stages.
  uint64_t BlocksHeld() const { return core_.BlocksHeld(); }

 private:
  // ---- WorkerPorts ----
  void Tell(v1::FromWorker message) override;
  void DropCoordinator(absl::Status why) override;
  void Shutdown() override;
  void Load(const LoadOrder& order) override;
  void CancelLoads(uint64_t) override {}  // the core knows an answer that it does not want
  void RowsDue(uint64_t, PipelineEpoch, StepId, uint32_t) override {}
  void Note(LogLevel level, std::string_view what, std::initializer_list<LogField> fields) override;

  TransportEvents EventsOfTransport();
  RowTransferEvents EventsOfRows();
  void Heartbeat(uint64_t stream);
  void Orphaned(uint64_t stream);
  // Copies to and from host memory are polled, some time from now.
  void PollSoon();
  void Poll();
  void EndLoad(const LoadOrder& order);
  void Drain();  // does what has arrived, then computes, as far as it is free
  void TryRun();
  // The device has done the oldest step of the stage, if it is still that epoch's.
  void StepEnds(uint64_t stage_id, PipelineEpoch epoch);
  // A refusal of what an honest cluster sends is a bug of one of the two.
  void CheckTold(const v1::FromWorker& message);
  void CheckFetched(const v1::RowsFetched& fetched);
  void CheckSound();
  void OnReplicate(const v1::Replicate& replicate);
  // As Stage::State::Land without room: nothing of it is there. False: it is to be fetched.
  bool RefuseLanding(const v1::FetchRows& fetch);
  static void VoidNan(v1::StageReport* report);
  bool Lie(v1::StageReport* report);

  void Count(uint64_t stage_id, SimEvent event) { counts_.Add(core_.StateOf(stage_id), event); }
  void CountAll(SimEvent event);

  World* const world_;
  Control* const control_;
  const Scenario* const scenario_;
  const uint64_t instance_;
  const uint64_t memory_bytes_;
  const bool check_always_;
  HashBackend backend_;
  SimTransport transport_;
  SimRowTransfer rows_;
  WorkerCore core_;

  bool alive_ = true;
  std::deque<std::function<void()>> inbox_;
  uint64_t stalled_until_us_ = 0;
  uint64_t hung_until_us_ = 0;
  bool poll_is_due_ = false;
  bool computing_ = false;  // nothing else happens meanwhile
  uint64_t device_free_us_ = 0;
  uint64_t stream_ = 0;  // counts its streams
  uint64_t heartbeat_interval_us_ = 0;
  EventCounts counts_;
  RestoreCheck restores_;
  std::deque<std::pair<ContentKey, LayerRange>> copied_;  // that it was told to copy, the newest
  bool leaving_ = false;
  bool load_finds_no_room_ = false;
  bool landing_finds_no_room_ = false;
  bool lie_next_ = false;
  bool lied_ = false;
  uint64_t steps_ahead_ = 0;
};

}  // namespace strait::sim
