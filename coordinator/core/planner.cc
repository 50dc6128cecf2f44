// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/planner.h"

#include <algorithm>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/check.h"
#include "proto/model_config.h"
#include "proto/reservation.h"
#include "proto/workspace.h"

namespace strait {
namespace {

constexpr uint64_t kImpossible = std::numeric_limits<uint64_t>::max();

// Layers and head are read in every step; the embedding is looked up.
uint64_t PaceBytes(const ModelShape& model, LayerRange layers) {
  return StageWeightBytes(model, layers) - (layers.begin == 0 ? model.embedding_bytes : 0);
}

absl::Status CannotFit(const CoreOptions& options, const ModelShape& model,
                       absl::Span<const uint64_t> memory_bytes) {
  const auto num_layers = static_cast<LayerIndex>(model.layer_weight_bytes.size());
  uint64_t memory = 0;
  for (const uint64_t bytes : memory_bytes) memory += bytes;
  const uint64_t needed =
      StageWeightBytes(model, {0, num_layers}) + num_layers * model.block_bytes +
      (model.workspace_bytes.empty() ? 0 : memory_bytes.size() * model.workspace_bytes.front());
  std::string each;
  for (const uint64_t bytes : memory_bytes)
    absl::StrAppend(&each, each.empty() ? "" : " + ", bytes);
  return absl::ResourceExhaustedError(absl::StrCat(
      "the model does not fit on ", memory_bytes.size(),
      " stage(s): weights, workspace and one latent "
      "block a layer take at least ",
      needed, " bytes, the workers offer ", memory, " (", each, ")",
      needed <= memory ? ", and no split into contiguous layers fits each of them" : "",
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

uint64_t StageWorkspaceBytes(const ModelShape& model, LayerRange layers) {
  if (model.workspace_bytes.empty()) return 0;
  return model
      .workspace_bytes[ChooseWorkspace(model.workspace_bytes, StageWeightBytes(model, layers))];
}

uint32_t StageColumns(const CoreOptions& options, const ModelShape& model, LayerRange layers,
                      uint64_t memory_bytes) {
  const uint64_t fixed = StageWeightBytes(model, layers) + StageWorkspaceBytes(model, layers);
  if (fixed >= memory_bytes) return 0;
  uint64_t cache_bytes = memory_bytes - fixed;
  if (options.max_cache_bytes_per_stage > 0) {
    cache_bytes = std::min(cache_bytes, options.max_cache_bytes_per_stage);
  }
  const uint64_t useful = uint64_t{options.max_running} * BlocksPerLayer(model.max_positions);
  const uint64_t addressable = std::numeric_limits<uint32_t>::max() / layers.size();
  return static_cast<uint32_t>(
      std::min({cache_bytes / model.block_bytes / layers.size(), useful, addressable}));
}

absl::StatusOr<PipelinePlan> PlanPipeline(const CoreOptions& options, const ModelShape& model,
                                          absl::Span<const uint64_t> memory_bytes) {
  const auto num_layers = static_cast<uint32_t>(model.layer_weight_bytes.size());
  const auto num_stages = static_cast<uint32_t>(memory_bytes.size());
  STRAIT_CHECK(num_stages > 0);
  if (num_stages > num_layers) {
    return absl::InvalidArgumentError(absl::StrCat(num_stages, " stages of ", num_layers,
                                                   " layers: every stage needs at least one"));
  }
  // columns[s][begin][end], priced once.
  const auto range_index = [num_layers](uint32_t s, uint32_t begin, uint32_t end) {
    return (size_t{s} * (num_layers + 1) + begin) * (num_layers + 1) + end;
  };
  std::vector<uint32_t> columns(size_t{num_stages} * (num_layers + 1) * (num_layers + 1), 0);
  std::vector<uint64_t> pace(size_t{num_layers + 1} * (num_layers + 1), 0);
  for (uint32_t begin = 0; begin < num_layers; ++begin) {
    for (uint32_t end = begin + 1; end <= num_layers; ++end) {
      pace[range_index(0, begin, end)] = PaceBytes(model, {begin, end});
      for (uint32_t s = 0; s < num_stages; ++s) {
        columns[range_index(s, begin, end)] =
            StageColumns(options, model, {begin, end}, memory_bytes[s]);
      }
    }
  }
  // best[s][end]: the largest smallest capacity of stages 0 … s over layers [0, end).
  const auto index = [num_layers](uint32_t s, uint32_t end) {
    return size_t{s} * (num_layers + 1) + end;
  };
  std::vector<uint32_t> best(size_t{num_stages} * (num_layers + 1), 0);
  for (uint32_t s = 0; s < num_stages; ++s) {
    for (uint32_t end = s + 1; end <= num_layers; ++end) {
      for (uint32_t begin = s == 0 ? 0 : s; begin < (s == 0 ? 1 : end); ++begin) {
        const uint32_t before =
            s == 0 ? std::numeric_limits<uint32_t>::max() : best[index(s - 1, begin)];
        best[index(s, end)] =
            std::max(best[index(s, end)], std::min(before, columns[range_index(s, begin, end)]));
      }
    }
  }
  const uint32_t capacity = best[index(num_stages - 1, num_layers)];
  if (capacity == 0) return CannotFit(options, model, memory_bytes);

  // Among splits with that capacity, the least heaviest stage.
  std::vector<uint64_t> heaviest(best.size(), kImpossible);
  std::vector<uint32_t> cut(best.size(), 0);
  for (uint32_t s = 0; s < num_stages; ++s) {
    for (uint32_t end = s + 1; end <= num_layers; ++end) {
      for (uint32_t begin = s == 0 ? 0 : s; begin < (s == 0 ? 1 : end); ++begin) {
        if (columns[range_index(s, begin, end)] < capacity) continue;
        const uint64_t before = s == 0 ? 0 : heaviest[index(s - 1, begin)];
        const uint64_t now = std::max(before, pace[range_index(0, begin, end)]);
        if (now >= heaviest[index(s, end)]) continue;
        heaviest[index(s, end)] = now;
        cut[index(s, end)] = begin;
      }
    }
  }
  PipelinePlan plan;
  plan.capacity_columns = capacity;
  plan.stages.resize(num_stages);
  for (uint32_t s = num_stages, end = num_layers; s-- > 0;) {
    const uint32_t begin = cut[index(s, end)];
    // The smallest stage bounds all: more blocks elsewhere would stay empty.
    plan.stages[s] = {{begin, end}, capacity * (end - begin)};
    end = begin;
  }
  return plan;
}

}  // namespace strait
