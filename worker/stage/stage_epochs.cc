// SPDX-License-Identifier: Apache-2.0
//
// How a stage enters and leaves epochs, takes over rows, and what it may hold.
#include "worker/stage/stage_state.h"

#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "worker/stage/take_over.h"

namespace strait {

void Stage::State::DropBegun() {
  for (const BegunStep& step : begun) {
    std::vector<LogitsResult> results;
    if (step.is_on_model) (void)model->Finish(&results);
    residents.cache().StepDone(step.id());
  }
  begun.clear();
  steps_finished = steps_begun;
}

void Stage::State::LeaveEpoch() {
  DropBegun();
  auto here = TakeLanded();
  EndCopies();
  LeaveLanded(std::move(here));
  restoring = false;
  restores.clear();
  unfilled.clear();
  plans.clear();
  hiddens.clear();
  returning.Clear();
  residents.Leave();
}

void Stage::State::ResetLedger() {
  PlanLedger::LeftMap left;
  PrefixLedger prefixes;
  prefixes.SetHostBlocks(host_blocks);
  residents.cache().DropUnheldPrefixes();
  for (const HeldRows& held : residents.left()) {
    left.emplace(held.id, PlanLedger::Left{held.rows, held.prefix_blocks});
    prefixes.Left(held.id, residents.cache().prefix(held.id));
  }
  ledger = PlanLedger(Shape(), std::move(left), std::move(prefixes));
}

absl::Status Stage::Activate(PipelineEpoch epoch, uint32_t stage_index, uint32_t num_stages,
                             bool grants, uint32_t host_blocks) {
  State& s = *state_;
  if (epoch <= s.epoch) {
    return absl::AbortedError(absl::StrCat("stage ", s.stage_id, " is in epoch ", ToString(s.epoch),
                                           " already, ", ToString(epoch), " is not newer"));
  }
  if (num_stages == 0 || num_stages > limits::kMaxStagesPerPipeline || stage_index >= num_stages) {
    return absl::InvalidArgumentError(absl::StrCat("stage ", stage_index, " of ", num_stages,
                                                   " stages, at most ",
                                                   limits::kMaxStagesPerPipeline));
  }
  if (s.is_followed) {
    return absl::FailedPreconditionError(
        absl::StrCat("stage ", s.stage_id, " enters no epoch: another stage took its place"));
  }
  const LayerRange layers = s.model->spec().layers;
  if (s.is_first() != (stage_index == 0) || s.is_last() != (stage_index + 1 == num_stages)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "stage ", s.stage_id, " has layers ", layers.begin, " to ", layers.end, " of ",
        s.traits.num_layers, ", it cannot be number ", stage_index, " of ", num_stages));
  }
  s.LeaveEpoch();
  s.epoch = epoch;
  s.failed = false;
  s.grants = grants || num_stages == 1;
  s.stage_index = stage_index;
  s.num_stages = num_stages;
  s.host_blocks = host_blocks;
  s.tier.SetBlocks(host_blocks);
  s.ResetLedger();
  return absl::OkStatus();
}

void Stage::TakeOver(absl::Span<Stage* const> predecessors) {
  State& s = *state_;
  STRAIT_CHECK(s.residents.cache().num_sequences() == 0 && s.ledger.next_step().value == 1);
  std::vector<Predecessor> theirs;
  for (Stage* const predecessor : predecessors) {
    State& p = *predecessor->state_;
    if (!std::exchange(p.is_followed, true)) p.LeaveEpoch();
    p.failed = true;
    theirs.push_back({p.model->spec().layers, &p.residents});
  }
  TakeOverRows(theirs, s.model->spec().layers, s.is_first() || s.is_last(), s.capacity_blocks,
               s.pool, &s.residents);
  s.ResetLedger();
}

absl::Status Stage::SetCapacity(uint32_t num_blocks) {
  State& s = *state_;
  // What is restored, the ledger does not know yet.
  const uint64_t held = s.restoring ? blocks_used() : s.ledger.blocks();
  if (held > num_blocks) {
    return absl::FailedPreconditionError(
        absl::StrCat("stage ", s.stage_id, " holds ", held,
                     " latent blocks after the plans that it has, it cannot do with ", num_blocks));
  }
  if (num_blocks > s.model->spec().pool_blocks) {
    STRAIT_RETURN_IF_ERROR(s.model->SetCapacity(num_blocks));
  }
  s.capacity_blocks = num_blocks;
  s.ledger.SetPoolBlocks(num_blocks);
  return absl::OkStatus();
}

bool Stage::NeedsSettling() const {
  return state_->model->spec().pool_blocks > state_->capacity_blocks;
}

void Stage::SettleCapacity() {
  State& s = *state_;
  if (!NeedsSettling()) return;
  STRAIT_CHECK(s.begun.empty() && blocks_used() <= s.capacity_blocks);
  STRAIT_CHECK(s.model->SetCapacity(s.capacity_blocks).ok(), "less is always there");
}

void Stage::Compact(BlockId end, std::vector<BlockMove>* moves) {
  STRAIT_CHECK(state_->begun.empty());
  state_->residents.cache().Compact(end, moves);
}

}  // namespace strait
