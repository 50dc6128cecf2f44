// SPDX-License-Identifier: Apache-2.0
//
// ReplicatedPipelines are workers with whole pipelines of various layer ranges, a buddy that keeps copies of their prefix
// blocks, and a coordinator that has them made, and has a pipeline begin with them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "proto/model/content_key.h"
#include "proto/wire/epoch_wire.h"
#include "tests/worker/core/many_stages.h"
#include "tests/worker/transfer/faulty_network.h"

namespace strait {

// The keys of all full blocks of these tokens.
inline std::vector<ContentKey> KeysOfTokens(const std::vector<TokenId>& tokens) {
  std::vector<ContentKey> keys;
  ContentDigest digest = DigestOf({});
  for (size_t at = 0; at + limits::kBlockTokens <= tokens.size(); at += limits::kBlockTokens) {
    digest = Extend(digest, absl::MakeConstSpan(tokens).subspan(at, limits::kBlockTokens));
    keys.push_back(KeyOf(digest));
  }
  return keys;
}

class ReplicatedPipeline {
 public:
  ReplicatedPipeline(FaultyNetwork* network, std::string where, uint64_t first_stage,
                     std::vector<LayerRange> split, uint32_t blocks_each_layer,
                     uint64_t frame_bytes)
      : address(std::move(where)),
        layers(std::move(split)),
        worker(10'000, network->Join(address), 0, frame_bytes) {
    network->SetCore(address, &worker.core);
    for (const LayerRange& range : layers) {
      stages.push_back(first_stage + stages.size());
      worker.Load(stages.back(), range, blocks_each_layer * range.size());
    }
    worker.FinishLoads();
    worker.Told();
  }

  PipelineEpoch pipeline_epoch() const { return {1, epoch}; }
  v1::StepPlan Plan() {
    v1::StepPlan plan;
    ToWire(pipeline_epoch(), plan.mutable_epoch());
    plan.set_step_id(++step);
    return plan;
  }
  void Run(const v1::StepPlan& plan) {
    worker.SendAll(stages, plan);
    worker.RunAll();
    for (const v1::FromWorker& message : worker.ports.messages) {
      if (!message.has_report()) continue;
      ASSERT_EQ(message.report().error_code(), 0u) << message.report().error_message();
      last_report = message.report();
    }
    worker.Told();
  }
  // What ACTIVE told, by stage: of each sequence the rows.
  std::map<uint64_t, std::map<uint64_t, uint32_t>> Active() {
    std::map<uint64_t, std::map<uint64_t, uint32_t>> active;
    for (const v1::FromWorker& message : worker.ports.messages) {
      if (!message.has_stage_state()) continue;
      const v1::StageState& state = message.stage_state();
      EXPECT_EQ(state.state(), v1::StageState::ACTIVE) << state.error_message();
      EXPECT_FALSE(active.contains(state.stage_id())) << "told twice";
      auto& held = active[state.stage_id()];
      for (const v1::HeldSequence& sequence : state.held()) {
        EXPECT_EQ(sequence.prefix_blocks() * limits::kBlockTokens, sequence.rows());
        held[sequence.sequence_id()] = sequence.rows();
      }
    }
    return active;
  }
  void ExpectRows(size_t index, uint64_t id, const std::vector<TokenId>& tokens,
                  uint32_t rows) const {
    const LatentCache& cache = worker.core.FindStage(stages[index])->cache();
    ASSERT_TRUE(cache.resident(SequenceId{id}));
    ASSERT_EQ(cache.length(SequenceId{id}), rows);
    const auto tables = cache.PageTables(SequenceId{id});
    for (LayerIndex layer = layers[index].begin; layer < layers[index].end; ++layer) {
      for (uint32_t p = 0; p < rows; ++p) {
        const BlockId block = tables[layer - layers[index].begin][p / limits::kBlockTokens];
        ASSERT_EQ(worker.cache.Peek(block, p % limits::kBlockTokens), FakeRow(layer, tokens[p], p))
            << "layer " << layer << ", position " << p;
      }
    }
  }

  const std::string address;
  const std::vector<LayerRange> layers;
  ManyStages worker;
  std::vector<uint64_t> stages;
  uint64_t epoch = 0;
  uint64_t step = 0;
  v1::StageReport last_report;
};

struct ReplicatedPipelines {
  static constexpr uint64_t kSecret = 0x5EC12E7;
  static constexpr uint64_t kReplicaSecret = 0xB0DD7;

  ReplicatedPipelines(uint32_t seed, uint32_t replica_blocks)
      : rng(seed), network(seed), buddy(10, network.Join("buddy:1"), replica_blocks, FrameBytes()) {
    network.SetCore("buddy:1", &buddy.core);
  }
  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(rng() % end); }
  // One block, several, or all layers of several.
  uint64_t FrameBytes() { return (64u << Below(6)) * kHashRowBytes + 100; }

  ReplicatedPipeline* Make(std::vector<LayerRange> split, uint32_t blocks_each_layer = 40) {
    const uint64_t number = pipelines.size() + 1;
    pipelines.push_back(std::make_unique<ReplicatedPipeline>(
        &network, "p" + std::to_string(number) + ":1", number * 100, std::move(split),
        blocks_each_layer, FrameBytes()));
    return pipelines.back().get();
  }

  // ---- What the workers' loops and time do ----
  void Turn() {
    now_us += 1 + Below(3'000);
    for (const auto& pipeline : pipelines) {
      pipeline->worker.now_us = now_us;
      if (pipeline->worker.core.CopiesRows()) pipeline->worker.core.PollCopies(now_us);
    }
    if (buddy.core.CopiesRows()) buddy.core.PollCopies(now_us);
    for (uint32_t i = Below(4); i > 0; --i) network.Deliver(now_us);
    for (const v1::FromWorker& message : std::exchange(buddy.ports.messages, {})) {
      ASSERT_TRUE(message.has_replicated());
      Told(message.replicated());
    }
    for (const auto& pipeline : pipelines) pipeline->worker.ExpectSound();
    buddy.ExpectSound();
  }
  template <class Until>
  ::testing::AssertionResult TurnUntil(Until until) {
    for (int i = 0; i < 100'000; ++i) {
      if (until()) return ::testing::AssertionSuccess();
      Turn();
      if (::testing::Test::HasFailure()) return ::testing::AssertionFailure();
    }
    return ::testing::AssertionFailure() << "it does not come";
  }
  void Told(const v1::Replicated& replicated) {
    for (const bool ok : {true, false}) {
      const auto keys = ParseContentKeys(ok ? replicated.keys() : replicated.failed());
      ASSERT_TRUE(keys.ok());
      for (const ContentKey& key : *keys) {
        const std::pair which(replicated.stage_id(), key);
        const auto it = pending.find(which);
        ASSERT_NE(it, pending.end()) << "told, and not asked for";
        pending.erase(it);
        if (ok) acked.insert(which);
        num_failed += !ok;
      }
    }
    bytes_told += replicated.fetched_bytes();
  }

  // ---- What the coordinator says ----
  void ServePrefixes(ReplicatedPipeline* pipeline) {
    v1::ToWorker message;
    v1::ServeRows& serve = *message.mutable_serve_rows();
    ToWire(pipeline->pipeline_epoch(), serve.mutable_epoch());
    serve.set_secret(kSecret);
    for (const uint64_t stage : pipeline->stages) {
      serve.set_stage_id(stage);
      pipeline->worker.core.OnMessage(message, now_us);
    }
  }
  void ServeReplicas() {
    v1::ToWorker message;
    message.mutable_serve_rows()->set_secret(kReplicaSecret);
    buddy.core.OnMessage(message, now_us);
  }
  void Replicate(const ReplicatedPipeline& pipeline, size_t index,
                 const std::vector<ContentKey>& keys, uint64_t bytes_per_s = 0) {
    v1::ToWorker message;
    v1::Replicate& replicate = *message.mutable_replicate();
    v1::RowsSource& source = *replicate.mutable_source();
    source.set_layer_begin(pipeline.layers[index].begin);
    source.set_layer_end(pipeline.layers[index].end);
    source.set_stage_id(pipeline.stages[index]);
    ToWire(pipeline.pipeline_epoch(), source.mutable_epoch());
    source.set_data_address(pipeline.address);
    source.set_secret(kSecret);
    replicate.set_keys(Pack(keys));
    replicate.set_bytes_per_s(bytes_per_s);
    for (const ContentKey& key : keys) pending.insert({pipeline.stages[index], key});
    buddy.core.OnMessage(std::move(message), now_us);
  }
  void Forget(const std::vector<ContentKey>& keys, LayerRange layers) {
    v1::ToWorker message;
    v1::Replicate& replicate = *message.mutable_replicate();
    replicate.set_layer_begin(layers.begin);
    replicate.set_layer_end(layers.end);
    replicate.set_forget(Pack(keys));
    buddy.core.OnMessage(std::move(message), now_us);
  }
  // Of these sequences, by id, the full blocks.
  void AddRestores(v1::ActivateStage* activate, LayerRange layers,
                   const std::map<uint64_t, std::vector<TokenId>>& sequences,
                   uint32_t timeout_ms) const {
    activate->set_restore_timeout_ms(timeout_ms);
    for (const auto& [id, tokens] : sequences) {
      const std::vector<ContentKey> keys = KeysOfTokens(tokens);
      if (keys.empty()) continue;
      v1::FetchRows& fetch = *activate->add_restores();
      fetch.set_stage_id(activate->stage_id());
      *fetch.mutable_epoch() = activate->epoch();
      fetch.set_sequence_id(id);
      fetch.mutable_placement()->set_term(1);
      fetch.mutable_placement()->set_counter(1000 + id);
      const auto rows = static_cast<uint32_t>(keys.size() * limits::kBlockTokens);
      fetch.set_end_row(rows);
      fetch.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.begin() + rows);
      fetch.set_keys(Pack(keys));
      // Whoever has them: each layer may be of another source.
      for (LayerIndex at = layers.begin; at < layers.end;) {
        const LayerIndex end = at + 1 + (id + at) % 3;
        v1::RowsSource* source = fetch.add_sources();
        source->set_layer_begin(at);
        source->set_layer_end(std::min(end, layers.end));
        source->set_data_address("buddy:1");
        source->set_secret(kReplicaSecret);
        at = source->layer_end();
      }
    }
  }
  void Activate(ReplicatedPipeline* pipeline,
                const std::map<uint64_t, std::vector<TokenId>>& restored = {},
                uint32_t timeout_ms = 0) {
    ++pipeline->epoch;
    pipeline->step = 0;
    pipeline->worker.now_us = now_us;
    for (size_t i = 0; i < pipeline->stages.size(); ++i) {
      pipeline->worker.Activate(pipeline->stages, i, pipeline->epoch,
                                [&](v1::ActivateStage* activate) {
                                  AddRestores(activate, pipeline->layers[i], restored, timeout_ms);
                                });
    }
  }
  bool AllActive(ReplicatedPipeline* pipeline) const {
    return pipeline->Active().size() == pipeline->stages.size();
  }

  std::mt19937 rng;
  FaultyNetwork network;
  std::vector<std::unique_ptr<ReplicatedPipeline>> pipelines;
  ManyStages buddy;
  uint64_t now_us = 1'000'000;
  std::multiset<std::pair<uint64_t, ContentKey>> pending;  // by stage, not told
  std::set<std::pair<uint64_t, ContentKey>> acked;
  int num_failed = 0;
  uint64_t bytes_told = 0;
};

}  // namespace strait
