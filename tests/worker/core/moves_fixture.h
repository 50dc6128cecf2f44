// SPDX-License-Identifier: Apache-2.0
//
// TwoPipelines are two workers, each with a whole pipeline of other layer ranges, and a coordinator that moves a
// sequence from the first to the second: in rounds, frozen, opened.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "proto/wire/epoch_wire.h"
#include "tests/worker/core/many_stages.h"
#include "tests/worker/transfer/faulty_network.h"

namespace strait {

// What was told of one placement, by stage.
struct Told {
  std::map<uint64_t, v1::RowsFetched> fetched;
  std::map<uint64_t, v1::RowsServed> served;
  int num_errors = 0;
};

class Pipeline {
 public:
  Pipeline(FaultyNetwork* network, std::string where, uint64_t first_stage,
           std::vector<LayerRange> split, uint32_t blocks_each_layer = 40)
      : address(std::move(where)),
        worker(10'000, network->Join(address)),
        layers(std::move(split)) {
    network->SetCore(address, &worker.core);
    for (const LayerRange& range : layers) {
      stages.push_back(first_stage + stages.size());
      worker.Load(stages.back(), range, blocks_each_layer * range.size());
    }
    worker.FinishLoads();
    Activate();
  }

  void Activate() {
    worker.ActivateAll(stages, ++epoch);
    worker.Told();
    step = 0;
    report_of.clear();
  }
  PipelineEpoch pipeline_epoch() const { return {1, epoch}; }
  // A plan for all stages.
  v1::StepPlan Plan() {
    v1::StepPlan plan;
    ToWire(pipeline_epoch(), plan.mutable_epoch());
    plan.set_step_id(++step);
    return plan;
  }
  void Send(const v1::StepPlan& plan) { worker.SendAll(stages, plan); }
  void SendEach(v1::ToWorker message, uint64_t* stage_id) {
    for (const uint64_t stage : stages) {
      *stage_id = stage;
      worker.core.OnMessage(message, 0);
    }
  }
  // Reports and rows that were told since the last call.
  void Read(std::map<PlacementEpoch, Told>* told) {
    for (const v1::FromWorker& message : std::exchange(worker.ports.messages, {})) {
      if (message.has_report()) {
        EXPECT_EQ(message.report().error_code(), 0u) << message.report().error_message();
        report_of[message.report().stage_id()] = message.report();
      } else if (message.has_rows_fetched()) {
        const v1::RowsFetched& rows = message.rows_fetched();
        Told& to = (*told)[{rows.placement().term(), rows.placement().counter()}];
        to.fetched[rows.stage_id()] = rows;
        to.num_errors += rows.error_code() != 0;
      } else if (message.has_rows_served()) {
        const v1::RowsServed& rows = message.rows_served();
        Told& to = (*told)[{rows.placement().term(), rows.placement().counter()}];
        EXPECT_FALSE(to.served.contains(rows.stage_id())) << "told twice";
        to.served[rows.stage_id()] = rows;
      }
    }
    worker.ports.told.clear();
  }
  void ExpectRows(uint64_t id, const std::vector<TokenId>& tokens) const {
    for (size_t i = 0; i < stages.size(); ++i) {
      const LatentCache& cache = worker.core.FindStage(stages[i])->cache();
      ASSERT_TRUE(cache.resident(SequenceId{id}));
      ASSERT_EQ(cache.length(SequenceId{id}), tokens.size());
      const auto tables = cache.PageTables(SequenceId{id});
      for (LayerIndex layer = layers[i].begin; layer < layers[i].end; ++layer) {
        for (uint32_t p = 0; p < tokens.size(); ++p) {
          const BlockId block = tables[layer - layers[i].begin][p / limits::kBlockTokens];
          ASSERT_EQ(worker.cache.Peek(block, p % limits::kBlockTokens),
                    FakeRow(layer, tokens[p], p))
              << "layer " << layer << ", position " << p;
        }
      }
    }
  }

  const std::string address;
  ManyStages worker;
  std::vector<uint64_t> stages;
  std::vector<LayerRange> layers;
  uint64_t epoch = 0;
  uint64_t step = 0;
  std::map<uint64_t, v1::StageReport> report_of;  // the last
};

struct TwoPipelines {
  TwoPipelines(uint32_t seed, std::vector<LayerRange> from_layers,
               std::vector<LayerRange> to_layers)
      : rng(seed),
        network(seed),
        from(&network, "from:1", 11, std::move(from_layers)),
        to(&network, "to:1", 21, std::move(to_layers)) {}

  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(rng() % end); }

  // ---- What the workers' loops and time do ----
  void Turn() {
    now_us += 1 + Below(3'000);
    for (Pipeline* pipeline : {&from, &to}) {
      ManyStages& worker = pipeline->worker;
      if (Below(2) == 0) worker.Begin();
      if (Below(2) == 0) worker.Finish();
      if (worker.core.CopiesRows()) worker.core.PollCopies(now_us);
    }
    for (uint32_t i = Below(3); i > 0; --i) network.Deliver(now_us);
    Read();
  }
  template <class Until>
  ::testing::AssertionResult TurnUntil(Until until) {
    for (int i = 0; i < 100'000; ++i) {
      if (until()) return ::testing::AssertionSuccess();
      Turn();
      if (::testing::Test::HasFatalFailure()) return ::testing::AssertionFailure();
    }
    return ::testing::AssertionFailure() << "it does not come";
  }
  void Read() {
    from.Read(&told);
    to.Read(&told);
    for (Pipeline* pipeline : {&from, &to}) {
      const absl::Status sound = pipeline->worker.core.CheckIntegrity();
      ASSERT_TRUE(sound.ok()) << sound;
    }
  }

  // ---- What the coordinator says ----
  void Grow(Pipeline* pipeline, uint64_t id, std::vector<TokenId>* tokens, uint32_t count) {
    v1::StepPlan plan = pipeline->Plan();
    if (tokens->empty()) AddOpen(&plan, id);
    AddMore(&plan, id, tokens, count);
    pipeline->Send(plan);
  }
  void AddMore(v1::StepPlan* plan, uint64_t id, std::vector<TokenId>* tokens, uint32_t count) {
    const auto first = static_cast<uint32_t>(tokens->size());
    for (uint32_t i = 0; i < count; ++i) tokens->push_back(Below(kFakeVocab));
    v1::SequenceStep* step = AddRows(plan, id, first, {tokens->begin() + first, tokens->end()});
    WantScore(step, count - 1, 1);
  }
  bool AllReported(const Pipeline& pipeline) const {
    if (pipeline.report_of.size() < pipeline.stages.size()) return pipeline.step == 0;
    return std::all_of(pipeline.report_of.begin(), pipeline.report_of.end(),
                       [&](const auto& entry) { return entry.second.step_id() == pipeline.step; });
  }
  template <class Message>
  void SetPlacement(Message* message, uint64_t id, PlacementEpoch placement) const {
    message->set_sequence_id(id);
    message->mutable_placement()->set_term(placement.term);
    message->mutable_placement()->set_counter(placement.counter);
  }
  void Serve(uint64_t id, PlacementEpoch placement, uint32_t served_rows = 0, bool end = false) {
    v1::ToWorker message;
    v1::ServeRows& serve = *message.mutable_serve_rows();
    ToWire(from.pipeline_epoch(), serve.mutable_epoch());
    SetPlacement(&serve, id, placement);
    serve.set_secret(kSecret);
    serve.set_served_rows(served_rows);
    serve.set_end(end);
    for (const uint64_t stage : from.stages) {
      serve.set_stage_id(stage);
      from.worker.core.OnMessage(message, now_us);
    }
  }
  void Import(uint64_t id, PlacementEpoch placement, uint32_t rows) {
    v1::StepPlan plan = to.Plan();
    v1::ImportSequence* import = plan.add_cache_ops()->mutable_import();
    SetPlacement(import, id, placement);
    import->set_rows(rows);
    to.Send(plan);
  }
  void Fetch(uint64_t id, PlacementEpoch placement, const std::vector<TokenId>& tokens,
             uint32_t begin, uint32_t end, bool is_last, uint64_t bytes_per_s = 0) {
    for (size_t i = 0; i < to.stages.size(); ++i) {
      v1::ToWorker message;
      v1::FetchRows& fetch = *message.mutable_fetch_rows();
      fetch.set_stage_id(to.stages[i]);
      ToWire(to.pipeline_epoch(), fetch.mutable_epoch());
      SetPlacement(&fetch, id, placement);
      fetch.set_begin_row(begin);
      fetch.set_end_row(end);
      fetch.mutable_tokens()->mutable_ids()->Add(tokens.begin() + begin, tokens.begin() + end);
      fetch.set_is_last(is_last);
      fetch.set_bytes_per_s(bytes_per_s);
      for (size_t s = 0; s < from.stages.size(); ++s) {
        const LayerIndex first = std::max(from.layers[s].begin, to.layers[i].begin);
        const LayerIndex last = std::min(from.layers[s].end, to.layers[i].end);
        if (first >= last) continue;
        v1::RowsSource* source = fetch.add_sources();
        source->set_layer_begin(first);
        source->set_layer_end(last);
        source->set_stage_id(from.stages[s]);
        ToWire(from.pipeline_epoch(), source->mutable_epoch());
        source->set_data_address(from.address);
        source->set_secret(kSecret);
      }
      to.worker.core.OnMessage(std::move(message), now_us);
    }
  }
  bool Fetched(PlacementEpoch placement, uint32_t rows) {
    const Told& of = told[placement];
    return of.num_errors > 0 ||
           (of.fetched.size() == to.stages.size() &&
            std::all_of(of.fetched.begin(), of.fetched.end(),
                        [&](const auto& entry) { return entry.second.rows() == rows; }));
  }
  bool Served(PlacementEpoch placement) {
    return told[placement].served.size() == from.stages.size();
  }
  uint64_t DigestFetched(PlacementEpoch placement) {
    uint64_t sum = 0;
    for (const auto& [stage, rows] : told[placement].fetched) sum += rows.digest();
    return sum;
  }
  uint64_t DigestServed(PlacementEpoch placement) {
    uint64_t sum = 0;
    for (const auto& [stage, rows] : told[placement].served) sum += rows.digest();
    return sum;
  }
  void ExpectNothingUnderWay() {
    network.faults = {};
    EXPECT_TRUE(TurnUntil([&] {
      return !from.worker.core.CopiesRows() && !to.worker.core.CopiesRows() &&
             !network.Deliver(now_us);
    }));
  }

  static constexpr uint64_t kSecret = 0x5EC12E7;
  std::mt19937 rng;
  FaultyNetwork network;
  Pipeline from;
  Pipeline to;
  std::map<PlacementEpoch, Told> told;
  uint64_t now_us = 1'000'000;
};

}  // namespace strait
