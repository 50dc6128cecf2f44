// SPDX-License-Identifier: Apache-2.0
//
// The edges between the stages that a pipeline is to get are made while its old stages serve, and taken over by the
// switch. What fails of that is told to nobody: the switch then makes its edges itself, as every epoch does. What its teardown
// costs: worker/transport/README.md.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"

namespace strait {

void Cluster::BeginLinks(uint64_t now_us) {
  Scale& scale = *scale_;
  std::vector<StageSlot>& slots = scale.next;
  scale.links = slots.size() > 1 ? Scale::Links::kComing : Scale::Links::kUp;
  scale.link_progress_us = now_us;
  scale.sampled_edge = {};
  if (slots.size() == 1) return;
  for (size_t i = 1; i < slots.size(); ++i) {
    slots[i].edge = edges_.Choose(EndAt(slots[i - 1]), EndAt(slots[i]), now_us);
    slots[i].numbered = NextEdge({}, slots[i - 1].stage_id, slots[i].stage_id,
                                 slots[i].edge.over_nccl, &last_edge_id_);
  }
  if (context_->options.grants()) {
    scale.sampled_edge = NextEdge({}, slots.back().stage_id, slots.front().stage_id,
                                  /*over_nccl=*/false, &last_edge_id_);
  }
  TellLink(static_cast<uint32_t>(slots.size()) - 1);
}

void Cluster::TellLink(uint32_t slot_index) {
  Scale& scale = *scale_;
  for (uint32_t i = slot_index + 1; i-- > 0;) {
    StageSlot& slot = scale.next[i];
    slot.link_told = true;
    SendToWorker out{slot.worker, {}};
    SetEdges(*pipelines_.at(scale.pipeline), scale.next, scale.sampled_edge, i,
             out.message.mutable_link_stage()->mutable_future());
    context_->Send(std::move(out));
    if (slot.edge.over_nccl) return;  // the stage before needs the id that this one makes
  }
}

void Cluster::OnEdgeIdAhead(Worker* worker, const Seat& seat, const v1::EdgeId& id,
                            uint64_t now_us) {
  StageSlot& slot = *seat.slot;
  if (FromWire(id.epoch()) != PipelineEpoch{} || !slot.link_told ||
      id.nccl_id().size() != limits::kNcclIdBytes) {
    return Evict(worker->id,
                 absl::FailedPreconditionError("tells an edge's NCCL id that was not asked for"),
                 now_us);
  }
  // Given up meanwhile.
  if (scale_->links != Scale::Links::kComing || !slot.edge.over_nccl || !slot.nccl_id.empty()) {
    return;
  }
  slot.nccl_id = id.nccl_id();
  scale_->link_progress_us = now_us;
  TellLink(seat.stage->slot_index - 1);
}

void Cluster::OnLinked(Worker* worker, const v1::StageLinked& linked, uint64_t now_us) {
  const Seat seat = SeatOf(worker, linked.stage_id());
  if (seat.slot == nullptr && linked.stage_id() != 0 && linked.stage_id() <= last_stage_id_) return;
  if (seat.slot != nullptr && !seat.stage->is_prepared()) return;  // late: it has its place
  if (seat.slot == nullptr || !seat.slot->link_told) {
    return Evict(worker->id,
                 absl::FailedPreconditionError(absl::StrCat(
                     "tells of edges of stage ", linked.stage_id(), ", which nobody asked for")),
                 now_us);
  }
  Scale& scale = *scale_;
  if (linked.error_code() == 0) {
    scale.link_progress_us = now_us;
    seat.slot->linked = true;
    const bool all = std::all_of(scale.next.begin(), scale.next.end(),
                                 [](const StageSlot& slot) { return slot.linked; });
    if (all && scale.links == Scale::Links::kComing) scale.links = Scale::Links::kUp;
    return;
  }
  // As an epoch's: the pair takes gRPC for a while.
  for (size_t i = 1; i < scale.next.size(); ++i) {
    const StageSlot& slot = scale.next[i];
    if (slot.stage_id != linked.failed_nccl_edge() || !slot.edge.over_nccl) continue;
    edges_.Avoid(scale.next[i - 1].worker, slot.worker, linked.error_message(), now_us);
  }
  GiveUpLinks();
}

bool Cluster::LinksSettled(uint64_t now_us) {
  if (scale_->links != Scale::Links::kComing) return true;
  if (now_us < scale_->link_progress_us + context_->options.migrate_stall_us) return false;
  GiveUpLinks();
  return true;
}

void Cluster::GiveUpLinks() {
  scale_->links = Scale::Links::kGivenUp;
  scale_->sampled_edge = {};
  for (StageSlot& slot : scale_->next) {
    slot.edge = EdgeChoice();
    slot.numbered = {};
    slot.nccl_id.clear();
    slot.linked = false;
  }
}

void Cluster::TakeLinks(Pipeline* pipeline) {
  STRAIT_CHECK(scale_->links == Scale::Links::kUp || scale_->links == Scale::Links::kGivenUp);
  pipeline->sampled_edge = std::exchange(scale_->sampled_edge, {});
  for (size_t i = 1; i < pipeline->slots.size(); ++i) {
    pipeline->slots[i].edge_made = scale_->links == Scale::Links::kUp;
  }
  scale_->links = Scale::Links::kNone;
}

}  // namespace strait
