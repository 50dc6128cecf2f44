// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/scale.h"

#include <algorithm>
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

// Those that get a stage, in order: `num_spares` spares at most.
std::vector<const ScaleHost*> ChooseHosts(absl::Span<const ScaleHost> hosts, uint32_t num_stages,
                                          size_t num_spares) {
  std::vector<const ScaleHost*> chosen;
  for (const ScaleHost& host : hosts) {
    if (!host.old_slots.empty() || host.follows) chosen.push_back(&host);
  }
  while (chosen.size() > num_stages) {
    // Of equals the last.
    const auto least = std::min_element(
        chosen.rbegin(), chosen.rend(),
        [](const auto* a, const auto* b) { return a->memory.bytes < b->memory.bytes; });
    chosen.erase(std::next(least).base());
  }
  for (const ScaleHost& host : hosts) {
    if (!host.old_slots.empty() || host.follows || num_spares == 0 || chosen.size() == num_stages) {
      continue;
    }
    chosen.push_back(&host);
    --num_spares;
  }
  return chosen;
}

// The old stages' caches on one host, while its new stages are there too. `fixed`: what both take without caches.
absl::Status MakeRoom(const ModelShape& model, const ScaleHost& host, uint64_t fixed,
                      absl::Span<const StageSlot> old_slots, const ScaleNeeds& needs,
                      std::vector<uint64_t>* old_cache_bytes) {
  uint64_t cache = 0;
  uint32_t num_layers = 0;
  for (const uint32_t s : host.old_slots) {
    cache += CacheMemoryBytes(model, host.memory, old_slots[s].cache_bytes);
    num_layers += old_slots[s].layers.size();
  }
  if (fixed + cache <= host.memory.bytes) return absl::OkStatus();
  const uint64_t room = host.memory.bytes - std::min(host.memory.bytes, fixed);
  const uint64_t rows = CacheMemoryRows(model, host.memory, room, num_layers);
  if (rows < std::max<uint64_t>(needs.resident_rows, limits::kBlockTokens)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "old and new stages together take ", fixed, " bytes without cache of the ",
        host.memory.bytes, " of worker ", host.worker.value, ", which leaves room for ", rows,
        " cache rows meanwhile; a sequence that runs may need ",
        std::max<uint64_t>(needs.resident_rows, limits::kBlockTokens),
        ": wait until it has ended, or give the worker more memory"));
  }
  for (const uint32_t s : host.old_slots) {
    uint64_t& bytes = (*old_cache_bytes)[s];
    bytes = std::min(bytes, StageCacheBytes(model, old_slots[s].layers, rows));
  }
  return absl::OkStatus();
}

absl::StatusOr<ScalePlan> PlanOn(const CoreOptions& options, const ModelShape& model,
                                 absl::Span<const StageSlot> old_slots,
                                 absl::Span<const ScaleHost* const> hosts, uint32_t num_stages,
                                 const ScaleNeeds& needs) {
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
  for (size_t h = 0; h < hosts.size(); ++h) {
    const ScaleHost& host = *hosts[h];
    HostedStages both;
    std::vector<uint64_t> old_ids;
    for (const uint32_t s : host.old_slots) {
      old_ids.push_back(old_slots[s].stage_id);
      both[old_slots[s].stage_id] = {.layers = old_slots[s].layers};
    }
    const auto end = stage + counts[h];
    uint32_t num_layers = 0;
    for (auto s = stage; s != end; ++s) {
      both[std::numeric_limits<uint64_t>::max() - (end - s)] = {.layers = s->layers};
      num_layers += s->layers.size();
    }
    uint64_t first_rows = plan.capacity_rows;
    if (!old_ids.empty()) {
      STRAIT_RETURN_IF_ERROR(MakeRoom(model, host, BookedBytes(options, model, host.memory, both),
                                      old_slots, needs, &plan.old_cache_bytes));
      uint64_t old_bytes = 0;
      for (const uint32_t s : host.old_slots) old_bytes += plan.old_cache_bytes[s];
      first_rows = std::min(first_rows, RowsThatFit(model.policy(), old_bytes, {0, num_layers}));
      if (first_rows < limits::kBlockTokens) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the caches of worker ", host.worker.value, "'s stages have ", old_bytes,
                         " bytes, which is no latent block for each of the ", num_layers,
                         " layers that it would have; give it more memory"));
      }
    }
    for (; stage != end; ++stage) {
      plan.stages.push_back({.worker = host.worker,
                             .plan = *stage,
                             .first_cache_bytes = StageCacheBytes(model, stage->layers, first_rows),
                             .successor_of = old_ids});
    }
  }
  return plan;
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
    const std::vector<const ScaleHost*> chosen = ChooseHosts(hosts, num_stages, num_spares);
    absl::StatusOr<ScalePlan> plan = PlanOn(options, model, old_slots, chosen, num_stages, needs);
    if (plan.ok()) return plan;
    if (!refused) refused = plan.status();
    num_spares = std::count_if(chosen.begin(), chosen.end(), [](const auto* host) {
      return host->old_slots.empty() && !host->follows;
    });
    if (num_spares == 0) return *refused;
    --num_spares;
  }
}

Holdings HoldingsOfSuccessor(LayerRange layers, absl::Span<const StageSlot* const> old_slots) {
  Holdings holdings;
  uint32_t num_covered = 0;  // no layer is in two old stages
  std::vector<const Holdings*> sources;
  for (const StageSlot* old : old_slots) {
    const LayerIndex begin = std::max(layers.begin, old->layers.begin);
    const LayerIndex end = std::min(layers.end, old->layers.end);
    if (begin < end) {
      num_covered += end - begin;
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

}  // namespace strait
