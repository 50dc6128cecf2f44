// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/edges.h"

#include <utility>

#include "proto/base/status_macros.h"

namespace strait {

absl::StatusOr<std::unique_ptr<Edges>> Edges::Create(GrpcTransportOptions options,
                                                     const NcclOffer& offer,
                                                     TransportEvents events) {
  NcclTransportOptions nccl_options;
  nccl_options.hidden_row_bytes = options.hidden_row_bytes;
  STRAIT_ASSIGN_OR_RETURN(auto grpc, GrpcTransport::Create(std::move(options), events));
  std::unique_ptr<NcclTransport> nccl;
  if (offer.nccl) {
    NcclEvents nccl_events{events, EndPoisonedProcess};
    nccl = std::make_unique<NcclTransport>(nccl_options, offer, std::move(nccl_events));
  }
  return std::unique_ptr<Edges>(new Edges(std::move(events), std::move(grpc), std::move(nccl)));
}

bool Edges::CanNccl(const Edge& edge) {
  if (nccl_) return true;
  events_.on_edge_down(edge, absl::FailedPreconditionError("this worker offers no NCCL"));
  return false;
}

Transport& Edges::Outgoing(uint64_t from_stage_id) {
  if (nccl_outgoing_.contains(from_stage_id)) return *nccl_;
  return *grpc_;
}

Transport& Edges::Incoming(uint64_t to_stage_id) {
  if (nccl_incoming_.contains(to_stage_id)) return *nccl_;
  return *grpc_;
}

void Edges::Connect(const Edge& edge) {
  Disconnect(edge.from_stage_id);
  if (edge.over_nccl) {
    if (!CanNccl(edge)) return;
    nccl_outgoing_.insert(edge.from_stage_id);
  }
  Outgoing(edge.from_stage_id).Connect(edge);
}

absl::Status Edges::Send(uint64_t from_stage_id, HiddenStep hidden) {
  return Outgoing(from_stage_id).Send(from_stage_id, std::move(hidden));
}

absl::Status Edges::SendSampled(uint64_t from_stage_id, SampledStep sampled) {
  return Outgoing(from_stage_id).SendSampled(from_stage_id, std::move(sampled));
}

void Edges::Probe(uint64_t from_stage_id) { Outgoing(from_stage_id).Probe(from_stage_id); }

void Edges::Disconnect(uint64_t from_stage_id) {
  Outgoing(from_stage_id).Disconnect(from_stage_id);
  nccl_outgoing_.erase(from_stage_id);
}

void Edges::Expect(const Edge& edge) {
  const uint64_t id = edge.to_stage_id;
  // gRPC ends older edges with a word to their senders, and keeps a parked one that is this.
  if (edge.over_nccl || nccl_incoming_.contains(id)) Forget(id);
  if (edge.over_nccl) {
    if (!CanNccl(edge)) return;
    nccl_incoming_.insert(id);
  }
  Incoming(id).Expect(edge);
}

void Edges::Due(uint64_t to_stage_id, PipelineEpoch epoch, StepId step, uint32_t num_tokens) {
  if (nccl_incoming_.contains(to_stage_id)) nccl_->Due(to_stage_id, epoch, step, num_tokens);
}

void Edges::Forget(uint64_t to_stage_id) {
  Incoming(to_stage_id).Forget(to_stage_id);
  nccl_incoming_.erase(to_stage_id);
}

void Edges::Retire(uint64_t stage_id) {
  if (nccl_) nccl_->Retire(stage_id);
  nccl_outgoing_.erase(stage_id);
  nccl_incoming_.erase(stage_id);
  grpc_->Retire(stage_id);
}

void Edges::Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) {
  Incoming(to_stage_id).Consumed(to_stage_id, epoch, step);
}

}  // namespace strait
