// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/scheduler.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/model/reservation.h"
#include "proto/wire/tables_digest.h"

namespace strait {

void Scheduler::Start(std::vector<uint32_t> layers_of_stages, uint32_t capacity_columns) {
  STRAIT_CHECK(!started() && residents_.empty() && capacity_columns > 0);
  num_stages_ = static_cast<uint32_t>(layers_of_stages.size());
  const uint32_t wanted = context_->options.steps_in_flight;
  const uint32_t ahead = std::max(1u, context_->options.grant_depth - 1);
  steps_in_flight_max_ =
      std::min(wanted > 0 ? wanted : num_stages_ + ahead, limits::kMaxStepsInFlight);
  capacity_ = capacity_columns;
  links_proven_ = false;
  times_.assign(num_stages_, {});
  ledger_.Start(std::move(layers_of_stages), context_->model.block_bytes);
}

void Scheduler::Stop(const absl::Status& why) {
  // Preempted sequences may have results pending too, so this goes by steps, not by residents.
  for (const StepRecord& record : ledger_.records()) {
    if (!ledger_.Unanswered(record)) continue;
    for (const WantedResult& wanted : record.wanted) {
      Sequence* sequence = journal_->Find(wanted.sequence);
      if (sequence == nullptr) continue;
      --sequence->results_pending;
      sequence->samples_pending -= wanted.sample;
    }
  }
  ledger_.Stop();
  closing_.clear();
  close_now_ = false;
  opened_.clear();
  const std::map<SequenceId, Sequence*> residents = residents_;
  for (const auto& [id, sequence] : residents) {
    const bool worked_on = sequence->opened;
    Forget(sequence);
    journal_->Wait(sequence);
    STRAIT_CHECK(sequence->results_pending == 0 && sequence->samples_pending == 0);
    if (!worked_on || ++sequence->fruitless_replays <= kMaxFruitlessReplays) continue;
    journal_->End(sequence, FinishReason::kError, std::nullopt,
                  absl::UnavailableError(absl::StrCat(
                      "the pipeline failed ", sequence->fruitless_replays,
                      " times without a token of this sequence in between; the last failure: ",
                      std::string(why.message()))));
  }
  capacity_ = reserved_ = 0;
  held_ = unplanned_rows_ = 0;
}

bool Scheduler::CanEverHold(const Sequence& sequence) const {
  return BlocksPerLayer(sequence.rows_max()) <= capacity_;
}

bool Scheduler::HasRoom(const Sequence& sequence) const {
  if (!started() || residents_.size() >= context_->options.max_running) return false;
  if (!CanEverHold(sequence)) return false;
  // Residents grow; without some room left for that, whoever is placed would be preempted at once.
  const uint32_t headroom =
      std::min(static_cast<uint32_t>(residents_.size()), (capacity_ + 15) / 16);
  const uint64_t needed = uint64_t{BlocksPerLayer(sequence.rows_wanted())} + headroom;
  return needed <= free_columns();
}

void Scheduler::Place(Sequence* sequence) {
  STRAIT_CHECK(sequence->results_pending == 0 && sequence->rows == 0);
  journal_->StopWaiting(sequence);
  sequence->resident_in = this;
  sequence->columns = BlocksPerLayer(sequence->rows_wanted());
  reserved_ += sequence->columns;
  STRAIT_CHECK(reserved_ <= capacity_);
  unplanned_rows_ += sequence->rows_wanted();
  residents_.emplace(sequence->id, sequence);
  prefilling_.emplace(sequence->id, sequence);
}

void Scheduler::Forget(Sequence* sequence) {
  STRAIT_CHECK(sequence->resident_in == this);
  if (prefilling_.erase(sequence->id) == 1) {
    unplanned_rows_ -= sequence->rows_wanted() - sequence->rows;
  }
  if (sequence->ready_ticket != 0) ready_.erase(sequence->ready_ticket);
  residents_.erase(sequence->id);
  sequence->resident_in = nullptr;
  sequence->rows = sequence->columns = 0;
  sequence->opened = false;
  sequence->ready_ticket = 0;
}

void Scheduler::Drop(Sequence* sequence) {
  const uint32_t columns = sequence->columns;
  if (sequence->opened) {
    closing_.push_back({sequence->id, columns});
    close_now_ = close_now_ || (num_stages_ > 1 && sequence->samples_pending > 1);
  } else {
    reserved_ -= columns;
  }
  Forget(sequence);
}

uint32_t Scheduler::DecodeCap() const {
  const size_t decoding = residents_.size() - prefilling_.size();
  return static_cast<uint32_t>((decoding + num_stages_ - 1) / num_stages_);
}

bool Scheduler::WorthDecoding() const {
  const uint32_t cap = DecodeCap();
  const std::vector<Sequence*> chosen = ChooseDecodes(cap);
  if (chosen.empty()) return false;
  // With a step for every stage under way, a part of a micro-batch waits to be joined by others:
  // many small steps would read the weights more often for the same tokens.
  return chosen.size() >= cap || ledger_.decode_steps() < num_stages_;
}

bool Scheduler::MayDecode(const Sequence& sequence) const {
  return sequence.samples_pending < context_->options.grant_depth &&
         sequence.generated() + sequence.samples_pending < sequence.spec.max_tokens;
}

void Scheduler::MakeReady(Sequence* sequence) {
  if (sequence->ready_ticket != 0 || !MayDecode(*sequence)) return;
  sequence->ready_ticket = ++last_ticket_;
  ready_.emplace(sequence->ready_ticket, sequence);
}

bool Scheduler::InTime(const Sequence& sequence) const {
  return sequence.samples_pending == 0 ||
         ledger_.next_step().value - sequence.sampled_by.value >= num_stages_;
}

std::vector<Sequence*> Scheduler::ChooseDecodes(size_t most) const {
  std::vector<Sequence*> chosen;
  for (const auto& [ticket, sequence] : ready_) {
    if (chosen.size() >= most) return chosen;
    if (InTime(*sequence)) chosen.push_back(sequence);
  }
  if (!chosen.empty() || !prefilling_.empty() || ledger_.decode_steps() >= num_stages_) {
    return chosen;
  }
  for (const auto& [ticket, sequence] : ready_) {
    if (chosen.size() >= most) break;
    chosen.push_back(sequence);
  }
  return chosen;
}

std::optional<v1::StepPlan> Scheduler::Form(uint64_t now_us) {
  if (!started() || ledger_.in_flight() >= limits::kMaxStepsInFlight) return std::nullopt;
  const bool full = ledger_.with_rows() >= steps_in_flight_max_;
  if (full && !close_now_) return std::nullopt;
  if (closing_.empty() && prefilling_.empty() && !WorthDecoding()) return std::nullopt;
  Draft draft;
  draft.record.id = ledger_.next_step();
  draft.plan.set_step_id(draft.record.id.value);
  draft.tokens_left = context_->options.max_step_tokens;
  draft.sequences_left = limits::kMaxStepSequences;
  PlanCloses(&draft);
  if (!full) {
    PlanDecodes(&draft);
    PlanPrefill(&draft);
  }
  STRAIT_CHECK(draft.plan.cache_ops_size() + draft.plan.sequences_size() > 0);
  draft.record.columns_after = held_;
  TablesDigest digest;
  for (const auto& [id, rows] : opened_) digest.Add(id, rows);
  draft.record.tables_digest = digest.Value();
  ledger_.Add(std::move(draft.record), now_us);
  ++context_->stats.steps;
  return std::move(draft.plan);
}

void Scheduler::PlanClose(SequenceId id, uint32_t columns, bool ended, Draft* draft) {
  v1::CloseSequence* close = draft->plan.add_cache_ops()->mutable_close();
  close->set_sequence_id(id.value);
  close->set_ended(ended);
  reserved_ -= columns;
  const auto it = opened_.find(id);
  STRAIT_CHECK(it != opened_.end());
  held_ -= BlocksPerLayer(it->second);
  opened_.erase(it);
}

void Scheduler::PlanCloses(Draft* draft) {
  for (const Closing& closing : closing_) PlanClose(closing.id, closing.columns, kEnded, draft);
  closing_.clear();
  close_now_ = false;
}

void Scheduler::Preempt(Sequence* sequence, Draft* draft) {
  ++context_->stats.preemptions;
  if (sequence->opened) {
    PlanClose(sequence->id, sequence->columns, !kEnded, draft);
  } else {
    reserved_ -= sequence->columns;
  }
  Forget(sequence);
  journal_->Wait(sequence);
}

bool Scheduler::GrowOneColumn(Sequence* sequence, Draft* draft) {
  while (free_columns() == 0) {
    Sequence* youngest = residents_.rbegin()->second;
    // Alone, it fits: admission has seen to that.
    STRAIT_CHECK(residents_.size() > 1, "the only resident outgrew the pool");
    Preempt(youngest, draft);
    if (youngest == sequence) return false;
  }
  ++sequence->columns;
  ++reserved_;
  return true;
}

void Scheduler::PlanDecodes(Draft* draft) {
  std::vector<Sequence*> chosen =
      ChooseDecodes(std::min({DecodeCap(), draft->tokens_left, draft->sequences_left}));
  // Oldest first, so that a victim of preemption is never one that has its rows in this step
  // already.
  std::sort(chosen.begin(), chosen.end(),
            [](const Sequence* a, const Sequence* b) { return a->id < b->id; });
  for (Sequence* sequence : chosen) {
    if (sequence->resident_in != this) continue;  // a victim
    const bool grows = BlocksPerLayer(sequence->rows + 1) > sequence->columns;
    if (grows && !GrowOneColumn(sequence, draft)) continue;
    ready_.erase(sequence->ready_ticket);
    sequence->ready_ticket = 0;
    PlanRows(sequence, 1, draft);
    draft->record.decodes = true;
  }
}

void Scheduler::PlanPrefill(Draft* draft) {
  auto it = prefilling_.begin();
  while (it != prefilling_.end() && draft->tokens_left > 0 && draft->sequences_left > 0) {
    Sequence* sequence = it->second;
    const uint32_t wanted = sequence->rows_wanted() - sequence->rows;
    const uint32_t rows = std::min({wanted, context_->options.prefill_chunk, draft->tokens_left});
    unplanned_rows_ -= rows;
    it = rows == wanted ? prefilling_.erase(it) : std::next(it);
    PlanRows(sequence, rows, draft);
  }
}

void Scheduler::PlanRows(Sequence* sequence, uint32_t num_rows, Draft* draft) {
  if (!sequence->opened) {
    sequence->opened = true;
    opened_.emplace(sequence->id, 0);
    v1::OpenSequence* open = draft->plan.add_cache_ops()->mutable_open();
    open->set_sequence_id(sequence->id.value);
    open->set_prompt_tokens(sequence->prompt_tokens);
    *open->mutable_sampling() = ToWire(*sequence);
  }
  const uint32_t begin = sequence->rows;
  const uint32_t end = begin + num_rows;
  v1::SequenceStep* step = draft->plan.add_sequences();
  step->set_sequence_id(sequence->id.value);
  step->set_first_position(begin);
  if (end <= sequence->tokens.size()) {
    step->mutable_literals()->mutable_ids()->Add(sequence->tokens.begin() + begin,
                                                 sequence->tokens.begin() + end);
  } else {
    STRAIT_CHECK(num_rows == 1 && sequence->samples_pending > 0);
    step->mutable_sampled()->set_step_id(sequence->sampled_by.value);
    draft->record.granted.push_back({sequence->id, sequence->sampled_by});
    ++context_->stats.granted_tokens;
  }

  WantedResult wanted{sequence->id};
  if (sequence->spec.score_prompt) {
    // Row r scores the token of position r + 1; a replay does not score again.
    const uint32_t first = std::max(begin, sequence->scored) + 1;
    const uint32_t last = std::min(end, sequence->prompt_tokens - 1);
    for (uint32_t position = first; position <= last; ++position) {
      v1::LogitsWanted* logits = step->add_logits();
      logits->set_offset(position - 1 - begin);
      logits->set_score_token(sequence->tokens[position]);
      logits->set_num_top(sequence->spec.num_top);
    }
    wanted.first_scored = first;
    wanted.num_scores = last >= first ? last - first + 1 : 0;
    wanted.score_num_top = sequence->spec.num_top;
  }
  const bool samples = end == sequence->tokens.size() + sequence->samples_pending;
  if (samples) {
    v1::LogitsWanted* logits = step->add_logits();
    logits->set_offset(num_rows - 1);
    logits->set_sample(true);
    wanted.sample = true;
    wanted.sample_num_top = sequence->spec.want_logprobs ? sequence->spec.num_top : 0;
    logits->set_num_top(wanted.sample_num_top);
  }
  if (step->logits_size() > 0) {
    ++sequence->results_pending;
    draft->record.wanted.push_back(wanted);
  }
  if (samples) {
    ++sequence->samples_pending;
    sequence->sampled_by = draft->record.id;
  }

  const uint32_t replayed = std::min(end, std::max(begin, sequence->rows_computed_once)) - begin;
  context_->stats.replayed_tokens += replayed;
  const uint32_t prompt_end = std::min(end, sequence->prompt_tokens);
  context_->stats.prompt_tokens += prompt_end - std::min(prompt_end, begin + replayed);
  sequence->rows_computed_once = std::max(sequence->rows_computed_once, end);

  held_ += BlocksPerLayer(end) - BlocksPerLayer(begin);
  STRAIT_CHECK(BlocksPerLayer(end) <= sequence->columns, "rows beyond the reservation");
  opened_[sequence->id] = end;
  sequence->rows = end;
  draft->record.num_rows += num_rows;
  draft->tokens_left -= num_rows;
  --draft->sequences_left;
  if (samples) MakeReady(sequence);
}

absl::Status Scheduler::CheckIntegrity() const {
  uint64_t reserved = 0;
  uint64_t unplanned = 0;
  for (const auto& [id, sequence] : residents_) {
    const bool prefilling = prefilling_.contains(id);
    reserved += sequence->columns;
    if (prefilling) unplanned += sequence->rows_wanted() - sequence->rows;
    const auto opened = opened_.find(id);
    const uint32_t rows = opened == opened_.end() ? 0 : opened->second;
    const bool feasible = sequence->resident_in == this && rows == sequence->rows &&
                          sequence->opened == (opened != opened_.end()) &&
                          BlocksPerLayer(rows) <= sequence->columns &&
                          sequence->samples_pending <= sequence->results_pending &&
                          sequence->samples_pending <= context_->options.grant_depth;
    // Past its prefill it has all rows but that of its last token, whether that is known or not.
    const bool fed = sequence->score_only() ? sequence->rows == sequence->rows_wanted()
                                            : sequence->rows + 1 == sequence->tokens.size() +
                                                                        sequence->samples_pending;
    const bool ready = sequence->ready_ticket != 0;
    const bool in_step = prefilling ? !ready && sequence->rows < sequence->rows_wanted()
                                    : fed && ready == MayDecode(*sequence);
    if (!feasible || !in_step) {
      return absl::InternalError(absl::StrCat("resident sequence ", id.value, " with ",
                                              sequence->rows, " rows of ", sequence->rows_wanted(),
                                              " is inconsistent"));
    }
    // It must have something to do or to wait for.
    if (!prefilling && sequence->ready_ticket == 0 && sequence->results_pending == 0) {
      return absl::InternalError(absl::StrCat("resident sequence ", id.value, " is stuck"));
    }
  }
  for (const Closing& closing : closing_) reserved += closing.columns;
  uint64_t held = 0;
  for (const auto& [id, rows] : opened_) held += BlocksPerLayer(rows);
  if (reserved != reserved_ || reserved_ > capacity_ || held != held_ || held_ > reserved_ ||
      unplanned != unplanned_rows_) {
    return absl::InternalError(absl::StrCat("columns: reserved ", reserved_, " (counted ", reserved,
                                            "), held ", held_, " (counted ", held, ") of ",
                                            capacity_, "; rows to plan ", unplanned_rows_,
                                            " (counted ", unplanned, ")"));
  }
  if (opened_.size() > residents_.size() + closing_.size()) {
    return absl::InternalError(absl::StrCat(opened_.size(), " sequences are open, ",
                                            residents_.size(), " resident, ", closing_.size(),
                                            " closing"));
  }
  return absl::OkStatus();
}

}  // namespace strait
