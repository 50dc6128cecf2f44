// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/grpc_transport.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/grpcpp.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/clock.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "worker/transport/hidden_receiver.h"
#include "worker/transport/hidden_sender.h"
#include "worker/transport/sampled_rows.h"

namespace strait {
namespace {

constexpr std::chrono::milliseconds kWatchdogPeriod(250);

constexpr char kHiddenMethod[] = "/strait.v1.StageTransport/Hidden";
constexpr char kSampledMethod[] = "/strait.v1.StageTransport/Sampled";

class Service final
    : public v1::StageTransport::WithRawCallbackMethod_Hidden<
          v1::StageTransport::WithRawCallbackMethod_Sampled<
              v1::StageTransport::WithCallbackMethod_Probe<v1::StageTransport::Service>>> {
 public:
  Service(HiddenReceiver* receiver, HiddenReceiver* sampled_receiver)
      : receiver_(receiver), sampled_receiver_(sampled_receiver) {}
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Hidden(
      grpc::CallbackServerContext* context) override {
    return receiver_->Accept(context);
  }
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Sampled(
      grpc::CallbackServerContext* context) override {
    return sampled_receiver_->Accept(context);
  }

  grpc::ServerUnaryReactor* Probe(grpc::CallbackServerContext* context, const v1::ProbeRequest*,
                                  v1::ProbeReply*) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  HiddenReceiver* const receiver_;
  HiddenReceiver* const sampled_receiver_;
};

// What edges of sampled ids tell: as others, but rows are ids.
TransportEvents SampledEvents(const TransportEvents& events) {
  TransportEvents out = events;
  out.on_hidden = [&events](uint64_t to, HiddenStep rows) {
    events.on_sampled(to, FromRows(rows));
  };
  return out;
}

}  // namespace

class GrpcTransport::Impl {
 public:
  Impl(const GrpcTransportOptions& options, TransportEvents events)
      : events_(std::move(events)),
        receiver(options.hidden_row_bytes, options.accept_timeout, options.stall_timeout,
                 options.receive_bytes_max, &events_),
        sender(kHiddenMethod, options.hidden_row_bytes,
               {options.answer_timeout, options.accept_timeout, options.stall_timeout}, &events_),
        sampled_receiver(kSampledRowBytes, options.accept_timeout, options.stall_timeout,
                         options.receive_bytes_max, &sampled_events_),
        sampled_sender(kSampledMethod, kSampledRowBytes,
                       {options.answer_timeout, options.accept_timeout, options.stall_timeout},
                       &sampled_events_),
        service_(&receiver, &sampled_receiver) {}

  absl::Status Start(const std::string& listen_address,
                     const std::vector<grpc::Service*>& services) {
    grpc::ServerBuilder builder;
    rpc::ConfigureServer(builder, listen_address, rpc::Traffic::kData, &port);
    builder.RegisterService(&service_);
    for (grpc::Service* const service : services) builder.RegisterService(service);
    server_ = builder.BuildAndStart();
    if (!server_ || port == 0) {
      return absl::UnavailableError(absl::StrCat(
          "cannot listen on ", listen_address,
          " for other workers: the address is taken or not of this machine; choose another with "
          "--listen (port 0 takes a free one)"));
    }
    watchdog_ = std::thread([this] { Watch(); });
    return absl::OkStatus();
  }

  ~Impl() {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    changed_.notify_all();
    if (watchdog_.joinable()) watchdog_.join();
    receiver.Stop();
    sampled_receiver.Stop();
    if (server_) {
      server_->Shutdown(std::chrono::system_clock::now());
      server_->Wait();
    }
  }

 private:
  void Watch() {
    std::unique_lock lock(mu_);
    while (!changed_.wait_for(lock, kWatchdogPeriod, [this] { return stop_; })) {
      lock.unlock();
      const uint64_t now_us = MonotonicMicros();
      sender.CheckDeadlines(now_us);
      receiver.CheckDeadlines(now_us);
      sampled_sender.CheckDeadlines(now_us);
      sampled_receiver.CheckDeadlines(now_us);
      lock.lock();
    }
  }

  const TransportEvents events_;
  const TransportEvents sampled_events_ = SampledEvents(events_);

 public:
  HiddenReceiver receiver;
  HiddenSender sender;
  HiddenReceiver sampled_receiver;
  HiddenSender sampled_sender;
  int port = 0;

 private:
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::mutex mu_;
  std::condition_variable changed_;
  bool stop_ = false;  // guarded by mu_
  std::thread watchdog_;
};

absl::StatusOr<std::unique_ptr<GrpcTransport>> GrpcTransport::Create(GrpcTransportOptions options,
                                                                     TransportEvents events) {
  if (options.hidden_row_bytes == 0 || options.hidden_row_bytes % sizeof(float) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows of ", options.hidden_row_bytes, " bytes are not whole float32 rows"));
  }
  auto impl = std::make_unique<Impl>(options, std::move(events));
  if (absl::Status started = impl->Start(options.listen_address, options.services); !started.ok())
    return started;
  return std::unique_ptr<GrpcTransport>(new GrpcTransport(std::move(impl)));
}

GrpcTransport::GrpcTransport(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
GrpcTransport::~GrpcTransport() = default;

void GrpcTransport::Connect(const Edge& edge) {
  (edge.sampled ? impl_->sampled_sender : impl_->sender).Connect(edge);
}
absl::Status GrpcTransport::SendSampled(uint64_t from_stage_id, SampledStep sampled) {
  return impl_->sampled_sender.Send(from_stage_id, ToRows(sampled));
}
absl::Status GrpcTransport::Send(uint64_t from_stage_id, HiddenStep hidden) {
  return impl_->sender.Send(from_stage_id, std::move(hidden));
}
// A stage has one edge at either end, of the one kind or of the other.
void GrpcTransport::Probe(uint64_t from_stage_id) {
  impl_->sender.Probe(from_stage_id);
  impl_->sampled_sender.Probe(from_stage_id);
}
void GrpcTransport::Disconnect(uint64_t from_stage_id) {
  impl_->sender.Disconnect(from_stage_id);
  impl_->sampled_sender.Disconnect(from_stage_id);
}
void GrpcTransport::Expect(const Edge& edge) {
  (edge.sampled ? impl_->sampled_receiver : impl_->receiver).Expect(edge);
}
void GrpcTransport::Forget(uint64_t to_stage_id) {
  impl_->receiver.Forget(to_stage_id);
  impl_->sampled_receiver.Forget(to_stage_id);
}
void GrpcTransport::Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) {
  impl_->receiver.Consumed(to_stage_id, epoch, step);
  impl_->sampled_receiver.Consumed(to_stage_id, epoch, step);
}
int GrpcTransport::port() const { return impl_->port; }

TransportStats GrpcTransport::Stats() const {
  const HiddenReceiver& ids = impl_->sampled_receiver;
  return {.opens_refused = impl_->receiver.opens_refused() + ids.opens_refused(),
          .frames_refused = impl_->receiver.frames_refused() + ids.frames_refused(),
          .stalls = impl_->receiver.stalls() + impl_->sender.stalls() + ids.stalls() +
                    impl_->sampled_sender.stalls(),
          .bytes_sent = impl_->sender.bytes_sent() + impl_->sampled_sender.bytes_sent(),
          .bytes_received = impl_->receiver.bytes_received() + ids.bytes_received()};
}

}  // namespace strait
