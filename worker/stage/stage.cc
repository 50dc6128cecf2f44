// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/stage.h"

#include <algorithm>
#include <deque>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/model/reservation.h"
#include "worker/stage/begun_step.h"
#include "worker/stage/plan_ledger.h"
#include "worker/stage/returning_ids.h"
#include "worker/stage/take_over.h"

namespace strait {
namespace {

struct WaitingPlan {
  PlanLedger::CheckedPlan checked;
  uint32_t num_logits = 0;
  uint32_t blocks_after = 0;  // that the stage holds then
  uint64_t arrived_us = 0;
  bool has_rows() const { return checked.num_tokens > 0; }
  uint64_t step_id() const { return checked.plan.step_id(); }
};

struct WaitingHidden {
  HiddenStep hidden;
  uint64_t arrived_us = 0;
};

}  // namespace

struct Stage::State {
  State(uint64_t id, std::unique_ptr<StageModel> stage_model, const StageTraits& stage_traits,
        BlockPool* block_pool)
      : stage_id(id),
        model(std::move(stage_model)),
        traits(stage_traits),
        pool(block_pool),
        capacity_blocks(model->spec().pool_blocks),
        residents(model->spec().layers.size(), block_pool),
        ledger(Shape(), {}) {}

  StageShape Shape() const {
    return {.num_layers = model->spec().layers.size(),
            .pool_blocks = capacity_blocks,
            .vocab_size = traits.vocab_size,
            .max_positions = traits.max_positions,
            .stage_index = stage_index,
            .num_stages = num_stages,
            .grants = grants};
  }
  bool is_first() const { return model->spec().layers.begin == 0; }
  bool is_last() const { return model->spec().layers.end == traits.num_layers; }
  // Whether sampled ids come back to it, or go back from it, over an edge.
  bool takes_ids() const { return grants && is_first() && !is_last(); }
  bool gives_ids() const { return grants && is_last() && !is_first(); }

  absl::Status CheckEpoch(PipelineEpoch theirs, const char* what) const;
  absl::Status CheckPairing(const WaitingPlan* plan, const HiddenStep* hidden) const;
  uint32_t NumPlansWithRows() const;

  bool MayGoAhead(const WaitingPlan& next) const;

  void ApplyCacheOps(const v1::StepPlan& plan, absl::Span<SamplingParams> opened);
  // Rows that are new here: their tokens and blocks.
  void StoreRows(const v1::SequenceStep& step, Resident& resident, BatchSequence* sequence,
                 BegunStep* begun);
  // The rows of a sequence, and what of the model's batch they are.
  BatchSequence AppendRows(const v1::SequenceStep& step, BegunStep* begun);
  absl::Status Begin(WaitingPlan plan, const HiddenMemory& memory, BegunStep* step);
  void Fail();
  // What is begun goes; returns when the model has let go of it.
  void DropBegun();
  // What is under way goes, too; sequences are left with their finished rows.
  void LeaveEpoch();

  // Constant after construction.
  const uint64_t stage_id;
  const std::unique_ptr<StageModel> model;
  const StageTraits traits;
  BlockPool* const pool;

  uint32_t capacity_blocks;
  bool is_followed = false;  // a successor took what it had

  // Of the epoch.
  PipelineEpoch epoch;
  bool failed = false;
  bool grants = false;
  uint32_t stage_index = 0;
  uint32_t num_stages = 1;
  Residents residents;
  PlanLedger ledger;  // ahead of `residents` by the plans that wait
  std::deque<WaitingPlan> plans;
  std::deque<WaitingHidden> hiddens;  // in step order; the i-th belongs to the i-th plan with rows
  ReturningIds returning;             // to the first of several stages
  std::deque<BegunStep> begun;        // oldest first
  uint64_t last_end_us = 0;           // of a step
};

Stage::Stage(uint64_t stage_id, std::unique_ptr<StageModel> model, const StageTraits& traits,
             BlockPool* pool)
    : state_(std::make_unique<State>(stage_id, std::move(model), traits, pool)) {}

Stage::~Stage() { state_->DropBegun(); }

uint64_t Stage::stage_id() const { return state_->stage_id; }
const StageModel& Stage::model() const { return *state_->model; }
PipelineEpoch Stage::epoch() const { return state_->epoch; }
bool Stage::is_first() const { return state_->is_first(); }
bool Stage::is_last() const { return state_->is_last(); }
size_t Stage::num_begun() const { return state_->begun.size(); }
uint32_t Stage::blocks_used() const { return state_->residents.cache().blocks_used(); }

uint32_t Stage::blocks_due_max() const {
  uint32_t most = blocks_used();
  for (const WaitingPlan& plan : state_->plans) most = std::max(most, plan.blocks_after);
  return most;
}

uint32_t Stage::capacity_blocks() const { return state_->capacity_blocks; }
const LatentCache& Stage::cache() const { return state_->residents.cache(); }
std::vector<HeldRows> Stage::held() const { return state_->residents.left(); }

absl::Status Stage::SetCapacity(uint32_t num_blocks) {
  State& s = *state_;
  if (s.ledger.blocks() > num_blocks) {
    return absl::FailedPreconditionError(
        absl::StrCat("stage ", s.stage_id, " holds ", s.ledger.blocks(),
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
  STRAIT_CHECK(s.begun.empty() && blocks_used() <= s.capacity_blocks);
  if (NeedsSettling()) {
    STRAIT_CHECK(s.model->SetCapacity(s.capacity_blocks).ok(), "less is always there");
  }
}

void Stage::Compact(BlockId end, std::vector<BlockMove>* moves) {
  STRAIT_CHECK(state_->begun.empty());
  state_->residents.cache().Compact(end, moves);
}

void Stage::State::LeaveEpoch() {
  DropBegun();
  plans.clear();
  hiddens.clear();
  returning.Clear();
  residents.Leave();
}

void Stage::TakeOver(absl::Span<Stage* const> predecessors) {
  State& s = *state_;
  STRAIT_CHECK(s.epoch == PipelineEpoch());
  std::vector<Predecessor> theirs;
  for (Stage* const predecessor : predecessors) {
    State& p = *predecessor->state_;
    if (!std::exchange(p.is_followed, true)) p.LeaveEpoch();
    p.failed = true;
    theirs.push_back({p.model->spec().layers, &p.residents});
  }
  TakeOverRows(theirs, s.model->spec().layers, s.is_first() || s.is_last(), s.pool, &s.residents);
}

absl::Status Stage::Activate(PipelineEpoch epoch, uint32_t stage_index, uint32_t num_stages,
                             bool grants) {
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
  absl::flat_hash_map<SequenceId, uint32_t> left;
  for (const HeldRows& held : s.residents.left()) left.emplace(held.id, held.rows);
  s.ledger = PlanLedger(s.Shape(), left);
  return absl::OkStatus();
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
  if (s.plans.size() >= limits::kMaxStepsInFlight) {
    return absl::ResourceExhaustedError(
        absl::StrCat(s.plans.size(), " plans wait at stage ", s.stage_id, ", it takes no more"));
  }
  WaitingPlan waiting;
  STRAIT_ASSIGN_OR_RETURN(waiting.checked, s.ledger.Check(std::move(plan)));
  waiting.arrived_us = now_us;
  const uint32_t num_earlier = s.NumPlansWithRows();
  if (s.hiddens.size() > num_earlier) {
    const HiddenStep& hidden = s.hiddens[num_earlier].hidden;
    if (waiting.has_rows() || hidden.step.value <= waiting.step_id()) {
      STRAIT_RETURN_IF_ERROR(s.CheckPairing(&waiting, &hidden));
    }
  }
  s.ledger.Commit(waiting.checked);
  waiting.blocks_after = s.ledger.blocks();
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

bool Stage::Ready() const {
  const State& s = *state_;
  if (s.failed || s.plans.empty() || s.begun.size() >= kMaxStepsBegun) return false;
  const WaitingPlan& next = s.plans.front();
  if (!next.has_rows()) return true;
  if (s.is_first() ? s.takes_ids() && !s.returning.AreHere(next.checked.plan) : s.hiddens.empty()) {
    return false;
  }
  return s.begun.empty() || s.MayGoAhead(next);
}

bool Stage::State::MayGoAhead(const WaitingPlan& next) const {
  if (!model->TakesAhead(next.checked.num_tokens, next.num_logits)) return false;
  if (!is_last()) return true;
  for (const v1::SequenceStep& step : next.checked.plan.sequences()) {
    if (!step.has_sampled() || !WantsSample(step)) continue;
    const Resident& resident = *residents.Find(SequenceId{step.sequence_id()});
    const bool known = resident.sampled_by.value == step.sampled().step_id();
    if (!known && resident.sampling.needs_tokens()) return false;
  }
  return true;
}

void Stage::State::ApplyCacheOps(const v1::StepPlan& plan, absl::Span<SamplingParams> opened) {
  size_t num_opened = 0;
  for (const v1::CacheOp& op : plan.cache_ops()) {
    if (op.has_open()) {
      const v1::OpenSequence& open = op.open();
      const uint32_t kept =
          open.kept_rows().empty() ? 0 : open.kept_rows(static_cast<int>(stage_index));
      residents.Open(open, std::move(opened[num_opened++]), kept);
    } else {
      const SequenceId id{op.close().sequence_id()};
      residents.Close(id);
      returning.Closed(id);
    }
  }
}

void Stage::State::StoreRows(const v1::SequenceStep& step, Resident& resident,
                             BatchSequence* sequence, BegunStep* begun) {
  STRAIT_CHECK(resident.tokens.size() == step.first_position());
  const SequenceId id{step.sequence_id()};
  if (step.has_literals()) {
    const auto& ids = step.literals().ids();
    resident.tokens.insert(resident.tokens.end(), ids.begin(), ids.end());
  } else if (!is_first() && !is_last()) {
    resident.tokens.push_back(kUnknownToken);
  } else {
    const StepId of{step.sampled().step_id()};
    TokenId token = 0;  // of one that is revoked
    if (resident.sampled_by == of) {
      token = resident.sampled;
    } else if (resident.asked_of == of) {
      token = kUnknownToken;
      sequence->token_of_request = resident.asked_request;
      begun->late_ids.push_back({begun->residents.size(), begun->report.granted_ids_size()});
    } else {
      STRAIT_CHECK(returning.Revoked(id), "a granted row began before its id was here");
    }
    resident.tokens.push_back(token);
    begun->report.add_granted_ids(token);
  }
  residents.cache().Grow(id, static_cast<uint32_t>(resident.tokens.size()));
  sequence->num_tokens = static_cast<uint32_t>(resident.tokens.size()) - step.first_position();
  begun->report.set_rows_stored(begun->report.rows_stored() + sequence->num_tokens);
}

BatchSequence Stage::State::AppendRows(const v1::SequenceStep& step, BegunStep* begun) {
  const SequenceId id{step.sequence_id()};
  const std::shared_ptr<Resident> resident = residents.Find(id);
  BatchSequence sequence;
  sequence.id = id;
  sequence.first_position = step.first_position();
  sequence.is_cached = resident->tokens.size() > step.first_position();
  if (sequence.is_cached) {
    sequence.num_tokens = static_cast<uint32_t>(step.literals().ids_size());
  } else {
    StoreRows(step, *resident, &sequence, begun);
  }
  const uint32_t end = sequence.first_position + sequence.num_tokens;
  sequence.tokens = absl::MakeConstSpan(resident->tokens).subspan(0, end);
  sequence.page_tables = residents.cache().PageTables(id);
  sequence.tables_id = residents.cache().tables_id(id);
  sequence.prompt_tokens = resident->prompt_tokens;
  sequence.sampling = &resident->sampling;
  begun->residents.push_back(resident);
  return sequence;
}

absl::Status Stage::State::Begin(WaitingPlan plan, const HiddenMemory& memory, BegunStep* step) {
  step->plan = std::move(plan.checked.plan);
  step->num_tokens = plan.checked.num_tokens;
  step->num_tokens_on = plan.checked.num_tokens_on;
  step->num_logits = plan.num_logits;
  std::vector<BatchSequence> sequences;
  std::vector<LogitsRequest> logits;
  sequences.reserve(static_cast<size_t>(step->plan.sequences_size()));
  ApplyCacheOps(step->plan, absl::MakeSpan(plan.checked.sampling));
  uint32_t row = 0;
  for (size_t i = 0; i < plan.checked.num_sequences; ++i) {
    const v1::SequenceStep& wire = step->plan.sequences(static_cast<int>(i));
    sequences.push_back(AppendRows(wire, step));
    for (const v1::LogitsWanted& wanted : wire.logits()) {
      if (!is_last()) break;
      if (wanted.has_sample()) {
        step->residents.back()->asked_of = step->id();
        step->residents.back()->asked_request = static_cast<uint32_t>(logits.size());
      }
      logits.push_back({static_cast<uint32_t>(sequences.size()) - 1, row + wanted.offset(),
                        wanted.has_sample(),
                        wanted.has_sample() ? TokenId{0} : wanted.score_token(), wanted.num_top()});
    }
    row += sequences.back().num_tokens;
  }
  STRAIT_CHECK(row == step->num_tokens && logits.size() == step->num_logits);
  STRAIT_CHECK(step->report.rows_stored() == plan.checked.num_stored);
  step->report.set_rows_computed(row);
  // The promise to the coordinator: what is held is what the reservation says.
  const LatentCache& cache = residents.cache();
  STRAIT_CHECK(plan.checked.blocks_after == cache.blocks_used());
  step->report.set_cache_bytes(cache.blocks_used() * traits.block_bytes);
  step->report.set_tables_digest(cache.Digest());
  if (row == 0) return absl::OkStatus();

  if (!is_last()) {
    const size_t bytes = size_t{row} * traits.hidden_row_bytes;
    step->hidden_out = memory ? memory(bytes) : HiddenBuffer(std::vector<std::byte>(bytes));
    STRAIT_CHECK(step->hidden_out.size() == bytes);
  }
  StageBatch batch;
  batch.sequences = sequences;
  batch.num_tokens = row;
  batch.logits = logits;
  STRAIT_RETURN_IF_ERROR(model->Begin(batch, step->hidden_in.in(), step->hidden_out.out()));
  step->is_on_model = true;
  return absl::OkStatus();
}

void Stage::State::Fail() {
  failed = true;
  plans.clear();
  hiddens.clear();
}

void Stage::State::DropBegun() {
  for (const BegunStep& step : begun) {
    std::vector<LogitsResult> results;
    if (step.is_on_model) (void)model->Finish(&results);
  }
  begun.clear();
}

void Stage::BeginNext(const std::function<uint64_t()>& clock, const HiddenMemory& memory) {
  State& s = *state_;
  STRAIT_CHECK(Ready());
  WaitingPlan plan = std::move(s.plans.front());
  s.plans.pop_front();
  BegunStep& step = s.begun.emplace_back();
  if (plan.has_rows() && !s.is_first()) {
    WaitingHidden in = std::move(s.hiddens.front());
    s.hiddens.pop_front();
    STRAIT_CHECK(in.hidden.step.value == plan.step_id());
    STRAIT_CHECK(in.hidden.num_tokens == plan.checked.num_tokens);
    step.report.set_wait_us(in.arrived_us > plan.arrived_us ? in.arrived_us - plan.arrived_us : 0);
    step.hidden_in = std::move(in.hidden.data);
  }
  step.report.set_stage_id(s.stage_id);
  step.report.mutable_epoch()->set_term(s.epoch.term);
  step.report.mutable_epoch()->set_counter(s.epoch.counter);
  step.report.set_step_id(plan.step_id());
  step.begin_us = clock();
  step.status = s.Begin(std::move(plan), memory, &step);
  if (!step.status.ok()) return s.Fail();
  if (!s.takes_ids()) return;
  std::vector<SequenceId> sampled = SampledSequences(step.plan);
  if (!sampled.empty()) s.returning.Await(step.id(), std::move(sampled));
}

bool Stage::Done() const {
  const State& s = *state_;
  STRAIT_CHECK(!s.begun.empty());
  return !s.begun.front().is_on_model || s.model->Done();
}

StepOutput Stage::FinishNext(const std::function<uint64_t()>& clock) {
  State& s = *state_;
  STRAIT_CHECK(!s.begun.empty());
  BegunStep step = std::move(s.begun.front());
  s.begun.pop_front();
  std::vector<LogitsResult> results;
  if (step.is_on_model) step.status = s.model->Finish(&results);
  const uint64_t end_us = clock();
  const uint64_t begin_us = std::max(step.begin_us, s.last_end_us);
  s.last_end_us = end_us;

  StepOutput output;
  step.report.set_compute_us(end_us > begin_us ? end_us - begin_us : 0);
  if (!step.status.ok()) {
    step.report.set_error_code(static_cast<uint32_t>(step.status.code()));
    step.report.set_error_message(BoundedMessage(step.status));
    step.report.clear_granted_ids();
    s.Fail();
    s.DropBegun();
    output.report = std::move(step.report);
    return output;
  }
  MarkFinished(step);
  if (s.is_last()) FillResults(results, s.traits.vocab_size, &step);
  if (!s.begun.empty()) FillLateIds(&s.begun.front());
  if (step.is_on_model && step.num_tokens_on > 0) {
    output.hidden = HiddenStep{s.epoch, step.id(), step.num_tokens_on, std::move(step.hidden_out)};
    output.hidden->data.Shrink(size_t{step.num_tokens_on} * s.traits.hidden_row_bytes);
  }
  if (s.gives_ids()) {
    std::vector<TokenId> sampled = SampledTokens(step);
    if (!sampled.empty()) output.sampled = SampledStep{s.epoch, step.id(), std::move(sampled)};
  }
  output.report = std::move(step.report);
  return output;
}

absl::Status Stage::CheckIntegrity() const {
  return state_->residents.CheckIntegrity(!state_->failed);
}

}  // namespace strait
