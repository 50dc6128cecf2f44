// SPDX-License-Identifier: Apache-2.0
//
// Harness drives a Core by hand: workers that load and activate at once, steps that wait until the
// test lets a stage report them.
//
// Thread:  the test's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/limits.h"
#include "proto/model/reservation.h"
#include "proto/wire/tables_digest.h"
#include "proto/wire/version.h"

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

inline RequestSpec OneSequence(uint32_t prompt_tokens, uint32_t max_tokens) {
  RequestSpec request;
  SequenceSpec& spec = request.sequences.emplace_back();
  for (uint32_t i = 0; i < prompt_tokens; ++i) spec.prompt.push_back(10 + i % 80);
  spec.max_tokens = max_tokens;
  spec.ignore_eos = true;
  return request;
}

class Harness {
 public:
  // A stage as its worker knows it.
  struct FakeStage {
    v1::LoadStage load;
    v1::ActivateStage activate;  // the last one
    v1::PipelineEpoch epoch;
    bool first = false;
    bool last = false;
    std::deque<v1::StepPlan> plans;  // not reported
    std::map<SequenceId, uint32_t> lengths;
  };
  struct FakeWorker {
    std::map<uint64_t, FakeStage> stages;
    bool evicted = false;
    absl::Status why;
  };

  Harness(CoreOptions options, ModelShape model)
      : block_bytes(model.block_bytes), core(std::move(options), std::move(model)) {}

  // The Hello of the next worker.
  v1::Hello MakeHello(uint64_t memory_bytes) const {
    const uint64_t id = last_worker + 1;
    v1::Hello hello;
    hello.set_wire_version(kWireVersion);
    hello.set_name("w" + std::to_string(id));
    hello.set_data_address("host:" + std::to_string(id));
    hello.set_memory_bytes(memory_bytes);
    hello.set_model_fingerprint(7);
    hello.set_weights_fingerprint(0xABC);
    hello.set_cache_row_bytes(2);
    hello.set_instance(id);
    return hello;
  }
  WorkerId Attach(uint64_t memory_bytes) { return Attach(MakeHello(memory_bytes)); }
  WorkerId Attach(const v1::Hello& hello) {
    const WorkerId id{++last_worker};
    workers[id];
    core.OnWorkerAttached(id, hello, now_us);
    Pump();
    return id;
  }
  void Lose(WorkerId id) {
    workers.erase(id);
    core.OnWorkerLost(id, absl::UnavailableError("gone"), now_us);
    Pump();
  }
  RequestId Submit(RequestSpec spec) {
    const RequestId id{++last_request};
    core.OnSubmit(id, std::move(spec), now_us);
    Pump();
    return id;
  }
  // Time passes, in which the coordinator is awake and all workers beat.
  void Tick(uint64_t after_us) { Pass(after_us, true); }
  void TickInSilence(uint64_t after_us) { Pass(after_us, false); }
  // Time passes in which the coordinator is stopped.
  void Pause(uint64_t us) {
    now_us += us;
    core.OnTick(now_us);
    Pump();
  }
  void Beat(WorkerId id) {
    v1::FromWorker message;
    message.mutable_heartbeat();
    core.OnWorkerMessage(id, message, now_us);
  }

  // The worker's one stage.
  FakeStage& StageOf(WorkerId id) { return workers.at(id).stages.begin()->second; }
  // The honest report of the stage's oldest plan; sampled tokens come from `next_token`.
  v1::StageReport MakeReport(WorkerId id) {
    FakeStage& stage = StageOf(id);
    const v1::StepPlan plan = stage.plans.front();
    stage.plans.pop_front();
    v1::StageReport report;
    report.set_stage_id(plan.stage_id());
    *report.mutable_epoch() = plan.epoch();
    report.set_step_id(plan.step_id());
    for (const v1::CacheOp& op : plan.cache_ops()) {
      if (op.has_open()) stage.lengths[SequenceId{op.open().sequence_id()}] = 0;
      if (op.has_close()) stage.lengths.erase(SequenceId{op.close().sequence_id()});
    }
    for (const v1::SequenceStep& step : plan.sequences()) {
      stage.lengths.at(SequenceId{step.sequence_id()}) +=
          step.has_sampled() ? 1 : step.literals().ids_size();
      if (step.has_sampled() && (stage.first || stage.last)) {
        const auto sampled = last_sampled.find(step.sequence_id());
        report.add_granted_ids(sampled == last_sampled.end() ? next_token : sampled->second);
      }
      if (!stage.last || step.logits().empty()) continue;
      v1::SequenceResult* result = report.add_results();
      result->set_sequence_id(step.sequence_id());
      for (const v1::LogitsWanted& wanted : step.logits()) {
        v1::TokenLogprob* out =
            wanted.has_sample() ? result->mutable_sampled() : result->add_scored();
        out->set_token_id(wanted.has_sample() ? next_token : wanted.score_token());
        out->set_logprob(-1);
        if (wanted.has_sample()) last_sampled[step.sequence_id()] = next_token;
      }
    }
    TablesDigest digest;
    uint64_t blocks = 0;
    const uint32_t layers = stage.load.layer_end() - stage.load.layer_begin();
    for (const auto& [sequence, length] : stage.lengths) {
      digest.Add(sequence, length);
      blocks += BlocksOfSequence(length, layers);
    }
    report.set_cache_bytes(blocks * block_bytes);
    report.set_tables_digest(digest.Value());
    return report;
  }
  // Of the edge that ends at this stage.
  static std::string NcclId(uint64_t stage_id) {
    return std::string(limits::kNcclIdBytes, static_cast<char>('a' + stage_id));
  }
  void Report(WorkerId id) { Send(id, MakeReport(id)); }
  void Send(WorkerId id, const v1::StageReport& report) {
    v1::FromWorker message;
    *message.mutable_report() = report;
    core.OnWorkerMessage(id, message, now_us);
    Pump();
  }
  // Every stage reports everything, until nothing more is planned.
  void Run() {
    for (bool any = true; any;) {
      any = false;
      for (auto& [id, worker] : workers) {
        while (!worker.evicted && !worker.stages.empty() && !StageOf(id).plans.empty()) {
          Report(id);
          any = true;
        }
      }
    }
  }

  void Pump() {
    for (std::vector<CoreMessage> messages = core.Take(now_us); !messages.empty();
         messages = core.Take(now_us)) {
      for (const CoreMessage& message : messages)
        std::visit([this](const auto& m) { On(m); }, message);
    }
    const absl::Status sound = core.CheckIntegrity();
    if (!sound.ok()) problems.push_back(sound.ToString());
  }

  const uint64_t block_bytes;
  Core core;
  uint64_t now_us = 1'000'000;
  uint64_t last_request = 0;
  uint64_t last_worker = 0;
  uint32_t next_token = 50;
  std::map<uint64_t, uint32_t> last_sampled;  // by sequence
  bool answer_loads = true;
  bool answer_activations = true;
  bool answer_nccl_ids = true;
  std::map<WorkerId, FakeWorker> workers;
  std::map<RequestId, std::vector<TokenInfo>> tokens;
  std::map<RequestId, std::vector<TokenInfo>> scores;
  std::map<RequestId, SequenceEnded> ended;
  std::map<RequestId, absl::Status> refused;
  std::vector<std::string> problems;

 private:
  void Pass(uint64_t us, bool beats) {
    for (const uint64_t end_us = now_us + us; now_us < end_us;) {
      now_us = std::min(end_us, now_us + kCallGapUs);
      for (auto& [id, worker] : workers) {
        if (beats && !worker.evicted) Beat(id);
      }
      core.OnTick(now_us);
      Pump();
    }
  }
  void Answer(WorkerId id, const v1::StageState& state) {
    v1::FromWorker message;
    *message.mutable_stage_state() = state;
    core.OnWorkerMessage(id, message, now_us);
  }
  void On(const SendToWorker& m) {
    const auto it = workers.find(m.worker);
    if (it == workers.end()) return;
    FakeWorker& worker = it->second;
    v1::StageState state;
    if (m.message.has_load_stage()) {
      const v1::LoadStage& load = m.message.load_stage();
      worker.stages[load.stage_id()].load = load;
      if (!answer_loads) return;
      state.set_stage_id(load.stage_id());
      state.set_state(v1::StageState::LOADED);
      state.set_cache_bytes(load.cache_bytes());
      Answer(m.worker, state);
    } else if (m.message.has_activate_stage()) {
      const v1::ActivateStage& activate = m.message.activate_stage();
      FakeStage& stage = worker.stages.at(activate.stage_id());
      stage.epoch = activate.epoch();
      stage.activate = activate;
      stage.first = activate.previous_stage_id() == 0;
      stage.last = activate.next_stage_id() == 0;
      stage.plans.clear();
      stage.lengths.clear();
      if (activate.edge_over_nccl() && answer_nccl_ids) {
        v1::FromWorker id;
        id.mutable_edge_id()->set_stage_id(activate.stage_id());
        *id.mutable_edge_id()->mutable_epoch() = activate.epoch();
        id.mutable_edge_id()->set_nccl_id(NcclId(activate.stage_id()));
        core.OnWorkerMessage(m.worker, id, now_us);
      }
      if (!answer_activations) return;
      state.set_stage_id(activate.stage_id());
      state.set_state(v1::StageState::ACTIVE);
      *state.mutable_epoch() = activate.epoch();
      Answer(m.worker, state);
    } else if (m.message.has_unload_stage()) {
      worker.stages.erase(m.message.unload_stage().stage_id());
      state.set_stage_id(m.message.unload_stage().stage_id());
      state.set_state(v1::StageState::UNLOADED);
      Answer(m.worker, state);
    } else if (m.message.has_step()) {
      worker.stages.at(m.message.step().stage_id()).plans.push_back(m.message.step());
    }
  }
  void On(const EvictWorker& m) {
    workers[m.worker].evicted = true;
    workers[m.worker].why = m.why;
    workers[m.worker].stages.clear();
  }
  void On(const RequestRefused& m) { refused[m.request] = m.why; }
  void On(const RequestAdmitted&) {}
  void On(const PromptScored& m) {
    auto& all = scores[m.request];
    all.insert(all.end(), m.scores.begin(), m.scores.end());
  }
  void On(const TokenEmitted& m) { tokens[m.request].push_back(m.token); }
  void On(const SequenceEnded& m) { ended[m.request] = m; }
};

}  // namespace strait
