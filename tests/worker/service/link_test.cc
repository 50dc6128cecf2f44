// SPDX-License-Identifier: Apache-2.0
//
// Defends: what a worker says in answer to a coordinator's message is never lost. Found as a hang at
// start-up: a stage loaded so fast that StageState was said before the link's own thread had noted
// its stream, and was dropped as said in a session that has ended.
#include "worker/service/link.h"

#include <array>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/queue.h"
#include "strait/v1/cluster.grpc.pb.h"

namespace strait {
namespace {

using std::chrono_literals::operator""s;
using Stream = rpc::ServerStream<v1::FromWorker, v1::ToWorker>;

// Answers every Hello with Welcome, in the reaction that read it.
class HastyCoordinator final : public v1::Coordinator::CallbackService {
 public:
  HastyCoordinator() {
    grpc::ServerBuilder builder;
    rpc::ConfigureServer(builder, "127.0.0.1:0", rpc::Traffic::kControl, &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~HastyCoordinator() override {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  grpc::ServerBidiReactor<v1::FromWorker, v1::ToWorker>* Attach(
      grpc::CallbackServerContext* context) override {
    auto self = std::make_shared<std::weak_ptr<Stream>>();
    auto stream = std::make_shared<Stream>(
        context,
        rpc::StreamOptions{
            .max_queued_messages = 100, .max_queued_bytes = 1 << 20, .max_message_bytes = 1 << 20},
        rpc::StreamEvents<v1::FromWorker>{
            .on_message =
                [self](v1::FromWorker message) {
                  v1::ToWorker welcome;
                  welcome.mutable_welcome()->set_heartbeat_interval_ms(60'000);
                  auto stream = self->lock();
                  if (message.has_hello() && stream) (void)stream->Send(welcome);
                  return true;
                },
            .on_end = [](absl::Status) {}});
    *self = stream;
    stream->Start();
    return stream.get();
  }

  int port = 0;

 private:
  std::unique_ptr<grpc::Server> server_;
};

TEST(ControlLinkTest, AnAnswerToTheFirstMessageIsNeverLost) {
  constexpr int kLinks = 16;
  constexpr int kSessions = 12;
  HastyCoordinator coordinator;
  std::array<std::unique_ptr<ControlLink>, kLinks> links;
  BoundedQueue<absl::Status> answered(kLinks * kSessions);
  std::atomic<int> sessions = 0;
  for (auto& link : links) {
    link = std::make_unique<ControlLink>(
        "127.0.0.1:" + std::to_string(coordinator.port),
        ControlLink::Events{.on_message =
                                [&](LinkSession session, v1::ToWorker) {
                                  v1::FromWorker answer;
                                  answer.mutable_stage_state()->set_stage_id(session);
                                  answered.Push(link->Send(session, std::move(answer)));
                                  link->Drop(absl::CancelledError("the next session, please"));
                                  return true;
                                },
                            .on_ended =
                                [&](LinkSession, absl::Status) {
                                  ++sessions;
                                  link->Dial(v1::Hello());
                                }});
  }
  // Threads that take the processors away between two instructions of a link's thread.
  std::atomic<bool> over = false;
  std::vector<std::thread> busy;
  for (unsigned i = 0; i < 3 * std::thread::hardware_concurrency(); ++i) {
    busy.emplace_back([&over] {
      while (!over) {
      }
    });
  }
  for (auto& link : links) link->Dial(v1::Hello());
  int count = 0;
  while (count < kLinks * kSessions) {
    auto some = answered.PopAll(30s);
    EXPECT_FALSE(some.empty()) << "no session for 30 s, after " << count;
    if (some.empty()) break;
    for (const absl::Status& status : some) EXPECT_TRUE(status.ok()) << status;
    count += static_cast<int>(some.size());
  }
  over = true;
  for (std::thread& thread : busy) thread.join();
  for (auto& link : links) link->Stop();
  EXPECT_GE(sessions, kLinks);
}

}  // namespace
}  // namespace strait
