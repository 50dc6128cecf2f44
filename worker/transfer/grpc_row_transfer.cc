// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/grpc_row_transfer.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "grpcpp/grpcpp.h"
#include "proto/rpc/clock.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "worker/transfer/rows_client.h"
#include "worker/transfer/rows_server.h"

namespace strait {
namespace {

constexpr std::chrono::milliseconds kWatchdogPeriod(250);

class Service final : public v1::RowTransfer::WithRawCallbackMethod_Rows<v1::RowTransfer::Service> {
 public:
  explicit Service(RowsServer* server) : server_(server) {}
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Rows(
      grpc::CallbackServerContext* context) override {
    return server_->Accept(context);
  }

 private:
  RowsServer* const server_;
};

}  // namespace

class GrpcRowTransfer::Impl {
 public:
  Impl(const GrpcRowTransferOptions& options, RowTransferEvents events)
      : events_(std::move(events)),
        buffers(std::make_shared<RowBuffers>()),
        server(options.stall_timeout, buffers, &events_),
        service(&server),
        client(std::make_unique<RowsClient>(options.answer_timeout, options.idle_timeout, buffers,
                                            &events_)) {
    watchdog_ = std::thread([this] { Watch(); });
  }
  ~Impl() { Stop(); }

  void Stop() {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    changed_.notify_all();
    if (watchdog_.joinable()) watchdog_.join();
    client.reset();
    server.Stop();
  }

 private:
  void Watch() {
    std::unique_lock lock(mu_);
    while (!changed_.wait_for(lock, kWatchdogPeriod, [this] { return stop_; })) {
      lock.unlock();
      const uint64_t now_us = MonotonicMicros();
      const bool asks = client->CheckDeadlines(now_us);
      const bool gives = server.CheckDeadlines(now_us);
      if (!asks && !gives) buffers->Clear();
      lock.lock();
    }
  }

  const RowTransferEvents events_;

 public:
  const std::shared_ptr<RowBuffers> buffers;
  RowsServer server;
  Service service;
  std::unique_ptr<RowsClient> client;  // null once stopped

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  bool stop_ = false;  // guarded by mu_
  std::thread watchdog_;
};

GrpcRowTransfer::GrpcRowTransfer(const GrpcRowTransferOptions& options, RowTransferEvents events)
    : impl_(std::make_unique<Impl>(options, std::move(events))) {}
GrpcRowTransfer::~GrpcRowTransfer() = default;

void GrpcRowTransfer::Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) {
  if (impl_->client) impl_->client->Ask(id, peer_address, ask);
}
void GrpcRowTransfer::Forget(AskId id) {
  if (impl_->client) impl_->client->Forget(id);
}
void GrpcRowTransfer::Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) {
  impl_->server.Answer(id, std::move(frame));
}
uint64_t GrpcRowTransfer::WaitingBytes() { return impl_->server.WaitingBytes(); }
std::string GrpcRowTransfer::TakeRows(size_t bytes) { return impl_->buffers->Take(bytes); }
void GrpcRowTransfer::GiveRows(std::string rows) { impl_->buffers->Give(std::move(rows)); }
grpc::Service* GrpcRowTransfer::service() { return &impl_->service; }
uint64_t GrpcRowTransfer::num_stalls() const { return impl_->server.num_stalls(); }
void GrpcRowTransfer::Stop() { impl_->Stop(); }

}  // namespace strait
