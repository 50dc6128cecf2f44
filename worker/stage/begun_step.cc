// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/begun_step.h"

#include <algorithm>
#include <string>

#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/text.h"

namespace strait {
namespace {

void SetTokenLogprob(const LogitsResult& result, v1::TokenLogprob* wire) {
  wire->set_token_id(result.token);
  wire->set_logprob(result.logprob);
  for (const auto& [token, logprob] : result.top) {
    wire->add_top_ids(token);
    wire->add_top_logprobs(logprob);
  }
}

}  // namespace

bool WantsSample(const v1::SequenceStep& step) {
  return !step.logits().empty() && step.logits().rbegin()->has_sample();
}

std::vector<SequenceId> SampledSequences(const v1::StepPlan& plan) {
  std::vector<SequenceId> sequences;
  for (const v1::SequenceStep& step : plan.sequences()) {
    if (WantsSample(step)) sequences.emplace_back(SequenceId{step.sequence_id()});
  }
  return sequences;
}

std::vector<TokenId> SampledTokens(const BegunStep& begun) {
  std::vector<TokenId> tokens;
  for (int i = 0; i < begun.plan.sequences_size(); ++i) {
    if (!WantsSample(begun.plan.sequences(i))) continue;
    tokens.push_back(begun.residents[static_cast<size_t>(i)]->sampled);
  }
  return tokens;
}

std::string BoundedMessage(const absl::Status& status) {
  return PrintableText(ToStd(status.message()), limits::kMaxErrorMessageBytes);
}

void FillResults(absl::Span<const LogitsResult> results, uint32_t vocab_size, BegunStep* begun) {
  STRAIT_CHECK(results.size() == begun->num_logits, "a result for each request");
  auto result = results.begin();
  for (int i = 0; i < begun->plan.sequences_size(); ++i) {
    const v1::SequenceStep& step = begun->plan.sequences(i);
    if (step.logits().empty()) continue;
    v1::SequenceResult* wire = begun->report.add_results();
    wire->set_sequence_id(step.sequence_id());
    Resident& resident = *begun->residents[static_cast<size_t>(i)];
    if (WantsSample(step)) {
      resident.sampled = 0;
      resident.sampled_by = begun->id();
    }
    const auto end = result + step.logits_size();
    const auto bad =
        std::find_if(result, end, [](const LogitsResult& one) { return !one.status.ok(); });
    if (bad != end) {
      wire->set_error_code(static_cast<uint32_t>(bad->status.code()));
      wire->set_error_message(BoundedMessage(bad->status));
      result = end;
      continue;
    }
    for (const v1::LogitsWanted& wanted : step.logits()) {
      STRAIT_CHECK(result->token < vocab_size);
      if (wanted.has_sample()) {
        SetTokenLogprob(*result, wire->mutable_sampled());
        resident.sampled = result->token;
      } else {
        SetTokenLogprob(*result, wire->add_scored());
      }
      ++result;
    }
  }
}

void MarkFinished(const BegunStep& begun) {
  for (size_t i = 0; i < begun.residents.size(); ++i) {
    const v1::SequenceStep& step = begun.plan.sequences(static_cast<int>(i));
    const uint32_t rows =
        step.has_sampled() ? 1 : static_cast<uint32_t>(step.literals().ids_size());
    Resident& resident = *begun.residents[i];
    resident.finished = std::max(resident.finished, step.first_position() + rows);
  }
}

void FillLateIds(BegunStep* begun) {
  for (const BegunStep::LateId& late : begun->late_ids) {
    const v1::SequenceStep& step = begun->plan.sequences(static_cast<int>(late.sequence_index));
    Resident& resident = *begun->residents[late.sequence_index];
    STRAIT_CHECK(resident.sampled_by.value == step.sampled().step_id());
    STRAIT_CHECK(resident.tokens.size() == step.first_position() + 1);
    resident.tokens.back() = resident.sampled;
    begun->report.set_granted_ids(late.granted_index, resident.sampled);
  }
  begun->late_ids.clear();
}

}  // namespace strait
