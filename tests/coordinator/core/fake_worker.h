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
#include "tests/coordinator/core/fake_moves.h"
#include "tests/coordinator/core/fake_prefixes.h"
#include "tests/coordinator/core/fake_replicas.h"

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
  v1::ActivateStage activate;             // the last one
  std::optional<v1::ActivateStage> link;  // whose edges it opened ahead
  v1::PipelineEpoch epoch;
  uint64_t answered = 0;  // the counter of the last epoch that it said ACTIVE to
  bool first = false;
  bool last = false;
  std::deque<v1::StepPlan> plans;                  // not reported
  std::map<SequenceId, uint32_t> lengths;          // rows of steps that it reported
  std::map<SequenceId, std::vector<TokenId>> fed;  // what they are of; kUnknown: granted
  std::set<SequenceId> told;                       // with the last ACTIVE, not named since
  FakePrefixes prefixes;
  FakeMoves moves;             // an import's length is what it has blocks for
  uint64_t prefix_secret = 0;  // of this epoch: that who reads its prefix blocks shows
  std::map<SequenceId, PlacementEpoch> landed;  // whose rows came before its first epoch
  uint64_t restored_counter = 0;  // of the last epoch that it began with rows from elsewhere
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
  FakeReplicas replicas;
  bool evicted = false;
  absl::Status why;
};

// Of latent blocks, by the rows that it has.
inline uint64_t HeldBytesOf(const FakeStage& stage, uint64_t block_bytes) {
  const uint64_t block = HeldBytes({block_bytes}, limits::kBlockTokens, stage.layers());
  uint64_t bytes = stage.prefixes.num_keys() * block;
  for (const auto& [sequence, length] : stage.lengths) {
    bytes += HeldBytes({block_bytes}, length, stage.layers()) - stage.prefixes.Of(sequence) * block;
  }
  return bytes;
}
// As worker/stage does it, or would refuse it.
inline void DoCacheOp(const v1::CacheOp& op, bool first_plan, FakeStage* stage,
                      const FakePrefixes::Problem& problem) {
  if (op.has_keep_prefix()) {
    const auto it = stage->lengths.find(SequenceId{op.keep_prefix().sequence_id()});
    if (it == stage->lengths.end()) return problem("keeps blocks of what is not open");
    return stage->prefixes.Keep(op.keep_prefix(), it->second, problem);
  }
  if (op.has_drop_prefix()) return stage->prefixes.Drop(op.drop_prefix(), problem);
  if (op.has_import()) {
    const v1::ImportSequence& import = op.import();
    const SequenceId sequence{import.sequence_id()};
    const PlacementEpoch placement{import.placement().term(), import.placement().counter()};
    const auto it = stage->moves.imports.find(sequence);
    if (it == stage->moves.imports.end() && stage->lengths.contains(sequence)) {
      problem("what is resident comes in");
    }
    if (it != stage->moves.imports.end() &&
        (it->second.placement != placement || it->second.rows >= import.rows())) {
      problem("an import does not grow");
    }
    stage->moves.imports[sequence].placement = placement;
    stage->moves.imports[sequence].rows = stage->lengths[sequence] = import.rows();
    return;
  }
  const SequenceId id{op.has_open() ? op.open().sequence_id() : op.close().sequence_id()};
  const bool was_told = stage->told.erase(id) > 0;
  const bool has = stage->lengths.contains(id);
  if (op.has_close()) {
    if (!has && !first_plan) problem("closes what is not open");
    stage->lengths.erase(id);
    stage->fed.erase(id);
    stage->moves.imports.erase(id);
    stage->moves.serves.erase(id);
    stage->prefixes.Leave(id, 0);
    return;
  }
  if (op.open().imported_rows() > 0) {
    const auto it = stage->moves.imports.find(id);
    if (it == stage->moves.imports.end()) return problem("opens an import that is none");
    if (it->second.tokens.size() != op.open().imported_rows()) {
      problem("opens an import of which other rows are here");
    }
    stage->fed[id] = it->second.tokens;
    stage->lengths[id] = op.open().imported_rows();
    stage->moves.imports.erase(it);
    return;
  }
  const auto& kept = op.open().kept_rows();
  if (has && !was_told) problem("opens what is open");
  if (!kept.empty() && (!first_plan || kept.size() != int(stage->activate.num_stages()))) {
    problem("kept rows are not of a first plan, or of other stages");
  }
  uint32_t rows = kept.empty() ? 0 : kept.at(int(stage->activate.stage_index()));
  if (rows > (was_told ? stage->lengths.at(id) : 0)) problem("keeps more rows than there are");
  if (rows < stage->prefixes.Of(id) * limits::kBlockTokens && rows % limits::kBlockTokens != 0) {
    problem("a cut goes through a prefix block");
  }
  stage->prefixes.Leave(id, std::min(stage->prefixes.Of(id), rows / limits::kBlockTokens));
  stage->rows_kept += rows;
  stage->fed[id].resize(rows);
  rows += stage->prefixes.Open(op.open(), problem);
  const auto& ids = op.open().prefix_tokens().ids();
  stage->fed[id].insert(stage->fed[id].end(), ids.begin(), ids.end());
  stage->lengths[id] = rows;
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
  std::map<SequenceId, std::vector<std::vector<ContentKey>>> keys;
  for (const uint64_t before : stage.load.successor_of()) {
    const auto it = worker.stages.find(before);
    if (it == worker.stages.end()) continue;
    FakeStage& other = it->second;
    other.followed = true;
    for (LayerIndex l = stage.layers().begin; l < stage.layers().end; ++l) {
      if (l < other.layers().begin || l >= other.layers().end) continue;
      for (const auto& [id, length] : other.lengths) {
        if (other.moves.imports.contains(id)) continue;
        rows[id].push_back(length);
        keys[id].push_back(other.prefixes.KeysOf(id));
        if (stage.fed[id].size() < other.fed[id].size()) stage.fed[id] = other.fed[id];
      }
    }
  }
  for (const auto& [id, by_layer] : rows) {
    const bool all = by_layer.size() == stage.layers().size();
    uint32_t length = all ? *std::min_element(by_layer.begin(), by_layer.end()) : 0;
    const auto shorter = [](const auto& a, const auto& b) { return a.size() < b.size(); };
    std::vector<ContentKey> prefix = *std::min_element(keys[id].begin(), keys[id].end(), shorter);
    const auto longest = std::max_element(keys[id].begin(), keys[id].end(), shorter);
    const auto prefix_rows = static_cast<uint32_t>(prefix.size()) * limits::kBlockTokens;
    if (longest->size() > prefix.size()) length = std::min(length, prefix_rows);
    if (length < prefix_rows) {
      prefix.resize(length / limits::kBlockTokens);
      length -= length % limits::kBlockTokens;
    }
    if (length > 0) stage.prefixes.Adopt(id, std::move(prefix));
    stage.fed[id].resize(length);
    if (length == 0) {
      stage.fed.erase(id);
    } else {
      stage.lengths[id] = length;
    }
  }
}
}  // namespace strait
