// SPDX-License-Identifier: Apache-2.0
//
// What a stage's report means for the scheduler: checked against the plans first, applied as a
// whole then.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/scheduler.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

// Log-probabilities are of a distribution; rounding may lift a certain token's a little above 0.
constexpr float kMaxLogprob = 1e-3f;

// Weight of the newest step in a stage's times, and what no step takes longer than.
constexpr double kRecentStep = 1.0 / 16;
constexpr uint64_t kLongestUs = 3'600'000'000;

bool IsLogprob(float value) { return value <= kMaxLogprob && !std::isnan(value); }

absl::Status CheckToken(const v1::TokenLogprob& token, uint32_t num_top, const ModelShape& model) {
  if (token.token_id() >= model.vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("token id ", token.token_id(), ", the vocabulary has ", model.vocab_size));
  }
  if (!IsLogprob(token.logprob())) {
    return absl::InvalidArgumentError(
        absl::StrCat("log-probability ", token.logprob(), " of token id ", token.token_id()));
  }
  const int due = static_cast<int>(std::min(num_top, model.vocab_size));
  if (token.top_ids_size() != due || token.top_logprobs_size() != due) {
    return absl::InvalidArgumentError(absl::StrCat(token.top_ids_size(), " alternatives with ",
                                                   token.top_logprobs_size(),
                                                   " log-probabilities, ", due, " were wanted"));
  }
  for (int i = 0; i < due; ++i) {
    if (token.top_ids(i) >= model.vocab_size || !IsLogprob(token.top_logprobs(i))) {
      return absl::InvalidArgumentError(absl::StrCat("alternative token id ", token.top_ids(i),
                                                     " with log-probability ",
                                                     token.top_logprobs(i)));
    }
  }
  return absl::OkStatus();
}

TokenInfo ToInfo(const v1::TokenLogprob& token, uint32_t position) {
  TokenInfo info;
  info.position = position;
  info.id = token.token_id();
  info.logprob = token.logprob();
  info.top.reserve(token.top_ids_size());
  for (int i = 0; i < token.top_ids_size(); ++i) {
    info.top.emplace_back(token.top_ids(i), token.top_logprobs(i));
  }
  return info;
}

absl::flat_hash_map<SequenceId, TokenId> SampledIds(const v1::StageReport& report) {
  absl::flat_hash_map<SequenceId, TokenId> ids;
  for (const v1::SequenceResult& result : report.results()) {
    if (result.has_sampled()) ids[SequenceId{result.sequence_id()}] = result.sampled().token_id();
  }
  return ids;
}

}  // namespace

void StageTimes::Add(const v1::StageReport& report) {
  const double weight = ++steps == 1 ? 1 : kRecentStep;
  const auto add = [weight](uint64_t us, double* average) {
    *average += weight * (static_cast<double>(std::min(us, kLongestUs)) - *average);
  };
  add(report.compute_us(), &compute_us);
  add(report.wait_us(), &wait_us);
  add(report.rows_computed(), &rows);
}

absl::Status Scheduler::CheckResults(const StepRecord& record,
                                     const v1::StageReport& report) const {
  if (report.results_size() != static_cast<int>(record.wanted.size())) {
    return absl::InvalidArgumentError(absl::StrCat(
        report.results_size(), " results, ", record.wanted.size(), " sequences wanted logits"));
  }
  for (int i = 0; i < report.results_size(); ++i) {
    const WantedResult& wanted = record.wanted[i];
    const v1::SequenceResult& result = report.results(i);
    if (result.sequence_id() != wanted.sequence.value) {
      return absl::InvalidArgumentError(absl::StrCat("a result of sequence ", result.sequence_id(),
                                                     " where that of ", wanted.sequence.value,
                                                     " is due"));
    }
    if (result.error_code() != 0) continue;  // void, whatever it has
    if (result.scored_size() != static_cast<int>(wanted.num_scores) ||
        result.has_sampled() != wanted.sample) {
      return absl::InvalidArgumentError(absl::StrCat(
          "sequence ", wanted.sequence.value, " has ", result.scored_size(), " scores and ",
          result.has_sampled() ? "a" : "no", " sample, ", wanted.num_scores, " and ",
          wanted.sample ? "a" : "no", " sample were wanted"));
    }
    const Sequence* sequence = journal_->Find(wanted.sequence);
    for (int s = 0; s < result.scored_size(); ++s) {
      STRAIT_RETURN_IF_ERROR(CheckToken(result.scored(s), wanted.score_num_top, context_->model));
      if (sequence == nullptr) continue;
      const uint32_t position = wanted.first_scored + s;
      if (result.scored(s).token_id() == sequence->tokens[position]) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "sequence ", wanted.sequence.value, ": token id ", result.scored(s).token_id(),
          " scored at position ", position, ", it has ", sequence->tokens[position]));
    }
    if (wanted.sample) {
      STRAIT_RETURN_IF_ERROR(CheckToken(result.sampled(), wanted.sample_num_top, context_->model));
    }
  }
  return absl::OkStatus();
}

absl::Status Scheduler::CheckGranted(const StepRecord& record,
                                     absl::Span<const TokenId> ids) const {
  if (ids.size() != record.granted.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(ids.size(), " granted ids, the plan has ", record.granted.size()));
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    const GrantedRow& row = record.granted[i];
    // Of an ended sequence no stage need know the id.
    if (!row.id || ids[i] == *row.id || journal_->Find(row.sequence) == nullptr) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("sequence ", row.sequence.value, " was fed token id ", ids[i], " in step ",
                     record.id.value, ", step ", row.sampled_by.value, " reported ", *row.id));
  }
  return absl::OkStatus();
}

absl::StatusOr<StageStep> Scheduler::OnReport(uint32_t stage_index, const v1::StageReport& report,
                                              uint64_t now_us) {
  STRAIT_CHECK(started());
  STRAIT_ASSIGN_OR_RETURN(const StepRecord* record, ledger_.CheckReport(stage_index, report));
  const bool first = stage_index == 0;
  const bool last = stage_index + 1 == num_stages_;
  if (last) {
    STRAIT_RETURN_IF_ERROR(CheckResults(*record, report));
  } else if (report.results_size() > 0) {
    return absl::InvalidArgumentError("results from a stage that is not the last one");
  }
  const std::vector<TokenId> fed(report.granted_ids().begin(), report.granted_ids().end());
  if (first || last) {
    STRAIT_RETURN_IF_ERROR(CheckGranted(*record, fed));
  } else if (!fed.empty()) {
    return absl::InvalidArgumentError("granted ids from a stage that does not know any");
  }
  // Only now all of them are known; on most days the first stage has reported before.
  if (last && !record->granted_ids_first.empty()) {
    STRAIT_RETURN_IF_ERROR(CheckGranted(*record, record->granted_ids_first));
  }
  const StageStep done = record->stages[stage_index];
  if (done.rows_computed > 0) {
    times_[stage_index].Add(report);
    MeasureStep(stage_index, done.rows_computed, std::min(report.compute_us(), kLongestUs));
  }
  // A step that went all the way has used the links forward; its granted rows that backward.
  const bool hands_back = num_stages_ > 1 && context_->options.grants();
  const bool all_the_way = last && done.rows_computed > 0;
  links_proven_ = links_proven_ || (all_the_way && (!hands_back || !record->granted.empty()));
  const StepId step = record->id;
  const std::vector<WantedResult> wanted = record->wanted;
  const std::vector<FilledRows> filled = last ? record->filled : std::vector<FilledRows>();
  if (first) ledger_.FedByFirst(step, fed);
  if (last) ledger_.Sampled(step, SampledIds(report));
  ledger_.Reported(stage_index, now_us);
  // The first plan is done there: what the stage told before it is kept, and counted, or gone.
  if (step.value == 1) survivors_.Forget(stage_index);
  if (last) {
    // What fills a block is done when the step is answered; its tokens are in the journal: the last of
    // them came with an earlier step's results, or is the prompt's.
    MarkDone(filled);
    ApplyResults(wanted, report, now_us);
  }
  return done;
}

void Scheduler::ApplyResults(const std::vector<WantedResult>& wanted, const v1::StageReport& report,
                             uint64_t now_us) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    Sequence* sequence = journal_->Find(wanted[i].sequence);
    if (sequence == nullptr) {  // it ended meanwhile
      context_->stats.surplus_tokens += wanted[i].sample;
      continue;
    }
    Residency* residency = sequence->Find(wanted[i].placement);
    STRAIT_CHECK(residency == sequence->home(), "no other place than its home samples or scores");
    // Preempted meanwhile, it holds nothing, and is gone with its last result.
    const bool resident = residency != nullptr && !residency->leaving;
    Answered(residency, wanted[i].sample);
    const v1::SequenceResult& result = report.results(static_cast<int>(i));
    if (result.error_code() != 0) {
      // Nobody's fault but the model's and the prompt's: no other worker would do better. Its rows
      // may be the reason: nobody else gets those that are not shared yet.
      if (resident) residency->shares = false;
      DropEverywhere(sequence);
      journal_->End(sequence, FinishReason::kError, std::nullopt,
                    absl::InternalError(absl::StrCat("the model's logits were not finite: ",
                                                     result.error_message())));
      continue;
    }
    if (result.scored_size() > 0) {
      std::vector<TokenInfo> scores;
      scores.reserve(result.scored_size());
      for (int s = 0; s < result.scored_size(); ++s) {
        scores.push_back(ToInfo(result.scored(s), wanted[i].first_scored + s));
      }
      journal_->GiveScores(sequence, std::move(scores));
    }
    std::optional<Journal::Finish> finish;
    if (wanted[i].sample) {
      const auto position = static_cast<uint32_t>(sequence->tokens.size());
      sequence->last_token_us = now_us;
      finish = journal_->GiveToken(sequence, ToInfo(result.sampled(), position));
    } else if (sequence->score_only() && sequence->scored + 1 == sequence->prompt_tokens) {
      finish = Journal::Finish{FinishReason::kLength, std::nullopt};
    }
    if (finish) {
      DropEverywhere(sequence);
      journal_->End(sequence, finish->reason, finish->stop_token, absl::OkStatus());
    } else if (wanted[i].sample && resident) {
      MakeReady(residency);
    }
  }
}

}  // namespace strait
