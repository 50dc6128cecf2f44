// SPDX-License-Identifier: Apache-2.0
//
// How a pipeline enters an epoch: which edges it has, who is told what and when.
#include <algorithm>
#include <utility>

#include "coordinator/core/cluster.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/epoch_wire.h"

namespace strait {

namespace {

RowSource SourceOf(const Pipeline& pipeline, const std::map<WorkerId, Worker>& workers,
                   uint64_t weights_fingerprint) {
  RowSource source{.weights = weights_fingerprint, .numerics = {}};
  // By layer: how many stages and workers there are is no matter of rows.
  const std::string* last = nullptr;
  for (const StageSlot& slot : pipeline.slots) {
    const std::string& numerics = workers.at(slot.worker).numerics_id;
    if (last == nullptr || numerics != *last) {
      absl::StrAppend(&source.numerics, "from layer ", slot.layers.begin, " ", numerics, "\n");
    }
    last = &numerics;
  }
  return source;
}

}  // namespace

void Cluster::Activate(Pipeline* pipeline, uint64_t now_us) {
  pipeline->state = Pipeline::State::kActivating;
  pipeline->scheduler.Foresee(SourceOf(*pipeline, workers_, weights_fingerprint_));
  pipeline->links_worked = false;
  pipeline->since_us = now_us;
  for (uint32_t i = 0; i < pipeline->slots.size(); ++i) {
    StageSlot& slot = pipeline->slots[i];
    slot.state = StageSlot::State::kActivating;
    slot.told = false;
    slot.host_blocks = HostBlocksOf(*pipeline, slot);
    slot.edge_made = slot.edge_made && pipeline->switched;  // for one epoch
    if (slot.edge_made) continue;
    slot.nccl_id.clear();
    slot.edge = EdgeChoice();
    if (i == 0) continue;
    const StageSlot& previous = pipeline->slots[i - 1];
    slot.edge = edges_.Choose(EndAt(previous), EndAt(slot), now_us);
    slot.numbered = NextEdge(slot.numbered, previous.stage_id, slot.stage_id, slot.edge.over_nccl,
                             &last_edge_id_);
  }
  if (context_->options.grants() && pipeline->slots.size() > 1) {
    pipeline->sampled_edge =
        NextEdge(pipeline->sampled_edge, pipeline->slots.back().stage_id,
                 pipeline->slots.front().stage_id, /*over_nccl=*/false, &last_edge_id_);
  }
  TellActivate(pipeline, static_cast<uint32_t>(pipeline->slots.size()) - 1);
}

uint32_t Cluster::HostBlocksOf(const Pipeline& pipeline, const StageSlot& slot) {
  if (context_->options.preempt == PreemptMode::kReplay) return 0;
  uint64_t num_stages = 0;
  for (const StageSlot& each : pipeline.slots) num_stages += each.worker == slot.worker;
  const uint64_t bytes = FindWorker(slot.worker)->host_cache_bytes / num_stages;
  const uint64_t blocks = bytes / (slot.layers.size() * context_->model.block_bytes);
  return static_cast<uint32_t>(std::min<uint64_t>(blocks, kMaxHostBlocks));
}

EdgeEnd Cluster::EndAt(const StageSlot& slot) {
  const Worker* worker = FindWorker(slot.worker);
  return {worker->id, &worker->name, &worker->nccl};
}

void Cluster::OnNcclFailure(const Pipeline& pipeline, uint64_t to_stage_id, const absl::Status& why,
                            uint64_t now_us) {
  if (to_stage_id == 0) return;
  for (uint32_t i = 1; i < pipeline.slots.size(); ++i) {
    const StageSlot& slot = pipeline.slots[i];
    if (slot.stage_id != to_stage_id || !slot.edge.over_nccl) continue;
    edges_.Avoid(pipeline.slots[i - 1].worker, slot.worker, std::string(why.message()), now_us);
  }
}

void Cluster::TellActivate(Pipeline* pipeline, uint32_t slot_index) {
  // From the last: a stage that dials the next should find it in this epoch already.
  for (uint32_t i = slot_index + 1; i-- > 0;) {
    StageSlot& slot = pipeline->slots[i];
    slot.told = true;
    SendToWorker out{slot.worker, {}};
    v1::ActivateStage* activate = out.message.mutable_activate_stage();
    SetEdges(*pipeline, pipeline->slots, pipeline->sampled_edge, i, activate);
    ToWire(pipeline->epoch, activate->mutable_epoch());
    activate->set_host_blocks(slot.host_blocks);
    activate->set_edge_made(slot.edge_made && slot.edge.over_nccl);
    if (i + 1 < pipeline->slots.size()) {
      const StageSlot& next = pipeline->slots[i + 1];
      activate->set_next_edge_made(next.edge_made && next.edge.over_nccl);
    }
    SetRestores(*pipeline, &slot, activate);
    context_->Send(std::move(out));
    // The stage before needs the id that this one makes.
    if (slot.edge.over_nccl && slot.nccl_id.empty()) return;
  }
}

void Cluster::SetEdges(const Pipeline& pipeline, const std::vector<StageSlot>& slots,
                       const NumberedEdge& sampled_edge, uint32_t stage_index,
                       v1::ActivateStage* activate) {
  const StageSlot& slot = slots[stage_index];
  activate->set_stage_id(slot.stage_id);
  activate->set_pipeline_id(pipeline.id.value);
  activate->set_stage_index(stage_index);
  activate->set_num_stages(static_cast<uint32_t>(slots.size()));
  activate->set_max_step_tokens(context_->options.max_step_tokens);
  if (stage_index + 1 < slots.size()) {
    const StageSlot& next = slots[stage_index + 1];
    activate->set_next_data_address(FindWorker(next.worker)->data_address);
    activate->set_next_stage_id(next.stage_id);
    activate->set_next_edge_id(next.numbered.id);
    activate->set_next_edge_nonce(EdgeNonce(context_->options.edge_secret, next.numbered.id));
    activate->set_next_nccl_id(next.nccl_id);
  }
  if (stage_index > 0) {
    activate->set_previous_stage_id(slots[stage_index - 1].stage_id);
    activate->set_edge_id(slot.numbered.id);
    activate->set_edge_nonce(EdgeNonce(context_->options.edge_secret, slot.numbered.id));
    activate->set_edge_over_nccl(slot.edge.over_nccl);
  }
  if (context_->options.grants()) SetGrants(slots, sampled_edge, stage_index, activate);
}

void Cluster::SetGrants(const std::vector<StageSlot>& slots, const NumberedEdge& sampled_edge,
                        uint32_t stage_index, v1::ActivateStage* activate) {
  activate->set_grants(true);
  const StageSlot& first = slots.front();
  const StageSlot& last = slots.back();
  const bool to_first = stage_index + 1 == slots.size();
  if (slots.size() == 1 || (stage_index > 0 && !to_first)) return;
  activate->set_sampled_edge_id(sampled_edge.id);
  activate->set_sampled_edge_nonce(EdgeNonce(context_->options.edge_secret, sampled_edge.id));
  if (!to_first) return activate->set_last_stage_id(last.stage_id);
  activate->set_first_stage_id(first.stage_id);
  activate->set_first_data_address(FindWorker(first.worker)->data_address);
}

void Cluster::OnEdgeId(Worker* worker, const v1::EdgeId& id, uint64_t now_us) {
  const Seat seat = SeatOf(worker, id.stage_id());
  StageSlot* slot = seat.slot;
  if (slot == nullptr) return;  // of a stage that is given up
  Pipeline* pipeline = seat.pipeline;
  if (seat.stage->is_prepared()) return OnEdgeIdAhead(worker, seat, id, now_us);
  if (FromWire(id.epoch()) < pipeline->epoch) return;  // late
  if (FromWire(id.epoch()) != pipeline->epoch || !slot->told || !slot->edge.over_nccl ||
      !slot->nccl_id.empty() || id.nccl_id().size() != limits::kNcclIdBytes) {
    return Evict(worker->id,
                 absl::FailedPreconditionError("tells an edge's NCCL id that was not asked for"),
                 now_us);
  }
  slot->nccl_id = id.nccl_id();
  TellActivate(pipeline, seat.stage->slot_index - 1);
}

void Cluster::RenewEdges(Pipeline* pipeline) {
  for (StageSlot& slot : pipeline->slots) {
    slot.numbered = {};
    slot.edge_made = false;
  }
  pipeline->sampled_edge = {};
}

void Cluster::CompleteActivation(Pipeline* pipeline, uint64_t now_us) {
  for (StageSlot& slot : pipeline->slots) {
    if (slot.state != StageSlot::State::kActive) return;
  }
  std::vector<StageCache> stages;
  std::vector<Holdings> told;
  for (StageSlot& slot : pipeline->slots) {
    stages.push_back({.layers = slot.layers,
                      .capacity_bytes = slot.cache_bytes,
                      .host_blocks = slot.host_blocks});
    told.push_back(std::exchange(slot.may_hold, {}));
    slot.restored.clear();
    HostedStage& stage = HostedIn(slot);
    if (stage.resize) stage.resize->asked_us = now_us;
  }
  Survivors survivors(std::move(told));
  if (survivors.Ids().size() + context_->options.max_running > limits::kMaxCacheOps) {
    // One plan cannot name them all. Only stages very far apart have so many.
    Fail(pipeline, absl::ResourceExhaustedError("its stages kept too many sequences"), now_us);
    return Dissolve(pipeline->id);
  }
  UnloadFollowed(pipeline->id);
  pipeline->state = Pipeline::State::kActive;
  pipeline->since_us = now_us;
  EndDeadly();
  pipeline->scheduler.Start(std::move(stages), std::move(survivors),
                            SourceOf(*pipeline, workers_, weights_fingerprint_));
  ++num_active_;
  if (pipeline->served && !pipeline->switched) ++context_->stats.recoveries;
  pipeline->served = true;
  pipeline->switched = false;
  OnScaledActive(*pipeline);
}

}  // namespace strait
