// SPDX-License-Identifier: Apache-2.0
//
// ControlLink keeps a worker attached to its coordinator: it dials, says Hello, beats, notices
// silence, and dials again.
//
// Owns:    the control stream, and one thread that dials and beats.
// Thread:  Send, Resume, Drop, Stop: any but gRPC's. Events: on_message on gRPC threads, on_ended
//          on the link's own; both must only enqueue. All events of a session come before the next
//          session's first.
// Errors:  Send to a session that is not the current one is dropped: Unavailable.
// Limits:  kControlQueueMessages, kMaxControlMessageBytes; kFirstBackoff … kMaxBackoff between
//          attempts.
// Why:     beats come from a thread of their own, so that a worker in a long step is not taken for
//          dead.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "proto/rpc/stream.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

// Counts attachments of this process.
using LinkSession = uint64_t;

class ControlLink {
 public:
  struct Events {
    // After Welcome, Pings left out. Answers whether there is room for more.
    std::function<bool(LinkSession, v1::ToWorker)> on_message;
    std::function<void(LinkSession, absl::Status)> on_ended;
  };

  ControlLink(std::string coordinator_address, Events events);
  ~ControlLink();

  // Dials with this Hello. After on_ended it dials again when it is called anew: what the worker says of
  // itself may have changed.
  void Dial(v1::Hello hello);
  absl::Status Send(LinkSession session, v1::FromWorker message);
  void Resume();
  // Ends the current session; the link dials again.
  void Drop(absl::Status why);
  void Stop();

 private:
  using Stream = rpc::ClientStream<v1::ToWorker, v1::FromWorker>;

  void Run();
  // Dials and serves one session; how it ended.
  absl::Status Serve();
  bool OnMessage(LinkSession session, v1::ToWorker message);
  std::shared_ptr<Stream> Current();

  const std::string coordinator_address_;
  const Events events_;

  std::atomic<uint64_t> heard_us_ = 0;  // when the coordinator was last heard

  std::mutex mu_;  // gRPC threads tell the link's thread
  std::condition_variable changed_;
  bool stop_ = false;                // guarded by mu_
  v1::Hello hello_;                  // guarded by mu_
  bool may_dial_ = false;            // guarded by mu_: hello_ is the one to say
  bool ended_ = false;               // guarded by mu_: the current stream has
  absl::Status end_status_;          // guarded by mu_
  absl::Status drop_;                // guarded by mu_: not ok, the link's thread ends the stream
  bool welcomed_ = false;            // guarded by mu_
  uint32_t beat_interval_ms_ = 0;    // guarded by mu_
  uint32_t silence_timeout_ms_ = 0;  // guarded by mu_
  LinkSession session_ = 0;          // guarded by mu_
  std::shared_ptr<Stream> stream_;   // guarded by mu_
  std::thread thread_;
};

// Resident bytes of this process; 0 where the system does not say.
uint64_t ResidentBytes();

}  // namespace strait
