// SPDX-License-Identifier: Apache-2.0
//
// Defends: nothing but a worker with a valid Hello gets in, whatever it says later is bounded and
// judged, and the service goes on for everybody else.
#include "coordinator/service/service.h"

#include <atomic>

#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/base/limits.h"
#include "proto/rpc/channel.h"
#include "proto/wire/version.h"
#include "strait/v1/cluster.grpc.pb.h"
#include "tests/coordinator/service/cluster_fixture.h"

namespace strait {
namespace {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;
using testing::HasSubstr;

class ServiceTest : public testing::Test {
 protected:
  void SetUp() override {
    CoordinatorOptions options;
    options.model = SmallShape();
    options.core.heartbeat_timeout_us = 1'000'000;
    options.core.accept_untold = true;
    options.attach.listen_address = "127.0.0.1:0";
    options.attach.hello_timeout = 300ms;
    auto made = CoordinatorService::Create(std::move(options));
    ASSERT_TRUE(made.ok()) << made.status();
    service_ = std::move(*made);
    stub_ = v1::Coordinator::NewStub(rpc::MakeChannel(
        "127.0.0.1:" + std::to_string(service_->grpc_port()), rpc::Traffic::kControl));
  }

  static v1::FromWorker GoodHello() {
    v1::FromWorker message;
    v1::Hello& hello = *message.mutable_hello();
    hello.set_wire_version(kWireVersion);
    hello.set_name("fake");
    hello.set_data_address("127.0.0.1:1");
    hello.set_memory_bytes(1 << 20);
    hello.set_model_fingerprint(SmallShape().fingerprint);
    hello.set_numerics_id("hash");
    hello.set_backend("cpu");
    hello.set_instance(1);
    return message;
  }
  // How the coordinator ends a worker that says this and then only listens.
  grpc::Status Outcome(const std::vector<v1::FromWorker>& messages) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + 30s);
    auto stream = stub_->Attach(&context);
    for (const auto& message : messages) (void)stream->Write(message);
    v1::ToWorker answer;
    while (stream->Read(&answer)) {
    }
    return stream->Finish();
  }

  std::unique_ptr<CoordinatorService> service_;
  std::unique_ptr<v1::Coordinator::Stub> stub_;
};

TEST_F(ServiceTest, SilentClientIsEnded) {
  EXPECT_EQ(Outcome({}).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(ServiceTest, FirstMessageMustBeHello) {
  v1::FromWorker beat;
  beat.mutable_heartbeat();
  EXPECT_EQ(Outcome({beat}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Outcome({v1::FromWorker()}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServiceTest, AnotherVersionIsNamed) {
  v1::FromWorker hello = GoodHello();
  hello.mutable_hello()->set_wire_version(kWireVersion + 1);
  const grpc::Status ended = Outcome({hello});
  EXPECT_EQ(ended.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(ended.error_message(), HasSubstr(std::to_string(kWireVersion + 1)));
}

TEST_F(ServiceTest, AnotherModelIsRefused) {
  v1::FromWorker hello = GoodHello();
  hello.mutable_hello()->set_model_fingerprint(1);
  const grpc::Status ended = Outcome({hello});
  EXPECT_EQ(ended.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(ended.error_message(), HasSubstr("model"));
}

TEST_F(ServiceTest, AnotherCacheFormatIsRefused) {
  v1::FromWorker hello = GoodHello();
  hello.mutable_hello()->set_cache_row_bytes(4);
  const grpc::Status ended = Outcome({hello});
  EXPECT_EQ(ended.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(ended.error_message(), HasSubstr("--cache-format"));
}

TEST_F(ServiceTest, GarbageHelloIsInvalid) {
  std::vector<std::function<void(v1::Hello&)>> lies = {
      [](v1::Hello& h) { h.set_name(std::string(100'000, 'n')); },
      [](v1::Hello& h) { h.set_data_address("nowhere"); },
      [](v1::Hello& h) { h.set_data_address("127.0.0.1:0"); },
      [](v1::Hello& h) { h.set_data_address(std::string(1'000'000, '1')); },
      [](v1::Hello& h) { h.set_memory_bytes(0); },
      [](v1::Hello& h) { h.set_memory_bytes(~uint64_t{0}); },
      [](v1::Hello& h) { h.clear_numerics_id(); },
      [](v1::Hello& h) { h.set_numerics_id(std::string(1000, 'x')); },
  };
  for (const auto& lie : lies) {
    v1::FromWorker hello = GoodHello();
    lie(*hello.mutable_hello());
    EXPECT_EQ(Outcome({hello}).error_code(), grpc::StatusCode::INVALID_ARGUMENT)
        << hello.ShortDebugString().substr(0, 200);
  }
}

TEST_F(ServiceTest, SecondHelloIsInvalid) {
  EXPECT_EQ(Outcome({GoodHello(), GoodHello()}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServiceTest, WorkerWithoutHeartbeatIsGivenUp) {
  EXPECT_EQ(Outcome({GoodHello()}).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(ServiceTest, LiesAboutStagesEndTheWorkerOnly) {
  v1::FromWorker state;
  state.mutable_stage_state()->set_stage_id(77);
  state.mutable_stage_state()->set_state(v1::StageState::ACTIVE);
  EXPECT_EQ(Outcome({GoodHello(), state}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_FALSE(service_->Ready());
  ModelShape shape = SmallShape();
  RunningWorker honest(&shape, service_->grpc_port(), "honest");
  for (int i = 0; i < 3000 && !service_->Ready(); ++i) std::this_thread::sleep_for(10ms);
  EXPECT_TRUE(service_->Ready());
}

TEST_F(ServiceTest, WelcomeThenLoadAndHeartbeatsAreAnswered) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + 30s);
  auto stream = stub_->Attach(&context);
  ASSERT_TRUE(stream->Write(GoodHello()));
  v1::ToWorker answer;
  ASSERT_TRUE(stream->Read(&answer));
  ASSERT_TRUE(answer.has_welcome());
  EXPECT_GT(answer.welcome().heartbeat_interval_ms(), 0u);
  ASSERT_TRUE(stream->Read(&answer));
  ASSERT_TRUE(answer.has_load_stage()) << answer.ShortDebugString();
  EXPECT_EQ(answer.load_stage().layer_end(), SmallShape().layer_weight_bytes.size());
  v1::FromWorker beat;
  beat.mutable_heartbeat()->set_sent_us(123);
  beat.mutable_heartbeat()->set_resident_bytes(456'789);
  ASSERT_TRUE(stream->Write(beat));
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.ping().heartbeat_sent_us(), 123u);

  // Memory and heartbeats show in the status, over gRPC and through the engine.
  std::string json;
  for (int i = 0; i < 3000 && json.find("456789") == std::string::npos; ++i) {
    ASSERT_TRUE(stream->Write(beat));
    grpc::ClientContext status_context;
    v1::GetStatusReply reply;
    ASSERT_TRUE(stub_->GetStatus(&status_context, {}, &reply).ok());
    json = reply.json();
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_THAT(json, HasSubstr("\"fake\""));
  EXPECT_THAT(json, HasSubstr("1048576"));
  EXPECT_THAT(service_->StatusJson(), HasSubstr("456789"));
  EXPECT_THAT(service_->MetricsText(), HasSubstr("strait_workers_attached 1\n"));
  context.TryCancel();
}

// The bug: a worker's error message went into log and status as it came, a megabyte of terminal
// controls if it liked.
TEST_F(ServiceTest, WordsOfAWorkerAreBoundedAndPrintable) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + 30s);
  auto stream = stub_->Attach(&context);
  v1::FromWorker hello = GoodHello();
  hello.mutable_hello()->set_name("fa\x1bke");
  ASSERT_TRUE(stream->Write(hello));
  v1::ToWorker answer;
  while (!answer.has_load_stage()) ASSERT_TRUE(stream->Read(&answer));
  v1::FromWorker failed;
  failed.mutable_stage_state()->set_stage_id(answer.load_stage().stage_id());
  failed.mutable_stage_state()->set_state(v1::StageState::FAILED);
  failed.mutable_stage_state()->set_error_code(static_cast<int>(absl::StatusCode::kInternal));
  failed.mutable_stage_state()->set_error_message("\x1b[2J" + std::string(1'000'000, 'x'));
  ASSERT_TRUE(stream->Write(failed));
  v1::FromWorker beat;
  beat.mutable_heartbeat();
  std::string json;
  for (int i = 0; i < 3000 && json.find("could not load") == std::string::npos; ++i) {
    ASSERT_TRUE(stream->Write(beat));
    json = service_->StatusJson();
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_THAT(json, HasSubstr("could not load"));
  EXPECT_LT(json.size(), 8 * limits::kMaxErrorMessageBytes);
  EXPECT_EQ(json.find("\\u001b"), std::string::npos) << json;
  context.TryCancel();
}

// The bug: streams that never said Hello took the room of workers, so some thousand of them kept
// every worker out for as long as their deadline, again and again.
TEST_F(ServiceTest, SilentStrangersKeepNoWorkerOut) {
  CoordinatorOptions options;
  options.model = SmallShape();
  options.core.accept_untold = true;
  options.attach.listen_address = "127.0.0.1:0";
  options.attach.hello_timeout = 60s;
  auto service = CoordinatorService::Create(std::move(options));
  ASSERT_TRUE(service.ok()) << service.status();
  auto stub = v1::Coordinator::NewStub(rpc::MakeChannel(
      "127.0.0.1:" + std::to_string((*service)->grpc_port()), rpc::Traffic::kControl));
  struct Call {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReaderWriter<v1::FromWorker, v1::ToWorker>> stream;
  };
  std::vector<std::unique_ptr<Call>> strangers;
  for (uint32_t i = 0; i < limits::kMaxWorkers + 100; ++i) {
    Call& call = *strangers.emplace_back(std::make_unique<Call>());
    call.stream = stub->Attach(&call.context);
  }
  // The one that has been silent for longest has to go.
  v1::ToWorker answer;
  EXPECT_FALSE(strangers.front()->stream->Read(&answer));
  EXPECT_EQ(strangers.front()->stream->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + 30s);
  auto worker = stub->Attach(&context);
  ASSERT_TRUE(worker->Write(GoodHello()));
  ASSERT_TRUE(worker->Read(&answer));
  EXPECT_TRUE(answer.has_welcome());
  context.TryCancel();
  (void)worker->Finish();
  for (size_t i = 1; i < strangers.size(); ++i) {
    strangers[i]->context.TryCancel();
    (void)strangers[i]->stream->Finish();
  }
}

// The bug: what was submitted while the loop ended lay in its queue unanswered.
TEST(ServiceStopTest, EveryRequestThatRacesWithStopIsAnswered) {
  struct Counting : RequestListener {
    explicit Counting(std::atomic<int>* count) : answered(count) {}
    void OnRefused(absl::Status) override { ++*answered; }
    void OnAdmitted(RequestId) override {}
    void OnPromptScores(uint32_t, std::vector<TokenInfo>) override {}
    void OnToken(uint32_t, TokenInfo) override {}
    void OnSequenceEnd(uint32_t, FinishReason, std::optional<TokenId>, absl::Status) override {
      ++*answered;
    }
    std::atomic<int>* const answered;
  };
  for (int round = 0; round < 25; ++round) {
    CoordinatorOptions options;
    options.model = SmallShape();
    options.attach.listen_address = "127.0.0.1:0";
    auto service = CoordinatorService::Create(std::move(options));
    ASSERT_TRUE(service.ok()) << service.status();
    std::atomic<int> submitted = 0;
    std::atomic<int> answered = 0;
    std::atomic<bool> over = false;
    std::vector<std::thread> clients;
    for (int i = 0; i < 4; ++i) {
      clients.emplace_back([&] {
        while (!over) {
          (*service)->Submit(MakeRequest(10, 5, 1), std::make_shared<Counting>(&answered));
          ++submitted;
        }
      });
    }
    while (submitted < 20) std::this_thread::yield();
    (*service)->Stop();
    over = true;
    for (std::thread& client : clients) client.join();
    ASSERT_EQ(answered, submitted) << "round " << round;
  }
}

TEST_F(ServiceTest, AScaleThatCannotBeIsAnsweredWithTheReason) {
  EXPECT_TRUE(absl::IsInvalidArgument(AskScale(*service_, 0).status()));
  const absl::Status none = AskScale(*service_, 2).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(none)) << none;
  EXPECT_THAT(std::string(none.message()), HasSubstr("no pipeline serves"));
}

TEST_F(ServiceTest, ManyStreamsThatComeAndGoDisturbNobody) {
  for (int i = 0; i < 100; ++i) {
    grpc::ClientContext context;
    auto stream = stub_->Attach(&context);
    v1::FromWorker hello = GoodHello();
    hello.mutable_hello()->set_instance(i + 10);
    if (i % 3 > 0) (void)stream->Write(hello);
    v1::ToWorker answer;
    if (i % 3 > 1) (void)stream->Read(&answer);
    context.TryCancel();
    (void)stream->Finish();
  }
  for (int i = 0; i < 3000; ++i) {
    if (service_->MetricsText().find("strait_workers_attached 0\n") != std::string::npos) break;
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_THAT(service_->MetricsText(), HasSubstr("strait_workers_attached 0\n"));
}

TEST_F(ServiceTest, TakenPortNamesTheFlag) {
  CoordinatorOptions options;
  options.model = SmallShape();
  options.attach.listen_address = "127.0.0.1:" + std::to_string(service_->grpc_port());
  const auto taken = CoordinatorService::Create(std::move(options));
  EXPECT_EQ(taken.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(taken.status().message()), HasSubstr("--grpc"));
  EXPECT_THAT(std::string(taken.status().message()),
              HasSubstr(std::to_string(service_->grpc_port())));
}

TEST_F(ServiceTest, OptionsThatContradictAreNamed) {
  CoordinatorOptions options;
  options.model = SmallShape();
  options.core.num_stages = 0;
  options.attach.listen_address = "127.0.0.1:0";
  EXPECT_EQ(CoordinatorService::Create(std::move(options)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace strait
