// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/plan_ledger.h"

#include <algorithm>
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

PlanLedger::PlanLedger(const StageShape& shape, LeftMap left, PrefixLedger prefixes)
    : shape_(shape), left_(std::move(left)), prefixes_(std::move(prefixes)) {
  blocks_ = prefixes_.num_prefixes() * shape_.num_layers;
  for (const auto& [id, rows] : left_) blocks_ += OwnBlocks(rows.rows, rows.prefix_blocks);
}

uint64_t PlanLedger::OwnBlocks(uint32_t length, size_t prefix_blocks) const {
  return BlocksOfSequence(length, shape_.num_layers) - prefix_blocks * shape_.num_layers;
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
    checked.sequences_after = static_cast<uint32_t>(sequences_.size() + imports_.size());
    for (const v1::CacheOp& op : plan.cache_ops()) {
      STRAIT_RETURN_IF_ERROR(CheckOp(op, &checked));
    }
    if (checked.num_left_named != left_.size()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "it is the first of its epoch and opens or closes ", checked.num_left_named, " of the ",
          left_.size(), " sequences that are left from before, and must do so with all"));
    }
    if (next_step_.value == 1) {
      prefixes_.DropUnheld(&checked.prefixes);
      checked.frees_blocks = true;
    }
    checked.blocks_after +=
        static_cast<uint64_t>(checked.prefixes.num_prefixes) * shape_.num_layers;
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

std::optional<PlanLedger::Left> PlanLedger::FindLeft(const CheckedPlan& checked,
                                                     SequenceId id) const {
  const auto it = left_.find(id);
  if (it == left_.end() || checked.changes.contains(id)) return std::nullopt;
  return it->second;
}

absl::Status PlanLedger::CheckOp(const v1::CacheOp& op, CheckedPlan* checked) const {
  const auto annotate = [](const char* what, uint64_t id, const absl::Status& status) {
    return absl::Status(status.code(),
                        absl::StrCat(what, " of sequence ", id, ": ", status.message()));
  };
  switch (op.op_case()) {
    case v1::CacheOp::kOpen:
      return annotate("open", op.open().sequence_id(), CheckOpen(op.open(), checked));
    case v1::CacheOp::kClose:
      return CheckClose(op.close(), checked);
    case v1::CacheOp::kKeepPrefix:
      return annotate("keep", op.keep_prefix().sequence_id(), CheckKeep(op.keep_prefix(), checked));
    case v1::CacheOp::kDropPrefix:
      return CheckDrop(op.drop_prefix(), checked);
    case v1::CacheOp::kOffloadPrefix:
    case v1::CacheOp::kReturnPrefix:
    case v1::CacheOp::kForgetPrefix:
      return CheckMove(op, checked);
    case v1::CacheOp::kImport:
      return annotate("import", op.import().sequence_id(), CheckImport(op.import(), checked));
    case v1::CacheOp::OP_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError(
      "a cache operation of a kind that this worker does not know; are versions equal?");
}

absl::StatusOr<uint32_t> PlanLedger::CheckPrefix(const v1::OpenSequence& open,
                                                 CheckedPlan* checked) const {
  STRAIT_ASSIGN_OR_RETURN(std::vector<ContentKey> keys, ParseContentKeys(open.prefix_keys()));
  const auto& tokens = open.prefix_tokens().ids();
  const uint64_t rows = keys.size() * limits::kBlockTokens;
  if (static_cast<uint64_t>(tokens.size()) != rows) {
    return absl::InvalidArgumentError(absl::StrCat(tokens.size(), " tokens of ", keys.size(),
                                                   " prefix blocks, which have ", rows));
  }
  if (keys.empty()) return 0;
  if (!open.kept_rows().empty()) {
    return absl::InvalidArgumentError("it keeps rows and begins with prefix blocks");
  }
  if (rows >= shape_.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat(
        rows, " rows of prefix blocks leave none of the model's ", shape_.max_positions));
  }
  checked->num_prefix_tokens += rows;
  STRAIT_RETURN_IF_ERROR(CheckCount("tokens of prefix blocks in one step",
                                    checked->num_prefix_tokens, limits::kMaxPositionEmbeddings));
  for (const uint32_t token : tokens) {
    if (token < shape_.vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token id ", token, ", the vocabulary has ", shape_.vocab_size));
  }
  STRAIT_RETURN_IF_ERROR(prefixes_.Open(SequenceId{open.sequence_id()}, keys, &checked->prefixes));
  checked->keys.push_back(std::move(keys));
  return static_cast<uint32_t>(rows);
}

absl::Status PlanLedger::CheckKeep(const v1::KeepPrefix& keep, CheckedPlan* checked) const {
  const SequenceId id{keep.sequence_id()};
  const Sequence* sequence = Find(*checked, id);
  if (sequence == nullptr) return absl::FailedPreconditionError("it is not resident");
  STRAIT_ASSIGN_OR_RETURN(std::vector<ContentKey> keys, ParseContentKeys(keep.keys()));
  if (keys.empty()) return absl::InvalidArgumentError("no keys");
  const uint64_t end = (uint64_t{keep.first_block()} + keys.size()) * limits::kBlockTokens;
  if (end > sequence->length) {
    return absl::FailedPreconditionError(
        absl::StrCat("keeps blocks to row ", end, ", it has ", sequence->length));
  }
  STRAIT_ASSIGN_OR_RETURN(const PrefixLedger::Kept kept,
                          prefixes_.Keep(id, keep.first_block(), keys, &checked->prefixes));
  checked->blocks_after -= uint64_t{kept.num_new} * shape_.num_layers;  // its own no more
  checked->frees_blocks = checked->frees_blocks || kept.num_joined > 0;
  // Those that are prefix blocks already are passed over.
  keys.erase(keys.begin(), keys.end() - kept.num_new);
  checked->keys.push_back(std::move(keys));
  return absl::OkStatus();
}

absl::Status PlanLedger::CheckDrop(const v1::DropPrefix& drop, CheckedPlan* checked) const {
  STRAIT_ASSIGN_OR_RETURN(std::vector<ContentKey> keys, ParseContentKeys(drop.keys()));
  STRAIT_RETURN_IF_ERROR(prefixes_.Drop(keys, &checked->prefixes));
  checked->frees_blocks = true;
  // A copy of one may be under way: what takes its place must wait for its end.
  checked->applies_early = checked->applies_early || (prefixes_.has_host() && next_step_.value > 1);
  checked->keys.push_back(std::move(keys));
  return absl::OkStatus();
}

absl::Status PlanLedger::CheckMove(const v1::CacheOp& op, CheckedPlan* checked) const {
  if (next_step_.value == 1) {
    return absl::FailedPreconditionError(
        "an epoch begins with empty host memory: its first plan moves no prefix blocks");
  }
  const std::string& packed = op.has_offload_prefix()  ? op.offload_prefix().keys()
                              : op.has_return_prefix() ? op.return_prefix().keys()
                                                       : op.forget_prefix().keys();
  STRAIT_ASSIGN_OR_RETURN(std::vector<ContentKey> keys, ParseContentKeys(packed));
  if (op.has_forget_prefix()) {
    STRAIT_RETURN_IF_ERROR(prefixes_.Forget(keys, &checked->prefixes));
  } else if (op.has_offload_prefix()) {
    STRAIT_RETURN_IF_ERROR(prefixes_.Offload(keys, &checked->prefixes));
  } else {
    STRAIT_RETURN_IF_ERROR(prefixes_.Return(keys, &checked->prefixes));
    STRAIT_RETURN_IF_ERROR(CheckRoom("return", *checked));
  }
  checked->applies_early = checked->applies_early || !op.has_forget_prefix();
  checked->keys.push_back(std::move(keys));
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> PlanLedger::CheckKept(const v1::OpenSequence& open,
                                               const Left& left) const {
  if (open.kept_rows().empty()) return 0;
  if (next_step_.value != 1) {
    return absl::InvalidArgumentError("rows are kept in the first plan of an epoch alone");
  }
  if (static_cast<uint32_t>(open.kept_rows_size()) != shape_.num_stages) {
    return absl::InvalidArgumentError(absl::StrCat("kept rows of ", open.kept_rows_size(),
                                                   " stages, there are ", shape_.num_stages));
  }
  const uint32_t kept = open.kept_rows(static_cast<int>(shape_.stage_index));
  if (kept > left.rows) {
    return absl::FailedPreconditionError(
        absl::StrCat("keeps ", kept, " rows, this stage has ", left.rows));
  }
  if (kept < left.prefix_blocks * limits::kBlockTokens && kept % limits::kBlockTokens != 0) {
    return absl::FailedPreconditionError(absl::StrCat("keeps ", kept,
                                                      " rows, which ends within one of its ",
                                                      left.prefix_blocks, " prefix blocks"));
  }
  return kept;
}

absl::Status PlanLedger::CheckOpen(const v1::OpenSequence& open, CheckedPlan* checked) const {
  const SequenceId id{open.sequence_id()};
  if (Find(*checked, id) != nullptr) {
    return absl::FailedPreconditionError("it is resident already");
  }
  if (open.prompt_tokens() == 0 || open.prompt_tokens() > shape_.max_positions) {
    return absl::InvalidArgumentError(absl::StrCat("prompt_tokens is ", open.prompt_tokens(),
                                                   ", it must be 1 to ", shape_.max_positions));
  }
  STRAIT_ASSIGN_OR_RETURN(const uint32_t imported, CheckImported(open, checked));
  STRAIT_RETURN_IF_ERROR(CheckCount("resident sequences", uint64_t{checked->sequences_after} + 1,
                                    limits::kMaxSequencesResident));
  const std::optional<Left> left = FindLeft(*checked, id);
  STRAIT_ASSIGN_OR_RETURN(const uint32_t kept, CheckKept(open, left.value_or(Left{})));
  STRAIT_ASSIGN_OR_RETURN(SamplingParams sampling,
                          CheckSampling(open.sampling(), shape_.vocab_size));
  checked->sampling.push_back(std::move(sampling));
  uint32_t kept_blocks = 0;  // prefix blocks
  if (left) {
    kept_blocks = std::min(left->prefix_blocks, kept / limits::kBlockTokens);
    prefixes_.Leave(id, kept_blocks, &checked->prefixes);
    checked->blocks_after -= OwnBlocks(left->rows, left->prefix_blocks);
    ++checked->num_left_named;
  }
  STRAIT_ASSIGN_OR_RETURN(const uint32_t begun, CheckPrefix(open, checked));
  checked->blocks_after += OwnBlocks(kept, kept_blocks) + OwnBlocks(imported, 0);
  checked->changes[id] = Sequence{.length = kept + begun + imported};
  ++checked->sequences_after;
  return absl::OkStatus();
}

absl::Status PlanLedger::CheckClose(const v1::CloseSequence& close, CheckedPlan* checked) const {
  const SequenceId id{close.sequence_id()};
  checked->frees_blocks = true;
  const Sequence* sequence = Find(*checked, id);
  const std::optional<Left> left = FindLeft(*checked, id);
  if (const Import* const import = FindImport(*checked, id)) {
    checked->blocks_after -= OwnBlocks(import->rows, 0);
    --checked->sequences_after;
    checked->import_changes[id] = std::nullopt;
    return absl::OkStatus();
  }
  if (sequence == nullptr && !left && next_step_.value != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("close of sequence ", id.value, ": it is not resident"));
  }
  const uint32_t length = sequence != nullptr ? sequence->length : left.value_or(Left{}).rows;
  checked->blocks_after -= OwnBlocks(length, prefixes_.PrefixOf(checked->prefixes, id).size());
  prefixes_.Leave(id, 0, &checked->prefixes);
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
  for (const auto& [id, change] : checked.import_changes) {
    if (change) {
      imports_[id] = *change;
    } else {
      imports_.erase(id);
    }
  }
  prefixes_.Commit(checked.prefixes);
  blocks_ = checked.blocks_after;
  left_.clear();
  STRAIT_CHECK(sequences_.size() + imports_.size() == checked.sequences_after);
  ++next_step_.value;
}

}  // namespace strait
