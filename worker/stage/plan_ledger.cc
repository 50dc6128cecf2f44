// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/plan_ledger.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/model/reservation.h"
#include "worker/stage/sampling_check.h"

namespace strait {
namespace {

absl::Status Annotate(const absl::Status& status, uint64_t step_id) {
  return absl::Status(status.code(),
                      absl::StrCat("plan of step ", step_id, ": ", status.message()));
}

absl::Status CheckCount(const char* what, uint64_t count, uint64_t most) {
  if (count <= most) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(count, " ", what, ", at most ", most));
}

}  // namespace

PlanLedger::PlanLedger(const StageShape& shape,
                       const absl::flat_hash_map<SequenceId, uint32_t>& left)
    : shape_(shape), left_(left) {
  for (const auto& [id, rows] : left_) blocks_ += BlocksOfSequence(rows, shape_.num_layers);
}

const PlanLedger::Sequence* PlanLedger::Find(const CheckedPlan& checked, SequenceId id) const {
  const auto change = checked.changes.find(id);
  if (change != checked.changes.end()) return change->second ? &*change->second : nullptr;
  const auto it = sequences_.find(id);
  return it == sequences_.end() ? nullptr : &it->second;
}

absl::StatusOr<PlanLedger::CheckedPlan> PlanLedger::Check(v1::StepPlan plan) const {
  CheckedPlan checked;
  const auto check = [&]() -> absl::Status {
    if (plan.step_id() != next_step_.value) {
      return absl::FailedPreconditionError(
          absl::StrCat("step ", next_step_.value, " is the next one of this epoch"));
    }
    STRAIT_RETURN_IF_ERROR(
        CheckCount("cache operations", plan.cache_ops_size(), limits::kMaxCacheOps));
    STRAIT_RETURN_IF_ERROR(
        CheckCount("sequences", plan.sequences_size(), limits::kMaxStepSequences));
    checked.blocks_after = blocks_;
    checked.sequences_after = static_cast<uint32_t>(sequences_.size());
    for (const v1::CacheOp& op : plan.cache_ops()) {
      switch (op.op_case()) {
        case v1::CacheOp::kOpen:
          STRAIT_RETURN_IF_ERROR(CheckOpen(op.open(), &checked));
          break;
        case v1::CacheOp::kClose:
          STRAIT_RETURN_IF_ERROR(CheckClose(op.close(), &checked));
          break;
        case v1::CacheOp::OP_NOT_SET:
          return absl::InvalidArgumentError(
              "a cache operation of a kind that this worker does not know; are versions equal?");
      }
    }
    if (checked.num_left_named != left_.size()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "it is the first of its epoch and opens or closes ", checked.num_left_named, " of the ",
          left_.size(), " sequences that are left from before, and must do so with all"));
    }
    for (const v1::SequenceStep& step : plan.sequences()) {
      const absl::Status status = CheckSequence(step, &checked);
      if (!status.ok()) {
        return absl::Status(status.code(),
                            absl::StrCat("sequence ", step.sequence_id(), ": ", status.message()));
      }
    }
    if (checked.blocks_after > shape_.pool_blocks) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "needs ", checked.blocks_after, " latent blocks, the stage has ", shape_.pool_blocks));
    }
    return absl::OkStatus();
  };
  const absl::Status status = check();
  if (!status.ok()) return Annotate(status, plan.step_id());
  checked.plan = std::move(plan);
  return checked;
}

std::optional<uint32_t> PlanLedger::Left(const CheckedPlan& checked, SequenceId id) const {
  const auto it = left_.find(id);
  if (it == left_.end() || checked.changes.contains(id)) return std::nullopt;
  return it->second;
}

absl::StatusOr<uint32_t> PlanLedger::CheckKept(const v1::OpenSequence& open, uint32_t left) const {
  if (open.kept_rows().empty()) return 0;
  if (next_step_.value != 1) {
    return absl::InvalidArgumentError("rows are kept in the first plan of an epoch alone");
  }
  if (static_cast<uint32_t>(open.kept_rows_size()) != shape_.num_stages) {
    return absl::InvalidArgumentError(absl::StrCat("kept rows of ", open.kept_rows_size(),
                                                   " stages, there are ", shape_.num_stages));
  }
  const uint32_t kept = open.kept_rows(static_cast<int>(shape_.stage_index));
  if (kept > left) {
    return absl::FailedPreconditionError(
        absl::StrCat("keeps ", kept, " rows, this stage has ", left));
  }
  return kept;
}

absl::Status PlanLedger::CheckOpen(const v1::OpenSequence& open, CheckedPlan* checked) const {
  const SequenceId id{open.sequence_id()};
  const auto where = absl::StrCat("open of sequence ", id.value, ": ");
  if (Find(*checked, id) != nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(where, "it is resident already"));
  }
  if (open.prompt_tokens() == 0 || open.prompt_tokens() > shape_.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(where, "prompt_tokens is ", open.prompt_tokens(),
                                                   ", it must be 1 to ", shape_.max_positions));
  }
  STRAIT_RETURN_IF_ERROR(CheckCount("resident sequences", uint64_t{checked->sequences_after} + 1,
                                    limits::kMaxSequencesResident));
  const std::optional<uint32_t> left = Left(*checked, id);
  const absl::StatusOr<uint32_t> kept = CheckKept(open, left.value_or(0));
  if (!kept.ok()) {
    return absl::Status(kept.status().code(), absl::StrCat(where, kept.status().message()));
  }
  absl::StatusOr<SamplingParams> sampling = CheckSampling(open.sampling(), shape_.vocab_size);
  if (!sampling.ok()) {
    return absl::Status(sampling.status().code(), absl::StrCat(where, sampling.status().message()));
  }
  checked->sampling.push_back(*std::move(sampling));
  checked->num_left_named += left.has_value();
  checked->blocks_after += BlocksOfSequence(*kept, shape_.num_layers);
  checked->blocks_after -= BlocksOfSequence(left.value_or(0), shape_.num_layers);
  checked->changes[id] = Sequence{.length = *kept};
  ++checked->sequences_after;
  return absl::OkStatus();
}

absl::Status PlanLedger::CheckClose(const v1::CloseSequence& close, CheckedPlan* checked) const {
  const SequenceId id{close.sequence_id()};
  const Sequence* sequence = Find(*checked, id);
  const std::optional<uint32_t> left = Left(*checked, id);
  if (sequence == nullptr && !left && next_step_.value != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("close of sequence ", id.value, ": it is not resident"));
  }
  const uint32_t length = sequence != nullptr ? sequence->length : left.value_or(0);
  checked->blocks_after -= BlocksOfSequence(length, shape_.num_layers);
  checked->sequences_after -= sequence != nullptr;
  checked->num_left_named += left.has_value();
  checked->changes[id] = std::nullopt;
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> PlanLedger::CheckTokens(const v1::SequenceStep& step,
                                                 const Sequence& before,
                                                 const CheckedPlan& checked) const {
  // Before the ids are looked at, so that a plan costs at most its limit.
  const auto count = [&](uint64_t tokens) {
    return CheckCount("tokens in one step", checked.num_planned + tokens, limits::kMaxStepTokens);
  };
  switch (step.source_case()) {
    case v1::SequenceStep::kLiterals: {
      const auto& ids = step.literals().ids();
      if (ids.empty()) return absl::InvalidArgumentError("no tokens");
      STRAIT_RETURN_IF_ERROR(count(static_cast<uint64_t>(ids.size())));
      for (const uint32_t token : ids) {
        if (token >= shape_.vocab_size) {
          return absl::InvalidArgumentError(
              absl::StrCat("token id ", token, ", the vocabulary has ", shape_.vocab_size));
        }
      }
      return static_cast<uint32_t>(ids.size());
    }
    case v1::SequenceStep::kSampled:
      if (step.replay_stages() != 0) {
        return absl::InvalidArgumentError("a row that is computed again has a literal token");
      }
      if (!shape_.grants) {
        return absl::FailedPreconditionError(
            "its token is what a step samples, and this epoch has no path for grants from the last "
            "stage to the first; activate it with grants, or plan literal tokens");
      }
      if (!before.sampled_by || before.sampled_by->value != step.sampled().step_id()) {
        return absl::FailedPreconditionError(absl::StrCat("step ", step.sampled().step_id(),
                                                          " samples no token for its position ",
                                                          before.length));
      }
      STRAIT_RETURN_IF_ERROR(count(1));
      return 1;
    case v1::SequenceStep::SOURCE_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("no token source");
}

absl::StatusOr<uint32_t> PlanLedger::CheckStages(const v1::SequenceStep& step,
                                                 const CheckedPlan& checked) const {
  const uint32_t stages = step.replay_stages() == 0 ? shape_.num_stages : step.replay_stages();
  if (stages > shape_.num_stages) {
    return absl::InvalidArgumentError(
        absl::StrCat("its rows go through ", stages, " stages, there are ", shape_.num_stages));
  }
  if (checked.num_planned > 0 && stages > checked.least_stages) {
    return absl::InvalidArgumentError(absl::StrCat(
        "its rows go through ", stages, " stages, those of the sequence before it through ",
        checked.least_stages, ": a plan's sequences come by falling number of stages"));
  }
  return stages;
}

absl::Status PlanLedger::CheckSequence(const v1::SequenceStep& step, CheckedPlan* checked) const {
  const SequenceId id{step.sequence_id()};
  const Sequence* before = Find(*checked, id);
  if (before == nullptr) return absl::FailedPreconditionError("it is not resident");
  if (before->last_step == next_step_) {
    return absl::InvalidArgumentError("it has rows twice in one plan");
  }
  STRAIT_ASSIGN_OR_RETURN(const uint32_t stages, CheckStages(step, *checked));
  STRAIT_ASSIGN_OR_RETURN(const uint32_t num_tokens, CheckTokens(step, *before, *checked));
  const uint64_t end = uint64_t{step.first_position()} + num_tokens;
  if (end > shape_.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("length ", end, " is beyond the model's context of ", shape_.max_positions));
  }
  const bool cached = step.replay_stages() != 0 && before->length >= end;
  const bool passes = shape_.stage_index < stages;
  if (!cached && (!passes || step.first_position() != before->length)) {
    return absl::FailedPreconditionError(
        passes
            ? absl::StrCat("first_position ", step.first_position(), " does not follow its length ",
                           before->length)
            : absl::StrCat("its rows to ", end, " end at stage ", stages, ", and this one, number ",
                           shape_.stage_index, ", has only ", before->length));
  }
  STRAIT_RETURN_IF_ERROR(CheckLogits(step, num_tokens, stages));
  checked->num_planned += num_tokens;
  checked->least_stages = stages;
  Sequence after = *before;
  after.last_step = next_step_;
  if (!cached) {
    after.length = static_cast<uint32_t>(end);
    const bool samples =
        !step.logits().empty() && step.logits().rbegin()->want_case() == v1::LogitsWanted::kSample;
    after.sampled_by = samples ? std::optional<StepId>(next_step_) : std::nullopt;
    checked->num_stored += num_tokens;
    checked->blocks_after += BlocksOfSequence(after.length, shape_.num_layers) -
                             BlocksOfSequence(before->length, shape_.num_layers);
  }
  if (passes) {
    ++checked->num_sequences;
    checked->num_tokens += num_tokens;
    if (shape_.stage_index + 1 < stages) checked->num_tokens_on += num_tokens;
  }
  checked->changes[id] = after;  // `before` may dangle from here
  return absl::OkStatus();
}

absl::Status PlanLedger::CheckLogits(const v1::SequenceStep& step, uint32_t num_tokens,
                                     uint32_t stages) const {
  if (stages < shape_.num_stages && !step.logits().empty()) {
    return absl::InvalidArgumentError("logits are wanted of rows that do not reach the last stage");
  }
  uint64_t least_offset = 0;
  for (const v1::LogitsWanted& wanted : step.logits()) {
    const auto where = absl::StrCat("logits at offset ", wanted.offset(), ": ");
    if (wanted.offset() < least_offset || wanted.offset() >= num_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, "offsets must rise and be below the ", num_tokens, " tokens"));
    }
    least_offset = uint64_t{wanted.offset()} + 1;
    if (wanted.num_top() > limits::kMaxTopLogprobs) {
      return absl::ResourceExhaustedError(absl::StrCat(where, "num_top is ", wanted.num_top(),
                                                       ", at most ", limits::kMaxTopLogprobs));
    }
    switch (wanted.want_case()) {
      case v1::LogitsWanted::kScoreToken:
        if (wanted.score_token() >= shape_.vocab_size) {
          return absl::InvalidArgumentError(absl::StrCat(where, "token id ", wanted.score_token(),
                                                         ", the vocabulary has ",
                                                         shape_.vocab_size));
        }
        break;
      case v1::LogitsWanted::kSample:
        if (!wanted.sample())
          return absl::InvalidArgumentError(absl::StrCat(where, "sample is false"));
        if (step.replay_stages() != 0) {
          return absl::InvalidArgumentError(
              absl::StrCat(where, "rows that are computed again are not sampled after"));
        }
        if (wanted.offset() + 1 != num_tokens) {
          return absl::InvalidArgumentError(absl::StrCat(where, "only the last of the ", num_tokens,
                                                         " tokens can be sampled after"));
        }
        break;
      case v1::LogitsWanted::WANT_NOT_SET:
        return absl::InvalidArgumentError(
            absl::StrCat(where, "neither a score nor a sample is wanted"));
    }
  }
  return absl::OkStatus();
}

void PlanLedger::Commit(const CheckedPlan& checked) {
  STRAIT_CHECK(checked.plan.step_id() == next_step_.value, "plans are committed in order");
  for (const auto& [id, change] : checked.changes) {
    if (change) {
      sequences_[id] = *change;
    } else {
      sequences_.erase(id);
    }
  }
  blocks_ = checked.blocks_after;
  left_.clear();
  STRAIT_CHECK(sequences_.size() == checked.sequences_after);
  ++next_step_.value;
}

}  // namespace strait
