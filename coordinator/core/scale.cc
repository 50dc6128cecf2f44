// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/scale.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/worker_books.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

using Hosts = std::vector<const ScaleHost*>;

bool IsOwn(const ScaleHost& host) { return !host.old_slots.empty() || host.follows; }

// Those that get a stage, in order: the own ones, without those that have the least memory, then `num_spares` spares at
// most.
Hosts ChooseHosts(absl::Span<const ScaleHost> hosts, uint32_t num_stages, size_t num_spares) {
  Hosts chosen;
  for (const ScaleHost& host : hosts) {
    if (IsOwn(host)) chosen.push_back(&host);
  }
  while (chosen.size() > num_stages) {
    // Of equals the last.
    const auto least = std::min_element(
        chosen.rbegin(), chosen.rend(),
        [](const auto* a, const auto* b) { return a->memory.bytes < b->memory.bytes; });
    chosen.erase(std::next(least).base());
  }
  for (const ScaleHost& host : hosts) {
    if (IsOwn(host) || num_spares == 0 || chosen.size() == num_stages) continue;
    chosen.push_back(&host);
    --num_spares;
  }
  return chosen;
}

// Every choice of as many own hosts and spares as `first` has, own ones and spares each in their order, the spares anywhere;
// `first` first. It alone, if there are more than kMaxScalePlans.
std::vector<Hosts> Orders(absl::Span<const ScaleHost> hosts, const Hosts& first) {
  Hosts own, spares;
  for (const ScaleHost& host : hosts) {
    if (IsOwn(host)) own.push_back(&host);
  }
  for (const ScaleHost* host : first) {
    if (!IsOwn(*host)) spares.push_back(host);
  }
  std::vector<Hosts> orders = {first};
  const size_t size = first.size();
  const std::function<void(Hosts, size_t, size_t)> extend = [&](Hosts begun, size_t next_own,
                                                                size_t next_spare) {
    if (orders.size() > kMaxScalePlans) return;
    if (begun.size() == size) {
      if (begun != first) orders.push_back(std::move(begun));
      return;
    }
    const size_t left = size - begun.size();
    // Every spare of `first` has its place.
    if (left > spares.size() - next_spare) {
      for (size_t o = next_own; o < own.size(); ++o) {
        Hosts longer = begun;
        longer.push_back(own[o]);
        extend(std::move(longer), o + 1, next_spare);
      }
    }
    if (next_spare < spares.size()) {
      begun.push_back(spares[next_spare]);
      extend(std::move(begun), next_own, next_spare + 1);
    }
  };
  extend({}, 0, 0);
  if (orders.size() > kMaxScalePlans) orders.resize(1);
  return orders;
}

// The parts of `layers` that none of these old slots has.
std::vector<LayerRange> MissingLayers(LayerRange layers, absl::Span<const StageSlot> old_slots,
                                      const std::vector<uint32_t>& slots) {
  std::vector<LayerRange> missing;
  LayerIndex next = layers.begin;
  // By rising layers, as stages lie.
  for (const uint32_t s : slots) {
    const LayerRange both = Intersection(layers, old_slots[s].layers);
    if (both.size() == 0) continue;
    if (next < both.begin) missing.push_back({next, both.begin});
    next = both.end;
  }
  if (next < layers.end) missing.push_back({next, layers.end});
  return missing;
}

// One host's part of a plan: what is there beside each other until the switch.
struct HostPart {
  std::vector<ScaledStage> stages;
  std::vector<ScaledLanding> landings;  // of these stages, from 0
};

// Caches of the old stages on one host, and rows for each landing beside them. `fixed`: what all take without caches;
// `num_missing`: layers of landings.
absl::StatusOr<uint64_t> MakeRoom(const ModelShape& model, const ScaleHost& host, uint64_t fixed,
                                  absl::Span<const StageSlot> old_slots, uint32_t num_missing,
                                  const ScaleNeeds& needs, std::vector<uint64_t>* old_cache_bytes) {
  uint64_t cache = 0;
  uint64_t old_rows = std::numeric_limits<uint64_t>::max();
  uint32_t num_layers = 0;
  for (const uint32_t s : host.old_slots) {
    cache += CacheMemoryBytes(model, host.memory, old_slots[s].cache_bytes);
    old_rows = std::min(old_rows,
                        RowsThatFit(model.policy(), old_slots[s].cache_bytes, old_slots[s].layers));
    num_layers += old_slots[s].layers.size();
  }
  const uint64_t landings =
      num_missing == 0 ? 0
                       : CacheMemoryBytes(model, host.memory,
                                          StageCacheBytes(model, {0, num_missing}, old_rows));
  if (fixed + cache + landings <= host.memory.bytes) return old_rows;
  const uint64_t room = host.memory.bytes - std::min(host.memory.bytes, fixed);
  const uint64_t rows = CacheMemoryRows(model, host.memory, room, num_layers + num_missing);
  const uint64_t least = std::max<uint64_t>(
      {needs.resident_rows, num_missing > 0 ? needs.reserved_rows : 0, limits::kBlockTokens});
  if (rows < least) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "old and new stages together take ", fixed, " bytes without cache of the ",
        host.memory.bytes, " of worker ", host.worker.value, ", which leaves room for ", rows,
        " cache rows meanwhile; a sequence that runs may need ", least,
        ": wait until it has ended, or give the worker more memory"));
  }
  for (const uint32_t s : host.old_slots) {
    uint64_t& bytes = (*old_cache_bytes)[s];
    bytes = std::min(bytes, StageCacheBytes(model, old_slots[s].layers, rows));
  }
  return rows;
}

absl::StatusOr<HostPart> PlanHost(const CoreOptions& options, const ModelShape& model,
                                  absl::Span<const StageSlot> old_slots, const ScaleHost& host,
                                  absl::Span<const StagePlan> stages, uint64_t capacity_rows,
                                  const ScaleNeeds& needs, bool lands,
                                  std::vector<uint64_t>* old_cache_bytes) {
  HostPart part;
  HostedStages both;
  std::vector<uint64_t> old_ids;
  for (const uint32_t s : host.old_slots) {
    old_ids.push_back(old_slots[s].stage_id);
    both[old_slots[s].stage_id] = {.layers = old_slots[s].layers};
  }
  uint64_t next_id = std::numeric_limits<uint64_t>::max();
  uint32_t num_layers = 0, num_missing = 0;
  for (size_t s = 0; s < stages.size(); ++s) {
    both[next_id--] = {.layers = stages[s].layers};
    num_layers += stages[s].layers.size();
    if (!lands || old_ids.empty()) continue;
    for (const LayerRange& missing : MissingLayers(stages[s].layers, old_slots, host.old_slots)) {
      both[next_id--] = {.layers = missing};
      num_missing += missing.size();
      part.landings.push_back({.stage_index = static_cast<uint32_t>(s), .layers = missing});
    }
  }
  uint64_t first_rows = capacity_rows;
  if (!old_ids.empty()) {
    STRAIT_ASSIGN_OR_RETURN(const uint64_t rows,
                            MakeRoom(model, host, BookedBytes(options, model, host.memory, both),
                                     old_slots, num_missing, needs, old_cache_bytes));
    uint64_t bytes = 0;
    for (const uint32_t s : host.old_slots) bytes += (*old_cache_bytes)[s];
    for (ScaledLanding& landing : part.landings) {
      landing.cache_bytes = StageCacheBytes(model, landing.layers, rows);
      bytes += landing.cache_bytes;
    }
    first_rows = std::min(first_rows, RowsThatFit(model.policy(), bytes, {0, num_layers}));
    if (first_rows < limits::kBlockTokens) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the caches of worker ", host.worker.value, "'s stages have ", bytes,
                       " bytes, which is no latent block for each of the ", num_layers,
                       " layers that it would have; give it more memory"));
    }
  }
  for (const StagePlan& stage : stages) {
    part.stages.push_back({.worker = host.worker,
                           .plan = stage,
                           .first_cache_bytes = StageCacheBytes(model, stage.layers, first_rows),
                           .successor_of = old_ids,
                           .lands = old_ids.empty()});
  }
  return part;
}

absl::StatusOr<ScalePlan> PlanOn(const CoreOptions& options, const ModelShape& model,
                                 absl::Span<const StageSlot> old_slots, const Hosts& hosts,
                                 uint32_t num_stages, const ScaleNeeds& needs) {
  std::vector<uint64_t> bytes;
  std::vector<WorkerMemory> memory;
  for (const ScaleHost* host : hosts) bytes.push_back(host->memory.bytes);
  const std::vector<uint32_t> counts = StagesOfHosts(bytes, num_stages);
  for (size_t h = 0; h < hosts.size(); ++h) {
    memory.push_back(hosts[h]->memory);
    memory.back().num_stages = counts[h];
  }
  STRAIT_ASSIGN_OR_RETURN(const PipelinePlan layers, PlanPipeline(options, model, memory));
  ScalePlan plan;
  plan.capacity_rows = layers.capacity_rows;
  plan.num_hosts = static_cast<uint32_t>(hosts.size());
  if (plan.capacity_rows < needs.promised_rows) {
    return absl::ResourceExhaustedError(absl::StrCat(
        num_stages, " stages on ", hosts.size(), " worker(s) would hold sequences of ",
        plan.capacity_rows, " cache rows; one that was admitted may need ", needs.promised_rows,
        ": wait until it has ended, or give the workers more memory"));
  }
  for (const StageSlot& slot : old_slots) plan.old_cache_bytes.push_back(slot.cache_bytes);
  auto stage = layers.stages.begin();
  for (size_t h = 0; h < hosts.size(); stage += counts[h++]) {
    const auto stages = absl::MakeConstSpan(&*stage, counts[h]);
    const auto plan_host = [&](bool lands) {
      return PlanHost(options, model, old_slots, *hosts[h], stages, plan.capacity_rows, needs,
                      lands, &plan.old_cache_bytes);
    };
    absl::StatusOr<HostPart> part = plan_host(true);
    if (absl::IsResourceExhausted(part.status())) part = plan_host(false);  // its rows are replayed
    if (!part.ok()) return part.status();
    for (ScaledStage& each : part->stages) {
      for (const LayerRange& missing :
           MissingLayers(each.plan.layers, old_slots, hosts[h]->old_slots)) {
        each.load_bytes += StageWeightBytes(model, missing);
        each.rows_bytes += StageCacheBytes(model, missing, needs.reserved_rows);
      }
      plan.moved_bytes += each.load_bytes + each.rows_bytes;
    }
    const auto first = static_cast<uint32_t>(plan.stages.size());
    for (ScaledLanding& landing : part->landings) {
      landing.stage_index += first;
      plan.landings.push_back(landing);
    }
    plan.stages.insert(plan.stages.end(), part->stages.begin(), part->stages.end());
  }
  return plan;
}

uint64_t HeaviestStage(const ModelShape& model, const ScalePlan& plan) {
  uint64_t heaviest = 0;
  for (const ScaledStage& stage : plan.stages) {
    heaviest = std::max(heaviest, StageWeightBytes(model, stage.plan.layers));
  }
  return heaviest;
}

std::string ReasonText(const PlanReason& why, bool holds_most) {
  if (why.num_plans == 1) return "no other order or choice of workers is possible";
  const std::string rest = absl::StrCat(" of ", why.num_plans, " possible plans");
  if (why.bottleneck_bytes > why.best_bottleneck_bytes + why.best_bottleneck_bytes / 20) {
    return absl::StrCat("it holds the longest sequences", rest,
                        "; one with a lighter heaviest stage would hold less");
  }
  return absl::StrCat("it moves the fewest bytes", rest,
                      " whose heaviest stage and capacity are within 5 % of the best",
                      holds_most ? "" : "; another one would hold somewhat longer sequences");
}

// That of the fewest bytes, of those that are about as good as the best.
ScalePlan ChoosePlan(const ModelShape& model, std::vector<ScalePlan> plans) {
  uint64_t most_rows = 0;
  uint64_t lightest = std::numeric_limits<uint64_t>::max();
  uint64_t lightest_moves = 0;
  for (const ScalePlan& plan : plans) {
    most_rows = std::max(most_rows, plan.capacity_rows);
    const uint64_t heaviest = HeaviestStage(model, plan);
    if (heaviest < lightest || (heaviest == lightest && plan.moved_bytes < lightest_moves)) {
      lightest = heaviest;
      lightest_moves = plan.moved_bytes;
    }
  }
  ScalePlan* best = nullptr;
  for (ScalePlan& plan : plans) {
    // Where no plan is good at both, capacity decides.
    const bool is_good =
        plan.capacity_rows >= most_rows - most_rows / 20 &&
        (HeaviestStage(model, plan) <= lightest + lightest / 20 || plan.capacity_rows == most_rows);
    if (is_good && (best == nullptr || plan.moved_bytes < best->moved_bytes)) best = &plan;
  }
  best->why = {.num_plans = static_cast<uint32_t>(plans.size()),
               .bottleneck_bytes = HeaviestStage(model, *best),
               .best_bottleneck_bytes = lightest,
               .moved_bytes = best->moved_bytes,
               .best_moved_bytes = lightest_moves,
               .text = {}};
  best->why.text = ReasonText(best->why, best->capacity_rows == most_rows);
  return std::move(*best);
}

}  // namespace

std::vector<uint32_t> StagesOfHosts(absl::Span<const uint64_t> memory_bytes, uint32_t num_stages) {
  STRAIT_CHECK(!memory_bytes.empty() && memory_bytes.size() <= num_stages);
  std::vector<uint32_t> counts(memory_bytes.size(), 1);
  for (size_t given = counts.size(); given < num_stages; ++given) {
    size_t best = 0;
    for (size_t h = 1; h < counts.size(); ++h) {
      if (memory_bytes[h] / (counts[h] + 1) > memory_bytes[best] / (counts[best] + 1)) best = h;
    }
    ++counts[best];
  }
  return counts;
}

absl::StatusOr<ScalePlan> PlanScale(const CoreOptions& options, const ModelShape& model,
                                    absl::Span<const StageSlot> old_slots,
                                    absl::Span<const ScaleHost> hosts, uint32_t num_stages,
                                    const ScaleNeeds& needs) {
  // A spare that is too small for a stage is left out rather than the scale refused.
  std::optional<absl::Status> refused;
  size_t num_spares = num_stages;
  for (;;) {
    const Hosts first = ChooseHosts(hosts, num_stages, num_spares);
    std::vector<ScalePlan> plans;
    for (const Hosts& chosen : Orders(hosts, first)) {
      absl::StatusOr<ScalePlan> plan = PlanOn(options, model, old_slots, chosen, num_stages, needs);
      if (plan.ok())
        plans.push_back(*std::move(plan));
      else if (!refused)
        refused = plan.status();
    }
    if (!plans.empty()) return ChoosePlan(model, std::move(plans));
    num_spares = std::count_if(first.begin(), first.end(),
                               [](const ScaleHost* host) { return !IsOwn(*host); });
    if (num_spares == 0) return *refused;
    --num_spares;
  }
}

Holdings HoldingsOfSuccessor(LayerRange layers, absl::Span<const StageSlot* const> old_slots) {
  Holdings holdings;
  uint32_t num_covered = 0;  // no layer is in two old stages
  std::vector<const Holdings*> sources;
  for (const StageSlot* old : old_slots) {
    if (const uint32_t both = Intersection(layers, old->layers).size(); both > 0) {
      num_covered += both;
      sources.push_back(&old->may_hold);
    }
    // It may tell any that one of them has, with no rows.
    for (const auto& [id, may_hold] : old->may_hold) holdings.emplace(id, MayHold{});
  }
  if (num_covered < layers.size()) return holdings;
  for (auto& [id, holding] : holdings) {
    constexpr uint32_t kAny = std::numeric_limits<uint32_t>::max();
    MayHold least{kAny, kAny, kAny};
    for (const Holdings* source : sources) {
      const auto it = source->find(id);
      const MayHold has = it == source->end() ? MayHold{} : it->second;
      least.planned = std::min(least.planned, has.planned);
      least.confirmed = std::min(least.confirmed, has.confirmed);
      least.prefix_blocks = std::min(least.prefix_blocks, has.prefix_blocks);
    }
    holding = least;
  }
  return holdings;
}

const char* Name(Scale::Phase phase) {
  switch (phase) {
    case Scale::Phase::kWaiting:
      return "waiting";
    case Scale::Phase::kMakingRoom:
      return "making room";
    case Scale::Phase::kLoading:
      return "loading";
    case Scale::Phase::kCopying:
      return "copying";
    case Scale::Phase::kStill:
      return "still";
    case Scale::Phase::kSwitched:
      return "switched";
    case Scale::Phase::kGrowing:
      return "growing";
  }
  return "";
}

}  // namespace strait
