// SPDX-License-Identifier: Apache-2.0
#include "coordinator/service/attach_server.h"

#include <map>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "grpcpp/grpcpp.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"
#include "proto/rpc/address.h"
#include "proto/rpc/channel.h"
#include "proto/wire/version.h"
#include "strait/v1/cluster.grpc.pb.h"

namespace strait {
namespace {

constexpr size_t kQueueBytes = 4 * size_t{limits::kMaxControlMessageBytes};
constexpr size_t kMaxNameBytes = 128;
constexpr size_t kMaxNumericsIdBytes = 256;
constexpr uint64_t kMaxMemoryBytes = uint64_t{1} << 50;
// Streams whose Hello has not come. They share no room with workers, and the one that has been
// silent for longest makes room for the next: a worker says Hello at once.
constexpr size_t kMaxStrangers = 64;
// Core counts workers exactly. These may be there besides, of processes that attach again.
constexpr size_t kMaxPredecessors = 64;
constexpr std::chrono::seconds kStopGrace(1);

// What a peer says in words goes to logs and into the status.
void BoundWords(v1::FromWorker* message) {
  const auto bound = [](std::string* words) {
    *words = PrintableText(*words, limits::kMaxErrorMessageBytes);
  };
  if (message->has_hello()) {
    v1::Hello* hello = message->mutable_hello();
    for (std::string* words :
         {hello->mutable_name(), hello->mutable_data_address(), hello->mutable_numerics_id(),
          hello->mutable_backend(), hello->mutable_host_id()}) {
      bound(words);
    }
  } else if (message->has_stage_state()) {
    bound(message->mutable_stage_state()->mutable_error_message());
  } else if (message->has_report()) {
    v1::StageReport* report = message->mutable_report();
    bound(report->mutable_error_message());
    for (v1::SequenceResult& result : *report->mutable_results()) {
      if (result.error_code() != 0) bound(result.mutable_error_message());
    }
  }
}

}  // namespace

absl::Status CheckHello(const v1::Hello& hello) {
  if (hello.wire_version() != kWireVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the worker speaks wire version ", hello.wire_version(), ", this coordinator ",
                     kWireVersion, ": install the same release on both machines"));
  }
  if (hello.name().size() > kMaxNameBytes || hello.backend().size() > kMaxNameBytes ||
      hello.numerics_id().size() > kMaxNumericsIdBytes || hello.numerics_id().empty()) {
    return absl::InvalidArgumentError(
        "a Hello with a name, backend or numerics id that is too long or missing");
  }
  if (hello.host_id().size() > limits::kMaxHostIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("a host id of ", hello.host_id().size(),
                                                   " bytes, at most ", limits::kMaxHostIdBytes,
                                                   ": see --host-id"));
  }
  STRAIT_ASSIGN_OR_RETURN(const rpc::HostPort data, rpc::ParseHostPort(hello.data_address()));
  if (data.port == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("data address ", hello.data_address(), " has no port: see --advertise"));
  }
  if (hello.memory_bytes() == 0 || hello.memory_bytes() > kMaxMemoryBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a worker with ", hello.memory_bytes(), " bytes of memory: see --memory"));
  }
  return absl::OkStatus();
}

absl::Status CheckReachable(const v1::Hello& hello, std::string_view peer) {
  const absl::StatusOr<rpc::HostPort> data = rpc::ParseHostPort(hello.data_address());
  const std::string host = rpc::HostOfPeer(peer);
  if (!data.ok() || !rpc::IsLoopback(data->host) || host.empty() || rpc::IsOfThisMachine(host)) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "worker ", hello.name(), " attaches from ", host, " and says that other workers reach it at ",
      hello.data_address(), ", which is an address of each machine's own: start it with --listen ",
      host,
      ":0 (or another address of its machine) and --insecure, or with --advertise HOST:PORT"));
}

class AttachServer::Impl final : public v1::Coordinator::CallbackService {
 public:
  Impl(AttachServerOptions options, AttachEvents events)
      : options_(std::move(options)), events_(std::move(events)) {}
  ~Impl() override { Stop(); }

  absl::Status Start() {
    grpc::ServerBuilder builder;
    rpc::ConfigureServer(builder, options_.listen_address, rpc::Traffic::kControl, &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    if (!server_ || port == 0) {
      return absl::UnavailableError(absl::StrCat(
          "cannot listen on ", options_.listen_address,
          " for workers: the address is taken or not of this machine; choose another with --grpc"));
    }
    return absl::OkStatus();
  }

  void Stop() {
    if (!server_) return;
    std::vector<std::shared_ptr<WorkerStream>> streams;
    {
      std::lock_guard lock(mu_);
      stopping_ = true;
      for (const auto& [arrival, attachment] : strangers_) {
        // One that is being started sees stopping_ afterwards.
        if (attachment->started) streams.push_back(attachment->stream);
      }
      for (const auto& attachment : workers_) streams.push_back(attachment->stream);
    }
    for (auto& stream : streams) stream->Close(absl::UnavailableError("the coordinator stops"));
    streams.clear();
    server_->Shutdown(std::chrono::system_clock::now() + kStopGrace);
    server_->Wait();
    server_.reset();
  }

  grpc::ServerBidiReactor<v1::FromWorker, v1::ToWorker>* Attach(
      grpc::CallbackServerContext* context) override {
    auto attachment = std::make_shared<Attachment>();
    rpc::StreamOptions options;
    options.max_queued_messages = limits::kControlQueueMessages;
    options.max_queued_bytes = kQueueBytes;
    options.max_message_bytes = limits::kMaxControlMessageBytes;
    options.first_message_timeout = options_.hello_timeout;
    rpc::StreamEvents<v1::FromWorker> events;
    events.on_message = [this, attachment](v1::FromWorker message) {
      return OnMessage(attachment, std::move(message));
    };
    events.on_end = [this, attachment](absl::Status status) {
      OnEnd(attachment, std::move(status));
    };
    auto stream = std::make_shared<WorkerStream>(context, options, std::move(events));
    attachment->stream = stream;
    std::shared_ptr<Attachment> silent;
    {
      std::lock_guard lock(mu_);
      attachment->arrival = ++last_arrival_;
      if (strangers_.size() >= kMaxStrangers && strangers_.begin()->second->started) {
        silent = strangers_.extract(strangers_.begin()).mapped();
      }
      strangers_.emplace(attachment->arrival, attachment);
    }
    stream->Start();
    bool stopping;
    {
      std::lock_guard lock(mu_);
      attachment->started = true;
      stopping = stopping_;
    }
    if (stopping) stream->Close(absl::UnavailableError("the coordinator stops"));
    if (silent) {
      silent->stream->Close(absl::ResourceExhaustedError(absl::StrCat(
          "more than ", kMaxStrangers, " connections have not said Hello, this one for longest")));
    }
    return stream.get();
  }

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const v1::GetStatusRequest*,
                                      v1::GetStatusReply* reply) override {
    reply->set_json(events_.status_json());
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  int port = 0;

 private:
  struct Attachment {
    std::shared_ptr<WorkerStream> stream;
    uint64_t arrival = 0;
    bool started = false;  // guarded by mu_: its stream may be closed by another's thread
    WorkerId worker;       // 0 until Hello; read reactions and, after them, the end
  };

  bool OnMessage(const std::shared_ptr<Attachment>& attachment, v1::FromWorker message) {
    BoundWords(&message);
    if (attachment->worker.value != 0) {
      return events_.on_message(attachment->worker, std::move(message));
    }
    absl::Status valid = message.has_hello()
                             ? CheckHello(message.hello())
                             : absl::InvalidArgumentError("the first message of a worker is Hello");
    if (valid.ok()) valid = CheckReachable(message.hello(), attachment->stream->peer());
    if (valid.ok()) valid = Admit(attachment);
    if (!valid.ok()) {
      Log(LogLevel::kWarning, "worker refused",
          {{"peer", attachment->stream->peer()}, {"why", valid}});
      attachment->stream->Close(valid);
      return true;
    }
    events_.on_attached(attachment->worker, std::move(*message.mutable_hello()),
                        attachment->stream);
    return true;
  }

  // Makes a worker of a stranger.
  absl::Status Admit(const std::shared_ptr<Attachment>& attachment) {
    std::lock_guard lock(mu_);
    if (strangers_.erase(attachment->arrival) == 0) {
      return absl::ResourceExhaustedError("its Hello came too late");
    }
    if (workers_.size() >= limits::kMaxWorkers + kMaxPredecessors) {
      return absl::ResourceExhaustedError(
          absl::StrCat("this coordinator has its ", limits::kMaxWorkers, " workers already"));
    }
    workers_.insert(attachment);
    attachment->worker = WorkerId{++last_worker_};
    return absl::OkStatus();
  }

  void OnEnd(const std::shared_ptr<Attachment>& attachment, absl::Status status) {
    {
      std::lock_guard lock(mu_);
      strangers_.erase(attachment->arrival);
      workers_.erase(attachment);
    }
    if (attachment->worker.value != 0) events_.on_ended(attachment->worker, std::move(status));
  }

  const AttachServerOptions options_;
  const AttachEvents events_;
  std::unique_ptr<grpc::Server> server_;
  std::mutex mu_;  // gRPC threads and Stop meet here
  // Guarded by mu_:
  bool stopping_ = false;
  uint64_t last_arrival_ = 0;
  uint64_t last_worker_ = 0;
  std::map<uint64_t, std::shared_ptr<Attachment>> strangers_;  // by arrival
  std::unordered_set<std::shared_ptr<Attachment>> workers_;
};

AttachServer::AttachServer(AttachServerOptions options, AttachEvents events)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(events))) {}
AttachServer::~AttachServer() = default;
absl::Status AttachServer::Start() { return impl_->Start(); }
void AttachServer::Stop() { impl_->Stop(); }
int AttachServer::port() const { return impl_->port; }

}  // namespace strait
