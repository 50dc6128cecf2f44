// SPDX-License-Identifier: Apache-2.0
//
// HiddenReceiver is the receiving side of GrpcTransport: it lets in whom the loop expects, checks
// every number that a sender gives before memory is taken for it, and hands on whole, verified
// steps.
//
// Thread:  Accept and stream events: gRPC threads. Expect, Forget, Consumed: loop thread.
//          CheckDeadlines: watchdog thread.
// Errors:  as GrpcTransport.
// Why:     a step is assembled on the gRPC thread that read it, straight from gRPC's slices: the
//          one copy that the bytes make on this side.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "worker/transport/hidden_frame.h"
#include "worker/transport/transport.h"

namespace strait {

class HiddenReceiver {
 public:
  HiddenReceiver(uint32_t hidden_row_bytes, std::chrono::milliseconds accept_timeout,
                 std::chrono::milliseconds stall_timeout, size_t receive_bytes_max,
                 const TransportEvents* events);
  ~HiddenReceiver();

  // A sender's call. The reactor deletes itself.
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Accept(
      grpc::CallbackServerContext* context);

  void Expect(const Edge& edge);
  void Forget(uint64_t to_stage_id);
  void Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step);
  void CheckDeadlines(uint64_t now_us);
  // Ends every stream; no event comes of it.
  void Stop();

  uint64_t opens_refused() const { return opens_refused_; }
  uint64_t frames_refused() const { return frames_refused_; }
  uint64_t stalls() const { return stalls_; }
  uint64_t bytes_received() const { return bytes_received_; }

 private:
  struct Incoming;
  using IncomingPtr = std::shared_ptr<Incoming>;
  struct Expectation {
    uint64_t edge_id = 0;
    uint64_t from_stage_id = 0;
    uint64_t nonce = 0;
    bool opened = false;  // a sender was let in
    IncomingPtr current;  // null again when its end was noticed and told
  };

  bool OnMessage(const IncomingPtr& incoming, const grpc::ByteBuffer& message);
  void OnEnd(const IncomingPtr& incoming, absl::Status status);
  absl::Status CheckOpen(const v1::HiddenOpen& open) const;
  void OnOpen(const IncomingPtr& incoming, const v1::HiddenOpen& open);
  absl::Status OnChunk(Incoming& incoming, const HiddenFrame& frame, bool* complete);
  using Settled = std::vector<std::pair<IncomingPtr, absl::Status>>;
  // REQUIRES: mu_ held. Ok: the sender is let in; whose place it took must be ended, and is added to
  // `settled`. Unavailable: it is too early.
  absl::Status Admit(const IncomingPtr& incoming, Settled* settled);
  // Those that are Ok are let in, the others end.
  void Settle(const Settled& settled);
  void Answer(Incoming& incoming, bool accepted);

  const uint32_t hidden_row_bytes_;
  const std::chrono::milliseconds accept_timeout_;
  const std::chrono::milliseconds stall_timeout_;
  const size_t receive_bytes_max_;
  const TransportEvents* const events_;
  std::atomic<bool> stopping_ = false;
  std::atomic<uint64_t> opens_refused_ = 0;
  std::atomic<uint64_t> frames_refused_ = 0;
  std::atomic<uint64_t> stalls_ = 0;
  std::atomic<uint64_t> bytes_received_ = 0;

  std::mutex mu_;                                       // loop, gRPC and watchdog threads meet here
  std::unordered_map<uint64_t, Expectation> expected_;  // guarded by mu_, by to_stage_id
  std::vector<IncomingPtr> parked_;                     // guarded by mu_
  std::unordered_set<IncomingPtr> streams_;             // guarded by mu_: all that have not ended
};

}  // namespace strait
