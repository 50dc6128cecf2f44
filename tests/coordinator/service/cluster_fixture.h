// SPDX-License-Identifier: Apache-2.0
//
// A cluster in one process over real sockets: a CoordinatorService and WorkerProcesses that run
// the simulator's hash model, and listeners that record what a client would see.
#pragma once

#include <chrono>
#include <condition_variable>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/service/service.h"
#include "gtest/gtest.h"
#include "tests/sim/hash_backend.h"
#include "tests/sim/oracle.h"
#include "worker/service/service.h"

namespace strait {

constexpr auto kPatience = std::chrono::seconds(60);

inline ModelShape SmallShape() {
  ModelShape shape;
  shape.vocab_size = 1000;
  shape.max_positions = 4096;
  shape.eos_token_ids = {1};
  shape.layer_weight_bytes.assign(6, 1000);
  shape.embedding_bytes = 100;
  shape.head_bytes = 100;
  shape.block_bytes = 64 * sizeof(uint64_t);
  shape.fingerprint = 4711;
  return shape;
}

// Engine::Scale to its end.
inline absl::StatusOr<ScaleOutcome> AskScale(Engine& engine, uint32_t num_stages) {
  auto promise = std::make_shared<std::promise<absl::StatusOr<ScaleOutcome>>>();
  auto answer = promise->get_future();
  engine.Scale(
      num_stages, [](const ScaleReport&) {},
      [promise](absl::Status status, ScaleOutcome outcome) {
        promise->set_value(status.ok() ? absl::StatusOr<ScaleOutcome>(outcome)
                                       : absl::StatusOr<ScaleOutcome>(std::move(status)));
      });
  if (answer.wait_for(kPatience) == std::future_status::ready) return answer.get();
  return absl::DeadlineExceededError("a scale is not answered");
}

// One request's events; waits for its end.
class Recorder : public RequestListener {
 public:
  struct Stream {
    std::vector<TokenInfo> scores;
    std::vector<TokenInfo> tokens;
    std::optional<FinishReason> reason;
    absl::Status status;
  };
  explicit Recorder(size_t num_sequences) : streams(num_sequences), open_(num_sequences) {}

  void OnRefused(absl::Status why) override {
    std::lock_guard lock(mu_);
    refused = std::move(why);
    open_ = 0;
    changed_.notify_all();
  }
  void OnAdmitted(RequestId request) override {
    std::lock_guard lock(mu_);
    id = request;
    changed_.notify_all();
  }
  void OnPromptScores(uint32_t i, std::vector<TokenInfo> scores) override {
    std::lock_guard lock(mu_);
    for (auto& score : scores) streams[i].scores.push_back(std::move(score));
  }
  void OnToken(uint32_t i, TokenInfo token) override {
    std::lock_guard lock(mu_);
    streams[i].tokens.push_back(std::move(token));
    ++num_tokens_;
    changed_.notify_all();
  }
  void OnSequenceEnd(uint32_t i, FinishReason reason, std::optional<TokenId>,
                     absl::Status status) override {
    std::lock_guard lock(mu_);
    EXPECT_FALSE(streams[i].reason) << "ended twice";
    streams[i].reason = reason;
    streams[i].status = std::move(status);
    --open_;
    changed_.notify_all();
  }

  bool WaitEnd() {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, kPatience, [this] { return open_ == 0; });
  }
  bool WaitTokens(size_t n) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, kPatience, [&] { return num_tokens_ >= n || open_ == 0; });
  }

  // To be read after WaitEnd.
  std::vector<Stream> streams;
  absl::Status refused;
  RequestId id;

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  size_t open_;
  size_t num_tokens_ = 0;
};

class RunningWorker {
 public:
  RunningWorker(const ModelShape* shape, int grpc_port, std::string name, uint64_t memory = 1 << 20)
      : backend(shape, memory) {
    WorkerOptions options;
    options.coordinator_address = "127.0.0.1:" + std::to_string(grpc_port);
    options.name = std::move(name);
    options.memory_bytes = memory;
    options.model_fingerprint = shape->fingerprint;
    auto made = WorkerProcess::Create(options, &backend);
    EXPECT_TRUE(made.ok()) << made.status();
    process = std::move(*made);
    thread_ = std::thread([this] { process->Run(); });
  }
  ~RunningWorker() {
    process->Stop();
    thread_.join();
    process.reset();
  }

  sim::HashBackend backend;
  std::unique_ptr<WorkerProcess> process;

 private:
  std::thread thread_;
};

class ClusterFixture {
 public:
  explicit ClusterFixture(uint32_t stages, uint32_t pipelines = 1, CoreOptions core = {},
                          ModelShape model = SmallShape())
      : shape(std::move(model)) {
    core.num_stages = stages;
    core.num_pipelines = pipelines;
    core.accept_untold = true;
    CoordinatorOptions options;
    options.core = core;
    options.model = shape;
    options.attach.listen_address = "127.0.0.1:0";
    auto made = CoordinatorService::Create(std::move(options));
    EXPECT_TRUE(made.ok()) << made.status();
    service = std::move(*made);
    for (uint32_t i = 0; i < stages * pipelines; ++i) AddWorker();
  }
  ~ClusterFixture() {
    service->Stop();
    workers.clear();
  }
  void AddWorker() {
    workers.push_back(std::make_unique<RunningWorker>(&shape, service->grpc_port(),
                                                      "worker-" + std::to_string(workers.size())));
  }
  bool WaitReady(bool wanted = true) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (service->Ready() != wanted && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return service->Ready() == wanted;
  }
  // Returns when it is answered.
  absl::StatusOr<ScaleOutcome> Scale(uint32_t num_stages) { return AskScale(*service, num_stages); }
  std::shared_ptr<Recorder> Submit(RequestSpec spec) {
    auto recorder = std::make_shared<Recorder>(spec.sequences.size());
    service->Submit(std::move(spec), recorder);
    return recorder;
  }
  void ExpectAsOracleSays(const RequestSpec& spec, const Recorder& got) {
    ASSERT_TRUE(got.refused.ok()) << got.refused;
    for (size_t i = 0; i < spec.sequences.size(); ++i) {
      const sim::Expected expected = sim::Expect(spec.sequences[i], shape);
      const Recorder::Stream& stream = got.streams[i];
      ASSERT_EQ(stream.tokens.size(), expected.tokens.size()) << stream.status;
      EXPECT_EQ(stream.reason, expected.reason);
      for (size_t t = 0; t < stream.tokens.size(); ++t) {
        ASSERT_EQ(stream.tokens[t].id, expected.tokens[t].id) << "token " << t;
        ASSERT_EQ(stream.tokens[t].position, expected.tokens[t].position);
      }
      ASSERT_EQ(stream.scores.size(), expected.scores.size());
      for (size_t t = 0; t < stream.scores.size(); ++t) {
        ASSERT_EQ(stream.scores[t].logprob, expected.scores[t].logprob) << "score " << t;
      }
    }
  }

  const ModelShape shape;
  std::unique_ptr<CoordinatorService> service;
  std::vector<std::unique_ptr<RunningWorker>> workers;
};

inline RequestSpec MakeRequest(uint32_t prompt_tokens, uint32_t max_tokens, uint64_t seed,
                               uint32_t sequences = 1) {
  RequestSpec spec;
  for (uint32_t i = 0; i < sequences; ++i) {
    SequenceSpec sequence;
    for (uint32_t t = 0; t < prompt_tokens; ++t) {
      sequence.prompt.push_back(static_cast<TokenId>((seed * 31 + t * 7 + i) % 900 + 2));
    }
    sequence.max_tokens = max_tokens;
    sequence.ignore_eos = true;
    sequence.seed = seed;
    sequence.choice_index = i;
    spec.sequences.push_back(std::move(sequence));
  }
  return spec;
}

}  // namespace strait
