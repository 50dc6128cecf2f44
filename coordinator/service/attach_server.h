// SPDX-License-Identifier: Apache-2.0
//
// AttachServer is the coordinator's gRPC side: it lets workers in whose Hello is valid, and
// carries messages between them and the loop.
//
// Owns:    the gRPC server (Coordinator, health, reflection).
// Thread:  Start and Stop from one thread, Stop before destruction. Events come on gRPC threads
//          and must only enqueue: on_attached, then messages, then on_ended, in order for one
//          worker.
// Errors:  Start: Unavailable (the address is taken). A worker that is silent, begins otherwise
//          than with Hello, or says nonsense is ended with a status that names it, and no event
//          comes of it.
// Limits:  kMaxWorkers streams of workers and a few that have not said Hello, each for hello_timeout
//          at most; kControlQueueMessages waiting to be written to one worker; what it says in words
//          is printable and kMaxErrorMessageBytes at most.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "proto/rpc/stream.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

using WorkerStream = rpc::ServerStream<v1::FromWorker, v1::ToWorker>;

struct AttachServerOptions {
  std::string listen_address = "127.0.0.1:7000";
  std::chrono::milliseconds hello_timeout{10'000};
};

struct AttachEvents {
  std::function<void(WorkerId, v1::Hello, std::shared_ptr<WorkerStream>)> on_attached;
  // Answers whether there is room for more; after `false` the stream is read on by its Resume.
  std::function<bool(WorkerId, v1::FromWorker)> on_message;
  std::function<void(WorkerId, absl::Status)> on_ended;
  std::function<std::string()> status_json;  // of GetStatus
};

// What must hold of a Hello whatever the model is.
absl::Status CheckHello(const v1::Hello& hello);
// FailedPrecondition: the worker is on another machine, by its `peer` as gRPC has it, and says that others reach it
// under an address of theirs.
absl::Status CheckReachable(const v1::Hello& hello, std::string_view peer);

class AttachServer {
 public:
  AttachServer(AttachServerOptions options, AttachEvents events);
  ~AttachServer();

  absl::Status Start();
  // Ends every stream with Unavailable; all events have come when it returns.
  void Stop();
  int port() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace strait
