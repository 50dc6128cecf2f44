// SPDX-License-Identifier: Apache-2.0
//
// GrpcTransport carries hidden states over gRPC streams: one stream and one connection an edge.
//
// Owns:    a data server (StageTransport, what else a worker offers, health, reflection), outgoing streams, a watchdog
//          thread.
// Thread:  as Transport; Expect, Forget, Consumed: loop thread. The destructor waits for the last
//          callback.
// Errors:  Create: Unavailable (the address is taken), InvalidArgument. A sender that contradicts
//          itself is ended with InvalidArgument or DataLoss, one of an older edge with Aborted,
//          one that nobody expects in time with FailedPrecondition, one that does not show its
//          edge's nonce with PermissionDenied; each is counted, and other edges do not notice.
// Limits:  GrpcTransportOptions; kMaxIncomingStreams, kMaxParkedOpens.
// Why:     a sender may open before the receiver was told of its edge: it is parked (not read
//          from), so nothing has to be kept for an edge that may never be.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/base/limits.h"
#include "worker/transport/transport.h"

namespace grpc {
class Service;
}

namespace strait {

inline constexpr size_t kMaxIncomingStreams = 512;
inline constexpr size_t kMaxParkedOpens = 64;

struct GrpcTransportOptions {
  std::string listen_address = "127.0.0.1:0";
  uint32_t hidden_row_bytes = 0;
  // From dialling, or probing, to the peer's first word.
  std::chrono::milliseconds answer_timeout = kAnswerTimeout;
  // From dialling to the peer's acceptance; also how long an unexpected sender is parked. Long,
  // because a peer is activated between two steps.
  std::chrono::milliseconds accept_timeout{30'000};
  // A write, or a step that arrived in part, that makes no progress for this long breaks the edge.
  std::chrono::milliseconds stall_timeout{30'000};
  size_t receive_bytes_max = limits::kDataQueueBytes;  // delivered and not consumed, per edge
  std::vector<grpc::Service*> services;  // that its data server offers besides; they outlive it
};

struct TransportStats {
  uint64_t opens_refused = 0;
  uint64_t frames_refused = 0;
  uint64_t stalls = 0;
  uint64_t bytes_sent = 0;
  uint64_t bytes_received = 0;
};

class GrpcTransport final : public Transport {
 public:
  static absl::StatusOr<std::unique_ptr<GrpcTransport>> Create(GrpcTransportOptions options,
                                                               TransportEvents events);
  ~GrpcTransport() override;

  void Connect(const Edge& edge) override;
  absl::Status Send(uint64_t from_stage_id, HiddenStep hidden) override;
  absl::Status SendSampled(uint64_t from_stage_id, SampledStep sampled) override;
  void Probe(uint64_t from_stage_id) override;
  void Disconnect(uint64_t from_stage_id) override;
  // And only a sender that shows the edge's nonce: this port is open to all who reach it, as a
  // simulated one is not.
  void Expect(const Edge& edge) override;
  void Forget(uint64_t to_stage_id) override;
  void Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) override;

  int port() const;  // that the data server listens on
  TransportStats Stats() const;

 private:
  class Impl;
  explicit GrpcTransport(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace strait
