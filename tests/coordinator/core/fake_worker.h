// SPDX-License-Identifier: Apache-2.0
//
// FakeWorker is what a test's worker has: stages with the rows that they reported, the caches that they were
// told, and what they took over from stages before them.
//
// Thread:  the test's.
// Why:     it counts memory on its own, so that books which forget something are found.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/model/reservation.h"

namespace strait {

inline ModelShape SmallModel(uint32_t num_layers = 4) {
  ModelShape model;
  model.vocab_size = 100;
  model.max_positions = 1024;
  model.eos_token_ids = {2};
  model.layer_weight_bytes.assign(num_layers, 1000);
  model.embedding_bytes = 500;
  model.head_bytes = 500;
  model.block_bytes = 128;
  model.workspace_bytes = {50};
  model.fingerprint = 7;
  return model;
}

// A stage as its worker knows it.
struct FakeStage {
  v1::LoadStage load;
  v1::ActivateStage activate;  // the last one
  v1::PipelineEpoch epoch;
  uint64_t answered = 0;  // the counter of the last epoch that it said ACTIVE to
  bool first = false;
  bool last = false;
  std::deque<v1::StepPlan> plans;                  // not reported
  std::map<SequenceId, uint32_t> lengths;          // rows of steps that it reported
  std::map<SequenceId, std::vector<TokenId>> fed;  // what they are of; kUnknown: granted
  std::set<SequenceId> told;                       // with the last ACTIVE, not named since
  uint64_t rows_computed = 0;
  uint64_t rows_stored = 0;
  uint64_t rows_kept = 0;     // by the last first plan
  uint64_t cache_bytes = 0;   // that plans may use which come from now on
  uint64_t memory_bytes = 0;  // that its cache takes
  std::optional<uint64_t> resize_due;
  uint64_t cache_before = 0;                   // the last resize
  std::map<uint64_t, uint64_t> cache_of_step;  // by step id: what was its when the plan came
  bool loaded = false;
  bool took_over = false;
  bool followed = false;  // a successor has its rows
  LayerRange layers() const { return {load.layer_begin(), load.layer_end()}; }
};
struct FakeWorker {
  v1::Hello hello;
  std::map<uint64_t, FakeStage> stages;
  bool evicted = false;
  absl::Status why;
};

// Of latent blocks, by the rows that it has.
inline uint64_t HeldBytesOf(const FakeStage& stage, uint64_t block_bytes) {
  uint64_t bytes = 0;
  for (const auto& [sequence, length] : stage.lengths) {
    bytes += HeldBytes({block_bytes}, length, stage.layers());
  }
  return bytes;
}
// Layers once, of each stage workspace; of a successor and whom it follows the larger caches.
inline void CheckMemory(const FakeWorker& worker, const ModelShape& model,
                        std::vector<std::string>* problems) {
  std::set<LayerIndex> layers;
  uint64_t bytes = 0, followed = 0, successors = 0;
  std::set<uint64_t> before;
  for (const auto& [id, stage] : worker.stages) {
    before.insert(stage.load.successor_of().begin(), stage.load.successor_of().end());
  }
  for (const auto& [id, stage] : worker.stages) {
    for (LayerIndex l = stage.layers().begin; l < stage.layers().end; ++l) layers.insert(l);
    if (!model.workspace_bytes.empty()) bytes += model.workspace_bytes.front();
    const bool follows =
        std::any_of(stage.load.successor_of().begin(), stage.load.successor_of().end(),
                    [&](uint64_t other) { return worker.stages.contains(other); });
    (before.contains(id) ? followed
     : follows           ? successors
                         : bytes) += std::max(stage.memory_bytes, stage.cache_bytes);
  }
  if (layers.contains(0)) bytes += model.embedding_bytes;
  if (layers.contains(model.layer_weight_bytes.size() - 1)) bytes += model.head_bytes;
  for (const LayerIndex l : layers) bytes += model.layer_weight_bytes[l];
  if (followed > 0 && successors > followed) {
    problems->push_back("successors have more cache than the stages that they follow");
  }
  bytes += std::max(followed, successors);
  if (bytes > worker.hello.memory_bytes()) {
    problems->push_back("the stages of " + worker.hello.name() + " take " + std::to_string(bytes) +
                        " bytes of " + std::to_string(worker.hello.memory_bytes()));
  }
}
// With its first activation: of a sequence as many rows as each of its layers has.
inline void TakeOver(FakeWorker& worker, FakeStage& stage) {
  if (std::exchange(stage.took_over, true)) return;
  std::map<SequenceId, std::vector<uint32_t>> rows;
  for (const uint64_t before : stage.load.successor_of()) {
    const auto it = worker.stages.find(before);
    if (it == worker.stages.end()) continue;
    FakeStage& other = it->second;
    other.followed = true;
    for (LayerIndex l = stage.layers().begin; l < stage.layers().end; ++l) {
      if (l < other.layers().begin || l >= other.layers().end) continue;
      for (const auto& [id, length] : other.lengths) {
        rows[id].push_back(length);
        if (stage.fed[id].size() < other.fed[id].size()) stage.fed[id] = other.fed[id];
      }
    }
  }
  for (const auto& [id, by_layer] : rows) {
    const bool all = by_layer.size() == stage.layers().size();
    const uint32_t length = all ? *std::min_element(by_layer.begin(), by_layer.end()) : 0;
    stage.fed[id].resize(length);
    if (length == 0) {
      stage.fed.erase(id);
    } else {
      stage.lengths[id] = length;
    }
  }
}
}  // namespace strait
