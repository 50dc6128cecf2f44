// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/grpc_row_transfer.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "grpcpp/grpcpp.h"
#include "proto/base/log.h"
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

// Null: rows go by gRPC.
std::shared_ptr<SharedRegion> MakeRegion(const GrpcRowTransferOptions& options) {
  if (!options.shares_memory) return nullptr;
  auto region = SharedRegion::Create(options.lock_pages);
  if (region.ok()) return *std::move(region);
  Log(LogLevel::kWarning, "no memory for rows of this host's workers, they come by gRPC",
      {{"why", region.status()}});
  return nullptr;
}

}  // namespace

class GrpcRowTransfer::Impl {
 public:
  Impl(const GrpcRowTransferOptions& options, RowTransferEvents events)
      : events_(std::move(events)),
        buffers(std::make_shared<RowBuffers>()),
        region(MakeRegion(options)),
        links(options.links),
        server({.stall_timeout = options.stall_timeout,
                .takes_offers = options.shares_memory,
                .lock_pages = options.lock_pages,
                .links = options.links},
               buffers, &events_),
        service(&server),
        client(std::make_unique<RowsClient>(options.answer_timeout, options.idle_timeout, buffers,
                                            region, options.links, &events_)),
        came(client->counts()) {
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
    if (links != nullptr) links->Stop();
  }

  void AskSelf(AskId id, const RowsAsk& ask) {
    std::shared_ptr<SharedRegion::Offer> offer;
    if (region != nullptr) offer = region->Make(ask.bytes);
    server.AskSelf(ask, offer == nullptr ? SharedPlace{} : offer->place(),
                   [this, id, offer](absl::StatusOr<RowsFrame> frame) {
                     if (frame.ok() && frame->lent.any()) {
                       const uint64_t bytes = frame->lent.memory.size();
                       frame->lent = {};  // its writer leaves it
                       absl::StatusOr<LentRows> rows = offer->Take(bytes);
                       if (!rows.ok()) {
                         frame = rows.status();
                       } else {
                         frame->lent = *std::move(rows);
                       }
                     }
                     if (frame.ok()) came->shared += frame->bytes().size();
                     events_.on_rows(id, std::move(frame));
                   });
  }

 private:
  void Watch() {
    std::unique_lock lock(mu_);
    while (!changed_.wait_for(lock, kWatchdogPeriod, [this] { return stop_; })) {
      lock.unlock();
      const uint64_t now_us = MonotonicMicros();
      const bool asks = client->CheckDeadlines(now_us);
      const bool gives = server.CheckDeadlines(now_us);
      if (!asks && !gives) {
        buffers->Clear();
        if (region != nullptr) region->Trim();
      }
      lock.lock();
    }
  }

  const RowTransferEvents events_;

 public:
  const std::shared_ptr<RowBuffers> buffers;
  const std::shared_ptr<SharedRegion> region;  // or null
  const std::shared_ptr<RowLinks> links;       // or null
  std::string address;                         // of this worker
  RowsServer server;
  Service service;
  std::unique_ptr<RowsClient> client;  // null once stopped
  const std::shared_ptr<RowCounts> came;

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
  if (!impl_->client) return;
  if (peer_address == impl_->address) return impl_->AskSelf(id, ask);
  impl_->client->Ask(id, peer_address, ask);
}
void GrpcRowTransfer::Forget(AskId id) {
  if (impl_->client) impl_->client->Forget(id);
}
void GrpcRowTransfer::Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) {
  impl_->server.Answer(id, std::move(frame));
}
uint64_t GrpcRowTransfer::WaitingBytes() { return impl_->server.WaitingBytes(); }
bool GrpcRowTransfer::TakeRows(PeerAskId id, size_t bytes, bool may_be_device, RowsFrame* frame) {
  return impl_->server.TakeRows(id, bytes, may_be_device, frame);
}
void GrpcRowTransfer::GiveRows(std::string rows) { impl_->buffers->Give(std::move(rows)); }
grpc::Service* GrpcRowTransfer::service() { return &impl_->service; }
uint64_t GrpcRowTransfer::num_stalls() const { return impl_->server.num_stalls(); }
void GrpcRowTransfer::SetAddress(std::string address) { impl_->address = std::move(address); }
RowTransferBytes GrpcRowTransfer::bytes() const {
  const RowCounts& went = impl_->server.counts();
  return {.came_shared = impl_->came->shared,
          .came_by_nccl = impl_->came->nccl,
          .came_by_grpc = impl_->came->grpc,
          .went_shared = went.shared,
          .went_by_nccl = went.nccl,
          .went_by_grpc = went.grpc};
}
uint64_t GrpcRowTransfer::shared_bytes_used() {
  return impl_->region == nullptr ? 0 : impl_->region->used_bytes();
}
void GrpcRowTransfer::Stop() { impl_->Stop(); }

}  // namespace strait
