// SPDX-License-Identifier: Apache-2.0
//
// How Cluster puts pipelines together, and what it does when one fails.
#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/wire/epoch_wire.h"

namespace strait {

uint64_t Pipeline::capacity_rows(const CachePolicy& policy) const {
  uint64_t rows = scaled_rows.value_or(std::numeric_limits<uint64_t>::max());
  for (const StageSlot& slot : slots) {
    const uint64_t bytes = std::max(slot.cache_bytes, slot.wanted_cache_bytes);
    rows = std::min(rows, RowsThatFit(policy, bytes, slot.layers));
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
  const bool has_no_place =
      std::all_of(worker.stages.begin(), worker.stages.end(),
                  [](const auto& entry) { return entry.second.role == HostedStage::Role::kWarm; });
  return has_no_place && worker.duty == Worker::Duty::kServes && faults_.IsFit(worker.id, now_us);
}

std::vector<Worker*> Cluster::IdleWorkers(uint64_t now_us) {
  std::vector<Worker*> idle;
  for (auto& [id, worker] : workers_) {
    if (IsIdle(worker, now_us)) idle.push_back(&worker);
  }
  const auto standing = [&](const Worker* worker) {
    return faults_.StandingOf(worker->id, now_us);
  };
  std::stable_sort(idle.begin(), idle.end(), [&](const Worker* a, const Worker* b) {
    if (standing(a) != standing(b)) return standing(a) < standing(b);
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
    for (Pipeline* pipeline : incomplete) {
      const PipelineId id = pipeline->id;
      FillVacancies(pipeline, now_us);
      if (pipelines_.contains(id)) UseSurvivors(pipeline, now_us);
    }
    if (incomplete.size() > 1) Consolidate(now_us);
    while (pipelines_.size() < context_->options.num_pipelines) {
      const size_t before = pipelines_.size();
      FormPipeline(now_us);
      if (pipelines_.size() == before) break;
    }
  }
  if (num_active_ > 0) EndDeadly();
  AdvanceScale(now_us);
  std::vector<PipelineId> ids;  // one may be dissolved
  for (const auto& [id, pipeline] : pipelines_) ids.push_back(id);
  for (const PipelineId id : ids) {
    Pipeline* const pipeline = pipelines_.at(id).get();
    GrowCaches(pipeline, now_us);
    const bool loaded =
        std::all_of(pipeline->slots.begin(), pipeline->slots.end(),
                    [](const StageSlot& slot) { return slot.state == StageSlot::State::kLoaded; });
    // Also while another still loads.
    const bool grown = GrowWarm(pipeline, now_us);
    if (!loaded || !grown || now_us < pipeline->retry_at_us) continue;
    if (!PartBlamed(pipeline, now_us)) Activate(pipeline, now_us);
  }
  AdvanceWarm(now_us);
}

Cluster::Crew Cluster::ChooseCrew(std::vector<Worker*> candidates, uint64_t now_us) {
  Crew crew;
  const size_t least = context_->num_hosts;
  if (candidates.size() < least) return crew;
  // As many as it has stages, but those that pipelines after it cannot do without.
  const size_t later =
      least * (context_->options.num_pipelines -
               std::min<size_t>(pipelines_.size() + 1, context_->options.num_pipelines));
  const size_t most = std::max(least, candidates.size() - std::min(candidates.size(), later));
  const size_t size = std::min<size_t>(most, context_->num_stages);
  std::vector<WorkerId> ids;
  for (const Worker* worker : candidates) ids.push_back(worker->id);
  ids = faults_.ChooseCrew(std::move(ids), size, IsRing(), now_us);
  candidates.clear();
  for (const WorkerId id : ids) candidates.push_back(&workers_.at(id));
  std::vector<uint64_t> bytes;
  for (const Worker* worker : candidates) bytes.push_back(worker->memory_bytes);
  const std::vector<uint32_t> counts = StagesOfHosts(bytes, context_->num_stages);
  for (size_t w = 0; w < candidates.size(); ++w) {
    crew.memory.push_back(candidates[w]->memory());
    crew.memory.back().num_stages = counts[w];
  }
  crew.workers = std::move(candidates);
  return crew;
}

void Cluster::FormPipeline(uint64_t now_us) {
  plan_problem_ = absl::OkStatus();
  const Crew crew = ChooseCrew(IdleWorkers(now_us), now_us);
  if (crew.workers.empty()) return;
  absl::StatusOr<PipelinePlan> plan = PlanPipeline(context_->options, context_->model, crew.memory);
  if (!plan.ok()) {
    plan_problem_ = plan.status();
    return;
  }
  if (!CoolAll(crew.workers)) return;
  auto owned = std::make_unique<Pipeline>(context_, journal_);
  Pipeline* pipeline = owned.get();
  pipeline->id = PipelineId{++last_pipeline_id_};
  pipeline->scheduler.set_pipeline(pipeline->id);
  pipeline->epoch = {context_->options.term, ++last_epoch_counter_};
  pipeline->since_us = now_us;
  pipeline->planned_rows = plan->capacity_rows;
  for (const StagePlan& stage : plan->stages) {
    const uint64_t bytes = StageWeightBytes(context_->model, stage.layers);
    pipeline->why.bottleneck_bytes = std::max(pipeline->why.bottleneck_bytes, bytes);
    pipeline->why.moved_bytes += bytes;
  }
  pipeline->why.num_plans = 1;
  pipeline->why.best_bottleneck_bytes = pipeline->why.bottleneck_bytes;
  pipeline->why.best_moved_bytes = pipeline->why.moved_bytes;
  pipeline->why.text =
      "formed anew: its layers are split so that it holds the longest sequences, and its heaviest "
      "stage is then as light as can be";
  for (const StagePlan& stage : plan->stages) {
    StageSlot slot;
    slot.layers = stage.layers;
    slot.cache_bytes = slot.wanted_cache_bytes = stage.cache_bytes;
    pipeline->slots.push_back(slot);
  }
  pipelines_.emplace(pipeline->id, std::move(owned));
  uint32_t slot_index = 0;
  for (size_t w = 0; w < crew.workers.size(); ++w) {
    const uint32_t end = slot_index + crew.memory[w].num_stages;
    for (const bool shared = end > slot_index + 1; slot_index < end; ++slot_index) {
      pipeline->slots[slot_index].group = shared ? w + 1 : 0;
      Assign(pipeline, slot_index, crew.workers[w], now_us);
    }
  }
}

std::vector<Cluster::Fill> Cluster::ChooseFills(const Pipeline& pipeline,
                                                const std::vector<Worker*>& idle,
                                                uint64_t now_us) const {
  const CoreOptions& options = context_->options;
  const ModelShape& model = context_->model;
  const bool one_each = idle.size() >= pipeline.num_vacant();
  std::vector<Fill> fills;
  std::vector<WorkerId> workers = WorkerIdsOf(pipeline);
  std::vector<Worker*> left = idle;
  for (uint32_t i = 0; i < pipeline.slots.size(); ++i) {
    const StageSlot& slot = pipeline.slots[i];
    if (slot.state != StageSlot::State::kVacant) continue;
    const bool joins = !one_each && !fills.empty() && slot.group != 0 &&
                       fills.back().slots.back() + 1 == i &&
                       pipeline.slots[i - 1].group == slot.group;
    if (joins) {
      fills.back().slots.push_back(i);
    } else if (!left.empty()) {
      // Most memory first, so the first is the roomiest of those against which least speaks, or has the weights.
      PreferWarm(slot.layers, &left);
      const size_t choice = ChooseForSlot(workers, i, left, now_us);
      fills.push_back({left[choice], {i}, 0});
      left.erase(left.begin() + static_cast<std::ptrdiff_t>(choice));
    } else {
      continue;
    }
    workers[i] = fills.back().worker->id;
  }
  for (Fill& fill : fills) {
    const WorkerMemory memory = fill.worker->memory();
    HostedStages stages;
    uint32_t num_layers = 0;
    fill.rows = std::numeric_limits<uint64_t>::max();
    for (const uint32_t i : fill.slots) {
      const LayerRange layers = pipeline.slots[i].layers;
      stages[i].layers = layers;
      num_layers += layers.size();
      fill.rows = std::min(fill.rows, StageRowsMax(options, model, layers, memory));
    }
    const uint64_t fixed = BookedBytes(options, model, memory, stages);
    const uint64_t room = memory.bytes - std::min(memory.bytes, fixed);
    fill.rows = std::min(fill.rows, CacheMemoryRows(model, memory, room, num_layers));
  }
  return fills;
}

void Cluster::FillVacancies(Pipeline* pipeline, uint64_t now_us) {
  const std::vector<Worker*> idle = IdleWorkers(now_us);
  if (idle.empty()) return;
  const std::vector<Fill> fills = ChooseFills(*pipeline, idle, now_us);
  uint64_t rows = pipeline->capacity_rows(context_->model.policy());
  for (const Fill& fill : fills) rows = std::min(rows, fill.rows);
  // What the roomiest workers at hand could do with other layer ranges. Loading everything anew
  // pays only if the pipeline holds at least twice as much afterwards, or cannot work otherwise.
  std::vector<Worker*> all = idle;
  for (Worker* worker : WorkersOf(*pipeline)) {
    if (worker->duty == Worker::Duty::kServes) all.push_back(worker);
  }
  std::stable_sort(all.begin(), all.end(), [](const Worker* a, const Worker* b) {
    return a->memory_bytes > b->memory_bytes;
  });
  if (const Crew crew = ChooseCrew(std::move(all), now_us); !crew.workers.empty()) {
    const absl::StatusOr<PipelinePlan> plan =
        PlanPipeline(context_->options, context_->model, crew.memory);
    const uint64_t anew = plan.ok() ? plan->capacity_rows : 0;
    if (anew > 2 * rows) return Dissolve(pipeline->id);
    if (rows == 0) pipeline->last_error = std::string(plan.status().message());
  }
  for (const Fill& fill : fills) {
    if (fill.rows == 0 || !MakeReady(*pipeline, fill)) continue;
    pipeline->filled_us = now_us;
    for (const uint32_t i : fill.slots) {
      StageSlot& slot = pipeline->slots[i];
      // Not cut to what a small one elsewhere can hold: that one may be replaced, too.
      slot.cache_bytes = slot.wanted_cache_bytes = StageCacheBytes(
          context_->model, slot.layers, std::min(fill.rows, pipeline->planned_rows));
      if (!TakeWarm(pipeline, i, fill.worker, now_us)) Assign(pipeline, i, fill.worker, now_us);
    }
  }
}

bool Cluster::LendTo(Pipeline* pipeline, uint32_t slot_index, uint64_t needed_rows,
                     uint64_t now_us) {
  StageSlot& slot = pipeline->slots[slot_index];
  Worker* best = nullptr;
  std::pair<bool, uint64_t> most;
  for (Worker* worker : WorkersOf(*pipeline)) {
    if (worker->duty != Worker::Duty::kServes || !faults_.IsFit(worker->id, now_us)) continue;
    HostedStages with = worker->stages;
    with[~uint64_t{0}].layers = slot.layers;
    const uint64_t fixed = BookedBytes(context_->options, context_->model, worker->memory(), with);
    if (fixed >= worker->memory_bytes) continue;
    // Not more than it could have alone.
    const uint64_t rows =
        std::min({CacheMemoryRows(context_->model, worker->memory(), worker->memory_bytes - fixed,
                                  slot.layers.size()),
                  StageRowsMax(context_->options, context_->model, slot.layers, worker->memory()),
                  pipeline->planned_rows});
    if (rows == 0 || rows < needed_rows) continue;
    const auto is_on = [&](uint32_t i) {
      return i < pipeline->slots.size() && pipeline->slots[i].state != StageSlot::State::kVacant &&
             pipeline->slots[i].worker == worker->id;
    };
    // A neighbour's hidden states do not leave its host.
    const std::pair<bool, uint64_t> rank{is_on(slot_index + 1) || is_on(slot_index - 1), rows};
    if (best != nullptr && rank <= most) continue;
    best = worker;
    most = rank;
  }
  if (best == nullptr) return false;
  slot.cache_bytes = slot.wanted_cache_bytes =
      StageCacheBytes(context_->model, slot.layers, most.second);
  Assign(pipeline, slot_index, best, now_us);
  for (StageSlot& each : pipeline->slots) {
    if (each.state != StageSlot::State::kVacant && each.worker == best->id) {
      each.group = best->id.value;
    }
  }
  return true;
}

std::vector<WorkerMemory> Cluster::SurvivorsOf(const Pipeline& pipeline, uint64_t now_us) {
  std::vector<uint64_t> bytes;
  std::vector<WorkerMemory> memory;
  for (const Worker* worker : WorkersOf(pipeline)) {
    // One that has stages of other pipelines, too, has less than it offers.
    const bool is_its_own =
        std::all_of(worker->stages.begin(), worker->stages.end(), [&](const auto& entry) {
          return entry.second.role == HostedStage::Role::kPlace &&
                 entry.second.pipeline == pipeline.id;
        });
    const bool serves = worker->duty == Worker::Duty::kServes && faults_.IsFit(worker->id, now_us);
    if (!is_its_own || !serves) continue;
    bytes.push_back(worker->memory_bytes);
    memory.push_back(worker->memory());
  }
  if (memory.empty() || memory.size() >= context_->num_hosts) return {};
  const std::vector<uint32_t> counts = StagesOfHosts(bytes, context_->num_stages);
  for (size_t w = 0; w < memory.size(); ++w) memory[w].num_stages = counts[w];
  return memory;
}

void Cluster::UseSurvivors(Pipeline* pipeline, uint64_t now_us) {
  if (pipeline->num_vacant() == 0 || pipeline->state != Pipeline::State::kAssembling ||
      // Nobody is left of it: workers may come back with its stages.
      pipeline->num_vacant() == pipeline->slots.size() ||
      // Where several were lost they come back one by one.
      now_us < std::max(pipeline->vacant_since_us, pipeline->filled_us) +
                   context_->options.spare_wait_us) {
    return;
  }
  uint64_t needed_rows = 0;
  const uint64_t holds = pipeline->capacity_rows(context_->model.policy());
  for (const auto& [id, sequence] : journal_->sequences()) {
    if (sequence->rows_max() > holds) continue;  // another pipeline's
    needed_rows = std::max<uint64_t>(needed_rows, sequence->rows_max());
  }
  const std::vector<WorkerMemory> survivors = SurvivorsOf(*pipeline, now_us);
  uint64_t anew = 0;
  if (!survivors.empty()) {
    const absl::StatusOr<PipelinePlan> plan =
        PlanPipeline(context_->options, context_->model, survivors);
    if (plan.ok() && plan->capacity_rows >= needed_rows) anew = plan->capacity_rows;
  }
  // As in FillVacancies: loading everything anew pays if the pipeline holds twice as much then.
  bool all = true;
  for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
    if (pipeline->slots[i].state != StageSlot::State::kVacant) continue;
    all = LendTo(pipeline, i, std::max(needed_rows, anew / 2), now_us) && all;
  }
  if (all || anew == 0) return;
  context_->num_hosts = static_cast<uint32_t>(survivors.size());
  look_again_ = true;
  Dissolve(pipeline->id);
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
  StageSlot vacant;
  vacant.layers = pipeline->slots[slot_index].layers;
  vacant.group = pipeline->slots[slot_index].group;
  vacant.cache_bytes = vacant.wanted_cache_bytes =
      StageCacheBytes(context_->model, vacant.layers, pipeline->planned_rows);
  pipeline->slots[slot_index] = vacant;
  if (slot_index + 1 < pipeline->slots.size()) {
    pipeline->slots[slot_index + 1].numbered = {};
    pipeline->slots[slot_index + 1].edge_made = false;
  }
  if (slot_index == 0 || slot_index + 1 == pipeline->slots.size()) pipeline->sampled_edge = {};
}

void Cluster::Assign(Pipeline* pipeline, uint32_t slot_index, Worker* worker, uint64_t now_us) {
  Assign(&pipeline->slots[slot_index],
         {.role = HostedStage::Role::kPlace, .pipeline = pipeline->id, .slot_index = slot_index},
         worker, now_us);
}

void Cluster::Assign(StageSlot* slot, HostedStage hosted, Worker* worker, uint64_t now_us) {
  STRAIT_CHECK(slot->state == StageSlot::State::kVacant);
  slot->state = StageSlot::State::kLoading;
  slot->worker = worker->id;
  slot->stage_id = ++last_stage_id_;
  slot->bytes_total = StageWeightBytes(context_->model, slot->layers);
  slot->load_progress_us = now_us;
  hosted.layers = slot->layers;
  hosted.cache_bytes = slot->cache_bytes;
  SendLoad(worker, slot->stage_id, std::move(hosted));
}

void Cluster::SendLoad(Worker* worker, uint64_t stage_id, HostedStage hosted) {
  SendToWorker out{worker->id, {}};
  v1::LoadStage* load = out.message.mutable_load_stage();
  load->set_stage_id(stage_id);
  load->set_layer_begin(hosted.layers.begin);
  load->set_layer_end(hosted.layers.end);
  load->set_cache_bytes(hosted.cache_bytes);
  load->mutable_successor_of()->Add(hosted.successor_of.begin(), hosted.successor_of.end());
  worker->stages.emplace(stage_id, std::move(hosted));
  context_->Send(std::move(out));
}

void Cluster::Fail(Pipeline* pipeline, const absl::Status& why, uint64_t now_us) {
  if (scale_ && scale_->prepares()) AbortScale(pipeline->id, why);
  pipeline->switched = false;
  if (pipeline->state == Pipeline::State::kActive) {
    --num_active_;
    for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
      const StageTimes& times = pipeline->scheduler.times(i);
      if (times.steps > 0) pipeline->slots[i].times = times;
    }
    for (const auto& [id, residency] : pipeline->scheduler.residents()) {
      const bool decodes =
          residency->role == Residency::Role::kHome && residency->sequence->generated() > 0;
      if (decodes) ++context_->stats.sequences_interrupted;
    }
    std::vector<Holdings> may_hold = pipeline->scheduler.Stop();
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
  STRAIT_CHECK(pipelines_.at(id)->state == Pipeline::State::kAssembling);
  AbortScale(id, absl::UnavailableError("the pipeline is put together anew"));
  for (auto& [worker_id, worker] : workers_) {
    for (auto& [stage_id, stage] : worker.stages) {
      if (stage.role != HostedStage::Role::kUnloading && stage.pipeline == id) {
        Unload(&worker, stage_id);
      }
    }
  }
  pipelines_.erase(id);
}

void Cluster::Unload(Worker* worker, uint64_t stage_id) {
  faults_.ForgiveStage(stage_id);
  worker->stages.at(stage_id).role = HostedStage::Role::kUnloading;
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
                      context_->num_hosts);
}

}  // namespace strait
