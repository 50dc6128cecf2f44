// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/cluster.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"

namespace strait {
Worker* Cluster::FindWorker(WorkerId id) {
  const auto it = workers_.find(id);
  return it == workers_.end() ? nullptr : &it->second;
}

HostedStage& Cluster::HostedIn(const StageSlot& slot) {
  return FindWorker(slot.worker)->stages.at(slot.stage_id);
}

Cluster::Seat Cluster::SeatOf(Worker* worker, uint64_t stage_id) {
  HostedStage* stage = worker->Find(stage_id);
  if (stage == nullptr) return {};
  if (stage->role == HostedStage::Role::kNext) {
    return {stage, pipelines_.at(stage->pipeline).get(), &scale_->next[stage->slot_index]};
  }
  if (stage->role == HostedStage::Role::kLanding) {
    return {stage, pipelines_.at(stage->pipeline).get(), &scale_->landings[stage->slot_index]};
  }
  if (stage->role != HostedStage::Role::kPlace) return {};
  Pipeline* pipeline = pipelines_.at(stage->pipeline).get();
  return {stage, pipeline, &pipeline->slots[stage->slot_index]};
}

std::vector<Worker*> Cluster::WorkersOf(const Pipeline& pipeline) {
  std::vector<Worker*> workers;
  for (const StageSlot& slot : pipeline.slots) {
    if (slot.state == StageSlot::State::kVacant) continue;
    Worker* worker = FindWorker(slot.worker);
    if (std::find(workers.begin(), workers.end(), worker) == workers.end()) {
      workers.push_back(worker);
    }
  }
  return workers;
}

// ---------------------------------------------------------------- workers go

void Cluster::OnLost(WorkerId id, const absl::Status& why, uint64_t now_us) {
  if (FindWorker(id) == nullptr) return;
  Remove(id, why.ok() ? absl::UnavailableError("its stream ended") : why, true, true, now_us);
}

void Cluster::Evict(WorkerId id, absl::Status why, bool died, uint64_t now_us) {
  context_->Send(EvictWorker{id, why});
  Remove(id, why, false, died, now_us);
}

void Cluster::EndStream(WorkerId id, absl::Status why, uint64_t now_us) {
  context_->Send(EvictWorker{id, why});
  Remove(id, why, true, true, now_us);
}

void Cluster::RememberStages(const Worker& worker, bool may_return) {
  for (const auto& [stage_id, stage] : worker.stages) {
    DepartedStage departed{
        .instance = worker.instance, .worker_name = worker.name, .hosted = stage};
    const bool follows =
        std::any_of(stage.successor_of.begin(), stage.successor_of.end(),
                    [&](uint64_t before) { return worker.stages.contains(before); });
    if (stage.role == HostedStage::Role::kPlace) {
      StageSlot& slot = pipelines_.at(stage.pipeline)->slots[stage.slot_index];
      departed.rows_computed = slot.rows_computed;
      departed.rows_stored = slot.rows_stored;
      departed.wanted_cache_bytes = slot.wanted_cache_bytes;
      // One that has not taken over its predecessors' cache would come back without any.
      departed.may_return = may_return && !follows;
      if (departed.may_return) departed.may_hold = std::move(slot.may_hold);
    }
    if (stage.role == HostedStage::Role::kWarm) departed.may_return = may_return;
    departed_.Add(stage_id, std::move(departed));
  }
}

void Cluster::Remove(WorkerId id, const absl::Status& why, bool may_return, bool died,
                     uint64_t now_us) {
  Worker* worker = FindWorker(id);
  if (died) CountDeath(*worker, why);
  ++context_->stats.workers_lost;
  const absl::Status lost(why.code(),
                          absl::StrCat("worker ", worker->name, ": ", std::string(why.message())));
  std::set<PipelineId> pipelines;
  std::optional<PipelineId> prepared;
  for (auto& [stage_id, stage] : worker->stages) {
    if (stage.role == HostedStage::Role::kPlace) pipelines.insert(stage.pipeline);
    if (!stage.is_prepared()) continue;
    prepared = stage.pipeline;
    SeatOf(worker, stage_id).slot->state = StageSlot::State::kVacant;
    stage.role = HostedStage::Role::kUnloading;
  }
  if (prepared) AbortScale(*prepared, lost);
  for (const PipelineId pipeline : pipelines) {
    Fail(pipelines_.at(pipeline).get(), lost, now_us);
    AbortScale(pipeline, lost);
  }
  RememberStages(*worker, may_return);
  for (const auto& [stage_id, stage] : worker->stages) {
    faults_.ForgiveStage(stage_id);
    if (stage.role != HostedStage::Role::kPlace) continue;
    Vacate(pipelines_.at(stage.pipeline).get(), stage.slot_index, now_us);
  }
  if (worker->duty != Worker::Duty::kServes) {
    // Its copies go with it, and others have been told of new ones only.
    for (auto& [pipeline_id, pipeline] : pipelines_) {
      for (StageSlot& slot : pipeline->slots) slot.copying.buddy = WorkerId{};
    }
  }
  workers_.erase(id);
  replicas_.Forget(id);
  serves_replicas_.erase(id);
  edges_.Forget(id);
  faults_.Forget(id);
  look_again_ = true;
}

// ---------------------------------------------------------------- what workers say

void Cluster::OnMessage(WorkerId id, const v1::FromWorker& message, uint64_t now_us) {
  Worker* worker = FindWorker(id);
  if (worker == nullptr) return;  // evicted, and its last words were on the way
  worker->last_heard_us = now_us;
  switch (message.message_case()) {
    case v1::FromWorker::kHeartbeat:
      worker->resident_bytes = message.heartbeat().resident_bytes();
      return;
    case v1::FromWorker::kLoadProgress:
      return OnLoadProgress(worker, message.load_progress(), now_us);
    case v1::FromWorker::kStageState:
      return OnStageState(worker, message.stage_state(), now_us);
    case v1::FromWorker::kReport:
      return OnReport(worker, message.report(), now_us);
    case v1::FromWorker::kPrefixesMoved:
      return OnMoved(worker, message.prefixes_moved(), now_us);
    case v1::FromWorker::kCacheResized:
      return OnCacheResized(worker, message.cache_resized(), now_us);
    case v1::FromWorker::kRowsFetched:
      return OnFetched(worker, message.rows_fetched(), now_us);
    case v1::FromWorker::kRowsServed:
    case v1::FromWorker::kLeave:
      return;  // Migrations' business, and Draining's
    case v1::FromWorker::kReplicated:
      return OnReplicated(worker, message.replicated(), now_us);
    case v1::FromWorker::kStageLinked:
      return OnLinked(worker, message.stage_linked(), now_us);
    case v1::FromWorker::kEdgeId:
      return OnEdgeId(worker, message.edge_id(), now_us);
    case v1::FromWorker::kHello:
      return Evict(id, absl::InvalidArgumentError("a second Hello on one stream"), now_us);
    case v1::FromWorker::MESSAGE_NOT_SET:
      return Evict(id, absl::InvalidArgumentError("a message of unknown kind; are versions equal?"),
                   now_us);
  }
}

void Cluster::OnLoadProgress(Worker* worker, const v1::LoadProgress& progress, uint64_t now_us) {
  HostedStage* stage = worker->Find(progress.stage_id());
  if (stage != nullptr && stage->role == HostedStage::Role::kWarm) {
    if (progress.bytes_loaded() > stage->warm.bytes_loaded) worker->load_progress_us = now_us;
    stage->warm.bytes_loaded = progress.bytes_loaded();
    stage->warm.bytes_total = progress.bytes_total();
    return;
  }
  StageSlot* slot = SeatOf(worker, progress.stage_id()).slot;
  if (slot == nullptr) {
    // Of a stage that is given up; who waits until it has gone sees that it gets on.
    if (stage != nullptr && progress.bytes_loaded() > stage->warm.bytes_loaded) {
      stage->warm.bytes_loaded = progress.bytes_loaded();
      worker->load_progress_us = now_us;
    }
    return;
  }
  if (progress.bytes_loaded() > slot->bytes_loaded) worker->load_progress_us = now_us;
  slot->bytes_loaded = progress.bytes_loaded();
  slot->bytes_total = progress.bytes_total();
}

void Cluster::OnStageState(Worker* worker, const v1::StageState& state, uint64_t now_us) {
  const WorkerId id = worker->id;
  const HostedStage* stage = worker->Find(state.stage_id());
  if (stage != nullptr && stage->role == HostedStage::Role::kUnloading) {
    // A failure means that there was nothing to unload: a load that failed before.
    if (state.state() == v1::StageState::UNLOADED || state.state() == v1::StageState::FAILED) {
      worker->stages.erase(state.stage_id());
      look_again_ = true;
    }
    return;
  }
  if (stage != nullptr && stage->role == HostedStage::Role::kWarm) {
    return OnWarmState(worker, state, now_us);
  }
  if (state.stage_id() == 0 || state.stage_id() > last_stage_id_) {
    return Evict(id,
                 absl::InvalidArgumentError(
                     absl::StrCat("speaks of stage ", state.stage_id(), ", which there never was")),
                 now_us);
  }
  const Seat seat = SeatOf(worker, state.stage_id());
  StageSlot* slot = seat.slot;
  if (slot == nullptr) return;  // the late answer to something given up
  switch (state.state()) {
    case v1::StageState::LOADED:
      if (slot->state != StageSlot::State::kLoading) {
        return Evict(id, absl::FailedPreconditionError("says LOADED twice"), now_us);
      }
      if (state.cache_bytes() != slot->cache_bytes) {
        return Evict(id,
                     absl::FailedPreconditionError(absl::StrCat("took ", state.cache_bytes(),
                                                                " bytes of latent blocks, not the ",
                                                                slot->cache_bytes, " asked for")),
                     now_us);
      }
      // Its other stages come one after the other.
      worker->load_progress_us = now_us;
      faults_.OnLoaded(worker->id);
      slot->state = StageSlot::State::kLoaded;
      slot->weight_bytes = state.weight_bytes();
      slot->bytes_loaded = slot->bytes_total = state.weight_bytes();
      return;
    case v1::StageState::ACTIVE:
      return OnActive(worker, seat, state, now_us);
    case v1::StageState::FAILED:
      return OnFailed(worker, seat, state, now_us);
    default:
      return Evict(id,
                   absl::InvalidArgumentError(absl::StrCat(
                       "stage state ", static_cast<int>(state.state()), " was not asked for")),
                   now_us);
  }
}

void Cluster::OnActive(Worker* worker, const Seat& seat, const v1::StageState& state,
                       uint64_t now_us) {
  Pipeline* pipeline = seat.pipeline;
  StageSlot* slot = seat.slot;
  const PipelineEpoch epoch = FromWire(state.epoch());
  if (epoch < pipeline->epoch) return;
  if (epoch != pipeline->epoch || slot->state != StageSlot::State::kActivating) {
    return Evict(worker->id,
                 absl::FailedPreconditionError(
                     absl::StrCat("says ACTIVE in epoch ", ToString(epoch), ", the pipeline is in ",
                                  ToString(pipeline->epoch))),
                 now_us);
  }
  const absl::Status sound = CheckHeld(slot->may_hold, state.held());
  if (!sound.ok()) {
    return Evict(
        worker->id,
        absl::Status(sound.code(), absl::StrCat("stage ", slot->stage_id, " of worker ",
                                                worker->name, " ", std::string(sound.message()))),
        now_us);
  }
  slot->may_hold = Narrowed(slot->may_hold, state.held());
  slot->state = StageSlot::State::kActive;
  CompleteActivation(pipeline, now_us);
}

void Cluster::OnFailed(Worker* worker, const Seat& seat, const v1::StageState& state,
                       uint64_t now_us) {
  Pipeline* pipeline = seat.pipeline;
  const absl::Status error(state.error_code() == 0
                               ? absl::StatusCode::kUnknown
                               : static_cast<absl::StatusCode>(state.error_code()),
                           state.error_message());
  if (seat.slot->state != StageSlot::State::kLoading) {
    if (FromWire(state.epoch()) < pipeline->epoch) return;
    OnNcclFailure(*pipeline, state.failed_nccl_edge(), error, now_us);
    RenewEdges(pipeline);
    return OnStageError(worker, seat, error, state.failed_link(), now_us);
  }
  // Not evicted: it would come back and fail again at once. Others may have better luck meanwhile.
  worker->last_error = absl::StrCat("could not load: ", std::string(error.message()));
  faults_.OnLoadFailed(worker->id, now_us);
  look_again_ = true;
  const std::string what = absl::StrCat("worker ", worker->name, " ", worker->last_error);
  const HostedStage stage = *seat.stage;
  worker->stages.erase(state.stage_id());
  if (stage.is_prepared()) {
    seat.slot->state = StageSlot::State::kVacant;
    return AbortScale(pipeline->id, absl::Status(error.code(), what));
  }
  pipeline->last_error = what;
  Vacate(pipeline, stage.slot_index, now_us);
}

void Cluster::OnReport(Worker* worker, const v1::StageReport& report, uint64_t now_us) {
  const WorkerId id = worker->id;
  const Seat seat = SeatOf(worker, report.stage_id());
  if (seat.slot == nullptr) {
    if (report.stage_id() != 0 && report.stage_id() <= last_stage_id_) return;  // late
    return Evict(id,
                 absl::InvalidArgumentError(absl::StrCat("reports for stage ", report.stage_id(),
                                                         ", which there never was")),
                 now_us);
  }
  Pipeline* pipeline = seat.pipeline;
  const PipelineEpoch epoch = FromWire(report.epoch());
  if (seat.stage->is_prepared()) {
    return Evict(id, absl::FailedPreconditionError("reports for a stage that is in no epoch"),
                 now_us);
  }
  if (epoch < pipeline->epoch) return;  // late
  if (epoch > pipeline->epoch) {
    return Evict(id,
                 absl::FailedPreconditionError(absl::StrCat("reports in epoch ", ToString(epoch),
                                                            ", the pipeline is in ",
                                                            ToString(pipeline->epoch))),
                 now_us);
  }
  if (report.error_code() != 0) {
    const absl::Status error(static_cast<absl::StatusCode>(report.error_code()),
                             report.error_message());
    OnNcclFailure(*pipeline, report.failed_nccl_edge(), error, now_us);
    if (report.step_id() == 0) RenewEdges(pipeline);
    return OnStageError(worker, seat, error, report.failed_link(), now_us);
  }
  if (pipeline->state != Pipeline::State::kActive) {
    return Evict(id, absl::FailedPreconditionError("reports a step before any was planned"),
                 now_us);
  }
  const uint32_t slot_index = seat.stage->slot_index;
  const absl::StatusOr<StageStep> done = pipeline->scheduler.OnReport(slot_index, report, now_us);
  if (!done.ok()) {
    Evict(id,
          absl::Status(done.status().code(), absl::StrCat("report of step ", report.step_id(), ": ",
                                                          std::string(done.status().message()))),
          now_us);
    // Who contradicts the plans may have handed on what is wrong: nobody's rows are believed.
    for (StageSlot& each : pipeline->slots) {
      for (auto& [sequence, holding] : each.may_hold) holding.confirmed = 0;
    }
    return;
  }
  seat.slot->rows_computed += done->rows_computed;
  seat.slot->rows_stored += done->rows_stored;
  // Only a step that went all the way shows that every stage works.
  if (slot_index + 1 != pipeline->slots.size() || done->rows_computed == 0) return;
  pipeline->last_step_us = now_us;
  OnScaledStep(*pipeline, now_us);
  OnStepFinished(pipeline, now_us);
}

void Cluster::OnMoved(Worker* worker, const v1::PrefixesMoved& moved, uint64_t now_us) {
  const Seat seat = SeatOf(worker, moved.stage_id());
  if (seat.slot == nullptr && moved.stage_id() != 0 && moved.stage_id() <= last_stage_id_) return;
  const absl::Status status = [&]() -> absl::Status {
    if (seat.slot == nullptr || seat.stage->is_prepared()) {
      return absl::InvalidArgumentError(absl::StrCat("speaks of prefix blocks of stage ",
                                                     moved.stage_id(), ", which is in no epoch"));
    }
    const PipelineEpoch epoch = FromWire(moved.epoch());
    if (epoch < seat.pipeline->epoch) return absl::OkStatus();  // late
    if (epoch > seat.pipeline->epoch || seat.pipeline->state != Pipeline::State::kActive) {
      return absl::FailedPreconditionError("speaks of prefix blocks that nobody asked for");
    }
    return seat.pipeline->scheduler.OnMoved(seat.stage->slot_index, moved);
  }();
  if (!status.ok()) Evict(worker->id, status, now_us);
}

}  // namespace strait
