// SPDX-License-Identifier: Apache-2.0
//
// Ports and a transport that write down what a WorkerCore asks of them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/worker/stage/fake_model.h"
#include "worker/core/worker_core.h"

namespace strait {

class RecordingTransport final : public Transport {
 public:
  void Connect(const Edge& edge) override {
    calls += " connect " + std::to_string(edge.id);
    all_ahead = all_ahead && edge.ahead;
  }
  absl::Status Send(uint64_t from_stage_id, HiddenStep hidden) override {
    sent.emplace_back(from_stage_id, std::move(hidden));
    return absl::OkStatus();
  }
  absl::Status SendSampled(uint64_t, SampledStep) override { return absl::OkStatus(); }
  void Probe(uint64_t) override { calls += " probe"; }
  void Disconnect(uint64_t) override { calls += " disconnect"; }
  void Expect(const Edge& edge) override {
    calls += " expect " + std::to_string(edge.id);
    all_ahead = all_ahead && edge.ahead;
  }
  void Forget(uint64_t) override { calls += " forget"; }
  void Retire(uint64_t) override { calls += " retire"; }
  void Consumed(uint64_t, PipelineEpoch, StepId) override {}
  std::string calls;
  bool all_ahead = true;  // all edges were made ahead
  std::vector<std::pair<uint64_t, HiddenStep>> sent;
};

class RecordingPorts final : public WorkerPorts {
 public:
  void Tell(v1::FromWorker message) override {
    std::string what;
    if (message.has_stage_state()) {
      const v1::StageState& state = message.stage_state();
      what = v1::StageState::State_Name(state.state());
      if (state.error_code() != 0) what += " " + std::to_string(state.error_code());
    } else if (message.has_report()) {
      what = "report " + std::to_string(message.report().error_code());
    } else if (message.has_stage_linked()) {
      what = "linked";
      const uint32_t code = message.stage_linked().error_code();
      if (code != 0) what += " " + std::to_string(code);
    } else if (message.has_edge_id()) {
      what = "edge id";
    } else if (message.has_cache_resized()) {
      const v1::CacheResized& resized = message.cache_resized();
      what = "resized " + std::to_string(resized.cache_bytes() / kFakeBlockBytes);
      if (resized.error_code() != 0) what += " " + std::to_string(resized.error_code());
    }
    told += (told.empty() ? "" : ", ") + what;
    messages.push_back(std::move(message));
  }
  void DropCoordinator(absl::Status) override { told += "drop"; }
  void Shutdown() override { told += "shutdown"; }
  void Load(const LoadOrder& order) override { loads.push_back(order); }
  void CancelLoads(uint64_t) override { loads.clear(); }
  void RowsDue(uint64_t, PipelineEpoch, StepId, uint32_t num_rows) override {
    rows_due += num_rows;
  }
  void Note(LogLevel, std::string_view, std::initializer_list<LogField>) override {}
  std::string told;
  std::vector<v1::FromWorker> messages;
  std::vector<LoadOrder> loads;
  uint32_t rows_due = 0;
};

}  // namespace strait
