// SPDX-License-Identifier: Apache-2.0
//
// How Cluster keeps spares warm, and gives what they have ready a place: see coordinator/core/warm.h.
#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "coordinator/core/warm.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

namespace strait {

bool Cluster::IsWarm(const Worker& worker) const { return worker.Has(HostedStage::Role::kWarm); }

std::vector<WarmRange> Cluster::ServedRanges() const {
  std::vector<WarmRange> ranges;
  for (const auto& [id, pipeline] : pipelines_) {
    for (const StageSlot& slot : pipeline->slots) {
      auto range = std::find_if(ranges.begin(), ranges.end(),
                                [&](const WarmRange& each) { return each.layers == slot.layers; });
      if (range == ranges.end()) {
        range = ranges.insert(range, {.layers = slot.layers, .planned_rows = ~uint64_t{0}});
      }
      ++range->num_stages;
      range->planned_rows = std::min(range->planned_rows, pipeline->planned_rows);
    }
  }
  for (const auto& [id, worker] : workers_) {
    for (const auto& [stage_id, stage] : worker.stages) {
      for (WarmRange& range : ranges) {
        range.num_covers += stage.role == HostedStage::Role::kWarm && stage.layers == range.layers;
      }
    }
  }
  return ranges;
}

void Cluster::AdvanceWarm(uint64_t now_us) {
  for (auto& [id, worker] : workers_) {
    if (worker.duty != Worker::Duty::kServes) Cool(&worker);
  }
  const bool is_quiet = !scale_ && !pipelines_.empty() && num_active_ == pipelines_.size() &&
                        std::none_of(workers_.begin(), workers_.end(), [](const auto& entry) {
                          return entry.second.Has(HostedStage::Role::kUnloading);
                        });
  if (context_->options.warm_spares == 0 || !is_quiet) return;
  std::vector<Worker*> spares = IdleWorkers(now_us);
  std::stable_partition(spares.begin(), spares.end(),
                        [this](const Worker* worker) { return IsWarm(*worker); });
  uint32_t num_warm = 0;
  for (Worker* spare : spares) {
    if (num_warm == context_->options.warm_spares) return;
    Warm(spare, now_us);
    num_warm += IsWarm(*spare);
  }
}

void Cluster::Warm(Worker* spare, uint64_t now_us) {
  const std::vector<WarmRange> ranges = ServedRanges();
  bool loads = false;
  std::vector<uint64_t> unserved;
  for (const auto& [stage_id, stage] : spare->stages) {
    loads = loads || !stage.warm.is_loaded;
    const bool served = std::any_of(ranges.begin(), ranges.end(), [&](const WarmRange& range) {
      return range.layers == stage.layers;
    });
    if (!served) unserved.push_back(stage_id);
  }
  for (const uint64_t stage_id : unserved) Unload(spare, stage_id);
  if (loads || !unserved.empty() || now_us < spare->warm_after_us) return;
  const std::optional<LayerRange> layers =
      NextWarm(context_->options, context_->model, spare->memory(), spare->stages, ranges);
  if (!layers) return;
  HostedStage stage{.role = HostedStage::Role::kWarm,
                    .layers = *layers,
                    .cache_bytes = WarmCacheBytes(context_->model, *layers)};
  stage.warm.bytes_total = StageWeightBytes(context_->model, *layers);
  stage.warm.load_progress_us = now_us;
  SendLoad(spare, ++last_stage_id_, std::move(stage));
}

void Cluster::OnWarmState(Worker* worker, const v1::StageState& state, uint64_t now_us) {
  HostedStage& stage = worker->stages.at(state.stage_id());
  if (state.state() == v1::StageState::LOADED && !stage.warm.is_loaded &&
      state.cache_bytes() == stage.cache_bytes) {
    stage.warm.is_loaded = true;
    stage.warm.weight_bytes = stage.warm.bytes_loaded = stage.warm.bytes_total =
        state.weight_bytes();
    worker->load_progress_us = now_us;
    worker->warm_failures = 0;
    return;
  }
  if (state.state() != v1::StageState::FAILED || stage.warm.is_loaded) {
    return Evict(worker->id,
                 absl::FailedPreconditionError(absl::StrCat(
                     "says state ", static_cast<int>(state.state()), " with ", state.cache_bytes(),
                     " bytes of latent blocks of a stage that was to be loaded with ",
                     stage.cache_bytes, ", and to wait")),
                 now_us);
  }
  worker->last_error =
      absl::StrCat("could not hold layers [", stage.layers.begin, ", ", stage.layers.end,
                   ") ready: ", std::string(state.error_message()));
  worker->warm_after_us =
      now_us + Doubling(kWarmBackoffUs, worker->warm_failures++, kWarmBackoffMaxUs);
  worker->stages.erase(state.stage_id());
}

std::optional<uint64_t> Cluster::WarmStageOf(const Worker& worker, LayerRange layers) const {
  for (const auto& [stage_id, stage] : worker.stages) {
    if (stage.role == HostedStage::Role::kWarm && stage.layers == layers) return stage_id;
  }
  return std::nullopt;
}

void Cluster::PreferWarm(LayerRange layers, std::vector<Worker*>* idle) const {
  // What it has ready for others is worth the least here, and is better kept.
  const auto rank = [&](const Worker* worker) {
    const std::optional<uint64_t> stage_id = WarmStageOf(*worker, layers);
    if (!stage_id) return std::tuple(2, worker->stages.size());
    return std::tuple(worker->stages.at(*stage_id).warm.is_loaded ? 0 : 1, worker->stages.size());
  };
  std::stable_sort(idle->begin(), idle->end(),
                   [&](const Worker* a, const Worker* b) { return rank(a) < rank(b); });
}

bool Cluster::Cool(Worker* worker) {
  std::vector<uint64_t> warm;
  for (const auto& [stage_id, stage] : worker->stages) {
    if (stage.role == HostedStage::Role::kWarm) warm.push_back(stage_id);
  }
  for (const uint64_t stage_id : warm) Unload(worker, stage_id);
  return worker->stages.empty();
}

bool Cluster::CoolAll(const std::vector<Worker*>& workers) {
  bool are_cold = true;
  for (Worker* worker : workers) are_cold = Cool(worker) && are_cold;
  return are_cold;
}

bool Cluster::SparesAreCold(const ScalePlan& plan) {
  bool are_cold = true;
  for (const ScaledStage& stage : plan.stages) {
    Worker* worker = FindWorker(stage.worker);
    if (!stage.successor_of.empty() || worker == nullptr || worker->stages.empty()) continue;
    // Who has a place by now is lost for it, and need not be waited for.
    const bool is_spare =
        std::all_of(worker->stages.begin(), worker->stages.end(), [](const auto& entry) {
          return entry.second.role == HostedStage::Role::kWarm ||
                 entry.second.role == HostedStage::Role::kUnloading;
        });
    if (is_spare) are_cold = Cool(worker) && are_cold;
  }
  return are_cold;
}

bool Cluster::MakeReady(const Pipeline& pipeline, const Fill& fill) {
  std::vector<uint64_t> others;
  size_t num_ready = 0;
  for (const auto& [stage_id, stage] : fill.worker->stages) {
    const bool is_wanted = std::any_of(fill.slots.begin(), fill.slots.end(), [&](uint32_t i) {
      return pipeline.slots[i].layers == stage.layers;
    });
    num_ready += is_wanted;
    if (!is_wanted) others.push_back(stage_id);
  }
  for (const uint64_t stage_id : others) Unload(fill.worker, stage_id);
  return others.empty() || num_ready == fill.slots.size();
}

bool Cluster::TakeWarm(Pipeline* pipeline, uint32_t slot_index, Worker* worker, uint64_t now_us) {
  StageSlot& slot = pipeline->slots[slot_index];
  const std::optional<uint64_t> stage_id = WarmStageOf(*worker, slot.layers);
  if (!stage_id) return false;
  HostedStage& stage = worker->stages.at(*stage_id);
  stage.role = HostedStage::Role::kPlace;
  stage.pipeline = pipeline->id;
  stage.slot_index = slot_index;
  slot.state = stage.warm.is_loaded ? StageSlot::State::kLoaded : StageSlot::State::kLoading;
  slot.was_warm = true;
  slot.worker = worker->id;
  slot.stage_id = *stage_id;
  slot.cache_bytes = stage.cache_bytes;
  slot.weight_bytes = stage.warm.weight_bytes;
  slot.bytes_loaded = stage.warm.bytes_loaded;
  slot.bytes_total = stage.warm.bytes_total;
  slot.load_progress_us = now_us;
  ++context_->stats.warm_stages_taken;
  return true;
}

bool Cluster::GrowWarm(Pipeline* pipeline, uint64_t now_us) {
  bool are_grown = true;
  for (StageSlot& slot : pipeline->slots) {
    if (!slot.was_warm || slot.state != StageSlot::State::kLoaded) continue;
    Worker* worker = FindWorker(slot.worker);
    // A stage that still loads goes when it has loaded, and nobody waits for it if there is room beside it.
    const bool is_free = !worker->Has(HostedStage::Role::kUnloading);
    const uint64_t needed = is_free ? slot.wanted_cache_bytes : NeededBytes(*pipeline, slot);
    if (slot.cache_bytes >= std::min(needed, slot.wanted_cache_bytes)) {
      slot.was_warm = false;
      continue;
    }
    are_grown = false;
    if (HostedIn(slot).resize || now_us < slot.grow_after_us) continue;
    const uint64_t most =
        is_free ? slot.wanted_cache_bytes : std::min(BytesBeside(slot), slot.wanted_cache_bytes);
    if (most < needed) continue;
    slot.load_progress_us = now_us;
    SendResize(worker, slot.stage_id, most, now_us);
  }
  return are_grown;
}

uint64_t Cluster::NeededBytes(const Pipeline& pipeline, const StageSlot& slot) const {
  const uint64_t holds = pipeline.capacity_rows(context_->model.policy());
  uint64_t longest = 0, together = 0;
  for (const auto& [id, sequence] : journal_->sequences()) {
    if (sequence->rows_max() <= holds) {
      longest = std::max<uint64_t>(longest, sequence->rows_max());
    }
    // To a block's end, and a block to grow.
    if (sequence->last_pipeline == pipeline.id) {
      together += sequence->rows_wanted() + 2 * limits::kBlockTokens;
    }
  }
  const uint64_t rows = std::max(longest, together) + limits::kBlockTokens - 1;
  // Less than half of what was planned is no place for it (NextWarm).
  return std::max(StageCacheBytes(context_->model, slot.layers, rows), slot.wanted_cache_bytes / 2);
}

uint64_t Cluster::BytesBeside(const StageSlot& slot) const {
  const Worker& worker = workers_.at(slot.worker);
  const uint64_t rows =
      CacheMemoryRows(context_->model, worker.memory(), FreeBytes(worker), slot.layers.size());
  return slot.cache_bytes +
         StageCacheBytes(context_->model, slot.layers, rows - rows % limits::kBlockTokens);
}

void Cluster::GiveUpWarm(Pipeline* pipeline, uint32_t slot_index, uint64_t now_us) {
  const StageSlot& slot = pipeline->slots[slot_index];
  Worker* worker = FindWorker(slot.worker);
  pipeline->last_error = worker->last_error;
  faults_.OnLoadFailed(worker->id, now_us);
  Unload(worker, slot.stage_id);
  Vacate(pipeline, slot_index, now_us);
  look_again_ = true;
}

}  // namespace strait
