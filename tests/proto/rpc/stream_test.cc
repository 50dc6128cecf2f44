// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stream keeps order, bounds what waits, tells its end exactly once and last, and no
// silent, slow or dead peer keeps either end waiting.
#include "proto/rpc/stream.h"

#include <atomic>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/base/limits.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/queue.h"
#include "strait/v1/cluster.grpc.pb.h"

namespace strait::rpc {
namespace {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;
using Server = ServerStream<v1::FromWorker, v1::ToWorker>;
using Client = ClientStream<v1::ToWorker, v1::FromWorker>;

constexpr StreamOptions kRoomy{
    .max_queued_messages = 100'000, .max_queued_bytes = 64 << 20, .max_message_bytes = 1 << 20};

// Everything one end saw, for one test thread.
template <class In>
struct Seen {
  BoundedQueue<In> messages{1 << 20};
  BoundedQueue<absl::Status> ends{16};
  std::atomic<bool> read_on = true;
  std::atomic<int> num_messages = 0;

  StreamEvents<In> Events() {
    return {.on_message =
                [this](In message) {
                  ++num_messages;
                  messages.Push(std::move(message));
                  return read_on.load();
                },
            .on_end = [this](absl::Status status) { ends.Push(std::move(status)); }};
  }
  In Next() {
    while (ready_.empty()) {
      ready_ = messages.PopAll(20s);
      if (ready_.empty()) {
        ADD_FAILURE() << "no message";
        return {};
      }
    }
    In message = std::move(ready_.front());
    ready_.pop_front();
    return message;
  }
  absl::Status End() {
    auto ended = ends.PopAll(20s);
    if (ended.size() != 1) return absl::InternalError("no end, or several");
    return ended.front();
  }

 private:
  std::deque<In> ready_;
};

class Service final : public v1::Coordinator::CallbackService {
 public:
  StreamOptions options = kRoomy;
  Seen<v1::FromWorker> seen;
  BoundedQueue<std::shared_ptr<Server>> streams{16};

  grpc::ServerBidiReactor<v1::FromWorker, v1::ToWorker>* Attach(
      grpc::CallbackServerContext* context) override {
    auto stream = std::make_shared<Server>(context, options, seen.Events());
    stream->Start();
    streams.Push(stream);
    return stream.get();
  }
};

class StreamTest : public testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    ConfigureServer(builder, "127.0.0.1:0", Traffic::kControl, &port_);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(port_, 0);
  }
  void TearDown() override {
    client_.reset();
    at_server_.reset();
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  std::unique_ptr<Client> Dial(StreamOptions options = kRoomy) {
    return Dial("127.0.0.1:" + std::to_string(port_), options);
  }
  std::unique_ptr<Client> Dial(const std::string& address, StreamOptions options) {
    auto stub = v1::Coordinator::NewStub(MakeChannel(address, Traffic::kControl));
    return std::make_unique<Client>(options, seen_.Events(), [&](auto* context, auto* reactor) {
      stub->async()->Attach(context, reactor);
    });
  }
  void Connect() {
    client_ = Dial();
    auto accepted = service_.streams.PopAll(20s);
    ASSERT_EQ(accepted.size(), 1u);
    at_server_ = accepted.front();
  }

  static v1::FromWorker Beat(uint64_t number, size_t padding = 0) {
    v1::FromWorker message;
    message.mutable_heartbeat()->set_sent_us(number);
    if (padding > 0) message.mutable_stage_state()->set_error_message(std::string(padding, 'x'));
    if (padding > 0) message.mutable_stage_state()->set_stage_id(number);
    return message;
  }
  static v1::ToWorker Ping(uint64_t number) {
    v1::ToWorker message;
    message.mutable_ping()->set_heartbeat_sent_us(number);
    return message;
  }

  int port_ = 0;
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  Seen<v1::ToWorker> seen_;
  std::unique_ptr<Client> client_;
  std::shared_ptr<Server> at_server_;
};

// It once hung: a write that failed was taken for the end of the stream, nothing was read any more,
// and gRPC tells a call's end only when all that came before has been read.
TEST_F(StreamTest, EndIsToldThoughMessagesBeforeItWereNotRead) {
  for (const bool destroyed : {false, true}) {
    seen_.read_on = false;  // after the first
    Connect();
    v1::ToWorker message;
    message.mutable_welcome()->set_worker_id(1);
    for (int i = 0; i < 5; ++i) ASSERT_TRUE(at_server_->Send(message).ok());
    (void)seen_.Next();
    while (at_server_->queued_bytes() > 0) std::this_thread::sleep_for(1ms);
    at_server_->Close(absl::UnavailableError("the server stops"));
    // Until a write has failed.
    while (client_->Send(Beat(1)).ok()) std::this_thread::sleep_for(1ms);
    if (!destroyed) {
      const absl::Status end = seen_.End();
      EXPECT_EQ(end.code(), absl::StatusCode::kUnavailable) << end;
      EXPECT_EQ(end.message(), "the server stops");
    }
    client_.reset();
    at_server_.reset();
    (void)seen_.ends.PopAll(0s);
    (void)service_.seen.ends.PopAll(20s);
    seen_.read_on = true;
  }
}

TEST_F(StreamTest, KeepsOrderBothWays) {
  Connect();
  constexpr int kMessages = 2000;
  std::jthread other([&] {
    for (int i = 0; i < kMessages; ++i) ASSERT_TRUE(at_server_->Send(Ping(i)).ok());
  });
  for (int i = 0; i < kMessages; ++i) ASSERT_TRUE(client_->Send(Beat(i)).ok());
  for (int i = 0; i < kMessages; ++i) {
    ASSERT_EQ(service_.seen.Next().heartbeat().sent_us(), static_cast<uint64_t>(i));
    ASSERT_EQ(seen_.Next().ping().heartbeat_sent_us(), static_cast<uint64_t>(i));
  }
}

TEST_F(StreamTest, PeerThatDoesNotReadIsToldToTheSenderAndNothingIsLost) {
  service_.seen.read_on = false;
  StreamOptions options = kRoomy;
  options.max_queued_messages = 8;
  client_ = Dial(options);
  at_server_ = service_.streams.PopAll(20s).front();
  // 64 KiB a message: flow control stops the sender long before the loop ends.
  int sent = 0;
  absl::Status status;
  for (; sent < 10'000; ++sent) {
    status = client_->Send(Beat(sent, 64 << 10));
    if (!status.ok()) break;
    if (sent % 8 == 7) std::this_thread::sleep_for(2ms);
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_LE(service_.seen.num_messages, 1);
  service_.seen.read_on = true;
  at_server_->Resume();
  for (int i = 0; i < sent; ++i) {
    ASSERT_EQ(service_.seen.Next().stage_state().stage_id(), static_cast<uint64_t>(i));
  }
}

TEST_F(StreamTest, ResumeBeforeThePauseIsNotLost) {
  service_.seen.read_on = false;
  Connect();
  at_server_->Resume();
  ASSERT_TRUE(client_->Send(Beat(1)).ok());
  ASSERT_TRUE(client_->Send(Beat(2)).ok());
  EXPECT_EQ(service_.seen.Next().heartbeat().sent_us(), 1u);
  EXPECT_EQ(service_.seen.Next().heartbeat().sent_us(), 2u);
}

TEST_F(StreamTest, OversizeIsRefusedAndTheStreamLives) {
  Connect();
  EXPECT_EQ(client_->Send(Beat(0, 2 << 20)).code(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(client_->Send(Beat(7)).ok());
  EXPECT_EQ(service_.seen.Next().heartbeat().sent_us(), 7u);
}

TEST_F(StreamTest, MessageOverTheReceiversLimitEndsTheStream) {
  StreamOptions options = kRoomy;
  options.max_message_bytes = 64 << 20;
  client_ = Dial(options);
  EXPECT_TRUE(client_->Send(Beat(0, limits::kMaxControlMessageBytes + 1)).ok());
  EXPECT_FALSE(seen_.End().ok());
  EXPECT_EQ(service_.seen.num_messages, 0);
}

TEST_F(StreamTest, ServersStatusReachesTheClient) {
  Connect();
  at_server_->Close(absl::FailedPreconditionError("another model"));
  const absl::Status end = seen_.End();
  EXPECT_EQ(end.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(end.message(), "another model");
  EXPECT_EQ(client_->Send(Beat(1)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(service_.seen.End().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(StreamTest, DroppedClientEndsTheServersStream) {
  Connect();
  client_.reset();
  EXPECT_EQ(seen_.End().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(service_.seen.End().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(at_server_->Send(Ping(1)).code(), absl::StatusCode::kUnavailable);
}

TEST_F(StreamTest, PeerDeathMidWriteEndsTheStreamOnce) {
  service_.seen.read_on = false;
  Connect();
  for (int i = 0; i < 200; ++i) (void)client_->Send(Beat(i, 64 << 10));
  server_->Shutdown(std::chrono::system_clock::now());
  EXPECT_FALSE(seen_.End().ok());
  EXPECT_EQ(client_->Send(Beat(1)).code(), absl::StatusCode::kUnavailable);
}

TEST_F(StreamTest, AbortEndsAStreamWhosePeerReadsNothing) {
  seen_.read_on = false;
  Connect();
  v1::ToWorker big;
  big.mutable_shutdown()->set_reason(std::string(1 << 19, 'x'));
  for (int i = 0; i < 100; ++i) (void)at_server_->Send(big);
  EXPECT_GT(at_server_->queued_bytes(), 0u);
  at_server_->Abort();
  EXPECT_EQ(service_.seen.End().code(), absl::StatusCode::kCancelled);
}

TEST_F(StreamTest, SilentClientIsEnded) {
  service_.options.first_message_timeout = 50ms;
  Connect();
  EXPECT_EQ(seen_.End().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(service_.seen.End().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(StreamTest, SilentServerIsGivenUp) {
  StreamOptions options = kRoomy;
  options.first_message_timeout = 50ms;
  client_ = Dial(options);
  EXPECT_EQ(seen_.End().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(StreamTest, FirstMessageInTimeKeepsTheStream) {
  service_.options.first_message_timeout = 2s;
  Connect();
  ASSERT_TRUE(client_->Send(Beat(1)).ok());
  EXPECT_EQ(service_.seen.Next().heartbeat().sent_us(), 1u);
  std::this_thread::sleep_for(2100ms);
  ASSERT_TRUE(client_->Send(Beat(2)).ok());
  EXPECT_EQ(service_.seen.Next().heartbeat().sent_us(), 2u);
}

TEST_F(StreamTest, NobodyThereIsUnavailable) {
  server_->Shutdown();
  client_ = Dial();
  EXPECT_EQ(seen_.End().code(), absl::StatusCode::kUnavailable);
}

TEST_F(StreamTest, DroppingAtAnyMomentIsSafe) {
  for (int i = 0; i < 200; ++i) {
    auto client = Dial();
    for (int k = 0; k < i % 5; ++k) (void)client->Send(Beat(k, (i % 3) << 12));
    if (i % 2 == 0) std::this_thread::yield();
    client.reset();
    EXPECT_EQ(seen_.End().code(), absl::StatusCode::kCancelled);
  }
  service_.streams.PopAll(0s);
}

}  // namespace
}  // namespace strait::rpc
