// SPDX-License-Identifier: Apache-2.0
//
// What is told of a scale: how far it is, what it would do, and how long each sequence stood still.
#include <algorithm>
#include <utility>

#include "coordinator/core/cluster.h"
#include "coordinator/core/migration.h"
#include "proto/base/status_macros.h"

namespace strait {

std::vector<std::pair<SequenceId, uint64_t>> SumPauses(
    const std::map<SequenceId, uint64_t>& pauses_us, v1::ScaleReply* reply) {
  std::vector<std::pair<SequenceId, uint64_t>> longest(pauses_us.begin(), pauses_us.end());
  std::stable_sort(longest.begin(), longest.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  reply->set_residents(static_cast<uint32_t>(longest.size()));
  if (!longest.empty()) {
    reply->set_resident_pause_max_us(longest.front().second);
    reply->set_resident_pause_p50_us(longest[longest.size() / 2].second);
    reply->set_resident_pause_min_us(longest.back().second);
  }
  if (longest.size() > kMaxListedPauses) longest.resize(kMaxListedPauses);
  return longest;
}

std::optional<ScaleReport> Cluster::ReportOfScale(uint64_t now_us) const {
  if (!scale_) return std::nullopt;
  const Scale& scale = *scale_;
  ScaleReport report{.num_stages = scale.num_stages,
                     .pipelines_done = scale.done,
                     .pipelines_total = scale.num_pipelines,
                     .phase = Name(scale.phase),
                     .moved_bytes = scale.moved_bytes + (scale.ahead ? scale.ahead->bytes() : 0),
                     .total_us = now_us - std::min(now_us, scale.begin_us)};
  if (scale.phase == Scale::Phase::kWaiting) return report;
  report.pipeline = scale.pipeline;
  const auto pipeline = pipelines_.find(scale.pipeline);
  if (pipeline == pipelines_.end()) return report;
  // After the switch the new stages are in their places.
  const std::vector<StageSlot>& stages = scale.prepares() ? scale.next : pipeline->second->slots;
  for (const std::vector<StageSlot>* slots : {&stages, &scale.landings}) {
    for (const StageSlot& slot : *slots) {
      report.bytes_loaded += slot.bytes_loaded;
      report.bytes_to_load += slot.bytes_total;
    }
  }
  if (stages.empty()) {  // not told to load yet
    for (const ScaledStage& stage : scale.plan.stages) report.bytes_to_load += stage.load_bytes;
  }
  if (scale.ahead) scale.ahead->CountRows(*pipeline->second, &report.rows, &report.rows_total);
  for (size_t i = 1; i < stages.size(); ++i) {
    ++report.edges_total;
    report.edges_up += stages[i - 1].linked || stages[i].state == StageSlot::State::kActive;
  }
  return report;
}

void Cluster::TellScale(bool now, uint64_t now_us) {
  if (!scale_ || scale_->drains || (!now && now_us < scale_->told_us + kTellEveryUs)) return;
  scale_->told_us = now_us;
  context_->Send(ScaleTold{scale_->id, *ReportOfScale(now_us)});
}

bool Cluster::PausesAreOver(const Pipeline& pipeline, uint64_t now_us) {
  Scale& scale = *scale_;
  const uint64_t since_us = std::max(scale.first_step_us, pipeline.since_us);
  const bool is_late = now_us >= since_us + context_->options.migrate_pause_us;
  std::erase_if(scale.before, [&](const auto& entry) {
    const auto& [id, before] = entry;
    const Sequence* sequence = journal_->Find(id);
    if (sequence == nullptr) return true;
    const bool has_one = sequence->generated() > before.generated;
    if (!has_one && !is_late) return false;
    // Of one that is late: so much at least.
    uint64_t& pause_us = scale.resident_pauses_us[id];
    const uint64_t end_us = has_one ? sequence->last_token_us : now_us;
    pause_us = std::max(pause_us, end_us - std::min(end_us, before.last_token_us));
    return true;
  });
  return scale.before.empty();
}

absl::StatusOr<std::vector<PlannedPipeline>> Cluster::PlanAll(uint32_t num_stages,
                                                              uint64_t now_us) {
  std::vector<PlannedPipeline> planned;
  std::set<WorkerId> taken;
  for (const auto& [id, pipeline] : pipelines_) {
    PlannedPipeline& one = planned.emplace_back();
    one.pipeline = id;
    one.capacity_rows = pipeline->capacity_rows(context_->model.policy());
    one.why = pipeline->why;
    if (pipeline->slots.size() == num_stages) continue;
    STRAIT_ASSIGN_OR_RETURN(const ScalePlan plan,
                            PlanScaleOf(pipeline.get(), num_stages, now_us, taken));
    one.capacity_rows = plan.capacity_rows;
    one.why = plan.why;
    for (const ScaledStage& stage : plan.stages) {
      taken.insert(stage.worker);
      one.stages.push_back({.worker = stage.worker,
                            .name = workers_.at(stage.worker).name,
                            .layer_begin = stage.plan.layers.begin,
                            .layer_end = stage.plan.layers.end,
                            .cache_bytes = stage.plan.cache_bytes,
                            .load_bytes = stage.load_bytes,
                            .rows_bytes = stage.rows_bytes});
    }
  }
  return planned;
}

std::optional<ChangeUnderWay> Cluster::Change() const {
  if (!scale_ || scale_->phase == Scale::Phase::kWaiting) return std::nullopt;
  ChangeUnderWay change{.pipeline = scale_->pipeline,
                        .phase = Name(scale_->phase),
                        .drains = scale_->drains,
                        .hosts = {},
                        .serve = {}};
  for (const ScaledStage& stage : scale_->plan.stages) change.hosts.push_back(stage.worker);
  for (const StageSlot& slot : pipelines_.at(scale_->pipeline)->slots) {
    if (slot.state != StageSlot::State::kVacant) change.serve.push_back(slot.worker);
  }
  return change;
}

}  // namespace strait
