// SPDX-License-Identifier: Apache-2.0
//
// What must be true of Cluster's books after every event: places and workers' stages name each other, no
// worker's memory is booked twice, and schedulers reckon with the caches that there are.
#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status Wrong(PipelineId pipeline, uint32_t slot_index, const std::string& what) {
  return absl::InternalError(
      absl::StrCat("pipeline ", pipeline.value, " stage ", slot_index, ": ", what));
}

}  // namespace

absl::Status Cluster::CheckPipeline(const Pipeline& pipeline) const {
  const bool is_active = pipeline.state == Pipeline::State::kActive;
  if (is_active != pipeline.scheduler.started()) {
    return absl::InternalError(absl::StrCat(
        "pipeline ", pipeline.id.value, " is ",
        is_active ? "active, its scheduler stopped" : "not active, its scheduler runs"));
  }
  for (uint32_t i = 0; i < pipeline.slots.size(); ++i) {
    const StageSlot& slot = pipeline.slots[i];
    if (is_active && (!slot.may_hold.empty() ||
                      pipeline.scheduler.stages()[i].capacity_bytes != slot.cache_bytes)) {
      return Wrong(
          pipeline.id, i,
          absl::StrCat("it has ", slot.cache_bytes, " bytes of cache, its scheduler reckons with ",
                       pipeline.scheduler.stages()[i].capacity_bytes, "; ", slot.may_hold.size(),
                       " sequences are told of it outside"));
    }
    if (slot.state == StageSlot::State::kVacant) {
      if (slot.may_hold.empty() && slot.stage_id == 0) continue;
      return Wrong(pipeline.id, i, "it is vacant and has rows");
    }
    if (departed_.Find(slot.stage_id) != nullptr) {
      return Wrong(pipeline.id, i, "it is here and departed");
    }
    const auto worker = workers_.find(slot.worker);
    if (worker == workers_.end() || !worker->second.stages.contains(slot.stage_id)) {
      return Wrong(pipeline.id, i, "its worker does not know");
    }
    const HostedStage& hosted = worker->second.stages.at(slot.stage_id);
    if (hosted.role != HostedStage::Role::kPlace || hosted.pipeline != pipeline.id ||
        hosted.slot_index != i || hosted.layers != slot.layers) {
      return Wrong(pipeline.id, i, "its worker has it elsewhere");
    }
    // Plans may use what the worker has: less while it grows, and what it will have while it shrinks.
    const uint64_t has = hosted.resize ? std::min(hosted.cache_bytes, hosted.resize->cache_bytes)
                                       : hosted.cache_bytes;
    if (slot.cache_bytes != has) {
      return Wrong(
          pipeline.id, i,
          absl::StrCat("its worker has ", has, " bytes of cache, plans ", slot.cache_bytes));
    }
  }
  const absl::Status status = pipeline.scheduler.CheckIntegrity();
  if (status.ok()) return status;
  return absl::InternalError(
      absl::StrCat("pipeline ", pipeline.id.value, ": ", std::string(status.message())));
}

absl::Status Cluster::CheckWorker(const Worker& worker) const {
  const uint64_t booked =
      BookedBytes(context_->options, context_->model, worker.memory(), worker.stages);
  if (booked > worker.memory_bytes) {
    return absl::InternalError(absl::StrCat("worker ", worker.id.value, " offers ",
                                            worker.memory_bytes, " bytes, its ",
                                            worker.stages.size(), " stages take ", booked));
  }
  for (const auto& [stage_id, stage] : worker.stages) {
    if (stage.role == HostedStage::Role::kUnloading || stage.role == HostedStage::Role::kWarm) {
      continue;
    }
    const auto pipeline = pipelines_.find(stage.pipeline);
    bool known = pipeline != pipelines_.end();
    if (known && stage.role == HostedStage::Role::kPlace) {
      const auto& slots = pipeline->second->slots;
      known = stage.slot_index < slots.size() && slots[stage.slot_index].stage_id == stage_id;
    } else if (known && stage.is_prepared()) {
      known = scale_ && scale_->prepares() && scale_->pipeline == stage.pipeline;
      if (known) {
        const bool lands = stage.role == HostedStage::Role::kLanding;
        const std::vector<StageSlot>& slots = lands ? scale_->landings : scale_->next;
        known = stage.slot_index < slots.size() && slots[stage.slot_index].stage_id == stage_id;
      }
    } else if (known) {
      known = pipeline->second->state != Pipeline::State::kActive;
    }
    if (known) continue;
    return absl::InternalError(absl::StrCat("worker ", worker.id.value, " has stage ", stage_id,
                                            ", which no pipeline knows"));
  }
  return absl::OkStatus();
}

absl::Status Cluster::CheckScale() const {
  uint32_t pipelines = 0;
  for (const auto& [id, pipeline] : pipelines_) pipelines += pipeline->scaled_rows.has_value();
  const bool prepares = scale_ && scale_->prepares();
  if (pipelines != prepares) {
    return absl::InternalError(absl::StrCat(pipelines, " pipelines prepare for a scale"));
  }
  if (!prepares) return absl::OkStatus();
  if (pipelines_.at(scale_->pipeline)->state != Pipeline::State::kActive) {
    return absl::InternalError("a pipeline prepares for a scale and is not active");
  }
  for (const std::vector<StageSlot>* slots : {&scale_->next, &scale_->landings}) {
    for (const StageSlot& slot : *slots) {
      const auto worker = workers_.find(slot.worker);
      if (worker != workers_.end() && worker->second.stages.contains(slot.stage_id)) continue;
      return absl::InternalError(absl::StrCat("nobody has stage ", slot.stage_id, " of a scale"));
    }
  }
  return absl::OkStatus();
}

absl::Status Cluster::CheckIntegrity() const {
  uint32_t active = 0;
  for (const auto& [id, pipeline] : pipelines_) {
    active += pipeline->state == Pipeline::State::kActive;
    STRAIT_RETURN_IF_ERROR(CheckPipeline(*pipeline));
  }
  for (const auto& [id, worker] : workers_) STRAIT_RETURN_IF_ERROR(CheckWorker(worker));
  if (active != num_active_) {
    return absl::InternalError(absl::StrCat(active, " pipelines active, counted ", num_active_));
  }
  STRAIT_RETURN_IF_ERROR(replicas_.CheckIntegrity());
  return CheckScale();
}

}  // namespace strait
