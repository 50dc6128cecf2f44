// SPDX-License-Identifier: Apache-2.0
//
// HiddenSender is the sending side of GrpcTransport: one stream and one connection per outgoing
// edge.
//
// Owns:    streams and their channels; those of dropped edges until CheckDeadlines buries them.
// Thread:  Connect, Send, Probe, Disconnect: loop thread. CheckDeadlines: watchdog thread. Never a gRPC
//          thread, and destroyed on none.
// Errors:  as Transport.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "worker/transport/transport.h"

namespace strait {

class HiddenSender {
 public:
  struct Timeouts {
    std::chrono::milliseconds answer;  // GrpcTransportOptions say what they bound
    std::chrono::milliseconds accept;
    std::chrono::milliseconds stall;
  };
  // `method`: the one of StageTransport that it calls.
  HiddenSender(const char* method, uint32_t hidden_row_bytes, Timeouts timeouts,
               const TransportEvents* events);
  ~HiddenSender();

  void Connect(const Edge& edge);
  absl::Status Send(uint64_t from_stage_id, HiddenStep hidden);
  // Nothing where the stage has no edge of this kind.
  void Probe(uint64_t from_stage_id);
  void Disconnect(uint64_t from_stage_id);
  void CheckDeadlines(uint64_t now_us);

  uint64_t stalls() const { return stalls_; }
  uint64_t bytes_sent() const { return bytes_sent_; }

 private:
  struct Outgoing;

  const char* const method_;
  const uint32_t hidden_row_bytes_;
  const Timeouts timeouts_;
  const TransportEvents* const events_;
  std::atomic<uint64_t> stalls_ = 0;
  std::atomic<uint64_t> bytes_sent_ = 0;

  std::mutex mu_;  // the watchdog reads what the loop writes
  std::unordered_map<uint64_t, std::shared_ptr<Outgoing>>
      edges_;                                       // guarded by mu_, by from_stage_id
  std::vector<std::shared_ptr<Outgoing>> dropped_;  // guarded by mu_
};

}  // namespace strait
