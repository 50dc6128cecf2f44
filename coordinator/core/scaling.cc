// SPDX-License-Identifier: Apache-2.0
//
// How a pipeline gets other stages while it serves: see coordinator/core/scale.h for what is planned.
//
//   waiting ─▶ making room ─▶ loading ─▶ copying ─▶ still ─▶ switched ─▶ growing ─▶ waiting for the next pipeline
//
// Until the switch the pipeline serves with its old stages, and whatever fails leaves it as it was. The
// switch ends its epoch as a failure does, but nothing failed, no step was under way, and rows that went to other workers
// are there. From then on the new stages are its stages: what fails is an ordinary failure of theirs.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

// A pipeline stands still so often, for migrate_pause_us each, before it changes without the rows that did not come.
constexpr uint32_t kMaxStands = 2;

bool AreLoaded(const std::vector<StageSlot>& slots) {
  return std::all_of(slots.begin(), slots.end(),
                     [](const StageSlot& slot) { return slot.state == StageSlot::State::kLoaded; });
}

}  // namespace

absl::Status Cluster::MayScale(uint32_t num_stages) const {
  const uint64_t most =
      std::min<uint64_t>(context_->model.layer_weight_bytes.size(), limits::kMaxStagesPerPipeline);
  if (num_stages == 0 || num_stages > most) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a pipeline cannot have ", num_stages, " stages: a stage has a layer at least, and the ",
        "model has ", context_->model.layer_weight_bytes.size(), "; ask for 1 to ", most));
  }
  if (scale_) {
    return absl::FailedPreconditionError(absl::StrCat("pipelines are being scaled to ",
                                                      scale_->num_stages,
                                                      " stage(s) already; wait for its end"));
  }
  if (pipelines_.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("no pipeline serves: ", WhyNoPipeline()));
  }
  for (const auto& [pipeline_id, pipeline] : pipelines_) {
    if (pipeline->state == Pipeline::State::kActive) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("pipeline ", pipeline_id.value, " does not serve now",
                     pipeline->last_error.empty() ? "" : ": ", pipeline->last_error,
                     "; wait until it does (strait status)"));
  }
  return absl::OkStatus();
}

void Cluster::OnScale(ScaleId id, ScaleSpec spec, uint64_t now_us) {
  absl::Status may = MayScale(spec.num_stages);
  if (may.ok() && spec.dry_run) {
    absl::StatusOr<std::vector<PlannedPipeline>> plans = PlanAll(spec.num_stages, now_us);
    may = plans.status();
    if (may.ok()) {
      ScaleReport report{.num_stages = spec.num_stages,
                         .pipelines_total = static_cast<uint32_t>(plans->size()),
                         .phase = "done",
                         .plans = *std::move(plans)};
      context_->Send(ScaleTold{id, std::move(report)});
    }
  }
  if (!may.ok() || spec.dry_run) return context_->Send(ScaleAnswered{id, std::move(may), {}});
  scale_ = Scale{.id = id,
                 .num_stages = spec.num_stages,
                 .num_pipelines = static_cast<uint32_t>(pipelines_.size()),
                 .begin_us = now_us,
                 .hosts_min = spec.num_stages,
                 .since_us = now_us};
  for (auto it = pipelines_.rbegin(); it != pipelines_.rend(); ++it) {
    scale_->pipelines.push_back(it->first);
  }
}

void Cluster::TickScale(uint64_t now_us) {
  // Whoever holds up another phase is evicted.
  if (!scale_ ||
      (scale_->phase != Scale::Phase::kWaiting && scale_->phase != Scale::Phase::kGrowing) ||
      now_us <= scale_->since_us + kMemoryTimeoutUs) {
    return;
  }
  AnswerScale(absl::DeadlineExceededError(absl::StrCat(
      "a worker has not given memory back for ", kMemoryTimeoutUs / 1'000'000, " s; ", scale_->done,
      " pipeline(s) have ", scale_->num_stages, " stage(s) all the same")));
}

void Cluster::AdvanceScale(uint64_t now_us) {
  while (scale_ && ScaleStep(now_us)) {
    scale_->since_us = now_us;
    TellScale(/*now=*/true, now_us);
  }
  TellScale(/*now=*/false, now_us);
}

bool Cluster::ScaleStep(uint64_t now_us) {
  Scale& scale = *scale_;
  if (scale.phase == Scale::Phase::kWaiting) return BeginTurn(now_us);
  Pipeline* pipeline = pipelines_.at(scale.pipeline).get();
  switch (scale.phase) {
    case Scale::Phase::kMakingRoom:
      for (const StageSlot& slot : pipeline->slots) {
        if (HostedIn(slot).resize) return false;
      }
      if (!SparesAreCold(scale.plan)) return false;
      scale.phase = Scale::Phase::kLoading;
      LoadLandings(pipeline, now_us);
      return true;
    case Scale::Phase::kLoading:
      if (!AreLoaded(scale.landings)) return false;
      if (scale.next.empty()) {
        LoadNext(pipeline, now_us);
        return scale_.has_value();
      }
      if (!AreLoaded(scale.next)) return false;
      BeginCopies(*pipeline, now_us);
      BeginLinks(now_us);
      scale.phase = Scale::Phase::kCopying;
      return true;
    case Scale::Phase::kCopying:
      scale.ahead->Advance(*pipeline, now_us);
      if (!scale.ahead->IsNear(*pipeline, now_us) || !LinksSettled(now_us)) return false;
      pipeline->scheduler.Hold(true);
      scale.rest_asked = false;
      scale.phase = Scale::Phase::kStill;
      return true;
    case Scale::Phase::kStill:
      return StandsStill(pipeline, now_us);
    case Scale::Phase::kGrowing: {
      const bool stepped = scale.first_step_us > 0;
      if (pipeline->state != Pipeline::State::kActive) return false;
      // First: it must see each sequence's first token, and caches may grow for long after that.
      const bool pauses_are_over = PausesAreOver(*pipeline, now_us);
      if (!pauses_are_over || !Grown(*pipeline) ||
          (!stepped && pipeline->scheduler.num_residents() > 0)) {
        return false;
      }
      const uint64_t end_us = stepped ? scale.first_step_us : pipeline->since_us;
      scale.pause_us = std::max(scale.pause_us, end_us - std::min(end_us, scale.pause_begin_us));
      scale.hosts_min = std::min(scale.hosts_min, scale.plan.num_hosts);
      ++scale.done;
      scale.phase = Scale::Phase::kWaiting;
      return true;
    }
    default:
      return false;
  }
}

bool Cluster::BeginTurn(uint64_t now_us) {
  Scale& scale = *scale_;
  if (scale.pipelines.empty() && scale.drains) {
    context_->num_hosts = std::min(context_->num_hosts, scale.hosts_min);
    look_again_ = true;
    AnswerScale(absl::OkStatus());
    return false;
  }
  if (scale.pipelines.empty()) {
    context_->num_stages = scale.num_stages;
    // Workers that are left may be fewer for a pipeline that there is not now.
    context_->num_hosts =
        pipelines_.size() == context_->options.num_pipelines ? scale.hosts_min : 1;
    look_again_ = true;
    AnswerScale(absl::OkStatus());
    return false;
  }
  const PipelineId id = scale.pipelines.back();
  const auto it = pipelines_.find(id);
  if (it == pipelines_.end() || it->second->state != Pipeline::State::kActive) {
    AnswerScale(absl::AbortedError(absl::StrCat("pipeline ", id.value, " failed before its turn; ",
                                                scale.done, " other(s) have ", scale.num_stages,
                                                " stage(s) now: ask again when it serves")));
    return false;
  }
  Pipeline* pipeline = it->second.get();
  if (pipeline->slots.size() == scale.num_stages && !scale.drains) {
    scale.hosts_min = std::min(scale.hosts_min, static_cast<uint32_t>(WorkersOf(*pipeline).size()));
    scale.pipelines.pop_back();
    ++scale.done;
    return true;
  }
  // Of an earlier change something is still under way, or its epoch has only begun.
  if (!Grown(*pipeline) || !pipeline->scheduler.MayShrink()) return false;
  absl::StatusOr<ScalePlan> plan = PlanScaleOf(pipeline, scale.num_stages, now_us);
  if (!plan.ok()) {
    AnswerScale(absl::Status(
        plan.status().code(),
        absl::StrCat("pipeline ", id.value, ": ", std::string(plan.status().message()))));
    return false;
  }
  scale.pipelines.pop_back();
  scale.pipeline = id;
  scale.plan = *std::move(plan);
  scale.phase = Scale::Phase::kMakingRoom;
  pipeline->scaled_rows = scale.plan.capacity_rows;
  std::vector<uint32_t> smaller;
  for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
    if (scale.plan.old_cache_bytes[i] < pipeline->slots[i].cache_bytes) smaller.push_back(i);
  }
  ResizeSlots(pipeline, scale.plan.old_cache_bytes, now_us);
  for (const uint32_t i : smaller) {
    const StageSlot& slot = pipeline->slots[i];
    SendResize(FindWorker(slot.worker), slot.stage_id, slot.cache_bytes, now_us);
  }
  return true;
}

absl::StatusOr<ScalePlan> Cluster::PlanScaleOf(Pipeline* pipeline, uint32_t num_stages,
                                               uint64_t now_us, const std::set<WorkerId>& taken) {
  std::vector<ScaleHost> hosts;
  std::vector<Worker*> spares = IdleWorkers(now_us);
  std::erase_if(spares, [&](const Worker* spare) { return taken.contains(spare->id); });
  for (Worker* worker : WorkersOf(*pipeline)) {
    if (worker->duty != Worker::Duty::kServes) {
      if (spares.empty()) continue;
      hosts.push_back({.worker = spares.front()->id,
                       .memory = spares.front()->memory(),
                       .old_slots = {},
                       .follows = true});
      spares.erase(spares.begin());
      continue;
    }
    ScaleHost host{.worker = worker->id, .memory = worker->memory(), .old_slots = {}};
    HostedStages others = worker->stages;
    std::erase_if(others, [&](const auto& entry) { return entry.second.pipeline == pipeline->id; });
    host.memory.bytes -= BookedBytes(context_->options, context_->model, worker->memory(), others);
    for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
      if (pipeline->slots[i].worker == worker->id) host.old_slots.push_back(i);
    }
    hosts.push_back(std::move(host));
  }
  for (Worker* worker : spares) {
    hosts.push_back({.worker = worker->id, .memory = worker->memory(), .old_slots = {}});
  }
  if (hosts.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no other worker is attached that could have any of its ",
                     pipeline->slots.size(), " stage(s)"));
  }
  ScaleNeeds needs{.resident_rows = pipeline->scheduler.resident_rows_max()};
  const uint64_t unheld = pipeline->scheduler.num_unheld_prefix_blocks();
  for (const StageCache& stage : pipeline->scheduler.stages()) {
    const uint64_t blocks =
        stage.reserved_bytes / context_->model.block_bytes / stage.layers.size();
    needs.reserved_rows =
        std::max(needs.reserved_rows, (blocks - std::min(blocks, unheld)) * limits::kBlockTokens);
  }
  const uint64_t holds = pipeline->capacity_rows(context_->model.policy());
  for (const auto& [id, sequence] : journal_->sequences()) {
    if (sequence->rows_max() > holds) continue;  // another pipeline's
    needs.promised_rows = std::max<uint64_t>(needs.promised_rows, sequence->rows_max());
  }
  const auto plan_on = [&] {
    return PlanScale(context_->options, context_->model, pipeline->slots, hosts, num_stages, needs);
  };
  absl::StatusOr<ScalePlan> plan = plan_on();
  const auto first = std::stable_partition(hosts.begin(), hosts.end(),
                                           [](const ScaleHost& host) { return !host.follows; });
  if (plan.ok() || first == hosts.end()) return plan;
  // Too small for that: as any other spare.
  for (auto host = first; host != hosts.end(); ++host) host->follows = false;
  return plan_on();
}

void Cluster::LoadLandings(Pipeline* pipeline, uint64_t now_us) {
  const ScalePlan& plan = scale_->plan;
  scale_->landings.resize(plan.landings.size());
  for (uint32_t i = 0; i < plan.landings.size(); ++i) {
    StageSlot& slot = scale_->landings[i];
    slot.layers = plan.landings[i].layers;
    slot.cache_bytes = slot.wanted_cache_bytes = plan.landings[i].cache_bytes;
    Assign(&slot, {.role = HostedStage::Role::kLanding, .pipeline = pipeline->id, .slot_index = i},
           FindWorker(plan.stages[plan.landings[i].stage_index].worker), now_us);
  }
}

void Cluster::LoadNext(Pipeline* pipeline, uint64_t now_us) {
  std::vector<ScaledStage>& stages = scale_->plan.stages;
  for (size_t i = 0; i < scale_->landings.size(); ++i) {
    stages[scale_->plan.landings[i].stage_index].successor_of.push_back(
        scale_->landings[i].stage_id);
  }
  for (const ScaledStage& stage : stages) {
    const Worker* worker = FindWorker(stage.worker);
    if (!stage.successor_of.empty() || (worker != nullptr && IsIdle(*worker, now_us))) continue;
    return AbortScale(pipeline->id,
                      absl::AbortedError(absl::StrCat("spare ", stage.worker.value,
                                                      " went, or another pipeline took it")));
  }
  scale_->next.resize(stages.size());
  for (uint32_t i = 0; i < stages.size(); ++i) {
    StageSlot& slot = scale_->next[i];
    slot.layers = stages[i].plan.layers;
    slot.cache_bytes = stages[i].first_cache_bytes;
    slot.wanted_cache_bytes = stages[i].plan.cache_bytes;
    const bool shared = std::count_if(stages.begin(), stages.end(), [&](const ScaledStage& other) {
                          return other.worker == stages[i].worker;
                        }) > 1;
    slot.group = shared ? stages[i].worker.value : 0;
    Assign(&slot,
           {.role = HostedStage::Role::kNext,
            .pipeline = pipeline->id,
            .slot_index = i,
            .successor_of = stages[i].successor_of},
           FindWorker(stages[i].worker), now_us);
  }
}

void Cluster::BeginCopies(const Pipeline& pipeline, uint64_t now_us) {
  std::vector<Landing> landings;
  for (const StageSlot& slot : scale_->landings) {
    landings.push_back({slot.stage_id, slot.worker, slot.layers});
  }
  for (size_t i = 0; i < scale_->next.size(); ++i) {
    const StageSlot& slot = scale_->next[i];
    if (scale_->plan.stages[i].lands) landings.push_back({slot.stage_id, slot.worker, slot.layers});
  }
  scale_->stands = 0;
  scale_->ahead.emplace(
      context_, std::move(landings), [this](WorkerId id) { return workers_.at(id).data_address; },
      now_us);
  scale_->ahead->Advance(pipeline, now_us);
}

bool Cluster::StandsStill(Pipeline* pipeline, uint64_t now_us) {
  Scale& scale = *scale_;
  // A step that does not end is its stage's fault (CollectLate).
  if (pipeline->scheduler.ledger().in_flight() > 0) return false;
  if (!std::exchange(scale.rest_asked, true)) {
    scale.ahead->Finish(*pipeline, now_us);
    scale.since_us = now_us;
  }
  if (scale.ahead->IsThere()) {
    Switch(pipeline, now_us);
    return true;
  }
  if (now_us < scale.since_us + context_->options.migrate_pause_us) return false;
  if (++scale.stands >= kMaxStands) {
    Switch(pipeline, now_us);
    return true;
  }
  pipeline->scheduler.Hold(false);
  scale.phase = Scale::Phase::kCopying;
  return false;
}

void Cluster::OnFetched(Worker* worker, const v1::RowsFetched& told, uint64_t now_us) {
  if (!scale_ || !scale_->ahead || !scale_->ahead->IsOf(worker->id, told.stage_id())) return;
  const absl::Status sound = scale_->ahead->OnFetched(worker->id, told, now_us);
  if (!sound.ok()) Evict(worker->id, sound, now_us);
}

void Cluster::Switch(Pipeline* pipeline, uint64_t now_us) {
  Scale& scale = *scale_;
  scale.moved_bytes += scale.ahead->bytes();
  const Scheduler& scheduler = pipeline->scheduler;
  scale.held_before = scheduler.HeldRows(/*known=*/true);
  // Who waits for no step feels no pause before the switch.
  scale.pause_begin_us =
      scheduler.num_residents() > 0 && pipeline->last_step_us > 0 ? pipeline->last_step_us : now_us;
  scale.first_step_us = 0;
  scale.before.clear();
  for (const auto& [id, residency] : scheduler.residents()) {
    const Sequence& sequence = *residency->sequence;
    if (sequence.generated() == 0) continue;
    scale.before[id] = {sequence.generated(), sequence.last_token_us};
  }
  std::vector<Holdings> may_hold = pipeline->scheduler.Stop();
  --num_active_;
  for (size_t i = 0; i < may_hold.size(); ++i) {
    pipeline->slots[i].may_hold = std::move(may_hold[i]);
  }
  std::vector<StageSlot> old = std::exchange(pipeline->slots, std::exchange(scale.next, {}));
  for (StageSlot& landing : scale.landings) {
    landing.may_hold = scale.ahead->HoldingsOf(landing.stage_id);
    old.push_back(std::move(landing));
  }
  scale.landings.clear();
  for (StageSlot& slot : pipeline->slots) {
    HostedStage& hosted = HostedIn(slot);
    hosted.role = HostedStage::Role::kPlace;
    std::vector<const StageSlot*> followed;
    for (const StageSlot& each : old) {
      if (each.worker == slot.worker) followed.push_back(&each);
    }
    slot.may_hold = followed.empty() ? scale.ahead->HoldingsOf(slot.stage_id)
                                     : HoldingsOfSuccessor(slot.layers, followed);
  }
  for (const StageSlot& slot : old) {
    Worker* worker = FindWorker(slot.worker);
    worker->stages.at(slot.stage_id).role = HostedStage::Role::kFollowed;
    const bool stays =
        std::any_of(worker->stages.begin(), worker->stages.end(), [&](const auto& entry) {
          return entry.second.role == HostedStage::Role::kPlace &&
                 entry.second.pipeline == pipeline->id;
        });
    if (!stays) Unload(worker, slot.stage_id);
  }
  pipeline->epoch = {context_->options.term, ++last_epoch_counter_};
  pipeline->state = Pipeline::State::kAssembling;
  pipeline->since_us = pipeline->retry_at_us = now_us;
  pipeline->failures = 0;
  pipeline->switched = true;
  pipeline->planned_rows = scale.plan.capacity_rows;
  pipeline->why = scale.plan.why;
  pipeline->scaled_rows.reset();
  TakeLinks(pipeline);
  scale.ahead.reset();
  scale.phase = Scale::Phase::kSwitched;
}

void Cluster::UnloadFollowed(PipelineId pipeline) {
  for (auto& [worker_id, worker] : workers_) {
    for (auto& [stage_id, stage] : worker.stages) {
      if (stage.role == HostedStage::Role::kFollowed && stage.pipeline == pipeline) {
        Unload(&worker, stage_id);
      }
    }
  }
}

void Cluster::OnScaledActive(const Pipeline& pipeline) {
  if (!scale_ || scale_->phase != Scale::Phase::kSwitched || scale_->pipeline != pipeline.id) {
    return;
  }
  const uint64_t kept = pipeline.scheduler.HeldRows();
  scale_->rows_kept += kept;
  scale_->rows_lost += scale_->held_before - std::min(scale_->held_before, kept);
  scale_->phase = Scale::Phase::kGrowing;
  scale_->told_us = 0;  // it is told at once
}

void Cluster::OnScaledStep(const Pipeline& pipeline, uint64_t now_us) {
  if (!scale_ || scale_->phase != Scale::Phase::kGrowing || scale_->pipeline != pipeline.id ||
      scale_->first_step_us > 0) {
    return;
  }
  scale_->first_step_us = now_us;
}

void Cluster::AbortScale(PipelineId id, const absl::Status& why) {
  if (!scale_ || scale_->pipeline != id || scale_->phase == Scale::Phase::kWaiting) return;
  const bool prepares = scale_->prepares();
  if (prepares) {
    Pipeline* pipeline = pipelines_.at(id).get();
    pipeline->scaled_rows.reset();
    pipeline->scheduler.Hold(false);
    if (scale_->ahead && pipeline->scheduler.started()) scale_->ahead->End(*pipeline);
    for (const std::vector<StageSlot>* slots : {&scale_->next, &scale_->landings}) {
      for (const StageSlot& slot : *slots) {
        if (slot.state != StageSlot::State::kVacant) Unload(FindWorker(slot.worker), slot.stage_id);
      }
    }
  }
  // No room is the asker's to mend, whatever else is an accident.
  const auto code = absl::IsResourceExhausted(why) ? absl::StatusCode::kResourceExhausted
                                                   : absl::StatusCode::kAborted;
  AnswerScale(
      absl::Status(code, absl::StrCat("pipeline ", id.value, ": ", std::string(why.message()),
                                      prepares ? "; its stages are as before"
                                               : "; it has its new stages, and recovers")));
}

void Cluster::AnswerScale(const absl::Status& status) {
  ScaleAnswered answer{scale_->id, status, {}};
  answer.reply.set_pipelines(scale_->done);
  answer.reply.set_pause_us(scale_->pause_us);
  answer.reply.set_rows_kept(scale_->rows_kept);
  answer.reply.set_rows_lost(scale_->rows_lost);
  answer.reply.set_moved_bytes(scale_->moved_bytes);
  std::vector<std::pair<SequenceId, uint64_t>> pauses =
      SumPauses(scale_->resident_pauses_us, &answer.reply);
  last_scale_ =
      ScaleEnded{scale_->num_stages, scale_->drains, status, answer.reply, std::move(pauses)};
  if (scale_->drains) {
    replaced_ = Replaced{std::move(answer.status), std::move(answer.reply)};
  } else {
    context_->Send(std::move(answer));
  }
  scale_.reset();
}

}  // namespace strait
