// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/epoch_wire.h"
#include "proto/wire/version.h"

namespace strait {
namespace {

constexpr uint64_t kMaxCostBytes = uint64_t{1} << 50;  // of one thing; sums of all stay below 2^62
constexpr int kMaxWorkspaceSizes = 1024;

StageCosts StageCostsOf(const v1::StageCosts& told) {
  StageCosts costs;
  costs.layer_bytes.assign(told.layer_bytes().begin(), told.layer_bytes().end());
  costs.embedding_bytes = told.embedding_bytes();
  costs.head_bytes = told.head_bytes();
  costs.block_bytes = told.block_bytes();
  costs.layer_workspace_bytes = told.layer_workspace_bytes();
  costs.edge_bytes = told.edge_bytes();
  costs.edge_row_bytes = told.edge_row_bytes();
  costs.workspace_bytes.assign(told.workspace_bytes().begin(), told.workspace_bytes().end());
  costs.last_workspace_bytes.assign(told.last_workspace_bytes().begin(),
                                    told.last_workspace_bytes().end());
  return costs;
}

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

// ---------------------------------------------------------------- workers come and go

void Cluster::OnAttached(WorkerId id, const v1::Hello& hello, uint64_t now_us) {
  STRAIT_CHECK(!workers_.contains(id), "worker ids are not reused");
  const auto refuse = [&](absl::Status why) { context_->Send(EvictWorker{id, std::move(why)}); };
  if (hello.wire_version() != kWireVersion) {
    return refuse(absl::FailedPreconditionError(
        absl::StrCat("worker speaks wire version ", hello.wire_version(), ", the coordinator ",
                     kWireVersion, "; install the same release on both")));
  }
  if (hello.model_fingerprint() != context_->model.fingerprint) {
    return refuse(absl::FailedPreconditionError(
        "worker has another model than the coordinator; start both with the same checkpoint"));
  }
  for (const auto& [other_id, other] : workers_) {
    if (other.instance != hello.instance()) continue;
    // The same process on a new stream: the old one has ended, though nobody has told yet.
    Evict(WorkerId(other_id), absl::AbortedError("the worker attached again"), now_us);
    break;
  }
  if (absl::Status agrees = CheckAgrees(hello); !agrees.ok()) return refuse(std::move(agrees));
  if (workers_.size() >= limits::kMaxWorkers) {
    return refuse(absl::ResourceExhaustedError(
        absl::StrCat(workers_.size(), " workers are attached, at most ", limits::kMaxWorkers)));
  }
  if (weights_fingerprint_ != hello.weights_fingerprint()) {
    // The first of a cluster with other weights: what the earlier ones began cannot be continued.
    journal_->EndBegun(absl::FailedPreconditionError(
        "the workers came back with other weights; a sequence cannot go on with another model"));
    weights_fingerprint_ = hello.weights_fingerprint();
  }
  Worker& worker = workers_[id];
  worker.id = id;
  worker.name = hello.name();
  worker.data_address = hello.data_address();
  worker.numerics_id = hello.numerics_id();
  worker.backend = hello.backend();
  worker.memory_bytes = hello.memory_bytes();
  if (hello.has_stage_costs()) worker.costs = StageCostsOf(hello.stage_costs());
  worker.instance = hello.instance();
  worker.num_threads = hello.num_threads();
  worker.process_id = hello.process_id();
  worker.nccl = NcclSupportOf(hello);
  worker.attached_us = worker.last_heard_us = now_us;
  look_again_ = true;

  SendToWorker out{id, {}};
  v1::Welcome* welcome = out.message.mutable_welcome();
  const uint64_t timeout_ms = context_->options.heartbeat_timeout_us / 1000;
  welcome->set_worker_id(id.value);
  welcome->set_term(context_->options.term);
  welcome->set_heartbeat_timeout_ms(static_cast<uint32_t>(timeout_ms));
  welcome->set_heartbeat_interval_ms(static_cast<uint32_t>(std::max<uint64_t>(1, timeout_ms / 5)));
  context_->Send(std::move(out));
}

absl::Status Cluster::CheckCosts(const v1::Hello& hello) const {
  if (!hello.has_stage_costs()) return absl::OkStatus();
  const v1::StageCosts& costs = hello.stage_costs();
  const auto too_large = [](uint64_t bytes) { return bytes > kMaxCostBytes; };
  const auto sizes = [&](const auto& list) {
    return !list.empty() && list.size() <= kMaxWorkspaceSizes && !too_large(*list.rbegin()) &&
           std::is_sorted(list.begin(), list.end());
  };
  if (static_cast<size_t>(costs.layer_bytes_size()) != context_->model.layer_weight_bytes.size() ||
      costs.block_bytes() < context_->model.block_bytes || too_large(costs.block_bytes()) ||
      too_large(costs.embedding_bytes()) || too_large(costs.head_bytes()) ||
      too_large(costs.layer_workspace_bytes()) || too_large(costs.edge_bytes()) ||
      costs.edge_row_bytes() > kMaxCostBytes / limits::kMaxStepTokens ||
      !sizes(costs.workspace_bytes()) || !sizes(costs.last_workspace_bytes()) ||
      std::any_of(costs.layer_bytes().begin(), costs.layer_bytes().end(), too_large)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "worker ", hello.name(), " tells costs of its stages that are none of this model: ",
        costs.layer_bytes_size(), " layers, ", costs.block_bytes(), " bytes a latent block, ",
        costs.workspace_bytes_size(), " and ", costs.last_workspace_bytes_size(),
        " sizes of a workspace; install the same release on all machines"));
  }
  return absl::OkStatus();
}

absl::Status Cluster::CheckAgrees(const v1::Hello& hello) const {
  const uint64_t weights = hello.weights_fingerprint();
  const uint64_t block_bytes = uint64_t{hello.cache_row_bytes()} * limits::kBlockTokens;
  if (!context_->options.accept_untold && (weights == 0 || block_bytes == 0)) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", hello.name(), " does not tell ",
                     weights == 0 ? "the fingerprint of its weights" : "the size of its cache rows",
                     ": install the same release on all machines"));
  }
  if (block_bytes != 0 && block_bytes != context_->model.block_bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", hello.name(), " stores cache rows of ", hello.cache_row_bytes(),
                     " bytes, this coordinator reckons with ",
                     context_->model.block_bytes / limits::kBlockTokens,
                     ": start both with the same --cache-format (fp8 is for GPU workers alone)"));
  }
  // Behind the rows, of which costs are made.
  STRAIT_RETURN_IF_ERROR(CheckCosts(hello));
  if (!workers_.empty() && weights != weights_fingerprint_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "worker ", hello.name(), " has weights with fingerprint ", absl::Hex(weights), ", the ",
        workers_.size(), " worker(s) attached have ", absl::Hex(weights_fingerprint_),
        ": a pipeline would mix two models. Start all with the same checkpoint (--model, "
        "--random-weights), or stop the others first"));
  }
  return absl::OkStatus();
}

void Cluster::OnLost(WorkerId id, const absl::Status& why, uint64_t now_us) {
  if (FindWorker(id) == nullptr) return;
  Remove(id, why.ok() ? absl::UnavailableError("its stream ended") : why, now_us);
}

void Cluster::Evict(WorkerId id, absl::Status why, uint64_t now_us) {
  context_->Send(EvictWorker{id, why});
  Remove(id, why, now_us);
}

void Cluster::Remove(WorkerId id, const absl::Status& why, uint64_t now_us) {
  Worker* worker = FindWorker(id);
  ++context_->stats.workers_lost;
  if (Pipeline* pipeline = PipelineOf(*worker)) {
    Vacate(pipeline, worker->slot_index, now_us);
    Fail(pipeline,
         absl::Status(why.code(),
                      absl::StrCat("worker ", worker->name, ": ", std::string(why.message()))),
         now_us);
  }
  workers_.erase(id);
  edges_.Forget(id);
  look_again_ = true;
}

void Cluster::OnTick(uint64_t now_us) {
  look_again_ = true;  // backoffs run out
  std::vector<std::pair<WorkerId, absl::Status>> late;
  for (const auto& [id, worker] : workers_) {
    const uint64_t silent_us = now_us - std::min(now_us, worker.last_heard_us);
    if (silent_us <= context_->options.heartbeat_timeout_us) continue;
    late.emplace_back(id, absl::DeadlineExceededError(
                              absl::StrCat("no heartbeat for ", silent_us / 1000, " ms, at most ",
                                           context_->options.heartbeat_timeout_us / 1000)));
  }
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
  if (state.stage_id() == 0 || state.stage_id() > last_stage_id_) {
    return Evict(id,
                 absl::InvalidArgumentError(
                     absl::StrCat("speaks of stage ", state.stage_id(), ", which there never was")),
                 now_us);
  }
  if (worker->unloading.contains(state.stage_id())) {
    // A failure means that there was nothing to unload: a load that failed before.
    if (state.state() == v1::StageState::UNLOADED || state.state() == v1::StageState::FAILED) {
      worker->unloading.erase(state.stage_id());
      look_again_ = true;
    }
    return;
  }
  StageSlot* slot = SlotOf(*worker, state.stage_id());
  if (slot == nullptr) return;  // the late answer to something given up
  Pipeline* pipeline = PipelineOf(*worker);
  switch (state.state()) {
    case v1::StageState::LOADED:
      if (slot->state != StageSlot::State::kLoading) {
        return Evict(id, absl::FailedPreconditionError("says LOADED twice"), now_us);
      }
      if (state.cache_bytes() != slot->pool_blocks * context_->model.block_bytes) {
        return Evict(id,
                     absl::FailedPreconditionError(absl::StrCat(
                         "took ", state.cache_bytes(), " bytes of latent blocks, not the ",
                         slot->pool_blocks * context_->model.block_bytes, " asked for")),
                     now_us);
      }
      worker->load_failures = 0;
      slot->state = StageSlot::State::kLoaded;
      slot->weight_bytes = state.weight_bytes();
      slot->bytes_loaded = slot->bytes_total = state.weight_bytes();
      return;
    case v1::StageState::ACTIVE: {
      const PipelineEpoch epoch = FromWire(state.epoch());
      if (epoch < pipeline->epoch) return;
      if (epoch != pipeline->epoch || slot->state != StageSlot::State::kActivating) {
        return Evict(id,
                     absl::FailedPreconditionError(
                         absl::StrCat("says ACTIVE in epoch ", ToString(epoch),
                                      ", the pipeline is in ", ToString(pipeline->epoch))),
                     now_us);
      }
      slot->state = StageSlot::State::kActive;
      return CompleteActivation(pipeline, now_us);
    }
    case v1::StageState::FAILED:
      return OnFailed(worker, state, now_us);
    default:
      return Evict(id,
                   absl::InvalidArgumentError(absl::StrCat(
                       "stage state ", static_cast<int>(state.state()), " was not asked for")),
                   now_us);
  }
}

void Cluster::OnEdgeId(Worker* worker, const v1::EdgeId& id, uint64_t now_us) {
  StageSlot* slot = SlotOf(*worker, id.stage_id());
  if (slot == nullptr) return;  // of a stage that is given up
  Pipeline* pipeline = PipelineOf(*worker);
  if (FromWire(id.epoch()) < pipeline->epoch) return;  // late
  if (FromWire(id.epoch()) != pipeline->epoch || !slot->told || !slot->edge.over_nccl ||
      !slot->nccl_id.empty() || id.nccl_id().size() != limits::kNcclIdBytes) {
    return Evict(worker->id,
                 absl::FailedPreconditionError("tells an edge's NCCL id that was not asked for"),
                 now_us);
  }
  slot->nccl_id = id.nccl_id();
  TellActivate(pipeline, worker->slot_index - 1);
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
    return OnStageError(worker, slot, error, now_us);
  }
  if (pipeline->state != Pipeline::State::kActive) {
    return Evict(id, absl::FailedPreconditionError("reports a step before any was planned"),
                 now_us);
  }
  const absl::Status status = pipeline->scheduler.OnReport(worker->slot_index, report, now_us);
  if (!status.ok()) {
    return Evict(id,
                 absl::Status(status.code(), absl::StrCat("report of step ", report.step_id(), ": ",
                                                          std::string(status.message()))),
                 now_us);
  }
  // Only a step that went all the way shows that every stage works.
  if (worker->slot_index + 1 != pipeline->slots.size()) return;
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
