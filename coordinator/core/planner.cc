// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/planner.h"

#include <algorithm>
#include <limits>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "proto/model/stage_memory.h"

namespace strait {
namespace {

constexpr uint64_t kImpossible = std::numeric_limits<uint64_t>::max();

// Layers and head are read in every step; the embedding is looked up.
uint64_t PaceBytes(const ModelShape& model, LayerRange layers) {
  return StageWeightBytes(model.layer_weight_bytes, 0, model.head_bytes, layers);
}

// Of one stage, or of all that the worker cuts `layers` into.
uint64_t FixedBytes(const CoreOptions& options, const ModelShape& model,
                    absl::Span<const LayerRange> stages, const WorkerMemory& memory) {
  const LayerRange layers{stages.front().begin, stages.back().end};
  uint64_t bytes = memory.costs != nullptr
                       ? StageWeightBytes(memory.costs->layer_bytes, memory.costs->embedding_bytes,
                                          memory.costs->head_bytes, layers)
                       : StageWeightBytes(model, layers);
  for (const LayerRange stage : stages) {
    bytes += StageWorkspaceBytes(model, stage, memory) + StageEdgeBytes(options, stage, memory);
  }
  return bytes;
}

uint32_t NumStages(absl::Span<const WorkerMemory> memory) {
  uint32_t stages = 0;
  for (const WorkerMemory& one : memory) stages += one.num_stages;
  return stages;
}

uint64_t BlockBytesOf(const ModelShape& model, const WorkerMemory& memory) {
  return memory.costs != nullptr ? memory.costs->block_bytes : model.block_bytes;
}

absl::Status CannotFit(const CoreOptions& options, const ModelShape& model,
                       absl::Span<const WorkerMemory> memory) {
  const auto num_layers = static_cast<LayerIndex>(model.layer_weight_bytes.size());
  // As the first worker counts: weights once, the least workspace for each.
  const WorkerMemory& first = memory.front();
  uint64_t needed = StageWeightBytes(model, {0, num_layers});
  const std::vector<uint64_t>* workspaces = &model.workspace_bytes;
  if (first.costs != nullptr) {
    needed = StageWeightBytes(first.costs->layer_bytes, first.costs->embedding_bytes,
                              first.costs->head_bytes, {0, num_layers});
    workspaces = &first.costs->workspace_bytes;
  }
  const uint32_t num_stages = NumStages(memory);
  needed += num_layers * BlockBytesOf(model, first) +
            (workspaces->empty() ? 0 : num_stages * workspaces->front());
  // Each edge at both of its ends: what one end takes is what a first stage takes.
  needed += 2 * (num_stages - 1) * StageEdgeBytes(options, {0, 1}, first);
  uint64_t offered = 0;
  std::string each;
  for (const WorkerMemory& one : memory) {
    offered += one.bytes;
    absl::StrAppend(&each, each.empty() ? "" : " + ", one.bytes);
  }
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model does not fit on ", num_stages,
      " stage(s): weights, workspace, edges and "
      "one latent block a layer take at least ",
      needed, " bytes, the workers offer ", offered, " (", each, ")",
      needed <= offered ? ", and no split into contiguous layers fits each of them" : "",
      options.max_cache_bytes_per_stage > 0
          ? absl::StrCat("; the cache is limited to ", options.max_cache_bytes_per_stage,
                         " bytes a stage")
          : "",
      "; use more stages, or workers with more memory"));
}

}  // namespace

uint64_t StageWeightBytes(const ModelShape& model, LayerRange layers) {
  return StageWeightBytes(model.layer_weight_bytes, model.embedding_bytes, model.head_bytes,
                          layers);
}

uint64_t StageWorkspaceBytes(const ModelShape& model, LayerRange layers,
                             const WorkerMemory& memory) {
  if (memory.costs != nullptr) {
    const StageCosts& costs = *memory.costs;
    return StageFixedBytes(costs, layers) -
           StageWeightBytes(costs.layer_bytes, costs.embedding_bytes, costs.head_bytes, layers);
  }
  if (model.workspace_bytes.empty()) return 0;
  return model
      .workspace_bytes[ChooseWorkspace(model.workspace_bytes, StageWeightBytes(model, layers))];
}

uint64_t StageEdgeBytes(const CoreOptions& options, LayerRange layers, const WorkerMemory& memory) {
  if (memory.costs == nullptr) return 0;
  return StageEdgeBytes(*memory.costs, layers, options.max_step_tokens);
}

std::vector<LayerRange> SplitLayers(const ModelShape& model, LayerRange layers,
                                    uint32_t num_stages) {
  STRAIT_CHECK(num_stages > 0 && num_stages <= layers.size());
  std::vector<LayerRange> stages;
  const uint64_t all = PaceBytes(model, layers);
  for (LayerIndex begin = layers.begin; num_stages > stages.size();) {
    const auto left = static_cast<uint32_t>(num_stages - stages.size());
    // Up to where its share ends, and the others have a layer each.
    LayerIndex end = left == 1 ? layers.end : begin + 1;
    const uint64_t share = (num_stages - left + 1) * (all / num_stages);
    while (left > 1 && end + left <= layers.end) {
      const uint64_t now = PaceBytes(model, {layers.begin, end});
      const uint64_t next = PaceBytes(model, {layers.begin, end + 1});
      if (now >= share || next - std::min(next, share) > share - now) break;
      ++end;
    }
    stages.push_back({begin, end});
    begin = end;
  }
  return stages;
}

uint64_t CacheMemoryBytes(const ModelShape& model, const WorkerMemory& memory,
                          uint64_t cache_bytes) {
  return cache_bytes / model.block_bytes * BlockBytesOf(model, memory);
}

uint64_t CacheMemoryRows(const ModelShape& model, const WorkerMemory& memory, uint64_t bytes,
                         uint32_t num_layers) {
  return RowsThatFit({BlockBytesOf(model, memory)}, bytes, {0, num_layers});
}

uint64_t StageRowsMax(const CoreOptions& options, const ModelShape& model, LayerRange layers,
                      const WorkerMemory& memory) {
  if (layers.size() < memory.num_stages) return 0;
  const std::vector<LayerRange> stages = SplitLayers(model, layers, memory.num_stages);
  const uint64_t fixed = FixedBytes(options, model, stages, memory);
  if (fixed >= memory.bytes) return 0;
  uint64_t rows = CacheMemoryRows(model, memory, memory.bytes - fixed, layers.size());
  for (const LayerRange stage : stages) {
    if (options.max_cache_bytes_per_stage == 0) break;
    rows = std::min(
        rows, CacheMemoryRows(model, memory, options.max_cache_bytes_per_stage, stage.size()));
  }
  const uint64_t useful =
      uint64_t{options.max_running} * BlocksPerLayer(model.max_positions) * limits::kBlockTokens;
  const uint64_t addressable =
      uint64_t{std::numeric_limits<BlockId>::max() / layers.size()} * limits::kBlockTokens;
  return std::min({rows, useful, addressable});
}

uint64_t StageCacheBytes(const ModelShape& model, LayerRange layers, uint64_t rows) {
  return rows / limits::kBlockTokens * ReservedBytes(model.policy(), limits::kBlockTokens, layers);
}

absl::StatusOr<PipelinePlan> PlanPipeline(const CoreOptions& options, const ModelShape& model,
                                          absl::Span<const WorkerMemory> memory) {
  const auto num_layers = static_cast<uint32_t>(model.layer_weight_bytes.size());
  STRAIT_CHECK(!memory.empty());
  if (const uint32_t num_stages = NumStages(memory); num_stages > num_layers) {
    return absl::InvalidArgumentError(absl::StrCat(num_stages, " stages of ", num_layers,
                                                   " layers: every stage needs at least one"));
  }
  const auto num_workers = static_cast<uint32_t>(memory.size());
  // rows[s][begin][end], priced once.
  const auto range_index = [num_layers](uint32_t s, uint32_t begin, uint32_t end) {
    return (size_t{s} * (num_layers + 1) + begin) * (num_layers + 1) + end;
  };
  std::vector<uint64_t> rows(size_t{num_workers} * (num_layers + 1) * (num_layers + 1), 0);
  // Of the heaviest stage that a worker of so many makes of [begin, end).
  std::map<uint32_t, std::vector<uint64_t>> pace;
  for (const WorkerMemory& one : memory) {
    pace[one.num_stages].resize(size_t{num_layers + 1} * (num_layers + 1), 0);
  }
  for (uint32_t begin = 0; begin < num_layers; ++begin) {
    for (uint32_t end = begin + 1; end <= num_layers; ++end) {
      for (auto& [parts, bytes] : pace) {
        if (end - begin < parts) continue;
        for (const LayerRange stage : SplitLayers(model, {begin, end}, parts)) {
          uint64_t& heaviest = bytes[range_index(0, begin, end)];
          heaviest = std::max(heaviest, PaceBytes(model, stage));
        }
      }
      for (uint32_t s = 0; s < num_workers; ++s) {
        rows[range_index(s, begin, end)] = StageRowsMax(options, model, {begin, end}, memory[s]);
      }
    }
  }
  // best[s][end]: the largest smallest capacity of workers 0 … s over layers [0, end).
  const auto index = [num_layers](uint32_t s, uint32_t end) {
    return size_t{s} * (num_layers + 1) + end;
  };
  std::vector<uint64_t> best(size_t{num_workers} * (num_layers + 1), 0);
  for (uint32_t s = 0; s < num_workers; ++s) {
    for (uint32_t end = s + 1; end <= num_layers; ++end) {
      for (uint32_t begin = s == 0 ? 0 : s; begin < (s == 0 ? 1 : end); ++begin) {
        const uint64_t before =
            s == 0 ? std::numeric_limits<uint64_t>::max() : best[index(s - 1, begin)];
        best[index(s, end)] =
            std::max(best[index(s, end)], std::min(before, rows[range_index(s, begin, end)]));
      }
    }
  }
  const uint64_t capacity = best[index(num_workers - 1, num_layers)];
  if (capacity == 0) return CannotFit(options, model, memory);

  // Among splits with that capacity, the least heaviest stage.
  std::vector<uint64_t> heaviest(best.size(), kImpossible);
  std::vector<uint32_t> cut(best.size(), 0);
  for (uint32_t s = 0; s < num_workers; ++s) {
    for (uint32_t end = s + 1; end <= num_layers; ++end) {
      for (uint32_t begin = s == 0 ? 0 : s; begin < (s == 0 ? 1 : end); ++begin) {
        if (rows[range_index(s, begin, end)] < capacity) continue;
        const uint64_t before = s == 0 ? 0 : heaviest[index(s - 1, begin)];
        const uint64_t now =
            std::max(before, pace.at(memory[s].num_stages)[range_index(0, begin, end)]);
        if (now >= heaviest[index(s, end)]) continue;
        heaviest[index(s, end)] = now;
        cut[index(s, end)] = begin;
      }
    }
  }
  PipelinePlan plan;
  plan.capacity_rows = capacity;
  for (uint32_t s = num_workers, end = num_layers; s-- > 0;) {
    const uint32_t begin = cut[index(s, end)];
    // The smallest stage bounds all: more bytes elsewhere would stay empty.
    const std::vector<LayerRange> stages = SplitLayers(model, {begin, end}, memory[s].num_stages);
    for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage) {
      plan.stages.push_back({*stage, StageCacheBytes(model, *stage, capacity)});
    }
    end = begin;
  }
  std::reverse(plan.stages.begin(), plan.stages.end());
  return plan;
}

}  // namespace strait
