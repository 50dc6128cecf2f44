// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/stage.h"

#include <algorithm>
#include <deque>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "proto/check.h"
#include "proto/limits.h"
#include "proto/reservation.h"
#include "proto/status_macros.h"
#include "proto/text.h"
#include "worker/cache/latent_cache.h"
#include "worker/stage/plan_ledger.h"
#include "worker/stage/returning_ids.h"

namespace strait {
namespace {

struct WaitingPlan {
  PlanLedger::CheckedPlan checked;
  uint64_t arrived_us = 0;
  bool has_rows() const { return checked.num_tokens > 0; }
  uint64_t step_id() const { return checked.plan.step_id(); }
};

struct WaitingHidden {
  HiddenStep hidden;
  uint64_t arrived_us = 0;
};

// What a stage knows of a sequence besides its blocks.
struct Resident {
  std::vector<TokenId> tokens;  // [length]
  uint32_t prompt_tokens = 0;
  SamplingParams sampling;
  // What a step sampled, where it is known: on the last stage, and on the first once it came back.
  TokenId sampled = 0;
  StepId sampled_by;
};

bool WantsSample(const v1::SequenceStep& step) {
  return !step.logits().empty() && step.logits().rbegin()->has_sample();
}

std::string Bounded(const absl::Status& status) {
  return PrintableText(ToStd(status.message()), limits::kMaxErrorMessageBytes);
}

void SetTokenLogprob(const LogitsResult& result, v1::TokenLogprob* wire) {
  wire->set_token_id(result.token);
  wire->set_logprob(result.logprob);
  for (const auto& [token, logprob] : result.top) {
    wire->add_top_ids(token);
    wire->add_top_logprobs(logprob);
  }
}

}  // namespace

struct Stage::State {
  State(uint64_t id, std::unique_ptr<StageModel> stage_model, uint32_t layers_total,
        uint32_t row_bytes, uint32_t vocab, uint32_t positions)
      : stage_id(id),
        model(std::move(stage_model)),
        num_layers_total(layers_total),
        hidden_row_bytes(row_bytes),
        vocab_size(vocab),
        max_positions(positions),
        cache(model->spec().layers.size(), model->spec().pool_blocks),
        ledger(Shape(false)) {}

  StageShape Shape(bool takes_grants) const {
    return {model->spec().layers.size(), model->spec().pool_blocks, vocab_size, max_positions,
            takes_grants};
  }
  bool is_first() const { return model->spec().layers.begin == 0; }
  bool is_last() const { return model->spec().layers.end == num_layers_total; }
  // Whether sampled ids come back to it, or go back from it, over an edge.
  bool takes_ids() const { return grants && is_first() && !is_last(); }
  bool gives_ids() const { return grants && is_last() && !is_first(); }

  absl::Status CheckEpoch(PipelineEpoch theirs, const char* what) const;
  absl::Status CheckPairing(const WaitingPlan* plan, const HiddenStep* hidden) const;
  uint32_t NumPlansWithRows() const;

  void ApplyCacheOps(const PlanLedger::CheckedPlan& checked);
  void AppendTokens(const v1::SequenceStep& step, v1::StageReport* report);
  absl::Status Run(const WaitingPlan& plan, HiddenIn hidden_in, const HiddenMemory& memory,
                   HiddenBuffer* hidden_out, v1::StageReport* report);
  void FillResults(const v1::StepPlan& plan, const std::vector<LogitsResult>& results,
                   v1::StageReport* report);
  void HandBack(const WaitingPlan& plan, StepOutput* output);

  // Constant after construction.
  const uint64_t stage_id;
  const std::unique_ptr<StageModel> model;
  const uint32_t num_layers_total;
  const uint32_t hidden_row_bytes;
  const uint32_t vocab_size;
  const uint32_t max_positions;

  // Of the epoch.
  PipelineEpoch epoch;
  bool failed = false;
  bool grants = false;
  LatentCache cache;
  PlanLedger ledger;  // ahead of `cache` by the plans that wait
  absl::flat_hash_map<SequenceId, std::unique_ptr<Resident>> residents;
  std::deque<WaitingPlan> plans;
  std::deque<WaitingHidden> hiddens;  // in step order; the i-th belongs to the i-th plan with rows
  ReturningIds returning;             // to the first of several stages
};

Stage::Stage(uint64_t stage_id, std::unique_ptr<StageModel> model, uint32_t num_layers_total,
             uint32_t hidden_row_bytes, uint32_t vocab_size, uint32_t max_positions)
    : state_(std::make_unique<State>(stage_id, std::move(model), num_layers_total, hidden_row_bytes,
                                     vocab_size, max_positions)) {}

Stage::~Stage() = default;

uint64_t Stage::stage_id() const { return state_->stage_id; }
const StageModel& Stage::model() const { return *state_->model; }
PipelineEpoch Stage::epoch() const { return state_->epoch; }
bool Stage::is_first() const { return state_->is_first(); }
bool Stage::is_last() const { return state_->is_last(); }
uint32_t Stage::blocks_used() const { return state_->cache.blocks_used(); }

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
  const LayerRange layers = s.model->spec().layers;
  if (s.is_first() != (stage_index == 0) || s.is_last() != (stage_index + 1 == num_stages)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "stage ", s.stage_id, " has layers ", layers.begin, " to ", layers.end, " of ",
        s.num_layers_total, ", it cannot be number ", stage_index, " of ", num_stages));
  }
  s.epoch = epoch;
  s.failed = false;
  s.plans.clear();
  s.hiddens.clear();
  s.residents.clear();
  s.returning.Clear();
  s.cache.CloseAll();
  s.grants = grants || num_stages == 1;
  s.ledger = PlanLedger(s.Shape(s.grants));
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
  if (s.takes_ids()) {
    for (const v1::CacheOp& op : waiting.checked.plan.cache_ops()) {
      if (op.close().ended()) s.returning.Revoke(SequenceId{op.close().sequence_id()});
    }
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
  if (hidden.data.size() != uint64_t{hidden.num_tokens} * s.hidden_row_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, hidden.data.size(), " bytes, ", hidden.num_tokens, " rows have ",
                     uint64_t{hidden.num_tokens} * s.hidden_row_bytes));
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
  STRAIT_RETURN_IF_ERROR(s.returning.Check(sampled, s.vocab_size));
  const std::vector<SequenceId> sequences = s.returning.Take(sampled.step);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto resident = s.residents.find(sequences[i]);
    if (resident == s.residents.end()) continue;  // closed meanwhile
    resident->second->sampled = sampled.tokens[i];
    resident->second->sampled_by = sampled.step;
  }
  return absl::OkStatus();
}

bool Stage::Ready() const {
  const State& s = *state_;
  if (s.failed || s.plans.empty()) return false;
  const WaitingPlan& next = s.plans.front();
  if (!next.has_rows()) return true;
  if (s.is_first()) return !s.takes_ids() || s.returning.AreHere(next.checked.plan);
  return !s.hiddens.empty();
}

void Stage::State::ApplyCacheOps(const PlanLedger::CheckedPlan& checked) {
  size_t num_opened = 0;
  for (const v1::CacheOp& op : checked.plan.cache_ops()) {
    if (op.has_open()) {
      const SequenceId id{op.open().sequence_id()};
      cache.Open(id);
      auto resident = std::make_unique<Resident>();
      resident->prompt_tokens = op.open().prompt_tokens();
      resident->sampling = checked.sampling[num_opened++];
      residents[id] = std::move(resident);
    } else {
      const SequenceId id{op.close().sequence_id()};
      cache.Close(id);
      residents.erase(id);
      returning.Closed(id);
    }
  }
}

void Stage::State::AppendTokens(const v1::SequenceStep& step, v1::StageReport* report) {
  const SequenceId id{step.sequence_id()};
  Resident& resident = *residents.at(id);
  STRAIT_CHECK(resident.tokens.size() == step.first_position());
  if (step.has_literals()) {
    const auto& ids = step.literals().ids();
    resident.tokens.insert(resident.tokens.end(), ids.begin(), ids.end());
  } else if (!is_first() && !is_last()) {
    resident.tokens.push_back(kUnknownToken);
  } else {
    const bool known = resident.sampled_by.value == step.sampled().step_id();
    STRAIT_CHECK(known || returning.Revoked(id), "a granted row began before its id was here");
    resident.tokens.push_back(known ? resident.sampled : TokenId{0});
    report->add_granted_ids(resident.tokens.back());
  }
  cache.Grow(id, static_cast<uint32_t>(resident.tokens.size()));
}

absl::Status Stage::State::Run(const WaitingPlan& plan, HiddenIn hidden_in,
                               const HiddenMemory& memory, HiddenBuffer* hidden_out,
                               v1::StageReport* report) {
  ApplyCacheOps(plan.checked);
  if (plan.has_rows()) {
    const v1::StepPlan& wire = plan.checked.plan;
    for (const v1::SequenceStep& step : wire.sequences()) AppendTokens(step, report);

    std::vector<BatchSequence> sequences;
    std::vector<LogitsRequest> logits;
    sequences.reserve(wire.sequences_size());
    uint32_t row = 0;
    for (const v1::SequenceStep& step : wire.sequences()) {
      const SequenceId id{step.sequence_id()};
      const Resident& resident = *residents.at(id);
      const auto index = static_cast<uint32_t>(sequences.size());
      BatchSequence& sequence = sequences.emplace_back();
      sequence.id = id;
      sequence.first_position = step.first_position();
      sequence.num_tokens = static_cast<uint32_t>(resident.tokens.size()) - step.first_position();
      sequence.tokens = resident.tokens;
      sequence.page_tables = cache.PageTables(id);
      sequence.prompt_tokens = resident.prompt_tokens;
      sequence.sampling = &resident.sampling;
      if (is_last()) {
        for (const v1::LogitsWanted& wanted : step.logits()) {
          logits.push_back({index, row + wanted.offset(), wanted.has_sample(),
                            wanted.has_sample() ? TokenId{0} : wanted.score_token(),
                            wanted.num_top()});
        }
      }
      row += sequence.num_tokens;
    }
    STRAIT_CHECK(row == plan.checked.num_tokens);

    StageBatch batch;
    batch.sequences = sequences;
    batch.num_tokens = row;
    batch.logits = logits;
    if (!is_last()) {
      const size_t bytes = size_t{row} * hidden_row_bytes;
      *hidden_out = memory ? memory(bytes) : HiddenBuffer(std::vector<std::byte>(bytes));
      STRAIT_CHECK(hidden_out->size() == bytes);
    }
    std::vector<LogitsResult> results;
    STRAIT_RETURN_IF_ERROR(model->Forward(batch, hidden_in, hidden_out->out(), &results));
    STRAIT_CHECK(results.size() == logits.size(), "a result for each request");
    if (is_last()) FillResults(wire, results, report);
  }
  // The promise to the coordinator: what is held is what the reservation says.
  STRAIT_CHECK(plan.checked.blocks_after == cache.blocks_used());
  return absl::OkStatus();
}

void Stage::State::FillResults(const v1::StepPlan& plan, const std::vector<LogitsResult>& results,
                               v1::StageReport* report) {
  auto result = results.begin();
  for (const v1::SequenceStep& step : plan.sequences()) {
    if (step.logits().empty()) continue;
    v1::SequenceResult* wire = report->add_results();
    wire->set_sequence_id(step.sequence_id());
    Resident& resident = *residents.at(SequenceId{step.sequence_id()});
    if (WantsSample(step)) {
      resident.sampled = 0;
      resident.sampled_by = StepId{plan.step_id()};
    }
    const auto end = result + step.logits_size();
    const auto bad =
        std::find_if(result, end, [](const LogitsResult& one) { return !one.status.ok(); });
    if (bad != end) {
      wire->set_error_code(static_cast<uint32_t>(bad->status.code()));
      wire->set_error_message(Bounded(bad->status));
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

// The last stage gives what the step sampled, the first remembers that it will come.
void Stage::State::HandBack(const WaitingPlan& plan, StepOutput* output) {
  const StepId id{plan.step_id()};
  SampledStep gives{epoch, id, {}};
  std::vector<SequenceId> sequences;
  for (const v1::SequenceStep& step : plan.checked.plan.sequences()) {
    if (!WantsSample(step)) continue;
    sequences.emplace_back(SequenceId{step.sequence_id()});
    if (gives_ids()) gives.tokens.push_back(residents.at(sequences.back())->sampled);
  }
  if (sequences.empty()) return;
  if (takes_ids()) returning.Await(id, std::move(sequences));
  if (gives_ids()) output->sampled = std::move(gives);
}

StepOutput Stage::RunNext(const std::function<uint64_t()>& clock, const HiddenMemory& memory) {
  State& s = *state_;
  STRAIT_CHECK(Ready());
  const WaitingPlan plan = std::move(s.plans.front());
  s.plans.pop_front();
  WaitingHidden in;
  uint64_t wait_us = 0;
  if (plan.has_rows() && !s.is_first()) {
    in = std::move(s.hiddens.front());
    s.hiddens.pop_front();
    STRAIT_CHECK(in.hidden.step.value == plan.step_id());
    STRAIT_CHECK(in.hidden.num_tokens == plan.checked.num_tokens);
    wait_us = in.arrived_us > plan.arrived_us ? in.arrived_us - plan.arrived_us : 0;
  }

  StepOutput output;
  v1::StageReport& report = output.report;
  HiddenBuffer hidden_out;
  const uint64_t begin_us = clock();
  const absl::Status status = s.Run(plan, in.hidden.data.in(), memory, &hidden_out, &report);
  const uint64_t end_us = clock();

  report.set_stage_id(s.stage_id);
  report.mutable_epoch()->set_term(s.epoch.term);
  report.mutable_epoch()->set_counter(s.epoch.counter);
  report.set_step_id(plan.step_id());
  report.set_blocks_used(s.cache.blocks_used());
  report.set_tables_digest(s.cache.Digest());
  report.set_compute_us(end_us > begin_us ? end_us - begin_us : 0);
  report.set_wait_us(wait_us);
  if (!status.ok()) {
    report.set_error_code(static_cast<uint32_t>(status.code()));
    report.set_error_message(Bounded(status));
    s.failed = true;
    s.plans.clear();
    s.hiddens.clear();
    return output;
  }
  if (plan.has_rows() && !s.is_last()) {
    output.hidden =
        HiddenStep{s.epoch, StepId{plan.step_id()}, plan.checked.num_tokens, std::move(hidden_out)};
  }
  if (s.takes_ids() || s.gives_ids()) s.HandBack(plan, &output);
  return output;
}

absl::Status Stage::CheckIntegrity() const {
  const State& s = *state_;
  STRAIT_RETURN_IF_ERROR(s.cache.CheckIntegrity());
  if (s.residents.size() != s.cache.num_sequences()) {
    return absl::InternalError(absl::StrCat(s.residents.size(), " residents, ",
                                            s.cache.num_sequences(), " with page tables"));
  }
  if (s.failed)
    return absl::OkStatus();  // the step that failed left tokens that were never computed
  for (const auto& [id, resident] : s.residents) {
    if (!s.cache.resident(id) || s.cache.length(id) != resident->tokens.size()) {
      return absl::InternalError(absl::StrCat("sequence ", id.value, " has ",
                                              resident->tokens.size(), " tokens and other tables"));
    }
  }
  return absl::OkStatus();
}

}  // namespace strait
