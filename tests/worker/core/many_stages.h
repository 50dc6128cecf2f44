// SPDX-License-Identifier: Apache-2.0
//
// ManyStages is a WorkerCore that hosts stages of a pipeline, with fakes over one cache whose memory is
// counted. What its stages hand on is handed to those behind.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "proto/wire/epoch_wire.h"
#include "tests/worker/core/recording.h"
#include "tests/worker/stage/fake_model.h"
#include "tests/worker/stage/plans.h"
#include "worker/core/worker_core.h"

namespace strait {

struct ManyStages {
  static constexpr uint32_t kLayers = 6;

  // `replica_blocks`: that replicas may have memory for.
  explicit ManyStages(int64_t memory_blocks = 1000, RowTransfer* transfer = nullptr,
                      uint32_t replica_blocks = 0, uint64_t frame_bytes = 100 * kHashRowBytes)
      : memory(memory_blocks),
        core({.orphan_timeout_us = 1'000'000,
              .replica_bytes = uint64_t{replica_blocks} * limits::kBlockTokens * kHashRowBytes,
              .transfer_frame_bytes = frame_bytes},
             {.num_layers = kLayers,
              .hidden_row_bytes = kFakeHiddenRowBytes,
              .vocab_size = kFakeVocab,
              .max_positions = 2000,
              .block_bytes = kFakeBlockBytes,
              .row_shape = kHashRowShape},
             &cache, &this->transport, &ports, transfer) {
    v1::Welcome welcome;
    welcome.set_term(1);
    core.OnWelcome(welcome);
  }

  // ---- What a coordinator says ----
  void Load(uint64_t id, LayerRange layers, uint32_t blocks, std::vector<uint64_t> before = {}) {
    v1::ToWorker message;
    v1::LoadStage& load = *message.mutable_load_stage();
    load.set_stage_id(id);
    load.set_layer_begin(layers.begin);
    load.set_layer_end(layers.end);
    load.set_cache_bytes(blocks * kFakeBlockBytes);
    for (const uint64_t stage : before) load.add_successor_of(stage);
    core.OnMessage(std::move(message), 0);
  }
  // The loader has done what it was asked.
  void FinishLoads() {
    for (const LoadOrder& order : std::exchange(ports.loads, {})) {
      auto model =
          std::make_unique<FakeModel>(order.spec.layers, order.spec.pool_blocks, kLayers, &cache);
      models[order.stage_id] = model.get();
      core.OnLoaded(order, std::move(model));
    }
  }
  // Edges of the pipeline are up at once.
  void Activate(const std::vector<uint64_t>& pipeline, size_t index, uint64_t counter,
                const std::function<void(v1::ActivateStage*)>& amend = {}) {
    v1::ToWorker message;
    v1::ActivateStage& activate = *message.mutable_activate_stage();
    activate.set_stage_id(pipeline[index]);
    activate.mutable_epoch()->set_term(1);
    activate.mutable_epoch()->set_counter(counter);
    activate.set_stage_index(static_cast<uint32_t>(index));
    activate.set_num_stages(static_cast<uint32_t>(pipeline.size()));
    if (index > 0) {
      activate.set_previous_stage_id(pipeline[index - 1]);
      activate.set_edge_id(100 + pipeline[index]);
      activate.set_edge_nonce(1);
    }
    std::optional<Edge> next;
    if (index + 1 < pipeline.size()) {
      activate.set_next_stage_id(pipeline[index + 1]);
      activate.set_next_edge_id(100 + pipeline[index + 1]);
      activate.set_next_edge_nonce(1);
      activate.set_next_data_address("127.0.0.1:9");
      next = Edge{.id = activate.next_edge_id(),
                  .from_stage_id = pipeline[index],
                  .to_stage_id = pipeline[index + 1]};
    }
    behind[pipeline[index]] = activate.next_stage_id();
    if (amend) amend(&activate);
    core.OnMessage(std::move(message), now_us);
    if (next) core.OnEdgeUp(*next, {});
  }
  void ActivateAll(const std::vector<uint64_t>& pipeline, uint64_t counter) {
    for (size_t i = 0; i < pipeline.size(); ++i) Activate(pipeline, i, counter);
  }
  void Unload(uint64_t id) {
    v1::ToWorker message;
    message.mutable_unload_stage()->set_stage_id(id);
    core.OnMessage(std::move(message), 0);
  }
  void Resize(uint64_t id, uint64_t cache_bytes) {
    v1::ToWorker message;
    message.mutable_resize_cache()->set_stage_id(id);
    message.mutable_resize_cache()->set_cache_bytes(cache_bytes);
    core.OnMessage(std::move(message), 0);
  }
  void ResizeBlocks(uint64_t id, uint32_t blocks) { Resize(id, blocks * kFakeBlockBytes); }
  // A plan of the stage's epoch.
  static v1::StepPlan PlanOf(uint64_t id, PipelineEpoch epoch, uint64_t step) {
    v1::StepPlan plan;
    plan.set_stage_id(id);
    ToWire(epoch, plan.mutable_epoch());
    plan.set_step_id(step);
    return plan;
  }
  v1::StepPlan Plan(uint64_t id, uint64_t step) const {
    return PlanOf(id, core.FindStage(id)->epoch(), step);
  }
  void Send(v1::StepPlan plan) {
    v1::ToWorker message;
    *message.mutable_step() = std::move(plan);
    core.OnMessage(std::move(message), 0);
  }
  void SendAll(const std::vector<uint64_t>& pipeline, v1::StepPlan plan) {
    for (const uint64_t id : pipeline) {
      plan.set_stage_id(id);
      Send(plan);
    }
  }

  // ---- What its loop does ----
  bool Begin() {
    const std::optional<uint64_t> id = core.NextReady();
    if (id) core.BeginStep(*id, &Clock);
    return id.has_value();
  }
  bool Finish() {
    bool any = false;
    const std::optional<uint64_t> id = core.NextDone(&any);
    if (id) core.FinishStep(*id, &Clock);
    for (auto& [from, hidden] : std::exchange(transport.sent, {})) {
      core.OnHidden(behind.at(from), std::move(hidden), 0);
    }
    return id.has_value();
  }
  void RunAll() {
    while (Begin() || Finish()) {
    }
  }

  // ---- What came of it ----
  // What was told since the last call.
  std::string Told() {
    ports.messages.clear();
    return std::exchange(ports.told, {});
  }
  // The error of the last message; whom it is about.
  std::string LastError() const {
    const v1::FromWorker& message = ports.messages.back();
    return message.has_report()        ? message.report().error_message()
           : message.has_stage_state() ? message.stage_state().error_message()
                                       : message.cache_resized().error_message();
  }
  void ExpectError(const std::string& told, const std::vector<std::string>& names) {
    EXPECT_EQ(ports.told, told);
    if (!ports.messages.empty()) {
      for (const std::string& name : names) {
        EXPECT_NE(LastError().find(name), std::string::npos) << LastError() << " names no " << name;
      }
    }
    Told();
    ExpectSound();
  }
  void ExpectSound() const { EXPECT_TRUE(core.CheckIntegrity().ok()) << core.CheckIntegrity(); }
  // Rows of each sequence that ACTIVE told, of the last message.
  std::map<uint64_t, uint32_t> LastHeld() const {
    std::map<uint64_t, uint32_t> held;
    for (const auto& sequence : ports.messages.back().stage_state().held()) {
      held[sequence.sequence_id()] = sequence.rows();
    }
    return held;
  }

  static uint64_t Clock() { return 0; }
  uint64_t now_us = 0;  // when it is activated

  const int64_t memory;
  int64_t taken = 0;
  NumberCache cache{[this](int64_t blocks) {
    if (taken + blocks > memory) {
      return absl::ResourceExhaustedError("there is no memory for the cache");
    }
    taken += blocks;
    return absl::OkStatus();
  }};
  RecordingTransport transport;
  RecordingPorts ports;
  std::map<uint64_t, FakeModel*> models;
  std::map<uint64_t, uint64_t> behind;  // the stage that follows in the pipeline
  WorkerCore core;
};

// The plan's sequence `id` has `rows` more rows, from `first` on; it is opened with its first.
inline v1::StepPlan WithRows(v1::StepPlan plan, uint64_t id, uint32_t first, uint32_t rows) {
  if (first == 0) AddOpen(&plan, id);
  std::vector<TokenId> tokens;
  for (uint32_t p = first; p < first + rows; ++p) tokens.push_back(p % 50);
  AddRows(&plan, id, first, tokens);
  return plan;
}
inline v1::StepPlan WithClose(v1::StepPlan plan, uint64_t id) {
  AddClose(&plan, id);
  return plan;
}
// All stages keep so many rows of it.
inline v1::StepPlan WithKept(v1::StepPlan plan, uint64_t id, uint32_t rows, int num_stages) {
  AddOpen(&plan, id);
  v1::OpenSequence* open = plan.mutable_cache_ops(plan.cache_ops_size() - 1)->mutable_open();
  for (int i = 0; i < num_stages; ++i) open->add_kept_rows(rows);
  return plan;
}

}  // namespace strait
