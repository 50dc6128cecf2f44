// SPDX-License-Identifier: Apache-2.0
//
// Edges are all edges of a worker: each by the transport that the coordinator chose for it.
//
// Owns:    a GrpcTransport, and an NcclTransport where the worker offers NCCL.
// Thread:  as Transport.
// Errors:  Create: the GrpcTransport's. An NCCL edge without NCCL is told like one that broke.
// Why:     a stage may change its transport with its edge; what it had before is dropped in both.
#pragma once

#include <memory>
#include <string>
#include <unordered_set>

#include "absl/status/statusor.h"
#include "worker/transport/grpc_transport.h"
#include "worker/transport/nccl_transport.h"

namespace strait {

class Edges final : public Transport {
 public:
  // `offer.nccl` may be null. An abort of NCCL that hangs ends the process (kPoisonedExit).
  static absl::StatusOr<std::unique_ptr<Edges>> Create(GrpcTransportOptions options,
                                                       const NcclOffer& offer,
                                                       TransportEvents events);

  void Connect(const Edge& edge) override;
  absl::Status Send(uint64_t from_stage_id, HiddenStep hidden) override;
  absl::Status SendSampled(uint64_t from_stage_id, SampledStep sampled) override;
  void Probe(uint64_t from_stage_id) override;
  void Disconnect(uint64_t from_stage_id) override;
  void Expect(const Edge& edge) override;
  void Forget(uint64_t to_stage_id) override;
  void Retire(uint64_t stage_id) override;
  void Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) override;
  // A plan was accepted: so many rows of this step will come. Receives over NCCL are posted by it.
  void Due(uint64_t to_stage_id, PipelineEpoch epoch, StepId step, uint32_t num_tokens);

  int port() const { return grpc_->port(); }
  // How long the loop should turn before it sleeps.
  std::chrono::microseconds eager_wait() const {
    return nccl_incoming_.empty() ? std::chrono::microseconds(0) : kEagerHiddenWait;
  }

 private:
  Edges(TransportEvents events, std::unique_ptr<GrpcTransport> grpc,
        std::unique_ptr<NcclTransport> nccl)
      : events_(std::move(events)), grpc_(std::move(grpc)), nccl_(std::move(nccl)) {}

  // Whether NCCL can take it; tells that it broke otherwise.
  bool CanNccl(const Edge& edge);
  Transport& Outgoing(uint64_t from_stage_id);
  Transport& Incoming(uint64_t to_stage_id);

  const TransportEvents events_;
  const std::unique_ptr<GrpcTransport> grpc_;
  const std::unique_ptr<NcclTransport> nccl_;   // may be null
  std::unordered_set<uint64_t> nccl_outgoing_;  // by from_stage_id
  std::unordered_set<uint64_t> nccl_incoming_;  // by to_stage_id
};

}  // namespace strait
