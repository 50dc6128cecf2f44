// SPDX-License-Identifier: Apache-2.0
//
// What Cluster does for workers that are to have no stage: when, coordinator/core/draining.h decides.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/status_macros.h"

namespace strait {

void Cluster::SetDuty(WorkerId id, Worker::Duty duty) {
  Worker& worker = workers_.at(id);
  worker.duty = duty;
  if (duty == Worker::Duty::kDrained) {
    if (drained_instances_.size() < kMaxDrainedInstances) {
      drained_instances_.insert(worker.instance);
    }
  } else {
    drained_instances_.erase(worker.instance);
  }
  look_again_ = true;
}

bool Cluster::IsClosed(const Pipeline& pipeline) const {
  return std::any_of(pipeline.slots.begin(), pipeline.slots.end(), [this](const StageSlot& slot) {
    return slot.state != StageSlot::State::kVacant &&
           workers_.at(slot.worker).duty != Worker::Duty::kServes;
  });
}

const Pipeline* Cluster::PipelineOf(const Worker& worker) const {
  for (const auto& [id, stage] : worker.stages) {
    if (stage.role == HostedStage::Role::kPlace || stage.role == HostedStage::Role::kNext) {
      return pipelines_.at(stage.pipeline).get();
    }
  }
  return nullptr;
}

absl::Status Cluster::CheckReplace(PipelineId id, uint64_t now_us) {
  Pipeline* pipeline = pipelines_.at(id).get();
  if (scale_ || pipeline->state != Pipeline::State::kActive) {
    return absl::FailedPreconditionError(
        absl::StrCat("pipeline ", id.value, scale_ ? " is being scaled" : " does not serve now"));
  }
  return PlanScaleOf(pipeline, static_cast<uint32_t>(pipeline->slots.size()), now_us).status();
}

absl::Status Cluster::Replace(PipelineId id, uint64_t now_us) {
  STRAIT_RETURN_IF_ERROR(CheckReplace(id, now_us));
  const auto num_stages = static_cast<uint32_t>(pipelines_.at(id)->slots.size());
  replaced_.reset();
  scale_ = Scale{.drains = true,
                 .num_stages = num_stages,
                 .pipelines = {id},
                 .num_pipelines = 1,
                 .begin_us = now_us,
                 .hosts_min = num_stages,
                 .since_us = now_us};
  return absl::OkStatus();
}

void Cluster::CancelReplace(const absl::Status& why) {
  if (!scale_ || !scale_->drains) return;
  if (scale_->prepares()) {
    AbortScale(scale_->pipeline, why);
  } else if (scale_->phase == Scale::Phase::kWaiting) {
    AnswerScale(why);
  }
}

void Cluster::Retire(PipelineId id, const absl::Status& why, uint64_t now_us) {
  Fail(pipelines_.at(id).get(), why, now_us);
  Dissolve(id);
  look_again_ = true;
}

void Cluster::Shutdown(WorkerId id, const std::string& reason) {
  SendToWorker out{id, {}};
  out.message.mutable_shutdown()->set_reason(reason);
  drained_instances_.erase(workers_.at(id).instance);  // it does not come back
  context_->Send(std::move(out));
}

}  // namespace strait
