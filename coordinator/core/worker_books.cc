// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/worker_books.h"

#include <algorithm>
#include <set>

namespace strait {
namespace {

uint64_t UnionWeightBytes(const ModelShape& model, const WorkerMemory& memory,
                          const HostedStages& stages) {
  const StageCosts* costs = memory.costs;
  const std::vector<uint64_t>& by_layer =
      costs != nullptr ? costs->layer_bytes : model.layer_weight_bytes;
  std::vector<bool> has(by_layer.size(), false);
  bool embedding = false, head = false;
  for (const auto& [id, stage] : stages) {
    for (LayerIndex l = stage.layers.begin; l < stage.layers.end; ++l) has[l] = true;
    embedding = embedding || stage.layers.begin == 0;
    head = head || stage.layers.end == by_layer.size();
  }
  uint64_t bytes = 0;
  if (embedding) bytes += costs != nullptr ? costs->embedding_bytes : model.embedding_bytes;
  if (head) bytes += costs != nullptr ? costs->head_bytes : model.head_bytes;
  for (size_t l = 0; l < has.size(); ++l) bytes += has[l] ? by_layer[l] : 0;
  return bytes;
}

}  // namespace

uint64_t BookedBytes(const CoreOptions& options, const ModelShape& model,
                     const WorkerMemory& memory, const HostedStages& stages) {
  if (stages.empty()) return 0;
  std::set<uint64_t> followed;
  for (const auto& [id, stage] : stages) {
    for (const uint64_t before : stage.successor_of) {
      if (stages.contains(before)) followed.insert(before);
    }
  }
  uint64_t bytes = UnionWeightBytes(model, memory, stages);
  uint64_t of_followed = 0, of_successors = 0;
  for (const auto& [id, stage] : stages) {
    bytes += StageWorkspaceBytes(model, stage.layers, memory) +
             StageEdgeBytes(options, stage.layers, memory);
    const uint64_t most = std::max(stage.cache_bytes, stage.resize ? stage.resize->cache_bytes : 0);
    const uint64_t cache = CacheMemoryBytes(model, memory, most);
    const bool follows = std::any_of(stage.successor_of.begin(), stage.successor_of.end(),
                                     [&](uint64_t before) { return stages.contains(before); });
    (followed.contains(id) ? of_followed : follows ? of_successors : bytes) += cache;
  }
  return bytes + std::max(of_followed, of_successors);
}

HostedStage* Worker::Find(uint64_t stage_id) {
  const auto it = stages.find(stage_id);
  return it == stages.end() ? nullptr : &it->second;
}

bool Worker::Has(HostedStage::Role role) const {
  return std::any_of(stages.begin(), stages.end(),
                     [&](const auto& entry) { return entry.second.role == role; });
}

}  // namespace strait
