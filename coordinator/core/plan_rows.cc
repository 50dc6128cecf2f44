// SPDX-License-Identifier: Apache-2.0
//
// What the scheduler puts into a plan: closed and opened sequences, decodes, chunks of prompts and
// replays, and what every stage must report of it.
#include <algorithm>
#include <utility>

#include "coordinator/core/scheduler.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/wire/tables_digest.h"

namespace strait {

void Scheduler::PlanSurvivors(Draft* draft) {
  for (const SequenceId id : unnamed_) {
    const auto it = residents_.find(id);
    if (it != residents_.end()) {
      PlanOpen(it->second, KeptOf(*it->second->sequence).rows, draft);
    } else {
      v1::CloseSequence* close = draft->plan.add_cache_ops()->mutable_close();
      close->set_sequence_id(id.value);
      close->set_ended(journal_->Find(id) == nullptr);
    }
  }
  unnamed_.clear();
}

void Scheduler::PlanOpen(Residency* residency, const std::vector<uint32_t>& kept_rows,
                         Draft* draft) {
  const Sequence& sequence = *residency->sequence;
  residency->opened = true;
  residency->opened_by = draft->record.id;
  v1::OpenSequence* open = draft->plan.add_cache_ops()->mutable_open();
  open->set_imported_rows(std::exchange(residency->adopted_rows, 0));
  open->set_sequence_id(sequence.id.value);
  open->set_prompt_tokens(sequence.prompt_tokens);
  *open->mutable_sampling() = ToWire(sequence);
  open->mutable_kept_rows()->Add(kept_rows.begin(), kept_rows.end());
  for (const uint32_t rows : kept_rows) context_->stats.kept_rows += rows;
  if (kept_rows.empty() && open->imported_rows() == 0) {
    for (const PrefixIndex::Node* node : residency->prefix.path) {
      AppendTo(node->key, open->mutable_prefix_keys());
    }
    const uint32_t rows = residency->rows.next();
    draft->prefix_tokens += rows;
    open->mutable_prefix_tokens()->mutable_ids()->Add(sequence.tokens.begin(),
                                                      sequence.tokens.begin() + rows);
  }
  books_.Hold(residency->rows, residency->prefix.blocks);
}

void Scheduler::PlanClose(Closing closing, bool ended, Draft* draft) {
  if (!closing.keep.keys.empty() && draft->plan.cache_ops_size() < 2 * kMaxKeeps) {
    PlanKeep(closing.id, closing.keep, &closing.prefix, draft);
  }
  v1::CloseSequence* close = draft->plan.add_cache_ops()->mutable_close();
  close->set_sequence_id(closing.id.value);
  close->set_ended(ended);
  books_.Free(closing.rows, closing.prefix.blocks);
  books_.Leave(closing.reserved_rows, closing.prefix.blocks);
  draft->record.closed.push_back({closing.id, closing.rows, closing.prefix.blocks});
  LeavePrefix(&closing.prefix, draft, ended);
}

void Scheduler::PlanCloses(Draft* draft) {
  for (Closing& closing : std::exchange(closing_, {})) {
    PlanClose(std::move(closing), kEnded, draft);
  }
  close_now_ = false;
}

void Scheduler::Preempt(Residency* residency, Draft* draft) {
  ++context_->stats.preemptions;
  Sequence* sequence = residency->sequence;
  const ContentKey first = residency->shares && sequence->rows_settled() >= limits::kBlockTokens
                               ? KeyOf(sequence, 0)
                               : ContentKey{};
  if (residency->opened) {
    PrefixKeep keep = Keepable(residency);
    PlanClose({sequence->id, residency->rows, residency->reserved_rows,
               std::move(residency->prefix), std::move(keep)},
              !kEnded, draft);
  } else {
    books_.Leave(residency->reserved_rows, residency->prefix.blocks);
    LeavePrefix(&residency->prefix, nullptr, !kEnded);
  }
  if (!context_->options.prefix_cache && index_.Find(first) != nullptr) {
    parked_[sequence->id] = first;
  }
  Forget(residency);
  residency->leaving = true;
  residency->rows = {};
  residency->prefix = {};
  residency->reserved_rows = 0;
  residency->opened = false;
  residency->ready_ticket = 0;
  if (residency->results_pending == 0) sequence->Remove(residency);
  LeftHome(sequence);
}

bool Scheduler::ReserveOneMore(Residency* residency, Draft* draft) {
  const uint32_t from = residency->reserved_rows;
  const uint32_t to = std::max(from, residency->rows.next() + 1);
  while (!books_.CanReserve(from, to)) {
    if (DropOldest(draft)) continue;
    if (Residency* incoming = Incoming()) {
      CloseIncoming(incoming, draft);
      continue;
    }
    Residency* youngest = Youngest();
    // Those that stand still are about to go, or to go on: none gives way for their sake.
    if (youngest == nullptr || (youngest == residency && num_still_ + num_away_ > 0)) return false;
    // Alone, it fits: admission has seen to that. But for blocks of its own beside prefix blocks of
    // the same tokens: it goes, and begins with those.
    STRAIT_CHECK(residents_.size() > 1 || !residency->prefix.blocks.even(),
                 "the only resident outgrew the cache");
    Preempt(youngest, draft);
    if (youngest == residency) return false;
  }
  books_.Reserve(from, to);
  residency->reserved_rows = to;
  return true;
}

void Scheduler::PlanDecodes(Draft* draft) {
  const std::vector<Residency*> chosen =
      ChooseDecodes(std::min({DecodeCap(), draft->tokens_left, draft->sequences_left}));
  // Oldest first, so that a victim of preemption is never one that has its rows in this step
  // already. By id: the residency of a victim may be gone.
  std::vector<SequenceId> ids;
  ids.reserve(chosen.size());
  for (const Residency* residency : chosen) ids.push_back(residency->sequence->id);
  std::sort(ids.begin(), ids.end());
  for (const SequenceId id : ids) {
    const auto it = residents_.find(id);
    if (it == residents_.end()) continue;  // a victim
    Residency* residency = it->second;
    if (!ReserveOneMore(residency, draft)) continue;
    ready_.erase(residency->ready_ticket);
    residency->ready_ticket = 0;
    PlanRows(residency, {1, 0}, draft);
    draft->record.decodes = true;
  }
}

// Of a step's rows, this part belongs to the oldest; shorter ones come first in the rest. So whoever has little left goes
// on soon, and whoever has much is never without.
constexpr uint32_t kOldestShare = 4;

void Scheduler::PlanPrefill(Draft* draft) {
  std::vector<Residency*> waiting;
  for (const auto& [id, residency] : prefilling_) {
    if (!residency->sequence->replays_alone() && !residency->returns) waiting.push_back(residency);
  }
  if (waiting.empty() || draft->tokens_left == 0) return;
  const auto wanted = [](const Residency* residency) {
    return residency->sequence->rows_wanted() - residency->rows.next();
  };
  Residency* const oldest = waiting.front();
  uint32_t kept_back = std::min({wanted(oldest), context_->options.prefill_chunk,
                                 (draft->tokens_left - 1) / kOldestShare + 1});
  std::stable_sort(waiting.begin(), waiting.end(),
                   [&](const Residency* a, const Residency* b) { return wanted(a) < wanted(b); });
  bool oldest_planned = false;
  for (Residency* residency : waiting) {
    const bool is_oldest = residency == oldest;
    if (is_oldest) kept_back = 0;
    const uint32_t seats = is_oldest || oldest_planned ? 0 : 1;  // kept back, too
    if (draft->tokens_left <= kept_back || draft->sequences_left <= seats) continue;
    const uint32_t prefix_tokens = residency->opened ? 0 : residency->rows.next();
    if (draft->prefix_tokens > 0 &&
        draft->prefix_tokens + prefix_tokens > limits::kMaxStepPrefixTokens) {
      continue;  // the plan would be too long a message
    }
    oldest_planned = oldest_planned || is_oldest;
    PlanChunk(residency, draft->tokens_left - kept_back, draft);
  }
}

Residency* Scheduler::ChooseAlone() {
  Residency* alone = nullptr;
  bool others = false;
  for (const auto& [id, residency] : prefilling_) {
    if (!residency->sequence->replays_alone()) {
      others = true;
    } else if (alone == nullptr) {
      alone = residency;
    }
  }
  // In turn with the others.
  if (alone != nullptr && alone_last_ && (others || WorthDecoding())) alone = nullptr;
  alone_last_ = alone != nullptr;
  return alone;
}

void Scheduler::PlanChunk(Residency* residency, uint32_t rows_max, Draft* draft) {
  const uint32_t wanted = residency->sequence->rows_wanted() - residency->rows.next();
  const StageRows::Chunk chunk =
      residency->rows.Cut(std::min({wanted, context_->options.prefill_chunk, rows_max}));
  unplanned_rows_ -= chunk.num_rows;
  if (chunk.num_rows == wanted) prefilling_.erase(residency->sequence->id);
  PlanRows(residency, chunk, draft);
}

void Scheduler::PlanRows(Residency* residency, StageRows::Chunk chunk, Draft* draft) {
  if (!residency->opened) PlanOpen(residency, {}, draft);
  const Sequence& sequence = *residency->sequence;
  const uint32_t begin = residency->rows.next();
  const uint32_t end = begin + chunk.num_rows;
  v1::SequenceStep* step = draft->plan.add_sequences();
  step->set_sequence_id(sequence.id.value);
  step->set_first_position(begin);
  step->set_replay_stages(chunk.replay_stages);
  if (end <= sequence.tokens.size()) {
    step->mutable_literals()->mutable_ids()->Add(sequence.tokens.begin() + begin,
                                                 sequence.tokens.begin() + end);
  } else {
    STRAIT_CHECK(chunk.num_rows == 1 && residency->samples_pending > 0);
    step->mutable_sampled()->set_step_id(residency->sampled_by.value);
    draft->record.granted.push_back({sequence.id, residency->sampled_by, std::nullopt});
    ++context_->stats.granted_tokens;
  }
  CountRows(*residency, chunk, draft);
  STRAIT_CHECK(end <= residency->reserved_rows, "rows beyond the reservation");
  books_.Grow(residency->rows, chunk.num_rows);
  // Also blocks that were full before: kept over an epoch, or replayed.
  const uint32_t full = end - end % limits::kBlockTokens;
  if (residency->shares && chunk.replay_stages == 0 &&
      full >
          std::max(residency->rows_done, residency->prefix.blocks.least() * limits::kBlockTokens)) {
    draft->record.filled.push_back({sequence.id, residency->epoch, end});
  }
  num_uneven_ -= !residency->rows.even();
  residency->rows.Advance(chunk.num_rows);
  num_uneven_ += !residency->rows.even();
  draft->record.num_rows += chunk.num_rows;
  draft->record.sequences.push_back(sequence.id);
  draft->record.first_rows.push_back(begin);
  draft->tokens_left -= chunk.num_rows;
  --draft->sequences_left;
  PlanLogits(residency, begin, chunk.num_rows, draft);
}

void Scheduler::CountRows(const Residency& residency, StageRows::Chunk chunk, Draft* draft) {
  uint32_t stages_through = num_stages_;
  if (residency.rows.even()) {
    draft->rows_through_all += chunk.num_rows;
  } else {
    stages_through = chunk.replay_stages == 0 ? num_stages_ : chunk.replay_stages;
    for (uint32_t s = 0; s < stages_through; ++s) {
      StageStep& stage = draft->record.stages[s];
      stage.rows_computed += chunk.num_rows;
      if (residency.rows.Stores(s)) stage.rows_stored += chunk.num_rows;
    }
  }
  Sequence& sequence = *residency.sequence;
  CoreStats& stats = context_->stats;
  const uint32_t begin = residency.rows.next();
  const uint32_t end = begin + chunk.num_rows;
  const uint32_t replayed = std::min(end, std::max(begin, sequence.rows_computed_once)) - begin;
  stats.replayed_tokens += replayed;
  stats.recomputed_rows += uint64_t{replayed} * stages_through;
  const uint32_t prompt_end = std::min(end, sequence.prompt_tokens);
  stats.prompt_tokens += prompt_end - std::min(prompt_end, begin + replayed);
  sequence.rows_computed_once = std::max(sequence.rows_computed_once, end);
}

void Scheduler::PlanLogits(Residency* residency, uint32_t begin, uint32_t num_rows, Draft* draft) {
  const Sequence& sequence = *residency->sequence;
  const uint32_t end = begin + num_rows;
  v1::SequenceStep* step = draft->plan.mutable_sequences(draft->plan.sequences_size() - 1);
  WantedResult wanted{sequence.id, residency->epoch};
  if (sequence.spec.score_prompt) {
    // Row r scores the token of position r + 1; a replay does not score again.
    const uint32_t first = std::max(begin, sequence.scored) + 1;
    const uint32_t last = std::min(end, sequence.prompt_tokens - 1);
    for (uint32_t position = first; position <= last; ++position) {
      v1::LogitsWanted* logits = step->add_logits();
      logits->set_offset(position - 1 - begin);
      logits->set_score_token(sequence.tokens[position]);
      logits->set_num_top(sequence.spec.num_top);
    }
    wanted.first_scored = first;
    wanted.num_scores = last >= first ? last - first + 1 : 0;
    wanted.score_num_top = sequence.spec.num_top;
  }
  const bool samples = end == sequence.tokens.size() + residency->samples_pending;
  if (samples) {
    v1::LogitsWanted* logits = step->add_logits();
    logits->set_offset(num_rows - 1);
    logits->set_sample(true);
    wanted.sample = true;
    wanted.sample_num_top = sequence.spec.want_logprobs ? sequence.spec.num_top : 0;
    logits->set_num_top(wanted.sample_num_top);
  }
  if (step->logits_size() == 0) return;
  STRAIT_CHECK(step->replay_stages() == 0, "what is settled is not asked for again");
  ++residency->results_pending;
  draft->record.wanted.push_back(wanted);
  if (!samples) return;
  ++residency->samples_pending;
  residency->sampled_by = draft->record.id;
  MakeReady(residency);
}

void Scheduler::Complete(Draft* draft) const {
  // What goes on to the next stage leads. Only rows without logits go through fewer stages, so
  // results and granted rows stay in order.
  auto* sequences = draft->plan.mutable_sequences();
  const auto num_stages = [this](const v1::SequenceStep& step) {
    return step.replay_stages() == 0 ? num_stages_ : step.replay_stages();
  };
  const auto fewer = [&](const v1::SequenceStep& a, const v1::SequenceStep& b) {
    return num_stages(a) > num_stages(b);
  };
  if (!std::is_sorted(sequences->begin(), sequences->end(), fewer)) {
    std::stable_sort(sequences->pointer_begin(), sequences->pointer_end(),
                     [&](const auto* a, const auto* b) { return fewer(*a, *b); });
  }
  for (uint32_t s = 0; s < num_stages_; ++s) {
    StageStep& stage = draft->record.stages[s];
    stage.cache_bytes = books_.stages()[s].held_bytes;
    stage.rows_computed += draft->rows_through_all;
    stage.rows_stored += draft->rows_through_all;
    if (s > 0 && num_uneven_ == 0) {
      stage.tables_digest = draft->record.stages[0].tables_digest;
      continue;
    }
    TablesDigest digest;
    for (const auto& [id, residency] : residents_) {
      if (residency->opened) digest.Add(id, residency->rows.at(s));
    }
    stage.tables_digest = digest.Value();
  }
}

}  // namespace strait
