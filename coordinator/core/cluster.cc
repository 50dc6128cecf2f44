// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"

namespace strait {
namespace {

uint64_t Doubling(uint64_t first, uint32_t times, uint64_t most) {
  return times >= 32 ? most : std::min(first << times, most);
}

}  // namespace

Worker* Cluster::FindWorker(WorkerId id) {
  const auto it = workers_.find(id);
  return it == workers_.end() ? nullptr : &it->second;
}

Pipeline* Cluster::PipelineOf(const Worker& worker) {
  return worker.pipeline ? pipelines_.at(*worker.pipeline).get() : nullptr;
}

StageSlot* Cluster::SlotOf(const Worker& worker, uint64_t stage_id) {
  Pipeline* pipeline = PipelineOf(worker);
  if (pipeline == nullptr) return nullptr;
  StageSlot* slot = &pipeline->slots[worker.slot_index];
  return slot->stage_id == stage_id ? slot : nullptr;
}

// ---------------------------------------------------------------- workers go

void Cluster::OnLost(WorkerId id, const absl::Status& why, uint64_t now_us) {
  if (FindWorker(id) == nullptr) return;
  Remove(id, why.ok() ? absl::UnavailableError("its stream ended") : why, true, now_us);
}

void Cluster::Evict(WorkerId id, absl::Status why, uint64_t now_us) {
  context_->Send(EvictWorker{id, why});
  Remove(id, why, false, now_us);
}

void Cluster::EndStream(WorkerId id, absl::Status why, uint64_t now_us) {
  context_->Send(EvictWorker{id, why});
  Remove(id, why, true, now_us);
}

void Cluster::RememberStages(const Worker& worker, bool may_return) {
  for (const auto& [stage_id, shape] : worker.unloading) {
    departed_.Add(stage_id, {.instance = worker.instance,
                             .worker_name = worker.name,
                             .shape = shape,
                             .pipeline = std::nullopt,
                             .may_hold = {}});
  }
  Pipeline* pipeline = PipelineOf(worker);
  if (pipeline == nullptr) return;
  StageSlot& slot = pipeline->slots[worker.slot_index];
  DepartedStage stage{.instance = worker.instance,
                      .worker_name = worker.name,
                      .shape = {slot.layers, slot.cache_bytes},
                      .pipeline = std::nullopt,
                      .slot_index = worker.slot_index,
                      .may_hold = {},
                      .rows_computed = slot.rows_computed,
                      .rows_stored = slot.rows_stored};
  if (may_return) {
    stage.pipeline = pipeline->id;
    stage.may_hold = std::move(slot.may_hold);
  }
  departed_.Add(slot.stage_id, std::move(stage));
}

void Cluster::Remove(WorkerId id, const absl::Status& why, bool may_return, uint64_t now_us) {
  Worker* worker = FindWorker(id);
  ++context_->stats.workers_lost;
  Pipeline* pipeline = PipelineOf(*worker);
  if (pipeline != nullptr) {
    Fail(pipeline,
         absl::Status(why.code(),
                      absl::StrCat("worker ", worker->name, ": ", std::string(why.message()))),
         now_us);
  }
  RememberStages(*worker, may_return);
  if (pipeline != nullptr) Vacate(pipeline, worker->slot_index, now_us);
  workers_.erase(id);
  edges_.Forget(id);
  look_again_ = true;
}

void Cluster::OnTick(uint64_t now_us) {
  look_again_ = true;  // backoffs run out
  using Late = std::vector<std::pair<WorkerId, absl::Status>>;
  Late silent;
  for (const auto& [id, worker] : workers_) {
    const uint64_t silent_us = now_us - std::min(now_us, worker.last_heard_us);
    if (silent_us <= context_->options.heartbeat_timeout_us) continue;
    silent.emplace_back(id, absl::DeadlineExceededError(
                                absl::StrCat("no heartbeat for ", silent_us / 1000, " ms, at most ",
                                             context_->options.heartbeat_timeout_us / 1000)));
  }
  for (auto& [id, why] : silent) EndStream(id, std::move(why), now_us);
  Late late;
  for (const auto& [id, pipeline] : pipelines_) {
    for (const StageSlot& slot : pipeline->slots) {
      if (slot.state != StageSlot::State::kLoading ||
          now_us <= slot.load_progress_us + context_->options.load_timeout_us) {
        continue;
      }
      late.emplace_back(slot.worker,
                        absl::DeadlineExceededError(absl::StrCat(
                            "loading stands still at ", slot.bytes_loaded, " of ", slot.bytes_total,
                            " bytes for ", context_->options.load_timeout_us / 1000, " ms")));
    }
    const StepLedger& ledger = pipeline->scheduler.ledger();
    if (pipeline->state == Pipeline::State::kActivating &&
        now_us > pipeline->since_us + context_->options.activation_timeout_us) {
      for (const StageSlot& slot : pipeline->slots) {
        if (!slot.owes_answer()) continue;
        late.emplace_back(slot.worker, absl::DeadlineExceededError("activation not answered"));
      }
    }
    if (pipeline->state == Pipeline::State::kActive && ledger.in_flight() > 0 &&
        now_us > ledger.last_progress_us() + context_->options.step_timeout_us) {
      late.emplace_back(pipeline->slots[ledger.SlowestStage()].worker,
                        absl::DeadlineExceededError(absl::StrCat(
                            "step ", ledger.records().front().id.value, " not reported for ",
                            context_->options.step_timeout_us / 1000, " ms")));
    }
  }
  for (auto& [id, why] : late) {
    if (FindWorker(id) != nullptr) Evict(id, std::move(why), now_us);
  }
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
    case v1::FromWorker::kEdgeId:
      return OnEdgeId(worker, message.edge_id(), now_us);
    case v1::FromWorker::kCacheResized:
      return Evict(id, absl::FailedPreconditionError("resized a cache that nobody asked for"),
                   now_us);
    case v1::FromWorker::kHello:
      return Evict(id, absl::InvalidArgumentError("a second Hello on one stream"), now_us);
    case v1::FromWorker::MESSAGE_NOT_SET:
      return Evict(id, absl::InvalidArgumentError("a message of unknown kind; are versions equal?"),
                   now_us);
  }
}

void Cluster::OnLoadProgress(Worker* worker, const v1::LoadProgress& progress, uint64_t now_us) {
  StageSlot* slot = SlotOf(*worker, progress.stage_id());
  if (slot == nullptr) return;  // of a stage that is given up
  if (progress.bytes_loaded() > slot->bytes_loaded) slot->load_progress_us = now_us;
  slot->bytes_loaded = progress.bytes_loaded();
  slot->bytes_total = progress.bytes_total();
}

void Cluster::OnStageState(Worker* worker, const v1::StageState& state, uint64_t now_us) {
  const WorkerId id = worker->id;
  if (worker->unloading.contains(state.stage_id())) {
    // A failure means that there was nothing to unload: a load that failed before.
    if (state.state() == v1::StageState::UNLOADED || state.state() == v1::StageState::FAILED) {
      worker->unloading.erase(state.stage_id());
      look_again_ = true;
    }
    return;
  }
  if (state.stage_id() == 0 || state.stage_id() > last_stage_id_) {
    return Evict(id,
                 absl::InvalidArgumentError(
                     absl::StrCat("speaks of stage ", state.stage_id(), ", which there never was")),
                 now_us);
  }
  StageSlot* slot = SlotOf(*worker, state.stage_id());
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
      worker->load_failures = 0;
      slot->state = StageSlot::State::kLoaded;
      slot->weight_bytes = state.weight_bytes();
      slot->bytes_loaded = slot->bytes_total = state.weight_bytes();
      return;
    case v1::StageState::ACTIVE:
      return OnActive(worker, slot, state, now_us);
    case v1::StageState::FAILED:
      return OnFailed(worker, state, now_us);
    default:
      return Evict(id,
                   absl::InvalidArgumentError(absl::StrCat(
                       "stage state ", static_cast<int>(state.state()), " was not asked for")),
                   now_us);
  }
}

void Cluster::OnActive(Worker* worker, StageSlot* slot, const v1::StageState& state,
                       uint64_t now_us) {
  Pipeline* pipeline = PipelineOf(*worker);
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

void Cluster::OnFailed(Worker* worker, const v1::StageState& state, uint64_t now_us) {
  Pipeline* pipeline = PipelineOf(*worker);
  StageSlot* slot = &pipeline->slots[worker->slot_index];
  const absl::Status error(state.error_code() == 0
                               ? absl::StatusCode::kUnknown
                               : static_cast<absl::StatusCode>(state.error_code()),
                           state.error_message());
  if (slot->state != StageSlot::State::kLoading) {
    if (FromWire(state.epoch()) < pipeline->epoch) return;
    OnNcclFailure(*pipeline, state.failed_nccl_edge(), error, now_us);
    RenewEdges(pipeline);
    return OnStageError(worker, slot, error, now_us);
  }
  // Not evicted: it would come back and fail again at once. Others may have better luck meanwhile.
  worker->last_error = absl::StrCat("could not load: ", std::string(error.message()));
  worker->unfit_until_us =
      now_us + Doubling(kLoadBackoffUs, worker->load_failures++, kLoadBackoffMaxUs);
  worker->pipeline.reset();
  look_again_ = true;
  pipeline->last_error = absl::StrCat("worker ", worker->name, " ", worker->last_error);
  Vacate(pipeline, worker->slot_index, now_us);
}

void Cluster::OnReport(Worker* worker, const v1::StageReport& report, uint64_t now_us) {
  const WorkerId id = worker->id;
  StageSlot* slot = SlotOf(*worker, report.stage_id());
  if (slot == nullptr) {
    if (report.stage_id() != 0 && report.stage_id() <= last_stage_id_) return;  // late
    return Evict(id,
                 absl::InvalidArgumentError(absl::StrCat("reports for stage ", report.stage_id(),
                                                         ", which there never was")),
                 now_us);
  }
  Pipeline* pipeline = PipelineOf(*worker);
  const PipelineEpoch epoch = FromWire(report.epoch());
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
    return OnStageError(worker, slot, error, now_us);
  }
  if (pipeline->state != Pipeline::State::kActive) {
    return Evict(id, absl::FailedPreconditionError("reports a step before any was planned"),
                 now_us);
  }
  const absl::StatusOr<StageStep> done =
      pipeline->scheduler.OnReport(worker->slot_index, report, now_us);
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
  slot->rows_computed += done->rows_computed;
  slot->rows_stored += done->rows_stored;
  // Only a step that went all the way shows that every stage works.
  if (worker->slot_index + 1 != pipeline->slots.size() || done->rows_computed == 0) return;
  for (StageSlot& each : pipeline->slots) each.errors = 0;
  if (!pipeline->scheduler.links_proven()) return;
  for (StageSlot& each : pipeline->slots) each.link_errors = 0;
  pipeline->failures = 0;
}

void Cluster::OnStageError(Worker* worker, StageSlot* slot, const absl::Status& error,
                           uint64_t now_us) {
  worker->last_error = std::string(error.message());
  const bool link = absl::IsUnavailable(error) || absl::IsDeadlineExceeded(error) ||
                    absl::IsAborted(error) || absl::IsCancelled(error);
  ++(link ? slot->link_errors : slot->errors);
  if (slot->errors >= kMaxStageErrors || slot->link_errors >= kMaxLinkErrors) {
    return Evict(
        worker->id,
        absl::Status(error.code(), absl::StrCat("its stage failed ", slot->errors,
                                                " times and its link ", slot->link_errors,
                                                " times, last: ", std::string(error.message()))),
        now_us);
  }
  Pipeline* pipeline = PipelineOf(*worker);
  Fail(pipeline,
       absl::Status(error.code(),
                    absl::StrCat("worker ", worker->name, ": ", std::string(error.message()))),
       now_us);
  pipeline->retry_at_us =
      now_us + Doubling(kActivateBackoffUs, pipeline->failures++, kActivateBackoffMaxUs);
}

}  // namespace strait
