// SPDX-License-Identifier: Apache-2.0
//
// What comes to a stage, and what others may ask.
#include "worker/stage/stage_state.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "xxhash.h"

namespace strait {

Stage::Stage(uint64_t stage_id, std::unique_ptr<StageModel> model, const StageTraits& traits,
             BlockPool* pool, HostBudget* host_budget, TransferShare* transfer)
    : state_(std::make_unique<State>(stage_id, std::move(model), traits, pool, host_budget,
                                     transfer)) {}

Stage::~Stage() {
  state_->DropBegun();
  state_->EndCopies();
}

StageTraits StageTraitsOf(const Backend& backend, uint64_t weights_fingerprint) {
  const std::string numerics = backend.numerics_id();
  return {.num_layers = backend.num_layers(),
          .hidden_row_bytes = backend.hidden_row_bytes(),
          .vocab_size = backend.vocab_size(),
          .max_positions = backend.max_positions(),
          .block_bytes = backend.block_bytes(),
          .row_shape = backend.row_shape(),
          .origin = {.model = weights_fingerprint,
                     .numerics = XXH3_64bits(numerics.data(), numerics.size())}};
}

uint64_t Stage::stage_id() const { return state_->stage_id; }
const StageModel& Stage::model() const { return *state_->model; }
PipelineEpoch Stage::epoch() const { return state_->epoch; }
bool Stage::is_first() const { return state_->is_first(); }
bool Stage::is_last() const { return state_->is_last(); }
size_t Stage::num_begun() const { return state_->begun.size(); }
uint32_t Stage::blocks_used() const { return state_->residents.cache().blocks_used(); }
bool Stage::IsQuiet() const {
  return !state_->tier.busy() && state_->model->copies().num_under_way() == 0;
}
bool Stage::CopiesRows() const {
  return !IsQuiet() || state_->restoring || state_->importer.busy() || state_->exporter.busy();
}
const HostTier& Stage::tier() const { return state_->tier; }
const Importer& Stage::importer() const { return state_->importer; }
const Exporter& Stage::exporter() const { return state_->exporter; }
uint32_t Stage::peak_blocks() const {
  uint64_t peak = cache().blocks_taken();
  for (const WaitingPlan& plan : state_->plans) peak = std::max(peak, plan.checked.blocks_after);
  return static_cast<uint32_t>(peak);
}
uint32_t Stage::capacity_blocks() const { return state_->capacity_blocks; }
const LatentCache& Stage::cache() const { return state_->residents.cache(); }
bool Stage::restoring() const { return state_->restoring; }
std::vector<HeldRows> Stage::held() const { return state_->residents.left(); }

absl::Status Stage::CheckIntegrity() const {
  const State& s = *state_;
  const size_t copies = s.tier.num_copies() + s.importer.num_copies() + s.exporter.num_copies();
  if (copies != s.model->copies().num_under_way()) {
    return absl::InternalError(absl::StrCat(s.model->copies().num_under_way(),
                                            " copies are under way, ", copies, " have an owner"));
  }
  return s.residents.CheckIntegrity(!s.failed);
}

absl::Status Stage::State::CheckEpoch(PipelineEpoch theirs, const char* what) const {
  if (theirs < epoch) {
    return absl::AbortedError(
        absl::StrCat(what, " of epoch ", ToString(theirs), ", the stage is in ", ToString(epoch)));
  }
  if (theirs > epoch) {
    return absl::FailedPreconditionError(absl::StrCat(what, " of epoch ", ToString(theirs),
                                                      ", the stage is in ", ToString(epoch),
                                                      "; activate it first"));
  }
  if (failed) {
    return absl::AbortedError(
        absl::StrCat("a step of epoch ", ToString(epoch), " failed here; a newer epoch is needed"));
  }
  return absl::OkStatus();
}

absl::Status Stage::State::CheckFinished(const v1::StepPlan& plan) const {
  for (const v1::CacheOp& op : plan.cache_ops()) {
    if (!op.has_keep_prefix()) continue;
    const v1::KeepPrefix& keep = op.keep_prefix();
    const std::shared_ptr<Resident> resident = residents.Find(SequenceId{keep.sequence_id()});
    const uint32_t finished = resident == nullptr ? 0 : resident->finished;
    const uint64_t end =
        (keep.first_block() + keep.keys().size() / kContentKeyBytes) * limits::kBlockTokens;
    if (end <= finished) continue;
    return absl::FailedPreconditionError(absl::StrCat("keep of sequence ", keep.sequence_id(),
                                                      " to row ", end, ", of which ", finished,
                                                      " are finished here"));
  }
  return absl::OkStatus();
}

absl::Status Stage::State::CheckFetched(const PlanLedger::CheckedPlan& checked) const {
  for (const PlanLedger::OpenedImport& opened : checked.opened_imports) {
    if (importer.IsFetched(opened.id, opened.placement, opened.rows)) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        "plan of step ", checked.plan.step_id(), ": open of sequence ", opened.id.value, ": its ",
        opened.rows, " imported rows are not all that was fetched and is here"));
  }
  return absl::OkStatus();
}

uint32_t Stage::State::NumPlansWithRows() const {
  return static_cast<uint32_t>(std::count_if(
      plans.begin(), plans.end(), [](const WaitingPlan& plan) { return plan.has_rows(); }));
}

// Plans and hidden states arrive on different ways, in any order; each kind comes in step order.
// Whichever is later is checked against the other.
absl::Status Stage::State::CheckPairing(const WaitingPlan* plan, const HiddenStep* hidden) const {
  if (plan->step_id() == hidden->step.value && plan->checked.num_tokens == hidden->num_tokens) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("hidden states of step ", hidden->step.value, " with ", hidden->num_tokens,
                   " rows came where those of step ", plan->step_id(), " with ",
                   plan->checked.num_tokens, " rows are due; do all stages get the same plans?"));
}

absl::Status Stage::AcceptPlan(v1::StepPlan plan, uint64_t now_us, uint32_t* num_rows) {
  State& s = *state_;
  if (plan.stage_id() != s.stage_id) {
    return absl::InvalidArgumentError(
        absl::StrCat("a plan for stage ", plan.stage_id(), " came to stage ", s.stage_id));
  }
  STRAIT_RETURN_IF_ERROR(s.CheckEpoch({plan.epoch().term(), plan.epoch().counter()}, "a plan"));
  if (s.restoring) {
    return absl::FailedPreconditionError(
        absl::StrCat("a plan came to stage ", s.stage_id, ", which is not active yet"));
  }
  if (s.plans.size() >= limits::kMaxStepsInFlight) {
    return absl::ResourceExhaustedError(
        absl::StrCat(s.plans.size(), " plans wait at stage ", s.stage_id, ", it takes no more"));
  }
  STRAIT_RETURN_IF_ERROR(s.CheckFinished(plan));
  WaitingPlan waiting;
  STRAIT_ASSIGN_OR_RETURN(waiting.checked, s.ledger.Check(std::move(plan)));
  STRAIT_RETURN_IF_ERROR(s.CheckFetched(waiting.checked));
  waiting.arrived_us = now_us;
  const uint32_t num_earlier = s.NumPlansWithRows();
  if (s.hiddens.size() > num_earlier) {
    const HiddenStep& hidden = s.hiddens[num_earlier].hidden;
    if (waiting.has_rows() || hidden.step.value <= waiting.step_id()) {
      STRAIT_RETURN_IF_ERROR(s.CheckPairing(&waiting, &hidden));
    }
  }
  s.ledger.Commit(waiting.checked);
  if (s.takes_ids()) {
    for (const v1::CacheOp& op : waiting.checked.plan.cache_ops()) {
      if (op.close().ended()) s.returning.Revoke(SequenceId{op.close().sequence_id()});
    }
  }
  for (const v1::SequenceStep& step : waiting.checked.plan.sequences()) {
    if (s.is_last()) waiting.num_logits += static_cast<uint32_t>(step.logits_size());
  }
  if (num_rows != nullptr) *num_rows = waiting.checked.num_tokens;
  s.plans.push_back(std::move(waiting));
  s.Prepare();
  return absl::OkStatus();
}

absl::Status Stage::AcceptHidden(HiddenStep hidden, uint64_t now_us) {
  State& s = *state_;
  STRAIT_RETURN_IF_ERROR(s.CheckEpoch(hidden.epoch, "hidden states"));
  const auto where = absl::StrCat("hidden states of step ", hidden.step.value, ": ");
  if (s.is_first()) {
    return absl::InvalidArgumentError(absl::StrCat(where, "the first stage takes none"));
  }
  if (hidden.num_tokens == 0 || hidden.num_tokens > limits::kMaxStepTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, hidden.num_tokens, " rows, must be 1 to ", limits::kMaxStepTokens));
  }
  if (hidden.data.size() != uint64_t{hidden.num_tokens} * s.traits.hidden_row_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, hidden.data.size(), " bytes, ", hidden.num_tokens, " rows have ",
                     uint64_t{hidden.num_tokens} * s.traits.hidden_row_bytes));
  }
  if (s.hiddens.size() >= limits::kMaxStepsInFlight) {
    return absl::ResourceExhaustedError(
        absl::StrCat(where, s.hiddens.size(), " steps' wait at stage ", s.stage_id));
  }
  // The plan that these belong to, if it is here.
  size_t index = s.hiddens.size();
  for (const WaitingPlan& plan : s.plans) {
    if (!plan.has_rows() || index-- > 0) continue;
    STRAIT_RETURN_IF_ERROR(s.CheckPairing(&plan, &hidden));
    s.hiddens.push_back({std::move(hidden), now_us});
    return absl::OkStatus();
  }
  const StepId least = s.hiddens.empty() || s.hiddens.back().hidden.step < s.ledger.next_step()
                           ? s.ledger.next_step()
                           : StepId{s.hiddens.back().hidden.step.value + 1};
  if (hidden.step < least) {
    return absl::FailedPreconditionError(absl::StrCat(
        where, "step ", least.value, " or a later one is due; do all stages get the same plans?"));
  }
  s.hiddens.push_back({std::move(hidden), now_us});
  return absl::OkStatus();
}

absl::Status Stage::AcceptSampled(SampledStep sampled) {
  State& s = *state_;
  STRAIT_RETURN_IF_ERROR(s.CheckEpoch(sampled.epoch, "sampled ids"));
  if (!s.takes_ids()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampled ids of step ", sampled.step.value, ": this stage takes none"));
  }
  STRAIT_RETURN_IF_ERROR(s.returning.Check(sampled, s.traits.vocab_size));
  const std::vector<SequenceId> sequences = s.returning.Take(sampled.step);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const std::shared_ptr<Resident> resident = s.residents.Find(sequences[i]);
    if (resident == nullptr) continue;  // closed meanwhile
    resident->sampled = sampled.tokens[i];
    resident->sampled_by = sampled.step;
  }
  return absl::OkStatus();
}

}  // namespace strait
