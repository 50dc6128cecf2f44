// SPDX-License-Identifier: Apache-2.0
//
// Who may join the cluster, and what a worker that was here before brings along.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/version.h"

namespace strait {
namespace {

constexpr uint64_t kMaxCostBytes = uint64_t{1} << 50;  // of one thing; sums of all stay below 2^62
constexpr int kMaxWorkspaceSizes = 1024;

std::string HostOf(const std::string& address) { return address.substr(0, address.rfind(':')); }

StageCosts StageCostsOf(const v1::StageCosts& told) {
  StageCosts costs;
  costs.layer_bytes.assign(told.layer_bytes().begin(), told.layer_bytes().end());
  costs.embedding_bytes = told.embedding_bytes();
  costs.head_bytes = told.head_bytes();
  costs.block_bytes = told.block_bytes();
  costs.layer_workspace_bytes = told.layer_workspace_bytes();
  costs.stage_bytes = told.stage_bytes();
  costs.edge_bytes = told.edge_bytes();
  costs.edge_row_bytes = told.edge_row_bytes();
  costs.workspace_bytes.assign(told.workspace_bytes().begin(), told.workspace_bytes().end());
  costs.last_workspace_bytes.assign(told.last_workspace_bytes().begin(),
                                    told.last_workspace_bytes().end());
  return costs;
}

}  // namespace

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
  if (absl::Status agrees = CheckAgrees(hello); !agrees.ok()) return refuse(std::move(agrees));
  for (const auto& [other_id, other] : workers_) {
    if (other.instance != hello.instance()) continue;
    // The same process on a new stream: the old one has ended, though nobody has told yet.
    EndStream(WorkerId(other_id), absl::AbortedError("the worker attached again"), now_us);
    break;
  }
  if (absl::Status sound = CheckHeldStages(hello); !sound.ok()) return refuse(std::move(sound));
  Uncount(hello.instance());
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
  worker.host_id = hello.host_id().empty() ? HostOf(worker.data_address) : hello.host_id();
  worker.numerics_id = hello.numerics_id();
  worker.backend = hello.backend();
  worker.memory_bytes = hello.memory_bytes();
  if (hello.has_stage_costs()) worker.costs = StageCostsOf(hello.stage_costs());
  worker.host_cache_bytes = hello.host_cache_bytes();
  worker.replica_bytes = hello.replica_bytes();
  replicas_.Offer(id, worker.replica_bytes);
  context_->replicates = context_->replicates || worker.replica_bytes > 0;
  worker.instance = hello.instance();
  worker.num_threads = hello.num_threads();
  worker.process_id = hello.process_id();
  worker.nccl = NcclSupportOf(hello);
  worker.attached_us = worker.last_heard_us = now_us;
  RenewBuddies(worker);
  if (drained_instances_.contains(worker.instance)) worker.duty = Worker::Duty::kDrained;
  look_again_ = true;

  SendToWorker out{id, {}};
  v1::Welcome* welcome = out.message.mutable_welcome();
  const uint64_t timeout_ms = context_->options.heartbeat_timeout_us / 1000;
  welcome->set_worker_id(id.value);
  welcome->set_term(context_->options.term);
  welcome->set_heartbeat_timeout_ms(static_cast<uint32_t>(timeout_ms));
  welcome->set_heartbeat_interval_ms(static_cast<uint32_t>(std::max<uint64_t>(1, timeout_ms / 5)));
  context_->Send(std::move(out));
  TakeBack(&worker, hello);
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
      too_large(costs.layer_workspace_bytes()) || too_large(costs.stage_bytes()) ||
      too_large(costs.edge_bytes()) ||
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

const Worker* Cluster::WorkerOfStage(uint64_t stage_id) const {
  for (const auto& [id, worker] : workers_) {
    if (worker.stages.contains(stage_id)) return &worker;
  }
  return nullptr;
}

HostedStage Cluster::HeldAs(const v1::HeldStage& held) const {
  const DepartedStage* departed = departed_.Find(held.stage_id());
  HostedStage stage = departed != nullptr ? departed->hosted : HostedStage();
  stage.role = HostedStage::Role::kUnloading;
  stage.layers = {held.layer_begin(), held.layer_end()};
  stage.cache_bytes = held.cache_bytes();
  stage.resize.reset();  // done, or never to be
  return stage;
}

absl::Status Cluster::CheckHeldStage(const v1::HeldStage& held, uint64_t instance) const {
  const uint64_t id = held.stage_id();
  if (id == 0 || id > last_stage_id_) {
    return absl::FailedPreconditionError(
        absl::StrCat("which there never was: the last one is ", last_stage_id_));
  }
  // Without the instance: who knows it is taken for that worker.
  const auto of_another = [&](const std::string& name) {
    return absl::FailedPreconditionError(
        absl::StrCat("which was given to another process, ", name));
  };
  if (const Worker* worker = WorkerOfStage(id)) return of_another(worker->name);
  const DepartedStage* departed = departed_.Find(id);
  if (departed == nullptr) return absl::OkStatus();
  if (departed->instance != instance) return of_another(departed->worker_name);
  // While it was resized it may have either cache.
  const HostedStage& had = departed->hosted;
  const LayerRange layers{held.layer_begin(), held.layer_end()};
  if (layers == had.layers && (held.cache_bytes() == had.cache_bytes ||
                               (had.resize && held.cache_bytes() == had.resize->cache_bytes))) {
    return absl::OkStatus();
  }
  const auto text = [](LayerRange range, uint64_t cache_bytes) {
    return absl::StrCat("layers [", range.begin, ", ", range.end, ") and ", cache_bytes,
                        " bytes of latent blocks");
  };
  return absl::FailedPreconditionError(absl::StrCat("with ", text(layers, held.cache_bytes()),
                                                    ", it was loaded with ",
                                                    text(had.layers, had.cache_bytes)));
}

absl::Status Cluster::CheckHeldStages(const v1::Hello& hello) const {
  if (hello.held_stages_size() > static_cast<int>(limits::kMaxHeldStages)) {
    return absl::InvalidArgumentError(absl::StrCat("worker ", hello.name(), " says that it kept ",
                                                   hello.held_stages_size(), " stages, at most ",
                                                   limits::kMaxHeldStages));
  }
  if (hello.term() != context_->options.term) return absl::OkStatus();  // of another's numbers
  HostedStages stages;
  for (const v1::HeldStage& held : hello.held_stages()) {
    absl::Status status = CheckHeldStage(held, hello.instance());
    if (status.ok() && (held.layer_begin() >= held.layer_end() ||
                        held.layer_end() > context_->model.layer_weight_bytes.size())) {
      status = absl::InvalidArgumentError("with layers that the model does not have");
    }
    if (!stages.emplace(held.stage_id(), HeldAs(held)).second) {
      status = absl::InvalidArgumentError("twice");
    }
    if (status.ok()) continue;
    return absl::Status(status.code(),
                        absl::StrCat("worker ", hello.name(), " says that it kept stage ",
                                     held.stage_id(), ", ", std::string(status.message())));
  }
  Worker worker;
  worker.memory_bytes = hello.memory_bytes();
  if (hello.has_stage_costs()) worker.costs = StageCostsOf(hello.stage_costs());
  const uint64_t booked = BookedBytes(context_->options, context_->model, worker.memory(), stages);
  if (booked <= hello.memory_bytes()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("worker ", hello.name(), " says that it kept ",
                                                    stages.size(), " stage(s), which take ", booked,
                                                    " bytes; it offers ", hello.memory_bytes()));
}

bool Cluster::TakeBackPlace(Worker* worker, const v1::HeldStage& held) {
  const DepartedStage* departed = departed_.Find(held.stage_id());
  if (departed == nullptr || !departed->may_return) return false;
  if (departed->hosted.role == HostedStage::Role::kWarm) {
    HostedStage warm = HeldAs(held);
    warm.role = HostedStage::Role::kWarm;
    warm.warm.is_loaded = true;
    warm.warm.weight_bytes = warm.warm.bytes_loaded = warm.warm.bytes_total = held.weight_bytes();
    worker->stages.emplace(held.stage_id(), std::move(warm));
    departed_.Take(held.stage_id());
    return true;
  }
  const auto it = pipelines_.find(departed->hosted.pipeline);
  if (it == pipelines_.end()) return false;
  const uint32_t slot_index = departed->hosted.slot_index;
  if (slot_index >= it->second->slots.size()) return false;  // it has fewer stages now
  StageSlot& slot = it->second->slots[slot_index];
  if (slot.layers != departed->hosted.layers) return false;
  if (slot.state == StageSlot::State::kLoading) {
    // Who has it loaded, and rows, is ready before who still loads.
    Unload(FindWorker(slot.worker), slot.stage_id);
  } else if (slot.state != StageSlot::State::kVacant) {
    return false;
  }
  HostedStage hosted = HeldAs(held);
  hosted.role = HostedStage::Role::kPlace;
  worker->stages.emplace(held.stage_id(), std::move(hosted));
  DepartedStage stage = departed_.Take(held.stage_id());
  it->second->filled_us = worker->attached_us;  // the others may follow
  slot.state = StageSlot::State::kLoaded;
  slot.worker = worker->id;
  slot.stage_id = held.stage_id();
  slot.cache_bytes = held.cache_bytes();
  slot.wanted_cache_bytes = std::max(stage.wanted_cache_bytes, held.cache_bytes());
  slot.weight_bytes = slot.bytes_loaded = slot.bytes_total = held.weight_bytes();
  slot.may_hold = std::move(stage.may_hold);
  slot.rows_computed = stage.rows_computed;
  slot.rows_stored = stage.rows_stored;
  return true;
}

void Cluster::TakeBack(Worker* worker, const v1::Hello& hello) {
  // Stages of another term have that one's numbers, and went with this Welcome.
  if (hello.term() != context_->options.term) return;
  for (const v1::HeldStage& held : hello.held_stages()) {
    if (TakeBackPlace(worker, held)) continue;
    worker->stages.emplace(held.stage_id(), HeldAs(held));
    if (departed_.Find(held.stage_id()) != nullptr) departed_.Take(held.stage_id());
    Unload(worker, held.stage_id());
  }
}

}  // namespace strait
