// SPDX-License-Identifier: Apache-2.0
//
// Defends: a worker answers everything that a coordinator asks exactly once, refuses what makes no
// sense without losing its other stages, and attaches again with nothing when its coordinator is
// gone or silent.
#include "worker/service.h"

#include <array>
#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/limits.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/queue.h"
#include "proto/rpc/stream.h"
#include "proto/version.h"
#include "strait/v1/cluster.grpc.pb.h"
#include "tests/sim/hash_backend.h"
#include "tests/sim/oracle.h"

namespace strait {
namespace {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;
using Stream = rpc::ServerStream<v1::FromWorker, v1::ToWorker>;

ModelShape Shape() {
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
    welcome.mutable_welcome()->set_heartbeat_interval_ms(20);
    welcome.mutable_welcome()->set_heartbeat_timeout_ms(silence_timeout_ms);
    Send(welcome);
    return first.hello();
  }

  int port = 0;
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
  WorkerTest() : shape_(Shape()), backend_(&shape_, 1 << 24) {
    WorkerOptions options;
    options.coordinator_address = "127.0.0.1:" + std::to_string(coordinator_.port);
    options.name = "tested";
    options.memory_bytes = 1 << 24;
    options.model_fingerprint = 42;
    options.weights_fingerprint = 43;
    options.cache_row_bytes = 8;
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
    load.set_pool_blocks(blocks);
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
  void TwoStages(uint64_t counter) {
    v1::ToWorker first = Activation(1, counter, 0, 2);
    first.mutable_activate_stage()->set_next_stage_id(2);
    first.mutable_activate_stage()->set_next_data_address(worker_->data_address());
    first.mutable_activate_stage()->set_next_edge_nonce(70 + counter);
    v1::ToWorker second = Activation(2, counter, 1, 2);
    second.mutable_activate_stage()->set_previous_stage_id(1);
    second.mutable_activate_stage()->set_edge_nonce(70 + counter);
    coordinator_.Send(first);
    coordinator_.Send(second);
    std::set<uint64_t> active;
    while (active.size() < 2 && !HasFailure()) {
      const v1::FromWorker message = coordinator_.Answer();
      // A stage that enters before its neighbour ends the edge that they had: an honest word.
      if (message.has_report() && message.report().epoch().counter() < counter) continue;
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

TEST_F(WorkerTest, SaysWhoItIs) {
  const v1::Hello hello = coordinator_.Welcome();
  EXPECT_EQ(hello.wire_version(), kWireVersion);
  EXPECT_EQ(hello.name(), "tested");
  EXPECT_EQ(hello.data_address(), worker_->data_address());
  EXPECT_EQ(hello.memory_bytes(), uint64_t{1} << 24);
  EXPECT_EQ(hello.model_fingerprint(), 42u);
  EXPECT_EQ(hello.weights_fingerprint(), 43u);
  EXPECT_EQ(hello.cache_row_bytes(), 8u);
  EXPECT_EQ(hello.numerics_id(), "hash");
  EXPECT_NE(hello.instance(), 0u);
  for (int i = 0; i < 3000 && coordinator_.beats < 3; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_GE(coordinator_.beats, 3);
}

TEST_F(WorkerTest, LoadsAndUnloads) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  EXPECT_GT(backend_.used_bytes(), 0u);
  v1::ToWorker unload;
  unload.mutable_unload_stage()->set_stage_id(1);
  coordinator_.Send(unload);
  ExpectState(1, v1::StageState::UNLOADED);
  EXPECT_EQ(backend_.used_bytes(), 0u);
  coordinator_.Send(unload);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kNotFound);
}

TEST_F(WorkerTest, RefusesWhatMakesNoSense) {
  coordinator_.Welcome();
  for (auto [begin, end, blocks] : std::vector<std::array<uint32_t, 3>>{
           {3, 3, 1}, {4, 2, 1}, {0, 7, 1}, {0, 0xffffffff, 1}, {0, 3, 0}}) {
    Load(1, begin, end, blocks);
    ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  }
  Load(0, 0, 3);
  ExpectState(0, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  Load(1, 0, 3, 0xffffffff);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kResourceExhausted);
  Load(1, 0, 3);
  Load(1, 0, 3);
  // The second is refused while the first loads, or after: both orders are right.
  std::set<int> states;
  for (int i = 0; i < 2; ++i) states.insert(coordinator_.Answer().stage_state().state());
  EXPECT_EQ(states, (std::set<int>{v1::StageState::LOADED, v1::StageState::FAILED}));
  coordinator_.Send(Activation(5, 1, 0, 1));
  ExpectState(5, v1::StageState::FAILED, absl::StatusCode::kFailedPrecondition);
  coordinator_.Send(Activation(1, 1, 3, 2));
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  coordinator_.Send(Activation(1, 1, 0, 2));  // without a next stage
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  v1::ToWorker nowhere = Activation(1, 1, 0, 2);
  nowhere.mutable_activate_stage()->set_next_stage_id(2);
  nowhere.mutable_activate_stage()->set_next_edge_nonce(7);
  nowhere.mutable_activate_stage()->set_next_data_address("no address");
  coordinator_.Send(nowhere);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  v1::ToWorker open = Activation(1, 1, 0, 2);  // an edge that anyone could open
  open.mutable_activate_stage()->set_next_stage_id(2);
  open.mutable_activate_stage()->set_next_data_address("127.0.0.1:1");
  coordinator_.Send(open);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  Load(2, 3, 6);
  ExpectState(2, v1::StageState::LOADED);
  v1::ToWorker last = Activation(2, 1, 1, 2);
  last.mutable_activate_stage()->set_previous_stage_id(1);
  coordinator_.Send(last);
  ExpectState(2, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
}

TEST_F(WorkerTest, TheEdgeOfSampledIdsIsToldWholeOrNotAtAll) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  using Spoil = std::function<void(v1::ActivateStage*)>;
  for (const Spoil& spoil : {
           Spoil([](auto* a) { a->set_sampled_edge_nonce(0); }),  // an edge that anyone could open
           Spoil([](auto* a) { a->set_last_stage_id(0); }),
           Spoil([](auto* a) { a->set_grants(false); }),
           Spoil([](auto* a) { a->set_first_stage_id(1); }),
           Spoil([](auto* a) { a->set_first_data_address("127.0.0.1:1"); }),
       }) {
    v1::ToWorker message = Activation(1, 1, 0, 2);
    v1::ActivateStage* activate = message.mutable_activate_stage();
    activate->set_next_stage_id(2);
    activate->set_next_data_address("127.0.0.1:1");
    activate->set_next_edge_nonce(7);
    activate->set_grants(true);
    activate->set_last_stage_id(2);
    activate->set_sampled_edge_nonce(8);
    spoil(activate);
    coordinator_.Send(message);
    ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kInvalidArgument);
  }
}

// Regression: what a worker quoted of a request went back whole, megabytes of it, and one byte that
// is no UTF-8 in an error's text made the whole report unreadable.
TEST_F(WorkerTest, ErrorMessagesAreBounded) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  v1::ToWorker nowhere = Activation(1, 1, 0, 2);
  nowhere.mutable_activate_stage()->set_next_stage_id(2);
  nowhere.mutable_activate_stage()->set_next_edge_nonce(7);
  nowhere.mutable_activate_stage()->set_next_data_address(std::string(1 << 20, '\x1b'));
  coordinator_.Send(nowhere);
  const v1::FromWorker answer = coordinator_.Answer();
  ASSERT_EQ(answer.stage_state().state(), v1::StageState::FAILED) << answer.ShortDebugString();
  EXPECT_LE(answer.stage_state().error_message().size(), limits::kMaxErrorMessageBytes);
  EXPECT_EQ(answer.stage_state().error_message().find('\x1b'), std::string::npos);
}

TEST_F(WorkerTest, ActivationFailsWhenTheNextStageIsNotThere) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  v1::ToWorker activation = Activation(1, 1, 0, 2);
  activation.mutable_activate_stage()->set_next_stage_id(2);
  activation.mutable_activate_stage()->set_next_edge_nonce(7);
  activation.mutable_activate_stage()->set_next_data_address("127.0.0.1:1");
  coordinator_.Send(activation);
  ExpectState(1, v1::StageState::FAILED, absl::StatusCode::kUnavailable);
}

TEST_F(WorkerTest, RunsStepsThroughTwoStagesAndAnEpochLater) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  Load(2, 3, 6);
  ExpectState(1, v1::StageState::LOADED);
  ExpectState(2, v1::StageState::LOADED);
  const std::vector<TokenId> prompt = {5, 6, 7, 8};
  SequenceSpec spec;
  spec.prompt = prompt;
  spec.max_tokens = 2;
  spec.ignore_eos = true;
  spec.seed = 3;
  spec.temperature = 0;
  const sim::Expected expected = sim::Expect(spec, shape_);
  for (uint64_t epoch : {1, 2}) {
    TwoStages(epoch);
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
        EXPECT_EQ(message.report().blocks_used(), 3u);
        reported.insert(message.report().stage_id());
        if (message.report().stage_id() != 2) continue;
        ASSERT_EQ(message.report().results_size(), 1);
        EXPECT_EQ(message.report().results(0).sampled().token_id(), expected.tokens[step - 1].id);
      }
    }
  }
  // A plan of the epoch before is dropped; one that leaves a gap is refused.
  coordinator_.Send(Plan(1, 1, 3, {4}, 5, false));
  coordinator_.Send(Plan(1, 2, 7, {4}, 5, false));
  v1::FromWorker refused = coordinator_.Answer();
  EXPECT_EQ(refused.report().step_id(), 7u);
  EXPECT_EQ(static_cast<absl::StatusCode>(refused.report().error_code()),
            absl::StatusCode::kFailedPrecondition);
  coordinator_.Send(Plan(77, 2, 3, {4}, 5, false));
  refused = coordinator_.Answer();
  EXPECT_EQ(refused.report().stage_id(), 77u);
  EXPECT_EQ(static_cast<absl::StatusCode>(refused.report().error_code()),
            absl::StatusCode::kNotFound);
}

TEST_F(WorkerTest, BrokenEdgeIsToldOnce) {
  coordinator_.Welcome();
  Load(1, 0, 3);
  Load(2, 3, 6);
  ExpectState(1, v1::StageState::LOADED);
  ExpectState(2, v1::StageState::LOADED);
  TwoStages(1);
  // The second stage goes: its edge ends.
  v1::ToWorker unload;
  unload.mutable_unload_stage()->set_stage_id(2);
  coordinator_.Send(unload);
  ExpectState(2, v1::StageState::UNLOADED);
  const v1::FromWorker told = coordinator_.Answer();
  ASSERT_TRUE(told.has_report()) << told.ShortDebugString();
  EXPECT_EQ(told.report().stage_id(), 1u);
  EXPECT_EQ(told.report().step_id(), 0u);
  EXPECT_NE(told.report().error_code(), 0u);
  coordinator_.Send(Plan(1, 1, 1, {4, 5}, 0, true));
  const v1::FromWorker report = coordinator_.Answer();
  EXPECT_EQ(report.report().step_id(), 1u);
  coordinator_.Send(unload);
  ExpectState(2, v1::StageState::FAILED, absl::StatusCode::kNotFound);
}

TEST_F(WorkerTest, AttachesAgainWithNothing) {
  const v1::Hello before = coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  coordinator_.End(absl::AbortedError("evicted by the test"));
  const v1::Hello after = coordinator_.Welcome();
  EXPECT_EQ(after.instance(), before.instance());
  EXPECT_EQ(after.data_address(), before.data_address());
  Load(1, 0, 3);  // the id is free again
  ExpectState(1, v1::StageState::LOADED);
}

TEST_F(WorkerTest, SilenceOfTheCoordinatorEndsTheSession) {
  coordinator_.Welcome(/*silence_timeout_ms=*/200);
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
  coordinator_.answer_beats = false;
  coordinator_.Welcome();
}

TEST_F(WorkerTest, AnsweredHeartbeatsKeepAnIdleSession) {
  coordinator_.Welcome(/*silence_timeout_ms=*/2000);
  for (int i = 0; i < 3000 && coordinator_.beats < 150; ++i) std::this_thread::sleep_for(10ms);
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);  // and no second Hello before it
}

TEST_F(WorkerTest, CoordinatorThatDoesNotBeginWithWelcomeIsLeft) {
  EXPECT_TRUE(coordinator_.Next().has_hello());
  v1::ToWorker shutdown;
  shutdown.mutable_load_stage()->set_stage_id(1);
  coordinator_.Send(shutdown);
  coordinator_.Welcome();
  Load(1, 0, 3);
  ExpectState(1, v1::StageState::LOADED);
}

TEST_F(WorkerTest, ShutdownEndsTheLoop) {
  coordinator_.Welcome();
  v1::ToWorker shutdown;
  shutdown.mutable_shutdown()->set_reason("the test says so");
  coordinator_.Send(shutdown);
  thread_.join();
  thread_ = std::thread([] {});
}

}  // namespace
}  // namespace strait
