// SPDX-License-Identifier: Apache-2.0
//
// WorkerTest is a worker with the hash backend and a coordinator that does what the test says.
//
// Thread:  the test's; the worker's loop has its own.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/base/limits.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/queue.h"
#include "proto/rpc/stream.h"
#include "strait/v1/cluster.grpc.pb.h"
#include "tests/sim/hash_backend.h"
#include "tests/sim/oracle.h"
#include "worker/service/service.h"

namespace strait {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;
using Stream = rpc::ServerStream<v1::FromWorker, v1::ToWorker>;

inline ModelShape Shape() {
  ModelShape shape;
  shape.vocab_size = 1000;
  shape.max_positions = 4096;
  shape.layer_weight_bytes.assign(6, 1000);
  shape.block_bytes = 64 * sizeof(uint64_t);
  return shape;
}

// A coordinator that does what the test says.
class FakeCoordinator final : public v1::Coordinator::CallbackService {
 public:
  FakeCoordinator() {
    grpc::ServerBuilder builder;
    rpc::ConfigureServer(builder, "127.0.0.1:0", rpc::Traffic::kControl, &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeCoordinator() override {
    End(absl::UnavailableError("the test is over"));
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  grpc::ServerBidiReactor<v1::FromWorker, v1::ToWorker>* Attach(
      grpc::CallbackServerContext* context) override {
    auto stream = std::make_shared<Stream>(
        context,
        rpc::StreamOptions{
            .max_queued_messages = 1000, .max_queued_bytes = 1 << 24, .max_message_bytes = 1 << 24},
        rpc::StreamEvents<v1::FromWorker>{.on_message =
                                              [this](v1::FromWorker message) {
                                                if (!message.has_heartbeat()) {
                                                  said_.Push(std::move(message));
                                                  return true;
                                                }
                                                ++beats;
                                                if (answer_beats) {
                                                  v1::ToWorker ping;
                                                  ping.mutable_ping();
                                                  Send(ping);
                                                }
                                                return true;
                                              },
                                          .on_end = [](absl::Status) {}});
    stream->Start();
    std::lock_guard lock(mu_);
    stream_ = stream;
    return stream.get();
  }

  void Send(const v1::ToWorker& message) {
    if (auto stream = Current()) (void)stream->Send(message);
  }
  void End(absl::Status status) {
    if (auto stream = Current()) stream->Close(std::move(status));
  }
  v1::FromWorker Next() {
    if (ready_.empty()) ready_ = said_.PopAll(30s);
    if (ready_.empty()) {
      ADD_FAILURE() << "the worker said nothing";
      return {};
    }
    v1::FromWorker message = std::move(ready_.front());
    ready_.pop_front();
    return message;
  }
  // The next message that is no progress.
  v1::FromWorker Answer() {
    v1::FromWorker message = Next();
    while (message.has_load_progress()) message = Next();
    return message;
  }
  // Reads Hello and welcomes.
  v1::Hello Welcome(uint32_t silence_timeout_ms = 0) {
    v1::FromWorker first = Answer();
    while (!first.has_hello() && !testing::Test::HasFailure()) first = Answer();
    v1::ToWorker welcome;
    welcome.mutable_welcome()->set_worker_id(1);
    welcome.mutable_welcome()->set_term(term);
    welcome.mutable_welcome()->set_heartbeat_interval_ms(20);
    welcome.mutable_welcome()->set_heartbeat_timeout_ms(silence_timeout_ms);
    Send(welcome);
    return first.hello();
  }

  int port = 0;
  uint64_t term = 1;
  std::atomic<int> beats = 0;
  std::atomic<bool> answer_beats = true;

 private:
  std::shared_ptr<Stream> Current() {
    std::lock_guard lock(mu_);
    return stream_;
  }

  std::mutex mu_;
  std::shared_ptr<Stream> stream_;  // guarded by mu_
  BoundedQueue<v1::FromWorker> said_{1 << 16};
  std::deque<v1::FromWorker> ready_;
  std::unique_ptr<grpc::Server> server_;
};

class WorkerTest : public testing::Test {
 protected:
  explicit WorkerTest(NcclOffer nccl = {}) : shape_(Shape()), backend_(&shape_, 1 << 24) {
    WorkerOptions options;
    options.coordinator_address = "127.0.0.1:" + std::to_string(coordinator_.port);
    options.name = "tested";
    options.memory_bytes = 1 << 24;
    options.model_fingerprint = 42;
    options.weights_fingerprint = 43;
    options.cache_row_bytes = 8;
    options.stage_costs = StageCosts{.layer_bytes = {1, 2, 3},
                                     .block_bytes = 4,
                                     .workspace_bytes = {5},
                                     .last_workspace_bytes = {6}};
    options.nccl = std::move(nccl);
    options.core.orphan_timeout_us = 3'000'000;
    options.core.replica_bytes = 1 << 20;
    auto made = WorkerProcess::Create(options, &backend_);
    EXPECT_TRUE(made.ok()) << made.status();
    worker_ = std::move(*made);
    thread_ = std::thread([this] { worker_->Run(); });
  }
  ~WorkerTest() override {
    worker_->Stop();
    thread_.join();
    worker_.reset();
  }

  void Load(uint64_t id, uint32_t begin, uint32_t end, uint32_t blocks = 600) {
    v1::ToWorker message;
    v1::LoadStage& load = *message.mutable_load_stage();
    load.set_stage_id(id);
    load.set_layer_begin(begin);
    load.set_layer_end(end);
    load.set_cache_bytes(blocks * shape_.block_bytes);
    coordinator_.Send(message);
  }
  static v1::ToWorker Activation(uint64_t id, uint64_t counter, uint32_t index, uint32_t stages) {
    v1::ToWorker message;
    v1::ActivateStage& activate = *message.mutable_activate_stage();
    activate.set_stage_id(id);
    activate.mutable_epoch()->set_term(1);
    activate.mutable_epoch()->set_counter(counter);
    activate.set_stage_index(index);
    activate.set_num_stages(stages);
    return message;
  }
  void ExpectState(uint64_t id, v1::StageState::State state,
                   absl::StatusCode code = absl::StatusCode::kOk) {
    const v1::FromWorker message = coordinator_.Answer();
    ASSERT_TRUE(message.has_stage_state()) << message.ShortDebugString();
    EXPECT_EQ(message.stage_state().stage_id(), id);
    EXPECT_EQ(message.stage_state().state(), state) << message.ShortDebugString();
    EXPECT_EQ(static_cast<absl::StatusCode>(message.stage_state().error_code()), code)
        << message.ShortDebugString();
  }
  // Both stages of one pipeline on this worker: the edge is a connection to itself.
  // Two steps of one sequence in each of two epochs of stages 1 and 2; activate(epoch) enters one.
  template <class Activate>
  void RunTwoEpochs(Activate activate) {
    const std::vector<TokenId> prompt = {5, 6, 7, 8};
    SequenceSpec spec;
    spec.prompt = prompt;
    spec.max_tokens = 2;
    spec.ignore_eos = true;
    spec.seed = 3;
    spec.temperature = 0;
    const sim::Expected expected = sim::Expect(spec, shape_);
    for (uint64_t epoch : {1, 2}) {
      activate(epoch);
      for (uint64_t step : {1, 2}) {
        const std::vector<TokenId> tokens =
            step == 1 ? prompt : std::vector<TokenId>{expected.tokens[0].id};
        for (uint64_t stage : {1, 2}) {
          coordinator_.Send(Plan(stage, epoch, step, tokens, step == 1 ? 0 : 4, step == 1));
        }
        std::set<uint64_t> reported;
        while (reported.size() < 2) {
          const v1::FromWorker message = coordinator_.Answer();
          ASSERT_TRUE(message.has_report()) << message.ShortDebugString();
          ASSERT_EQ(message.report().error_code(), 0u) << message.ShortDebugString();
          EXPECT_EQ(message.report().step_id(), step);
          EXPECT_EQ(message.report().cache_bytes(), 3 * shape_.block_bytes);
          reported.insert(message.report().stage_id());
          if (message.report().stage_id() != 2) continue;
          ASSERT_EQ(message.report().results_size(), 1);
          EXPECT_EQ(message.report().results(0).sampled().token_id(), expected.tokens[step - 1].id);
        }
      }
    }
  }

  static constexpr uint64_t kEdge = 7;

  void TwoStages(uint64_t counter) {
    v1::ToWorker first = Activation(1, counter, 0, 2);
    first.mutable_activate_stage()->set_next_stage_id(2);
    first.mutable_activate_stage()->set_next_data_address(worker_->data_address());
    first.mutable_activate_stage()->set_next_edge_nonce(77);
    first.mutable_activate_stage()->set_next_edge_id(kEdge);  // the same in every epoch
    v1::ToWorker second = Activation(2, counter, 1, 2);
    second.mutable_activate_stage()->set_previous_stage_id(1);
    second.mutable_activate_stage()->set_edge_nonce(77);
    second.mutable_activate_stage()->set_edge_id(kEdge);
    coordinator_.Send(first);
    coordinator_.Send(second);
    std::set<uint64_t> active;
    while (active.size() < 2 && !HasFailure()) {
      const v1::FromWorker message = coordinator_.Answer();
      ASSERT_TRUE(message.has_stage_state()) << message.ShortDebugString();
      EXPECT_EQ(message.stage_state().epoch().counter(), counter);
      ASSERT_EQ(message.stage_state().state(), v1::StageState::ACTIVE)
          << message.ShortDebugString();
      active.insert(message.stage_state().stage_id());
    }
  }
  static v1::ToWorker Plan(uint64_t stage, uint64_t counter, uint64_t step,
                           const std::vector<TokenId>& tokens, uint32_t first, bool open) {
    v1::ToWorker message;
    v1::StepPlan& plan = *message.mutable_step();
    plan.set_stage_id(stage);
    plan.mutable_epoch()->set_term(1);
    plan.mutable_epoch()->set_counter(counter);
    plan.set_step_id(step);
    if (open) {
      v1::OpenSequence& sequence = *plan.add_cache_ops()->mutable_open();
      sequence.set_sequence_id(9);
      sequence.set_prompt_tokens(static_cast<uint32_t>(tokens.size()));
      sequence.mutable_sampling()->set_seed(3);
      sequence.mutable_sampling()->set_top_p(1);
      sequence.mutable_sampling()->set_repetition_penalty(1);
    }
    v1::SequenceStep& sequence = *plan.add_sequences();
    sequence.set_sequence_id(9);
    sequence.set_first_position(first);
    for (TokenId token : tokens) sequence.mutable_literals()->add_ids(token);
    v1::LogitsWanted& logits = *sequence.add_logits();
    logits.set_offset(static_cast<uint32_t>(tokens.size()) - 1);
    logits.set_sample(true);
    return message;
  }

  FakeCoordinator coordinator_;
  const ModelShape shape_;
  sim::HashBackend backend_;
  std::unique_ptr<WorkerProcess> worker_;
  std::thread thread_;
};

}  // namespace strait
