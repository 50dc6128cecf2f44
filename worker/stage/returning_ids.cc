// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/returning_ids.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

namespace strait {

bool ReturningIds::AreHere(const v1::StepPlan& plan) const {
  if (awaited_.size() >= limits::kMaxStepsInFlight) return false;
  for (const v1::SequenceStep& step : plan.sequences()) {
    // Of literals the id is 0. Steps come back in order.
    if (step.sampled().step_id() <= last_.value) continue;
    if (!Revoked(SequenceId{step.sequence_id()})) return false;
  }
  return true;
}

absl::Status ReturningIds::Check(const SampledStep& sampled, uint32_t vocab_size) const {
  const auto where = absl::StrCat("sampled ids of step ", sampled.step.value, ": ");
  if (awaited_.empty() || awaited_.front().step != sampled.step) {
    return absl::InvalidArgumentError(absl::StrCat(
        where, "due are ",
        awaited_.empty() ? "none" : absl::StrCat("those of ", awaited_.front().step.value)));
  }
  const size_t due = awaited_.front().sequences.size();
  if (sampled.tokens.size() != due) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, sampled.tokens.size(), " ids for ", due, " sequences"));
  }
  for (const TokenId token : sampled.tokens) {
    if (token < vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(where, "token id ", token, ", the vocabulary has ", vocab_size));
  }
  return absl::OkStatus();
}

std::vector<SequenceId> ReturningIds::Take(StepId step) {
  STRAIT_CHECK(!awaited_.empty() && awaited_.front().step == step);
  std::vector<SequenceId> sequences = std::move(awaited_.front().sequences);
  awaited_.pop_front();
  last_ = step;
  return sequences;
}

}  // namespace strait
