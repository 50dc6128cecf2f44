// SPDX-License-Identifier: Apache-2.0
//
// Cluster knows the workers and puts pipelines together from them: it forms them, fills the place
// of a worker that died, and gives a pipeline a new epoch whenever something of it failed.
//
// Owns:    workers, pipelines (each with its Scheduler).
// Borrows: the Context, the Journal.
// Thread:  loop thread only.
// Errors:  what a worker does wrong evicts it, with a status that names the discrepancy.
// Limits:  limits::kMaxWorkers; CoreOptions::heartbeat_timeout_us, load_timeout_us,
//          activation_timeout_us, step_timeout_us.
// Why:     a pipeline is assembling (slots are vacant or load), activating (all are loaded) or
//          active (all answered); every failure, whatever it was, takes it back to assembling with
//          a new epoch. What its stages have of sequences stays theirs: they are asked for it when
//          they are activated, and it is theirs still if their worker comes back in time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/core/context.h"
#include "coordinator/core/departed.h"
#include "coordinator/core/edges.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/planner.h"
#include "coordinator/core/scheduler.h"

namespace strait {

// A worker whose stage fails so often without a finished step in between is evicted. A broken link
// counts apart, and longer than a heartbeat timeout: mostly the other end of it is to blame.
inline constexpr uint32_t kMaxStageErrors = 3;
inline constexpr uint32_t kMaxLinkErrors = 12;
// Wait before an activation after a failure that cost no worker: doubles from the first to the
// last.
inline constexpr uint64_t kActivateBackoffUs = 20'000;
inline constexpr uint64_t kActivateBackoffMaxUs = 2'000'000;
// A worker that could not load a stage is left alone so long, doubling.
inline constexpr uint64_t kLoadBackoffUs = 1'000'000;
inline constexpr uint64_t kLoadBackoffMaxUs = 60'000'000;
// Of two pipelines that lack workers for so long, the younger one gives its workers to the older.
inline constexpr uint64_t kConsolidateAfterUs = 10'000'000;

struct Worker {
  WorkerId id;
  std::string name;
  std::string data_address;
  std::string numerics_id;
  std::string backend;
  uint64_t memory_bytes = 0;
  std::optional<StageCosts> costs;  // of its stages' memory; absent: as on the CPU
  uint64_t instance = 0;
  uint32_t num_threads = 0;
  uint32_t process_id = 0;
  NcclSupport nccl;

  WorkerMemory memory() const { return {memory_bytes, costs ? &*costs : nullptr}; }

  uint64_t attached_us = 0;
  uint64_t last_heard_us = 0;
  uint64_t resident_bytes = 0;
  std::optional<PipelineId> pipeline;       // absent: spare, or unloading
  uint32_t slot_index = 0;                  // in the pipeline
  std::map<uint64_t, StagePlan> unloading;  // by stage id
  uint32_t load_failures = 0;
  uint64_t unfit_until_us = 0;
  std::string last_error;
};

// One place in a pipeline.
struct StageSlot {
  enum class State { kVacant, kLoading, kLoaded, kActivating, kActive };
  LayerRange layers;
  uint64_t cache_bytes = 0;  // of latent blocks
  State state = State::kVacant;
  WorkerId worker;        // unless vacant
  uint64_t stage_id = 0;  // of this worker's stage; never reused
  uint64_t bytes_loaded = 0;
  uint64_t bytes_total = 0;
  uint64_t load_progress_us = 0;  // when bytes_loaded last grew
  uint64_t weight_bytes = 0;
  uint32_t errors = 0;         // since a step was finished by all stages
  uint32_t link_errors = 0;    // since every link carried something
  uint64_t rows_computed = 0;  // since it was loaded, as it reported
  uint64_t rows_stored = 0;
  // What it may have of sequences; once it is active: what it told. The scheduler's while that runs.
  Holdings may_hold;
  // Of this epoch, once it is activated:
  bool told = false;      // ActivateStage is out
  EdgeChoice edge;        // from the stage before; none at the first
  NumberedEdge numbered;  // the same
  std::string nccl_id;    // of that edge, once this stage has made it

  // Whether it has not yet answered all that ActivateStage asks for.
  bool owes_answer() const {
    return told && (state == State::kActivating || (edge.over_nccl && nccl_id.empty()));
  }
};

struct Pipeline {
  enum class State { kAssembling, kActivating, kActive };
  Pipeline(Context* context, Journal* journal) : scheduler(context, journal) {}

  PipelineId id;
  PipelineEpoch epoch;
  State state = State::kAssembling;
  std::vector<StageSlot> slots;
  bool served = false;        // was active once
  uint64_t since_us = 0;      // in this state
  uint64_t retry_at_us = 0;   // no activation before
  uint32_t failures = 0;      // since every link carried something
  uint64_t planned_rows = 0;  // what its first workers could hold, see PipelinePlan::capacity_rows
  uint64_t vacant_since_us = 0;  // while a slot is vacant: since when one is, without a break
  std::string last_error;
  NumberedEdge sampled_edge;  // from the last stage to the first, if there are several and grants
  Scheduler scheduler;

  // The longest sequence that every stage can hold, vacant ones as planned.
  uint64_t capacity_rows(const CachePolicy& policy) const;
  uint32_t num_vacant() const;
};

class Cluster {
 public:
  Cluster(Context* context, Journal* journal) : context_(context), journal_(journal) {}

  void OnAttached(WorkerId id, const v1::Hello& hello, uint64_t now_us);
  void OnMessage(WorkerId id, const v1::FromWorker& message, uint64_t now_us);
  void OnLost(WorkerId id, const absl::Status& why, uint64_t now_us);
  // Timeouts.
  void OnTick(uint64_t now_us);
  // Forms, fills and activates what can be.
  void Advance(uint64_t now_us);
  // Sends a step of `pipeline` to all of its stages.
  void SendStep(const Pipeline& pipeline, const v1::StepPlan& plan);

  using Pipelines = std::map<PipelineId, std::unique_ptr<Pipeline>>;
  const Pipelines& pipelines() const { return pipelines_; }
  const std::map<WorkerId, Worker>& workers() const { return workers_; }
  uint32_t num_active() const { return num_active_; }
  // Of the roomiest pipeline, whatever its state.
  uint64_t capacity_rows() const;
  // For people: why no pipeline serves, and what would help.
  std::string WhyNoPipeline() const;
  absl::Status CheckIntegrity() const;

 private:
  // Whether a pipeline may consist of this worker and those that are attached.
  absl::Status CheckAgrees(const v1::Hello& hello) const;
  absl::Status CheckCosts(const v1::Hello& hello) const;
  // Whether the stages that it says it kept can be those of this process.
  absl::Status CheckHeldStages(const v1::Hello& hello) const;
  absl::Status CheckHeldStage(const v1::HeldStage& held, uint64_t instance) const;
  // Gives them their places again, or has them unloaded.
  void TakeBack(Worker* worker, const v1::Hello& hello);
  bool TakeBackPlace(Worker* worker, const v1::HeldStage& held);
  // Who has this stage now, if anybody has.
  const Worker* WorkerOfStage(uint64_t stage_id) const;
  bool IsIdle(const Worker& worker, uint64_t now_us) const;
  std::vector<Worker*> IdleWorkers(uint64_t now_us);  // most memory first, then oldest
  Worker* FindWorker(WorkerId id);
  Pipeline* PipelineOf(const Worker& worker);
  StageSlot* SlotOf(const Worker& worker, uint64_t stage_id);

  void OnLoadProgress(Worker* worker, const v1::LoadProgress& progress, uint64_t now_us);
  void OnStageState(Worker* worker, const v1::StageState& state, uint64_t now_us);
  void OnActive(Worker* worker, StageSlot* slot, const v1::StageState& state, uint64_t now_us);
  void OnFailed(Worker* worker, const v1::StageState& state, uint64_t now_us);
  void OnReport(Worker* worker, const v1::StageReport& report, uint64_t now_us);
  // A stage says that it failed: the pipeline starts anew, the worker goes if it was once too
  // often.
  void OnStageError(Worker* worker, StageSlot* slot, const absl::Status& error, uint64_t now_us);
  // Edges of it failed, or may have: all are opened anew.
  static void RenewEdges(Pipeline* pipeline);
  void Unload(Worker* worker, uint64_t stage_id, const StagePlan& shape);

  void FormPipeline(uint64_t now_us);
  void FillVacancies(Pipeline* pipeline, uint64_t now_us);
  void Consolidate(uint64_t now_us);
  void Assign(Pipeline* pipeline, uint32_t slot_index, Worker* worker, uint64_t now_us);
  // Nobody has this place any more, nor its edges; who comes next may hold as much as was planned at first.
  void Vacate(Pipeline* pipeline, uint32_t slot_index, uint64_t now_us);
  void Activate(Pipeline* pipeline, uint64_t now_us);
  // And the edge of sampled ids, at its two ends.
  void SetGrants(const Pipeline& pipeline, uint32_t stage_index, v1::ActivateStage* activate);
  // Tells stages to activate, from this one down to the next whose NCCL id must be known first.
  void TellActivate(Pipeline* pipeline, uint32_t slot_index);
  EdgeEnd EndAt(const StageSlot& slot);
  void OnEdgeId(Worker* worker, const v1::EdgeId& id, uint64_t now_us);
  // The NCCL edge that ends at this stage failed, say both ends or one.
  void OnNcclFailure(const Pipeline& pipeline, uint64_t to_stage_id, const absl::Status& why,
                     uint64_t now_us);
  void CompleteActivation(Pipeline* pipeline, uint64_t now_us);
  // Back to assembling with a new epoch; its sequences wait again.
  void Fail(Pipeline* pipeline, const absl::Status& why, uint64_t now_us);
  // Its workers unload and are idle afterwards. REQUIRES: not active.
  void Dissolve(PipelineId id);
  // For what it did: if it comes back, its stages are loaded anew.
  void Evict(WorkerId id, absl::Status why, uint64_t now_us);
  // Its stream is over, and may be the only thing that is: it keeps what it has.
  void EndStream(WorkerId id, absl::Status why, uint64_t now_us);
  void Remove(WorkerId id, const absl::Status& why, bool may_return, uint64_t now_us);
  // Its stages, of which no slot knows from now on.
  void RememberStages(const Worker& worker, bool may_return);

  Context* const context_;
  Journal* const journal_;
  EdgeChooser edges_;
  DepartedStages departed_;
  std::map<WorkerId, Worker> workers_;
  Pipelines pipelines_;
  uint32_t num_active_ = 0;
  uint64_t last_stage_id_ = 0;
  uint64_t last_edge_id_ = 0;
  uint64_t last_pipeline_id_ = 0;
  uint64_t last_epoch_counter_ = 0;
  uint64_t weights_fingerprint_ = 0;  // of the workers that are attached, or were last
  absl::Status plan_problem_;         // why no further pipeline was formed
  bool look_again_ =
      false;  // workers or their fitness changed since pipelines were last put together
};

}  // namespace strait
