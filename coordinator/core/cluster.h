// SPDX-License-Identifier: Apache-2.0
//
// Cluster knows the workers and puts pipelines together from them: it forms them, fills the place
// of a worker that died, and gives a pipeline a new epoch whenever something of it failed.
//
// Owns:    workers, pipelines (each with its Scheduler), a FaultPolicy, which says whom to blame.
// Borrows: the Context, the Journal.
// Thread:  loop thread only.
// Errors:  what a worker does wrong evicts it, with a status that names the discrepancy.
// Limits:  limits::kMaxWorkers; CoreOptions::heartbeat_timeout_us, load_timeout_us,
//          activation_timeout_us, step_timeout_us; what is booked of a worker's memory.
// Why:     workers, places and memory change together, so one class owns them: each event finds its
//          stage by id, changes its slot and its worker's books, and CheckIntegrity compares both.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/core/context.h"
#include "coordinator/core/departed.h"
#include "coordinator/core/edges.h"
#include "coordinator/core/fault_policy.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/pipeline.h"
#include "coordinator/core/planner.h"
#include "coordinator/core/replicas.h"
#include "coordinator/core/scale.h"
#include "coordinator/core/warm.h"
#include "coordinator/core/worker_books.h"

namespace strait {

// In a stage's host memory, by a worker's word.
inline constexpr uint64_t kMaxHostBlocks = 1 << 24;
// Of two pipelines that lack workers for so long, the younger one gives its workers to the older.
inline constexpr uint64_t kConsolidateAfterUs = 10'000'000;
// A worker that does not answer how its memory is lent out, by ResizeCache or UnloadStage, for so long.
inline constexpr uint64_t kMemoryTimeoutUs = 300'000'000;

// Processes that are remembered as drained, whether they are attached or not.
inline constexpr size_t kMaxDrainedInstances = 1024;

class Cluster {
 public:
  Cluster(Context* context, Journal* journal) : context_(context), journal_(journal) {}

  void OnAttached(WorkerId id, const v1::Hello& hello, uint64_t now_us);
  void OnMessage(WorkerId id, const v1::FromWorker& message, uint64_t now_us);
  void OnLost(WorkerId id, const absl::Status& why, uint64_t now_us);
  // Answered by ScaleTold and ScaleAnswered.
  void OnScale(ScaleId id, ScaleSpec spec, uint64_t now_us);
  // Of one that is under way; absent: none is.
  std::optional<ScaleReport> ReportOfScale(uint64_t now_us) const;
  const std::optional<ScaleEnded>& last_scale() const { return last_scale_; }
  // Timeouts.
  void OnTick(uint64_t now_us);
  // Forms, fills and activates what can be.
  void Advance(uint64_t now_us);
  // A worker said what cannot be.
  void Accuse(WorkerId id, absl::Status why, uint64_t now_us) { Evict(id, std::move(why), now_us); }
  bool IsScaling() const { return scale_.has_value(); }
  std::optional<ChangeUnderWay> Change() const;

  // ---- Workers that are to have no stage (coordinator/core/draining.h) ----
  // It lasts over a loss of its stream. REQUIRES: it is attached.
  void SetDuty(WorkerId id, Worker::Duty duty);
  // A worker of it drains: it takes new sequences only where no other pipeline can.
  bool IsClosed(const Pipeline& pipeline) const;
  // In which it has stages, or will have; null: none.
  const Pipeline* PipelineOf(const Worker& worker) const;
  // It gets as many stages as it has on workers that do not drain, as by a scale of it alone. CheckReplace: what Replace
  // would find now. FailedPrecondition: it does not serve, or pipelines are scaled; ResourceExhausted with the numbers.
  absl::Status CheckReplace(PipelineId id, uint64_t now_us);
  absl::Status Replace(PipelineId id, uint64_t now_us);
  struct Replaced {
    absl::Status status;
    v1::ScaleReply reply;
  };
  // Once, when it has ended.
  std::optional<Replaced> TakeReplaced() { return std::exchange(replaced_, std::nullopt); }
  // While its stages serve as before; later it goes on.
  void CancelReplace(const absl::Status& why);
  // Its workers unload and are idle afterwards; whoever is in it waits again.
  void Retire(PipelineId id, const absl::Status& why, uint64_t now_us);
  void Shutdown(WorkerId id, const std::string& reason);
  // Copies of prefix blocks that no sequence has go.
  void FlushReplicas();
  // New prefix blocks get copies on other workers. To be called when plans are out.
  void AdvanceReplicas();
  const Replicas& replicas() const { return replicas_; }
  // Rows that a death of any one worker leaves a copy of; whether it costs no more than the tail and a block.
  uint32_t ProtectedRows(const Pipeline& pipeline, const Residency& residency) const;
  bool IsProtected(const Pipeline& pipeline, const Residency& residency) const;
  // Its pipeline is about to serve again, for the first time since it failed, and to begin with copies of its rows: it
  // is not to compute them elsewhere. For restore_timeout_us at most, twice: while stages load, and activate.
  bool BeginsWithCopies(Sequence* sequence, uint64_t now_us) const;
  // Sends a step of `pipeline` to all of its stages.
  void SendStep(const Pipeline& pipeline, const v1::StepPlan& plan);

  using Pipelines = std::map<PipelineId, std::unique_ptr<Pipeline>>;
  const Pipelines& pipelines() const { return pipelines_; }
  const std::map<WorkerId, Worker>& workers() const { return workers_; }
  const FaultPolicy& faults() const { return faults_; }
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
  HostedStage HeldAs(const v1::HeldStage& held) const;
  absl::Status CheckHeldStage(const v1::HeldStage& held, uint64_t instance) const;
  // Gives them their places again, or has them unloaded.
  void TakeBack(Worker* worker, const v1::Hello& hello);
  bool TakeBackPlace(Worker* worker, const v1::HeldStage& held);
  // Who has this stage now, if anybody has.
  const Worker* WorkerOfStage(uint64_t stage_id) const;
  bool IsIdle(const Worker& worker, uint64_t now_us) const;
  std::vector<Worker*> IdleWorkers(uint64_t now_us);  // most memory first, then oldest
  Worker* FindWorker(WorkerId id);
  // What its worker is booked to have there. REQUIRES: not vacant.
  HostedStage& HostedIn(const StageSlot& slot);
  // A worker's stage that has a place, or will have one.
  struct Seat {
    HostedStage* stage = nullptr;  // null: it has none, or no more
    Pipeline* pipeline = nullptr;
    StageSlot* slot = nullptr;
  };
  Seat SeatOf(Worker* worker, uint64_t stage_id);
  // Without those to come. In the order of its slots.
  std::vector<Worker*> WorkersOf(const Pipeline& pipeline);

  void OnLoadProgress(Worker* worker, const v1::LoadProgress& progress, uint64_t now_us);
  void OnStageState(Worker* worker, const v1::StageState& state, uint64_t now_us);
  void OnActive(Worker* worker, const Seat& seat, const v1::StageState& state, uint64_t now_us);
  void OnFailed(Worker* worker, const Seat& seat, const v1::StageState& state, uint64_t now_us);
  void OnReport(Worker* worker, const v1::StageReport& report, uint64_t now_us);
  void OnMoved(Worker* worker, const v1::PrefixesMoved& moved, uint64_t now_us);

  // ---- Faults (faults.cc) ----
  // A stage says that it failed: the pipeline starts anew, the worker goes if its step failed once too often.
  // `link`: the edge that it names.
  void OnStageError(Worker* worker, const Seat& seat, const absl::Status& error,
                    const v1::LinkFailure& link, uint64_t now_us);
  // The edge failed: its two workers are blamed, in words that name them.
  std::string OnLinkFailed(const Pipeline& pipeline, const v1::LinkFailure& link,
                           const absl::Status& error, uint64_t now_us);
  // A step went all the way.
  void OnStepFinished(Pipeline* pipeline, uint64_t now_us);
  // Who had got no token for too long because of links ends.
  void EndUnreachable(const absl::Status& why, uint64_t now_us);
  // For sequences that the worker had in hand when it died; those that have seen too many of it end, but not before
  // they could run again: until then the worker may come back, and has not died.
  void CountDeath(const Worker& worker, const absl::Status& why);
  void EndDeadly();
  // They had not died: who is not running by now is forgiven.
  void Uncount(uint64_t instance);
  // Its workers as they are blamed for a failed link or several; true: others load in their place, or it is
  // dissolved to be formed in another order.
  bool PartBlamed(Pipeline* pipeline, uint64_t now_us);
  std::vector<WorkerId> WorkerIdsOf(const Pipeline& pipeline) const;
  bool IsRing() const { return context_->options.grants(); }
  uint64_t PatienceWithStep(const Pipeline& pipeline) const;
  // Edges of it failed, or may have: all are opened anew.
  static void RenewEdges(Pipeline* pipeline);
  void Unload(Worker* worker, uint64_t stage_id);
  void CollectLate(const Pipeline& pipeline, uint64_t now_us,
                   std::vector<std::pair<WorkerId, absl::Status>>* late) const;
  void CollectLate(const Worker& worker, uint64_t now_us,
                   std::vector<std::pair<WorkerId, absl::Status>>* late) const;

  // ---- Cache sizes (resizing.cc) ----
  void OnCacheResized(Worker* worker, const v1::CacheResized& resized, uint64_t now_us);
  void SendResize(Worker* worker, uint64_t stage_id, uint64_t cache_bytes, uint64_t now_us);
  // The slots' sizes, and what its scheduler reckons with. REQUIRES: as Scheduler::Resize.
  void ResizeSlots(Pipeline* pipeline, const std::vector<uint64_t>& cache_bytes, uint64_t now_us);
  // Caches that are smaller than wanted grow where their worker has room now.
  void GrowCaches(Pipeline* pipeline, uint64_t now_us);
  bool Grown(const Pipeline& pipeline) const;
  uint64_t FreeBytes(const Worker& worker) const;

  // ---- Copies on other workers (replicating.cc) ----
  void OnReplicated(Worker* worker, const v1::Replicated& replicated, uint64_t now_us);
  std::optional<WorkerId> ChooseBuddy(const StageSlot& slot) const;
  bool MayGetCopies(WorkerId id) const;
  // Stages whose buddy shares their host choose again where this one does not.
  void RenewBuddies(const Worker& newcomer);
  // What the next of its blocks are is told to a stage's buddy.
  void Replicate(const Pipeline& pipeline, uint32_t slot_index);
  // What could not be copied, a while ago.
  void CopyAgain(uint64_t now_us);
  void TellForget(WorkerId buddy, LayerRange layers, absl::Span<const ContentKey> keys);
  void TellServePrefixes(const Pipeline& pipeline, StageSlot* slot);
  void TellServeReplicas(WorkerId buddy);
  uint64_t ReplicaSecret(uint64_t what, uint64_t id) const;
  bool IsHeldAnywhere(const ContentKey& key) const;
  // A pipeline that served does not now.
  bool IsRecovering() const;
  // Of sequences that wait, and that it does not have, it fetches what copies there are.
  void SetRestores(const Pipeline& pipeline, StageSlot* slot, v1::ActivateStage* activate);
  // The most of its leading blocks that the same workers have copies of, and which they are.
  std::vector<ContentKey> CopiesOf(const Pipeline& pipeline, Sequence* sequence, LayerRange layers,
                                   std::vector<Replicas::Part>* parts) const;
  void CountProtected(uint64_t now_us);

  // ---- Scale (scaling.cc) ----
  void AdvanceScale(uint64_t now_us);
  void TickScale(uint64_t now_us);
  // True: it goes on at once, with this pipeline or the next.
  bool ScaleStep(uint64_t now_us);
  bool BeginTurn(uint64_t now_us);
  // `taken`: spares that it may not have.
  absl::StatusOr<ScalePlan> PlanScaleOf(Pipeline* pipeline, uint32_t num_stages, uint64_t now_us,
                                        const std::set<WorkerId>& taken = {});
  // Whether a scale may begin.
  absl::Status MayScale(uint32_t num_stages) const;
  // What would become of each pipeline, in turn.
  absl::StatusOr<std::vector<PlannedPipeline>> PlanAll(uint32_t num_stages, uint64_t now_us);
  // How it goes, if it is time to.
  void TellScale(bool now, uint64_t now_us);
  // Every sequence whose client read before the switch has a token of the new stages, or has gone; or that takes long.
  bool PausesAreOver(const Pipeline& pipeline, uint64_t now_us);
  void LoadLandings(Pipeline* pipeline, uint64_t now_us);
  void LoadNext(Pipeline* pipeline, uint64_t now_us);
  void BeginCopies(const Pipeline& pipeline, uint64_t now_us);
  bool StandsStill(Pipeline* pipeline, uint64_t now_us);

  // ---- Edges of the new stages, ahead (linking.cc) ----
  void BeginLinks(uint64_t now_us);
  // Tells stages to open their edges, from this one down to the next whose NCCL id must be known first.
  void TellLink(uint32_t slot_index);
  // Of a stage that has no place yet.
  void OnEdgeIdAhead(Worker* worker, const Seat& seat, const v1::EdgeId& id, uint64_t now_us);
  void OnLinked(Worker* worker, const v1::StageLinked& linked, uint64_t now_us);
  // The switch need not wait for them, any more.
  bool LinksSettled(uint64_t now_us);
  // What is there of them is of no use: the switch goes on without.
  void GiveUpLinks();
  // The new stages have their places: what is up is their edges.
  void TakeLinks(Pipeline* pipeline);

  // A row of a sequence came to a stage; other messages of this kind are not its business.
  void OnFetched(Worker* worker, const v1::RowsFetched& told, uint64_t now_us);
  void Switch(Pipeline* pipeline, uint64_t now_us);
  // The new stages are active: old ones go, before the first plan.
  void UnloadFollowed(PipelineId pipeline);
  void OnScaledActive(const Pipeline& pipeline);
  void OnScaledStep(const Pipeline& pipeline, uint64_t now_us);
  // This pipeline's turn, if it is, ends without success; new stages that have no place yet are unloaded.
  void AbortScale(PipelineId pipeline, const absl::Status& why);
  void AnswerScale(const absl::Status& status);

  // ---- Warm spares (warming.cc) ----
  bool IsWarm(const Worker& worker) const;
  // That have a stage, or have lost one; with the spares that have them warm.
  std::vector<WarmRange> ServedRanges() const;
  // While nothing else is put together.
  void AdvanceWarm(uint64_t now_us);
  // It loads one range more, or unloads those that nobody serves any more.
  void Warm(Worker* spare, uint64_t now_us);
  void OnWarmState(Worker* worker, const v1::StageState& state, uint64_t now_us);
  std::optional<uint64_t> WarmStageOf(const Worker& worker, LayerRange layers) const;
  // First those that have these layers ready, then those that load them, then those that have least ready.
  void PreferWarm(LayerRange layers, std::vector<Worker*>* idle) const;
  // What it has ready goes. True: it has nothing; false: ask again when it is unloaded.
  bool Cool(Worker* worker);
  bool CoolAll(const std::vector<Worker*>& workers);
  // The spares that a scale takes, likewise.
  bool SparesAreCold(const ScalePlan& plan);
  // What it has ready for this vacant slot gets the place. False: nothing.
  bool TakeWarm(Pipeline* pipeline, uint32_t slot_index, Worker* worker, uint64_t now_us);
  // Caches of stages that were warm grow to what is wanted. True: they have.
  bool GrowWarm(Pipeline* pipeline, uint64_t now_us);
  // Of a cache with which a place that was warm may begin: for the longest sequence, and for all that were there.
  uint64_t NeededBytes(const Pipeline& pipeline, const StageSlot& slot) const;
  // What its cache may have while other stages of its worker have not gone.
  uint64_t BytesBeside(const StageSlot& slot) const;
  // Its cache cannot grow: as if it could not be loaded.
  void GiveUpWarm(Pipeline* pipeline, uint32_t slot_index, uint64_t now_us);

  void FormPipeline(uint64_t now_us);
  void FillVacancies(Pipeline* pipeline, uint64_t now_us);
  // A pipeline's workers, by age, of these, who come with most memory first; as many stages as each will have. None:
  // they are too few.
  struct Crew {
    std::vector<Worker*> workers;
    std::vector<WorkerMemory> memory;
  };
  Crew ChooseCrew(std::vector<Worker*> candidates, uint64_t now_us);
  // Which of them take which vacant slots.
  struct Fill {
    Worker* worker;
    std::vector<uint32_t> slots;
    uint64_t rows;
  };
  std::vector<Fill> ChooseFills(const Pipeline& pipeline, const std::vector<Worker*>& idle,
                                uint64_t now_us) const;
  // What the worker has ready for other slots goes. False: something is to be loaded, and its memory is not free yet.
  bool MakeReady(const Pipeline& pipeline, const Fill& fill);
  // Of those that are free for this slot, the one against which least speaks beside these neighbours.
  size_t ChooseForSlot(const std::vector<WorkerId>& workers, uint32_t slot_index,
                       const std::vector<Worker*>& idle, uint64_t now_us) const;
  void Consolidate(uint64_t now_us);
  // No spare came in time for what is vacant: workers that are left take it, beside what they have where there is room;
  // else the pipeline is dissolved to be formed on them, if all that was admitted has room there.
  void UseSurvivors(Pipeline* pipeline, uint64_t now_us);
  // Those of its workers that it could be formed on, with as many stages each as it would have; empty: no fewer than
  // form one anyway.
  std::vector<WorkerMemory> SurvivorsOf(const Pipeline& pipeline, uint64_t now_us);
  bool LendTo(Pipeline* pipeline, uint32_t slot_index, uint64_t needed_rows, uint64_t now_us);
  // `worker` loads a stage for this slot, which is in its place or will be.
  void Assign(StageSlot* slot, HostedStage hosted, Worker* worker, uint64_t now_us);
  void Assign(Pipeline* pipeline, uint32_t slot_index, Worker* worker, uint64_t now_us);
  void SendLoad(Worker* worker, uint64_t stage_id, HostedStage hosted);
  // Nobody has this place any more, nor its edges; who comes next may hold as much as was planned at first.
  void Vacate(Pipeline* pipeline, uint32_t slot_index, uint64_t now_us);
  void Activate(Pipeline* pipeline, uint64_t now_us);
  // What a stage is told of a row of stages, and of its edges there.
  void SetEdges(const Pipeline& pipeline, const std::vector<StageSlot>& slots,
                const NumberedEdge& sampled_edge, uint32_t stage_index,
                v1::ActivateStage* activate);
  // And the edge of sampled ids, at its two ends.
  void SetGrants(const std::vector<StageSlot>& slots, const NumberedEdge& sampled_edge,
                 uint32_t stage_index, v1::ActivateStage* activate);
  // Tells stages to activate, from this one down to the next whose NCCL id must be known first.
  void TellActivate(Pipeline* pipeline, uint32_t slot_index);
  // A stage's share of its worker's host memory, in prefix blocks.
  uint32_t HostBlocksOf(const Pipeline& pipeline, const StageSlot& slot);
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
  void Evict(WorkerId id, absl::Status why, uint64_t now_us) {
    Evict(id, std::move(why), /*died=*/false, now_us);
  }
  // `died`: not for what it said, but because it does not work any more.
  void Evict(WorkerId id, absl::Status why, bool died, uint64_t now_us);
  // Its stream is over, and may be the only thing that is: it keeps what it has.
  void EndStream(WorkerId id, absl::Status why, uint64_t now_us);
  void Remove(WorkerId id, const absl::Status& why, bool may_return, bool died, uint64_t now_us);
  // Its stages, of which no slot knows from now on.
  void RememberStages(const Worker& worker, bool may_return);

  absl::Status CheckPipeline(const Pipeline& pipeline) const;
  absl::Status CheckWorker(const Worker& worker) const;
  absl::Status CheckScale() const;

  Context* const context_;
  Journal* const journal_;
  EdgeChooser edges_;
  FaultPolicy faults_;
  DepartedStages departed_;
  Replicas replicas_;
  std::set<WorkerId> serves_replicas_;  // that were told so
  uint64_t counted_us_ = 0;             // until when protected time is counted
  uint64_t copy_again_us_ = 0;          // not before
  std::map<WorkerId, Worker> workers_;
  Pipelines pipelines_;
  uint32_t num_active_ = 0;
  uint64_t last_stage_id_ = 0;
  uint64_t last_edge_id_ = 0;
  uint64_t last_pipeline_id_ = 0;
  uint64_t last_epoch_counter_ = 0;
  uint64_t weights_fingerprint_ = 0;  // of the workers that are attached, or were last
  std::optional<Scale> scale_;
  std::optional<Replaced> replaced_;
  std::optional<ScaleEnded> last_scale_;
  std::set<uint64_t> drained_instances_;  // at most kMaxDrainedInstances
  std::string deadly_;         // not empty: a sequence has seen too many deaths; the last one
  absl::Status plan_problem_;  // why no further pipeline was formed
  bool look_again_ =
      false;  // workers or their fitness changed since pipelines were last put together
};

}  // namespace strait
