// SPDX-License-Identifier: Apache-2.0
//
// How a stage begins and finishes steps.
#include "worker/stage/stage_state.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {

bool Stage::Ready() const {
  const State& s = *state_;
  if (s.failed || s.plans.empty() || s.begun.size() >= kMaxStepsBegun) return false;
  const WaitingPlan& next = s.plans.front();
  if (!next.ops_are_done() && s.AppliesEarly(next)) return false;
  if (!s.HasBlocks(next.checked.blocks_after)) return false;
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
  // What this closes, the step before may still use; only this stage's steps come behind it.
  if (begun.size() > 1) residents.cache().KeepFreed(begun[begun.size() - 2].id());
  STRAIT_CHECK(ApplyCacheOps(&plan));
  residents.cache().KeepFreed(StepId{});
  step->plan = std::move(plan.checked.plan);
  step->num_tokens = plan.checked.num_tokens;
  step->num_tokens_on = plan.checked.num_tokens_on;
  step->num_logits = plan.num_logits;
  std::vector<BatchSequence> sequences;
  std::vector<LogitsRequest> logits;
  sequences.reserve(static_cast<size_t>(step->plan.sequences_size()));
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
  ++s.steps_begun;
  if (!step.status.ok()) return s.Fail();
  s.Prepare();
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
  s.residents.cache().StepDone(step.id());
  ++s.steps_finished;
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

}  // namespace strait
