// SPDX-License-Identifier: Apache-2.0
//
// How Cluster puts pipelines together, and what it does when one fails.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/wire/epoch_wire.h"

namespace strait {

uint64_t Pipeline::capacity_rows(const CachePolicy& policy) const {
  uint64_t rows = RowsThatFit(policy, slots.front().cache_bytes, slots.front().layers);
  for (const StageSlot& slot : slots) {
    rows = std::min(rows, RowsThatFit(policy, slot.cache_bytes, slot.layers));
  }
  return rows;
}

uint32_t Pipeline::num_vacant() const {
  uint32_t vacant = 0;
  for (const StageSlot& slot : slots) vacant += slot.state == StageSlot::State::kVacant;
  return vacant;
}

uint64_t Cluster::capacity_rows() const {
  const CachePolicy policy = context_->model.policy();
  uint64_t most = 0;
  for (const auto& [id, pipeline] : pipelines_) {
    most = std::max(most, pipeline->capacity_rows(policy));
  }
  return most;
}

bool Cluster::IsIdle(const Worker& worker, uint64_t now_us) const {
  return !worker.pipeline && worker.unloading.empty() && worker.unfit_until_us <= now_us;
}

std::vector<Worker*> Cluster::IdleWorkers(uint64_t now_us) {
  std::vector<Worker*> idle;
  for (auto& [id, worker] : workers_) {
    if (IsIdle(worker, now_us)) idle.push_back(&worker);
  }
  std::stable_sort(idle.begin(), idle.end(), [](const Worker* a, const Worker* b) {
    return a->memory_bytes > b->memory_bytes;
  });
  return idle;
}

void Cluster::Advance(uint64_t now_us) {
  if (std::exchange(look_again_, false)) {
    std::vector<Pipeline*> incomplete;
    for (const auto& [id, pipeline] : pipelines_) {
      if (pipeline->num_vacant() > 0) incomplete.push_back(pipeline.get());
    }
    for (Pipeline* pipeline : incomplete) FillVacancies(pipeline, now_us);
    if (incomplete.size() > 1) Consolidate(now_us);
    while (pipelines_.size() < context_->options.num_pipelines) {
      const size_t before = pipelines_.size();
      FormPipeline(now_us);
      if (pipelines_.size() == before) break;
    }
  }
  for (const auto& [id, pipeline] : pipelines_) {
    const bool loaded =
        std::all_of(pipeline->slots.begin(), pipeline->slots.end(),
                    [](const StageSlot& slot) { return slot.state == StageSlot::State::kLoaded; });
    if (loaded && now_us >= pipeline->retry_at_us) Activate(pipeline.get(), now_us);
  }
}

void Cluster::FormPipeline(uint64_t now_us) {
  plan_problem_ = absl::OkStatus();
  std::vector<Worker*> chosen = IdleWorkers(now_us);
  if (chosen.size() < context_->options.num_stages) return;
  chosen.resize(context_->options.num_stages);
  std::sort(chosen.begin(), chosen.end(),
            [](const Worker* a, const Worker* b) { return a->id < b->id; });
  std::vector<WorkerMemory> memory;
  for (const Worker* worker : chosen) memory.push_back(worker->memory());
  absl::StatusOr<PipelinePlan> plan = PlanPipeline(context_->options, context_->model, memory);
  if (!plan.ok()) {
    plan_problem_ = plan.status();
    return;
  }
  auto owned = std::make_unique<Pipeline>(context_, journal_);
  Pipeline* pipeline = owned.get();
  pipeline->id = PipelineId{++last_pipeline_id_};
  pipeline->epoch = {context_->options.term, ++last_epoch_counter_};
  pipeline->since_us = now_us;
  pipeline->planned_rows = plan->capacity_rows;
  for (const StagePlan& stage : plan->stages) {
    StageSlot slot;
    slot.layers = stage.layers;
    slot.cache_bytes = stage.cache_bytes;
    pipeline->slots.push_back(slot);
  }
  pipelines_.emplace(pipeline->id, std::move(owned));
  for (uint32_t i = 0; i < chosen.size(); ++i) Assign(pipeline, i, chosen[i], now_us);
}

void Cluster::FillVacancies(Pipeline* pipeline, uint64_t now_us) {
  std::vector<Worker*> idle = IdleWorkers(now_us);
  if (idle.empty()) return;
  const CoreOptions& options = context_->options;
  const uint64_t planned = pipeline->planned_rows;
  std::vector<std::pair<uint32_t, Worker*>> fills;  // slot index, worker
  std::vector<uint64_t> rows_of_fills;
  uint64_t rows = pipeline->capacity_rows(context_->model.policy());
  std::vector<Worker*> left = idle;
  for (uint32_t i = 0; i < pipeline->slots.size() && !left.empty(); ++i) {
    const StageSlot& slot = pipeline->slots[i];
    if (slot.state != StageSlot::State::kVacant) continue;
    // Most memory first, so the first is the roomiest.
    const uint64_t fits =
        StageRowsMax(options, context_->model, slot.layers, left.front()->memory());
    rows = std::min(rows, fits);
    fills.emplace_back(i, left.front());
    // Not cut to what a small one elsewhere can hold: that one may be replaced, too.
    rows_of_fills.push_back(std::min(fits, planned));
    left.erase(left.begin());
  }
  // What the roomiest workers at hand could do with other layer ranges. Loading everything anew
  // pays only if the pipeline holds at least twice as much afterwards, or cannot work otherwise.
  std::vector<Worker*> all = idle;
  for (const StageSlot& slot : pipeline->slots) {
    if (slot.state != StageSlot::State::kVacant) all.push_back(FindWorker(slot.worker));
  }
  if (all.size() >= pipeline->slots.size()) {
    std::stable_sort(all.begin(), all.end(), [](const Worker* a, const Worker* b) {
      return a->memory_bytes > b->memory_bytes;
    });
    all.resize(pipeline->slots.size());
    std::sort(all.begin(), all.end(),
              [](const Worker* a, const Worker* b) { return a->id < b->id; });
    std::vector<WorkerMemory> memory;
    for (const Worker* worker : all) memory.push_back(worker->memory());
    const absl::StatusOr<PipelinePlan> plan = PlanPipeline(options, context_->model, memory);
    const uint64_t anew = plan.ok() ? plan->capacity_rows : 0;
    if (anew > 2 * rows) return Dissolve(pipeline->id);
    if (rows == 0) pipeline->last_error = std::string(plan.status().message());
  }
  for (size_t i = 0; i < fills.size(); ++i) {
    if (rows_of_fills[i] == 0) continue;
    StageSlot& slot = pipeline->slots[fills[i].first];
    slot.cache_bytes = StageCacheBytes(context_->model, slot.layers, rows_of_fills[i]);
    Assign(pipeline, fills[i].first, fills[i].second, now_us);
  }
}

void Cluster::Consolidate(uint64_t now_us) {
  std::vector<Pipeline*> broken;
  for (const auto& [id, pipeline] : pipelines_) {
    if (pipeline->num_vacant() > 0 && now_us >= pipeline->vacant_since_us + kConsolidateAfterUs) {
      broken.push_back(pipeline.get());
    }
  }
  if (broken.size() < 2) return;
  // One without a worker has none to give, and its workers may come back with its stages.
  const Pipeline& youngest = *broken.back();
  if (youngest.num_vacant() < youngest.slots.size()) Dissolve(youngest.id);
}

void Cluster::Vacate(Pipeline* pipeline, uint32_t slot_index, uint64_t now_us) {
  if (pipeline->num_vacant() == 0) pipeline->vacant_since_us = now_us;
  const LayerRange layers = pipeline->slots[slot_index].layers;
  StageSlot vacant;
  vacant.layers = layers;
  vacant.cache_bytes = StageCacheBytes(context_->model, layers, pipeline->planned_rows);
  pipeline->slots[slot_index] = vacant;
  if (slot_index + 1 < pipeline->slots.size()) pipeline->slots[slot_index + 1].numbered = {};
  if (slot_index == 0 || slot_index + 1 == pipeline->slots.size()) pipeline->sampled_edge = {};
}

void Cluster::Assign(Pipeline* pipeline, uint32_t slot_index, Worker* worker, uint64_t now_us) {
  StageSlot& slot = pipeline->slots[slot_index];
  STRAIT_CHECK(slot.state == StageSlot::State::kVacant && !worker->pipeline);
  worker->pipeline = pipeline->id;
  worker->slot_index = slot_index;
  slot.state = StageSlot::State::kLoading;
  slot.worker = worker->id;
  slot.stage_id = ++last_stage_id_;
  slot.bytes_total = StageWeightBytes(context_->model, slot.layers);
  slot.load_progress_us = now_us;
  SendToWorker out{worker->id, {}};
  v1::LoadStage* load = out.message.mutable_load_stage();
  load->set_stage_id(slot.stage_id);
  load->set_layer_begin(slot.layers.begin);
  load->set_layer_end(slot.layers.end);
  load->set_cache_bytes(slot.cache_bytes);
  context_->Send(std::move(out));
}

void Cluster::Fail(Pipeline* pipeline, const absl::Status& why, uint64_t now_us) {
  if (pipeline->state == Pipeline::State::kActive) {
    --num_active_;
    std::vector<Holdings> may_hold = pipeline->scheduler.Stop(why);
    for (size_t i = 0; i < may_hold.size(); ++i) {
      pipeline->slots[i].may_hold = std::move(may_hold[i]);
    }
  }
  pipeline->epoch = {context_->options.term, ++last_epoch_counter_};
  if (pipeline->state != Pipeline::State::kAssembling) pipeline->since_us = now_us;
  pipeline->state = Pipeline::State::kAssembling;
  pipeline->last_error = std::string(why.message());
  for (StageSlot& slot : pipeline->slots) {
    if (slot.state == StageSlot::State::kActivating || slot.state == StageSlot::State::kActive) {
      slot.state = StageSlot::State::kLoaded;
    }
  }
}

void Cluster::Dissolve(PipelineId id) {
  Pipeline* pipeline = pipelines_.at(id).get();
  STRAIT_CHECK(pipeline->state == Pipeline::State::kAssembling);
  for (const StageSlot& slot : pipeline->slots) {
    if (slot.state == StageSlot::State::kVacant) continue;
    Worker* worker = FindWorker(slot.worker);
    worker->pipeline.reset();
    Unload(worker, slot.stage_id, {slot.layers, slot.cache_bytes});
  }
  pipelines_.erase(id);
}

void Cluster::Unload(Worker* worker, uint64_t stage_id, const StagePlan& shape) {
  worker->unloading[stage_id] = shape;
  SendToWorker out{worker->id, {}};
  out.message.mutable_unload_stage()->set_stage_id(stage_id);
  context_->Send(std::move(out));
}

void Cluster::SendStep(const Pipeline& pipeline, const v1::StepPlan& plan) {
  for (const StageSlot& slot : pipeline.slots) {
    SendToWorker out{slot.worker, {}};
    v1::StepPlan* step = out.message.mutable_step();
    *step = plan;
    step->set_stage_id(slot.stage_id);
    ToWire(pipeline.epoch, step->mutable_epoch());
    context_->Send(std::move(out));
  }
}

std::string Cluster::WhyNoPipeline() const {
  if (!plan_problem_.ok()) return std::string(plan_problem_.message());
  for (const auto& [id, pipeline] : pipelines_) {
    std::string what =
        absl::StrCat("pipeline ", id.value, " is ", pipeline->served ? "recovering" : "loading");
    if (pipeline->num_vacant() > 0) {
      absl::StrAppend(&what, " and lacks ", pipeline->num_vacant(), " worker(s) of ",
                      pipeline->slots.size());
    }
    if (!pipeline->last_error.empty()) absl::StrAppend(&what, " (", pipeline->last_error, ")");
    return what;
  }
  return absl::StrCat(workers_.size(), " worker(s) attached, a pipeline needs ",
                      context_->options.num_stages);
}

absl::Status Cluster::CheckIntegrity() const {
  uint32_t active = 0;
  size_t slots_filled = 0;
  for (const auto& [id, pipeline] : pipelines_) {
    const bool is_active = pipeline->state == Pipeline::State::kActive;
    active += is_active;
    if (is_active != pipeline->scheduler.started()) {
      return absl::InternalError(absl::StrCat(
          "pipeline ", id.value, " is ",
          is_active ? "active, its scheduler stopped" : "not active, its scheduler runs"));
    }
    for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
      const StageSlot& slot = pipeline->slots[i];
      if (is_active && (!slot.may_hold.empty() ||
                        pipeline->scheduler.stages()[i].capacity_bytes != slot.cache_bytes)) {
        return absl::InternalError(
            absl::StrCat("pipeline ", id.value, " stage ", i, ": it has ", slot.cache_bytes,
                         " bytes of cache, its scheduler reckons with ",
                         pipeline->scheduler.stages()[i].capacity_bytes, "; ", slot.may_hold.size(),
                         " sequences are told of it outside"));
      }
      if (slot.state == StageSlot::State::kVacant) {
        if (slot.may_hold.empty() && slot.stage_id == 0) continue;
        return absl::InternalError(
            absl::StrCat("pipeline ", id.value, " stage ", i, " is vacant and has rows"));
      }
      ++slots_filled;
      if (departed_.Find(slot.stage_id) != nullptr) {
        return absl::InternalError(absl::StrCat("stage ", slot.stage_id, " is here and departed"));
      }
      const auto worker = workers_.find(slot.worker);
      if (worker == workers_.end() || worker->second.pipeline != id ||
          worker->second.slot_index != i) {
        return absl::InternalError(
            absl::StrCat("pipeline ", id.value, " stage ", i, ": its worker does not know"));
      }
    }
    const absl::Status status = pipeline->scheduler.CheckIntegrity();
    if (!status.ok()) {
      return absl::InternalError(
          absl::StrCat("pipeline ", id.value, ": ", std::string(status.message())));
    }
  }
  size_t assigned = 0;
  for (const auto& [id, worker] : workers_) assigned += worker.pipeline.has_value();
  if (active != num_active_ || assigned != slots_filled) {
    return absl::InternalError(absl::StrCat(active, " pipelines active, counted ", num_active_,
                                            "; ", assigned, " workers assigned to ", slots_filled,
                                            " stages"));
  }
  return absl::OkStatus();
}

}  // namespace strait
