// SPDX-License-Identifier: Apache-2.0
//
// The status as JSON; coordinator/core/STATUS.md documents every member.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/core/core.h"
#include "coordinator/core/state.h"
#include "coordinator/core/status_scale.h"
#include "proto/base/json.h"
#include "proto/base/limits.h"
#include "proto/wire/version.h"

namespace strait {
namespace {

// Sequences listed one by one, oldest first; the rest only counts.
constexpr size_t kMaxListedSequences = 256;

const char* Name(StageSlot::State state) {
  switch (state) {
    case StageSlot::State::kVacant:
      return "vacant";
    case StageSlot::State::kLoading:
      return "loading";
    case StageSlot::State::kLoaded:
      return "loaded";
    case StageSlot::State::kActivating:
      return "activating";
    case StageSlot::State::kActive:
      return "active";
  }
  return "";
}

const char* Name(const Pipeline& pipeline) {
  if (pipeline.state == Pipeline::State::kActive) return "active";
  if (pipeline.num_vacant() > 0) return "waiting_for_worker";
  if (pipeline.state == Pipeline::State::kActivating) return "activating";
  return "loading";
}

uint64_t Seconds(uint64_t now_us, uint64_t then_us) {
  return now_us > then_us ? (now_us - then_us) / 1'000'000 : 0;
}

template <class Epoch>
json::Object EpochJson(const Epoch& epoch) {
  json::Object out;
  out["term"] = epoch.term;
  out["counter"] = epoch.counter;
  return out;
}

// A pipeline's place, whoever has it.
json::Object PlaceJson(const Pipeline& pipeline, uint32_t index) {
  const StageSlot& slot = pipeline.slots[index];
  json::Object out;
  out["stage_index"] = index;
  out["state"] = Name(slot.state);
  if (slot.state != StageSlot::State::kVacant) {
    out["worker_id"] = slot.worker.value;
    out["stage_id"] = slot.stage_id;
  }
  out["layer_begin"] = slot.layers.begin;
  out["layer_end"] = slot.layers.end;
  if (!slot.edge.why.empty()) {
    json::Object edge;
    edge["transport"] = slot.edge.over_nccl ? "nccl" : "grpc";
    edge["why"] = slot.edge.why;
    out["edge"] = std::move(edge);
  }
  return out;
}

const char* Name(HostedStage::Role role) {
  switch (role) {
    case HostedStage::Role::kPlace:
      return "";
    case HostedStage::Role::kNext:
      return "next";
    case HostedStage::Role::kLanding:
      return "landing";
    case HostedStage::Role::kFollowed:
      return "followed";
    case HostedStage::Role::kUnloading:
      return "unloading";
    case HostedStage::Role::kWarm:
      return "warm";
  }
  return "";
}

// What a worker has in a place of a pipeline.
json::Object SeatJson(const Pipeline& pipeline, uint32_t index) {
  const StageSlot& slot = pipeline.slots[index];
  const Scheduler& scheduler = pipeline.scheduler;
  json::Object out = PlaceJson(pipeline, index);
  out["weight_bytes"] = slot.weight_bytes;
  out["bytes_loaded"] = slot.bytes_loaded;
  out["bytes_total"] = slot.bytes_total;
  const StageCache cache = scheduler.started() ? scheduler.stages()[index] : StageCache();
  out["cache_bytes_total"] = slot.cache_bytes;
  out["cache_bytes_reserved"] = cache.reserved_bytes;
  out["cache_bytes_used"] = cache.held_bytes;
  out["rows_computed"] = slot.rows_computed;
  out["rows_stored"] = slot.rows_stored;
  if (scheduler.started() && scheduler.times(index).steps > 0) {
    const StageTimes& times = scheduler.times(index);
    out["step_compute_us"] = static_cast<uint64_t>(times.compute_us);
    out["step_wait_us"] = static_cast<uint64_t>(times.wait_us);
  }
  std::vector<uint64_t> held(slot.layers.size(), 0);
  if (scheduler.started()) held = scheduler.HeldByLayer(index);
  json::Array by_layer;
  for (LayerIndex l = slot.layers.begin; l < slot.layers.end; ++l) {
    json::Object layer;
    layer["layer"] = l;
    layer["cache_bytes"] = held[l - slot.layers.begin];
    by_layer.push_back(std::move(layer));
  }
  out["cache_bytes_by_layer"] = std::move(by_layer);
  return out;
}

// A stage that has no place: it will have one, or had one.
json::Object StageJson(uint64_t stage_id, const HostedStage& stage) {
  json::Object out;
  out["state"] = Name(stage.role);
  out["stage_id"] = stage_id;
  out["layer_begin"] = stage.layers.begin;
  out["layer_end"] = stage.layers.end;
  out["weight_bytes"] = 0;
  out["cache_bytes_total"] = stage.cache_bytes;
  out["cache_bytes_reserved"] = 0;
  out["cache_bytes_used"] = 0;
  return out;
}

// Weights that wait for a place.
json::Object WarmJson(uint64_t stage_id, const HostedStage& stage) {
  json::Object out;
  out["state"] = stage.warm.is_loaded ? "warm" : "loading";
  out["stage_id"] = stage_id;
  out["layer_begin"] = stage.layers.begin;
  out["layer_end"] = stage.layers.end;
  out["bytes_loaded"] = stage.warm.bytes_loaded;
  out["bytes_total"] = stage.warm.bytes_total;
  return out;
}

const char* Name(FaultPolicy::Standing standing) {
  switch (standing) {
    case FaultPolicy::Standing::kGood:
      return "good";
    case FaultPolicy::Standing::kSuspect:
      return "suspect";
    case FaultPolicy::Standing::kSetAside:
      return "set_aside";
  }
  return "";
}

// What the worker does, by its stages; of several that differ the least settled.
const char* WorkerState(const Worker& worker, const Cluster& cluster) {
  if (worker.duty == Worker::Duty::kDraining) return "draining";
  if (worker.duty == Worker::Duty::kDrained) return "drained";
  const bool is_spare =
      std::all_of(worker.stages.begin(), worker.stages.end(),
                  [](const auto& entry) { return entry.second.role == HostedStage::Role::kWarm; });
  const char* state = is_spare ? "idle" : "unloading";
  bool loading = false, loaded = false, serving = false;
  for (const auto& [stage_id, stage] : worker.stages) {
    if (stage.role != HostedStage::Role::kPlace) continue;
    const Pipeline& pipeline = *cluster.pipelines().at(stage.pipeline);
    const auto slot_state = pipeline.slots[stage.slot_index].state;
    loading = loading || slot_state == StageSlot::State::kLoading;
    (pipeline.scheduler.started() ? serving : loaded) = true;
  }
  if (loading) return "loading";
  if (loaded) return "loaded";
  if (serving) return "serving";
  return worker.Has(HostedStage::Role::kNext) ? "loading" : state;
}

json::Object WorkerJson(const Worker& worker, const Cluster& cluster, const Context& context,
                        uint64_t now_us) {
  json::Object out;
  out["id"] = worker.id.value;
  out["name"] = worker.name;
  out["data_address"] = worker.data_address;
  out["host_id"] = worker.host_id;
  out["backend"] = worker.backend;
  out["numerics_id"] = worker.numerics_id;
  out["nccl_version"] = worker.nccl.version;
  out["num_threads"] = worker.num_threads;
  out["process_id"] = worker.process_id;
  out["memory_bytes"] = worker.memory_bytes;
  out["host_cache_bytes"] = worker.host_cache_bytes;
  out["replica_bytes"] = worker.replica_bytes;
  if (cluster.replicas().Offers(worker.id)) {
    out["replica_bytes_used"] = cluster.replicas().used_bytes(worker.id);
  }
  const uint64_t booked =
      BookedBytes(context.options, context.model, worker.memory(), worker.stages);
  out["booked_bytes"] = booked;
  out["free_bytes"] = worker.memory_bytes - std::min(worker.memory_bytes, booked);
  out["resident_bytes"] = worker.resident_bytes;
  out["attached_s"] = Seconds(now_us, worker.attached_us);
  out["silent_ms"] = now_us > worker.last_heard_us ? (now_us - worker.last_heard_us) / 1000 : 0;
  json::Array stages;
  json::Array warm;
  for (const auto& [stage_id, hosted] : worker.stages) {
    if (hosted.role == HostedStage::Role::kWarm) {
      warm.push_back(WarmJson(stage_id, hosted));
      continue;
    }
    const bool seated = hosted.role == HostedStage::Role::kPlace;
    json::Object stage = seated
                             ? SeatJson(*cluster.pipelines().at(hosted.pipeline), hosted.slot_index)
                             : StageJson(stage_id, hosted);
    stage["pipeline_id"] = hosted.pipeline.value;
    if (seated) {
      const Copying& copying =
          cluster.pipelines().at(hosted.pipeline)->slots[hosted.slot_index].copying;
      if (const auto buddy = cluster.workers().find(copying.buddy);
          buddy != cluster.workers().end()) {
        stage["buddy_worker_id"] = copying.buddy.value;
        stage["buddy_on_other_host"] = buddy->second.host_id != worker.host_id;
      }
    }
    stage["block_bytes"] = context.model.block_bytes;
    // As planned; with cache, and weights that no other stage there has too, all that it takes.
    stage["workspace_bytes"] = StageWorkspaceBytes(context.model, hosted.layers, worker.memory());
    stage["edge_bytes"] = StageEdgeBytes(context.options, hosted.layers, worker.memory());
    if (hosted.resize) stage["cache_bytes_asked"] = hosted.resize->cache_bytes;
    stages.push_back(std::move(stage));
  }
  out["state"] = WorkerState(worker, cluster);
  out["stages"] = std::move(stages);
  if (!warm.empty()) out["warm"] = std::move(warm);
  if (!worker.last_error.empty()) out["last_error"] = worker.last_error;
  out["standing"] = Name(cluster.faults().StandingOf(worker.id, now_us));
  json::Array failed;
  for (const FaultPolicy::FailedLink& link : cluster.faults().FailedLinksOf(worker.id, now_us)) {
    json::Object one;
    one["from"] = cluster.workers().at(link.from).name;
    one["to"] = cluster.workers().at(link.to).name;
    one["times"] = link.times;
    one["why"] = link.why;
    one["blamed_s"] = (link.until_us - now_us) / 1'000'000;
    failed.push_back(std::move(one));
  }
  if (!failed.empty()) out["failed_links"] = std::move(failed);
  return out;
}

json::Object PipelineJson(const Pipeline& pipeline, const Cluster& cluster, const ModelShape& model,
                          uint64_t now_us) {
  const Scheduler& scheduler = pipeline.scheduler;
  json::Object out;
  out["id"] = pipeline.id.value;
  out["epoch"] = EpochJson(pipeline.epoch);
  out["state"] = Name(pipeline);
  out["state_s"] = Seconds(now_us, pipeline.since_us);
  out["tokens_max"] = pipeline.capacity_rows(model.policy());
  out["tokens_free"] = scheduler.started() ? scheduler.free_rows() : 0;
  out["num_stages"] = pipeline.slots.size();
  out["running"] = scheduler.num_residents();
  out["prefilling"] = scheduler.num_prefilling();
  out["steps_in_flight"] = scheduler.ledger().in_flight();
  out["prefix_blocks"] = scheduler.num_prefix_blocks();
  out["prefix_blocks_free"] = scheduler.num_unheld_prefix_blocks();
  if (scheduler.started()) {
    out["prefix_blocks_on_host"] = scheduler.num_prefix_blocks_on_host();
    out["host_blocks"] = scheduler.host_blocks();
    out["copy_block_us"] = scheduler.copy_block_us();
    out["compute_block_us"] = scheduler.compute_block_us();
  }
  json::Array stages;
  std::string numerics;
  bool mixed = false;
  for (uint32_t i = 0; i < pipeline.slots.size(); ++i) {
    stages.push_back(PlaceJson(pipeline, i));
    if (pipeline.slots[i].state == StageSlot::State::kVacant) continue;
    const std::string& id = cluster.workers().at(pipeline.slots[i].worker).numerics_id;
    mixed = mixed || (!numerics.empty() && id != numerics);
    numerics = id;
  }
  out["mixed_numerics"] = mixed;
  out["stages"] = std::move(stages);
  out["plan"] = ReasonJson(pipeline.why);
  if (!pipeline.last_error.empty()) out["last_error"] = pipeline.last_error;
  return out;
}

json::Object SequenceJson(const Sequence& sequence, const Cluster& cluster,
                          const absl::flat_hash_map<const Scheduler*, PipelineId>& pipelines) {
  json::Object out;
  out["id"] = sequence.id.value;
  out["request_id"] = sequence.request->id.value;
  out["client_id"] = sequence.request->client_id;
  out["request"] = sequence.request->name;
  out["choice"] = sequence.index;
  out["prompt_tokens"] = sequence.prompt_tokens;
  out["generated_tokens"] = sequence.generated();
  out["cached_tokens"] = sequence.cached_tokens;
  out["max_tokens"] = sequence.spec.max_tokens;
  const Residency* home = sequence.home();
  const uint32_t rows = home == nullptr ? 0 : home->rows.next();
  out["rows"] = rows;
  if (!sequence.resident()) {
    const bool is_parked = sequence.rows_computed_once > 0 &&
                           std::any_of(pipelines.begin(), pipelines.end(), [&](const auto& entry) {
                             return entry.first->IsParked(sequence);
                           });
    out["state"] = is_parked ? "parked" : "waiting";
  } else {
    out["state"] =
        rows < sequence.rows_wanted() && home->ready_ticket == 0 ? "prefilling" : "decoding";
    out["pipeline_id"] = pipelines.at(home->scheduler).value;
    out["placement"] = EpochJson(home->epoch);
    const Pipeline& pipeline = *cluster.pipelines().at(pipelines.at(home->scheduler));
    out["protected_rows"] = cluster.ProtectedRows(pipeline, *home);
    out["unprotected"] = !cluster.replicas().any() || !cluster.IsProtected(pipeline, *home);
    if (!home->rows.even()) {
      json::Array by_stage;
      for (uint32_t s = 0; s < home->scheduler->stages().size(); ++s) {
        by_stage.push_back(home->rows.at(s));
      }
      out["rows_by_stage"] = std::move(by_stage);
    }
  }
  return out;
}

json::Object MoveJson(const MoveReport& report) {
  json::Object out;
  out["sequence"] = report.sequence.value;
  out["from"] = report.from.value;
  out["to"] = report.to.value;
  out["phase"] = report.phase;
  out["rounds"] = report.rounds;
  out["rows"] = report.rows;
  out["rows_total"] = report.rows_total;
  out["moved_bytes"] = report.moved_bytes;
  out["shared_bytes"] = report.shared_bytes;
  out["nccl_bytes"] = report.nccl_bytes;
  out["total_ms"] = report.total_us / 1000;
  return out;
}

json::Object DrainJson(const DrainReport& report) {
  json::Object out;
  out["worker_id"] = report.worker.value;
  out["worker"] = report.name;
  out["pipeline"] = report.pipeline.value;
  out["way"] = report.way;
  out["phase"] = report.phase;
  out["sequences_left"] = report.sequences_left;
  out["sequences_moved"] = report.sequences_moved;
  out["moved_bytes"] = report.moved_bytes;
  out["total_ms"] = report.total_us / 1000;
  return out;
}

json::Object StatsJson(const CoreStats& stats) {
  json::Object ended;
  ended["stop"] = stats.requests_ended[static_cast<int>(FinishReason::kStop)];
  ended["length"] = stats.requests_ended[static_cast<int>(FinishReason::kLength)];
  ended["cancelled"] = stats.requests_ended[static_cast<int>(FinishReason::kCancelled)];
  ended["error"] = stats.requests_ended[static_cast<int>(FinishReason::kError)];
  json::Object out;
  out["steps"] = stats.steps;
  out["prompt_tokens"] = stats.prompt_tokens;
  out["generated_tokens"] = stats.generated_tokens;
  out["replayed_tokens"] = stats.replayed_tokens;
  out["recomputed_rows"] = stats.recomputed_rows;
  out["kept_rows"] = stats.kept_rows;
  out["granted_tokens"] = stats.granted_tokens;
  out["surplus_tokens"] = stats.surplus_tokens;
  out["cached_rows"] = stats.cached_rows;
  out["prefix_blocks_made"] = stats.prefix_blocks_made;
  out["prefix_blocks_dropped"] = stats.prefix_blocks_dropped;
  out["prefix_blocks_survived"] = stats.prefix_blocks_survived;
  out["prefix_blocks_mended"] = stats.prefix_blocks_mended;
  out["prefix_blocks_offloaded"] = stats.prefix_blocks_offloaded;
  out["prefix_blocks_returned"] = stats.prefix_blocks_returned;
  out["prefix_blocks_lost"] = stats.prefix_blocks_lost;
  out["prefix_blocks_forgotten"] = stats.prefix_blocks_forgotten;
  out["host_copied_bytes"] = stats.host_copied_bytes;
  out["host_copying_us"] = stats.host_copying_us;
  out["preemptions"] = stats.preemptions;
  out["replicas_made"] = stats.replicas_made;
  out["replicas_failed"] = stats.replicas_failed;
  out["replicas_refused"] = stats.replicas_refused;
  out["warm_stages_taken"] = stats.warm_stages_taken;
  out["replicated_bytes"] = stats.replicated_bytes;
  out["replicated_shared_bytes"] = stats.replicated_shared_bytes;
  out["restored_rows"] = stats.restored_rows;
  out["decoding_us"] = stats.decoding_us;
  out["protected_us"] = stats.protected_us;
  out["migrations"] = stats.migrations;
  out["migrations_failed"] = stats.migrations_failed;
  out["migrated_bytes"] = stats.migrated_bytes;
  out["migrated_shared_bytes"] = stats.migrated_shared_bytes;
  out["migrated_nccl_bytes"] = stats.migrated_nccl_bytes;
  out["migration_pause_us"] = stats.migration_pause_us;
  out["migration_pause_us_max"] = stats.migration_pause_us_max;
  out["recoveries"] = stats.recoveries;
  out["sequences_interrupted"] = stats.sequences_interrupted;
  out["workers_lost"] = stats.workers_lost;
  out["requests_refused"] = stats.requests_refused;
  out["sequences_ended"] = std::move(ended);
  out["running"] = stats.running;
  out["waiting"] = stats.waiting;
  out["pipelines_active"] = stats.pipelines_active;
  out["cache_bytes_used"] = stats.cache_bytes_used;
  out["cache_bytes_free_prefixes"] = stats.cache_bytes_free_prefixes;
  out["cache_bytes_total"] = stats.cache_bytes_total;
  out["host_bytes_used"] = stats.host_bytes_used;
  out["host_bytes_total"] = stats.host_bytes_total;
  return out;
}

}  // namespace

std::string Core::StatusJson(uint64_t now_us) const {
  const State& state = *state_;
  now_us = state.AwakeAt(now_us);
  const CoreStats stats = Stats();
  json::Object out;
  out["version"] = kVersion;
  out["term"] = state.context.options.term;
  out["ready"] = Ready();
  if (!Ready()) out["problem"] = state.cluster.WhyNoPipeline();
  json::Object wanted;
  wanted["pipelines"] = state.context.options.num_pipelines;
  wanted["stages"] = state.context.num_stages;
  out["wanted"] = std::move(wanted);

  json::Array workers;
  for (const auto& [id, worker] : state.cluster.workers()) {
    workers.push_back(WorkerJson(worker, state.cluster, state.context, now_us));
  }
  out["workers"] = std::move(workers);

  json::Array pipelines;
  absl::flat_hash_map<const Scheduler*, PipelineId> by_scheduler;
  for (const auto& [id, pipeline] : state.cluster.pipelines()) {
    by_scheduler.emplace(&pipeline->scheduler, id);
    pipelines.push_back(PipelineJson(*pipeline, state.cluster, state.context.model, now_us));
  }
  out["pipelines"] = std::move(pipelines);

  json::Array sequences;
  for (const auto& [id, sequence] : state.journal.sequences()) {
    if (sequences.size() == kMaxListedSequences) break;
    sequences.push_back(SequenceJson(*sequence, state.cluster, by_scheduler));
  }
  out["running"] = stats.running;
  out["waiting"] = stats.waiting;
  out["sequences"] = std::move(sequences);
  json::Array migrations;
  for (const auto& [id, move] : state.migrations.moves()) {
    migrations.push_back(MoveJson(state.migrations.ReportOf(move, now_us)));
  }
  out["migrations"] = std::move(migrations);
  json::Array drains;
  for (const Drain& drain : state.draining.drains()) {
    drains.push_back(DrainJson(state.draining.ReportOf(drain, now_us)));
  }
  out["drains"] = std::move(drains);
  if (const std::optional<ScaleReport> scale = state.cluster.ReportOfScale(now_us)) {
    out["scale"] = ScaleJson(*scale);
  }
  if (state.cluster.last_scale()) out["last_scale"] = LastScaleJson(*state.cluster.last_scale());
  out["vocab_size"] = state.context.model.vocab_size;
  out["max_positions"] = state.context.model.max_positions;
  out["stats"] = StatsJson(stats);
  return boost::json::serialize(out);
}

}  // namespace strait
