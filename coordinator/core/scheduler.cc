// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/scheduler.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {

void Scheduler::Start(std::vector<StageCache> stages, Survivors survivors, RowSource source) {
  STRAIT_CHECK(!started() && residents_.empty() && !stages.empty());
  num_stages_ = static_cast<uint32_t>(stages.size());
  const uint32_t wanted = context_->options.steps_in_flight;
  const uint32_t ahead = std::max(1u, context_->options.grant_depth - 1);
  steps_in_flight_max_ =
      std::min(wanted > 0 ? wanted : num_stages_ + ahead, limits::kMaxStepsInFlight);
  links_proven_ = false;
  times_.assign(num_stages_, {});
  host_blocks_ = std::numeric_limits<uint32_t>::max();
  for (const StageCache& stage : stages) host_blocks_ = std::min(host_blocks_, stage.host_blocks);
  rates_.resize(num_stages_);
  books_.Start(context_->model.policy(), std::move(stages));
  ledger_.Start(num_stages_);
  index_.Start(num_stages_);
  is_new_source_ =
      keys_are_mixed_ || source.weights != source_.weights || source.numerics != source_.numerics;
  source_ = std::move(source);
  survivors_ = std::move(survivors);
  unnamed_ = survivors_.Ids();
  for (const SequenceId id : unnamed_) {
    Sequence* sequence = journal_->Find(id);
    // Ended, placed elsewhere meanwhile, or leaving another place.
    if (sequence == nullptr || sequence->home() != nullptr) continue;
    if (KeptOf(*sequence).empty()) continue;
    if (HasRoom(sequence, {})) Place(sequence);
  }
}

Holdings Scheduler::MayBeHeld(uint32_t stage_index) const {
  Holdings holdings = survivors_.of_stage(stage_index);
  const auto add = [&](SequenceId id, const StageRows& rows, const StageBlocks& prefix) {
    const Sequence* sequence = journal_->Find(id);
    const size_t confirmed = sequence == nullptr ? 0 : sequence->tokens.size();
    AddHolding(id, {rows.at(stage_index), static_cast<uint32_t>(confirmed), prefix.at(stage_index)},
               &holdings);
  };
  for (const auto& [id, residency] : residents_) {
    // What comes in does not outlive the epoch.
    if (residency->role == Residency::Role::kIncoming) continue;
    if (residency->opened) add(id, residency->rows, residency->prefix.blocks);
  }
  for (const Closing& closing : closing_) add(closing.id, closing.rows, closing.prefix.blocks);
  for (const StepRecord& record : ledger_.records()) {
    if (!ledger_.Unanswered(record, stage_index)) continue;
    for (const ClosedRows& closed : record.closed) {
      add(closed.sequence, closed.rows, closed.prefix);
    }
  }
  return holdings;
}

std::vector<Holdings> Scheduler::Stop() {
  std::vector<Holdings> may_hold;
  bool all_named = true;
  for (uint32_t s = 0; s < num_stages_; ++s) may_hold.push_back(MayBeHeld(s));
  // Preempted sequences may have results pending too, so this goes by steps, not by residents.
  for (const StepRecord& record : ledger_.records()) {
    if (!ledger_.Unanswered(record)) continue;
    for (const WantedResult& wanted : record.wanted) {
      Sequence* sequence = journal_->Find(wanted.sequence);
      if (sequence != nullptr) Answered(sequence->Find(wanted.placement), wanted.sample);
    }
  }
  // A stage that has not done this epoch's first plan may have blocks by keys from before it.
  for (uint32_t s = 0; s < num_stages_; ++s) all_named = all_named && ledger_.reported(s) > 0;
  keys_are_mixed_ = is_new_source_ && !all_named;
  ledger_.Stop();
  closing_.clear();
  close_now_ = alone_last_ = false;
  survivors_ = {};
  unnamed_.clear();
  const std::map<SequenceId, Residency*> residents = residents_;
  for (const auto& [id, residency] : residents) {
    Sequence* sequence = residency->sequence;
    STRAIT_CHECK(residency->results_pending == 0 && residency->samples_pending == 0);
    const bool was_home = residency->role == Residency::Role::kHome;
    Forget(residency);
    sequence->Remove(residency);
    if (was_home) LeftHome(sequence);
  }
  books_.Stop();
  index_.Clear();
  new_prefixes_.clear();
  due_ops_.Clear();
  ops_are_urgent_ = false;
  parked_.clear();
  STRAIT_CHECK(num_returning_ == 0);
  keepers_.clear();
  num_stages_ = 0;
  held_ = false;
  unplanned_rows_ = 0;
  return may_hold;
}

std::vector<SequenceId> Scheduler::InHand(uint32_t stage_index) const {
  for (const StepRecord& record : ledger_.records()) {
    if (!ledger_.Unanswered(record, stage_index) || record.num_rows == 0) continue;
    // What it waits for it cannot have failed at.
    const bool had_it = stage_index == 0 || !ledger_.Unanswered(record, stage_index - 1);
    return had_it ? record.sequences : std::vector<SequenceId>();
  }
  return {};
}

bool Scheduler::CanEverHold(const Sequence& sequence) const {
  return started() && books_.CanEverHold(sequence.rows_max());
}

void Scheduler::Place(Sequence* sequence) {
  STRAIT_CHECK(sequence->home() == nullptr);
  journal_->StopWaiting(sequence);
  Residency* residency = sequence->AddResidency(journal_->NextPlacement(), this);
  const KeptRows kept = KeptOf(*sequence);
  if (kept.empty()) {
    TakeCached(residency);
  } else {
    TakeKept(residency, kept);
    num_uneven_ += !residency->rows.even();
  }
  parked_.erase(sequence->id);
  sequence->last_pipeline = pipeline_;
  residency->reserved_rows = sequence->rows_wanted();
  while (!books_.CanEnter(residency->reserved_rows, residency->prefix.blocks)) {
    STRAIT_CHECK(DropOldest(nullptr), "it was placed without room");
  }
  if (kept.empty()) EnterCached(residency);
  books_.Enter(residency->reserved_rows, residency->prefix.blocks);
  MakePromises(residency);
  unplanned_rows_ += sequence->rows_wanted() - residency->rows.next();
  residents_.emplace(sequence->id, residency);
  prefilling_.emplace(sequence->id, residency);
}

void Scheduler::Forget(Residency* residency) {
  STRAIT_CHECK(residency->scheduler == this && !residency->leaving);
  const Sequence& sequence = *residency->sequence;
  if (prefilling_.erase(sequence.id) == 1) {
    unplanned_rows_ -= sequence.rows_wanted() - residency->rows.next();
  }
  if (residency->ready_ticket != 0) ready_.erase(residency->ready_ticket);
  num_still_ -= residency->frozen || residency->role == Residency::Role::kIncoming;
  num_away_ -= residency->role != Residency::Role::kHome;
  imports_due_.erase(sequence.id);
  num_uneven_ -= !residency->rows.even();
  BreakPromises(residency);
  num_returning_ -= std::exchange(residency->returns, false);
  keepers_.erase(sequence.id);
  residents_.erase(sequence.id);
}

void Scheduler::Drop(Residency* residency) {
  if (!residency->leaving) {
    if (residency->opened) {
      PrefixKeep keep = Keepable(residency);
      closing_.push_back({residency->sequence->id, residency->rows, residency->reserved_rows,
                          std::move(residency->prefix), std::move(keep)});
      close_now_ = close_now_ || (num_stages_ > 1 && residency->samples_pending > 1);
    } else {
      books_.Leave(residency->reserved_rows, residency->prefix.blocks);
      LeavePrefix(&residency->prefix, nullptr, kEnded);
    }
    Forget(residency);
  }
  residency->sequence->Remove(residency);
}

void Scheduler::DropEverywhere(Sequence* sequence) {
  for (std::optional<Residency>& residency : sequence->residencies) {
    if (residency) residency->scheduler->Drop(&*residency);
  }
}

void Scheduler::Answered(Residency* residency, bool sampled) {
  STRAIT_CHECK(residency != nullptr && residency->results_pending > 0);
  --residency->results_pending;
  residency->samples_pending -= sampled;
  if (residency->leaving && residency->results_pending == 0) {
    residency->sequence->Remove(residency);
  }
}

uint32_t Scheduler::DecodeCap() const {
  const size_t decoding = residents_.size() - prefilling_.size() - num_still_;
  return static_cast<uint32_t>((decoding + num_stages_ - 1) / num_stages_);
}

bool Scheduler::WorthDecoding() const {
  const uint32_t cap = DecodeCap();
  const std::vector<Residency*> chosen = ChooseDecodes(cap);
  if (chosen.empty()) return false;
  // With a step for every stage under way, a part of a micro-batch waits to be joined by others:
  // many small steps would read the weights more often for the same tokens.
  return chosen.size() >= cap || ledger_.decode_steps() < num_stages_;
}

bool Scheduler::MayDecode(const Residency& residency) const {
  const Sequence& sequence = *residency.sequence;
  // Who replays alone would be with others in a step that is granted: first its token must come.
  if (sequence.replays_alone() && residency.samples_pending > 0) return false;
  return residency.samples_pending < context_->options.grant_depth &&
         sequence.generated() + residency.samples_pending < sequence.spec.max_tokens;
}

void Scheduler::MakeReady(Residency* residency) {
  if (residency->ready_ticket != 0 || residency->frozen || !MayDecode(*residency)) return;
  residency->ready_ticket = ++last_ticket_;
  ready_.emplace(residency->ready_ticket, residency);
}

bool Scheduler::InTime(const Residency& residency) const {
  return residency.samples_pending == 0 ||
         ledger_.next_step().value - residency.sampled_by.value >= num_stages_;
}

std::vector<Residency*> Scheduler::ChooseDecodes(size_t most) const {
  std::vector<Residency*> chosen;
  for (const auto& [ticket, residency] : ready_) {
    if (chosen.size() >= most) return chosen;
    if (InTime(*residency)) chosen.push_back(residency);
  }
  if (!chosen.empty() || prefilling_.size() > num_returning_ ||
      ledger_.decode_steps() >= num_stages_) {
    return chosen;
  }
  for (const auto& [ticket, residency] : ready_) {
    if (chosen.size() >= most) break;
    chosen.push_back(residency);
  }
  return chosen;
}

std::optional<v1::StepPlan> Scheduler::Form(uint64_t now_us) {
  if (!started() || held_ || ledger_.in_flight() >= limits::kMaxStepsInFlight) return std::nullopt;
  const bool full = ledger_.with_rows() >= steps_in_flight_max_;
  if (full && !close_now_) return std::nullopt;
  const bool is_awaited = std::exchange(is_awaited_, false) && !keepers_.empty();
  GiveUpEnded();
  if (unnamed_.empty() && closing_.empty() && imports_due_.empty() &&
      prefilling_.size() == num_returning_ && !WorthDecoding() && !is_awaited && !ops_are_urgent_) {
    return std::nullopt;
  }
  // Or whoever decodes waits for room that others are about to leave.
  const bool may_be_empty =
      is_awaited || ops_are_urgent_ || num_still_ > 0 || Youngest() == nullptr;
  Draft draft = Begin();
  PlanSurvivors(&draft);
  PlanKeeps(&draft);
  PlanCloses(&draft);
  PlanImports(&draft);
  if (!full) {
    if (Residency* const alone = ChooseAlone()) {
      PlanChunk(alone, draft.tokens_left, &draft);
    } else {
      PlanDecodes(&draft);
      PlanPrefill(&draft);
    }
  }
  std::optional<v1::StepPlan> plan = Send(std::move(draft), now_us);
  STRAIT_CHECK(plan.has_value() || may_be_empty);
  return plan;
}

Scheduler::Draft Scheduler::Begin() {
  Draft draft;
  draft.record.id = ledger_.next_step();
  draft.record.stages.resize(num_stages_);
  draft.plan.set_step_id(draft.record.id.value);
  draft.tokens_left = context_->options.max_step_tokens;
  draft.sequences_left = limits::kMaxStepSequences;
  // The first plan of an epoch leaves no prefix block without a sequence.
  if (draft.record.id.value > 1) *draft.plan.mutable_cache_ops() = std::move(due_ops_);
  due_ops_.Clear();
  ops_are_urgent_ = false;
  return draft;
}

std::optional<v1::StepPlan> Scheduler::Send(Draft draft, uint64_t now_us) {
  if (draft.plan.cache_ops_size() + draft.plan.sequences_size() == 0) return std::nullopt;
  if (draft.record.id.value == 1) RemoveUnheld();
  Complete(&draft);
  ledger_.Add(std::move(draft.record), now_us);
  ++context_->stats.steps;
  return std::move(draft.plan);
}

uint32_t Scheduler::resident_rows_max() const {
  uint32_t rows = 0;
  for (const auto& [id, residency] : residents_) {
    rows = std::max(rows, residency->sequence->rows_max());
  }
  return rows;
}

bool Scheduler::MayShrink() const {
  return started() && unnamed_.empty() && ledger_.in_flight() < limits::kMaxStepsInFlight;
}

std::optional<v1::StepPlan> Scheduler::Resize(const std::vector<uint64_t>& capacity_bytes,
                                              uint64_t now_us) {
  std::optional<v1::StepPlan> plan;
  const bool fits = books_.Fits(capacity_bytes);
  // The books are ahead of the stages by what no plan has dropped yet.
  if (!fits || (!due_ops_.empty() && MayShrink())) {
    STRAIT_CHECK(MayShrink());
    Draft draft = Begin();
    PlanCloses(&draft);
    while (!books_.Fits(capacity_bytes)) {
      if (DropOldest(&draft)) continue;
      Residency* youngest = Youngest();
      STRAIT_CHECK(youngest != nullptr, "a sequence moves while caches shrink");
      STRAIT_CHECK(residents_.size() > 1 || !youngest->prefix.blocks.even(),
                   "the only resident outgrew the cache");
      Preempt(youngest, &draft);
    }
    plan = Send(std::move(draft), now_us);
  }
  books_.Resize(capacity_bytes);
  STRAIT_CHECK(books_.CanEverHold(resident_rows_max()));
  return plan;
}

std::vector<uint64_t> Scheduler::HeldByLayer(uint32_t stage_index) const {
  const LayerRange layers = stages()[stage_index].layers;
  std::vector<uint64_t> held(layers.size(), 0);
  const auto add = [&](const StageRows& rows, const StageBlocks& prefix) {
    for (uint32_t l = 0; l < layers.size(); ++l) {
      held[l] += books_.HeldInLayer(rows, prefix, stage_index, layers.begin + l);
    }
  };
  for (const auto& [id, residency] : residents_) {
    if (residency->opened) add(residency->rows, residency->prefix.blocks);
  }
  for (const Closing& closing : closing_) add(closing.rows, closing.prefix.blocks);
  for (uint32_t l = 0; l < layers.size(); ++l) {
    held[l] +=
        index_.num_on(stage_index) * books_.PrefixBytes({layers.begin + l, layers.begin + l + 1});
  }
  return held;
}

uint64_t Scheduler::HeldRows(bool known) const {
  uint64_t rows = 0;
  for (const auto& [id, residency] : residents_) {
    if (known && !residency->opened) continue;
    for (uint32_t s = 0; s < num_stages_; ++s) {
      rows += uint64_t{residency->rows.at(s)} * stages()[s].layers.size();
    }
  }
  return rows;
}

absl::Status Scheduler::CheckResident(const Residency& residency) const {
  const Sequence& sequence = *residency.sequence;
  if (residency.role != Residency::Role::kHome || residency.frozen) return CheckStill(residency);
  const uint32_t rows = residency.rows.next();
  uint32_t most = 0;
  for (uint32_t s = 0; s < num_stages_; ++s) most = std::max(most, residency.rows.at(s));
  const bool survives =
      !residency.opened &&
      (rows != residency.prefix.blocks.least() * limits::kBlockTokens || !residency.rows.even());
  const bool feasible = residency.scheduler == this && !residency.leaving &&
                        most <= residency.reserved_rows && (!survives || !unnamed_.empty()) &&
                        residency.samples_pending <= residency.results_pending &&
                        residency.samples_pending <= context_->options.grant_depth;
  // Past its prefill it has all rows but that of its last token, whether that is known or not.
  const bool fed = sequence.score_only()
                       ? rows == sequence.rows_wanted()
                       : rows + 1 == sequence.tokens.size() + residency.samples_pending;
  const bool prefilling = prefilling_.contains(sequence.id);
  const bool ready = residency.ready_ticket != 0;
  const bool in_step = prefilling ? !ready && rows < sequence.rows_wanted()
                                  : fed && residency.rows.even() && ready == MayDecode(residency);
  // It must have something to do or to wait for.
  const bool stuck = !prefilling && !ready && residency.results_pending == 0;
  if (feasible && in_step && !stuck) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("resident sequence ", sequence.id.value, " with ", rows,
                                          " rows of ", sequence.rows_wanted(),
                                          stuck ? " is stuck" : " is inconsistent"));
}

absl::Status Scheduler::CheckIntegrity() const {
  uint64_t unplanned = 0;
  uint32_t uneven = 0;
  uint32_t still = 0;
  uint32_t away = 0;
  uint32_t returning = 0;
  CacheBooks due = books_.Empty();
  STRAIT_RETURN_IF_ERROR(CheckPrefixes(&due));
  for (const auto& [id, residency] : residents_) {
    STRAIT_RETURN_IF_ERROR(CheckResident(*residency));
    due.Enter(residency->reserved_rows, residency->prefix.blocks);
    if (residency->opened) due.Hold(residency->rows, residency->prefix.blocks);
    uneven += !residency->rows.even();
    still += residency->frozen || residency->role == Residency::Role::kIncoming;
    away += residency->role != Residency::Role::kHome;
    const auto& path = residency->prefix.path;
    const bool returns =
        std::any_of(path.begin(), path.end(), [](const auto* node) { return node->returning; });
    if (returns != residency->returns || (returns && residency->opened)) {
      return absl::InternalError(
          absl::StrCat("sequence ", id.value, " waits for no blocks, or does not wait"));
    }
    returning += returns;
    if (!prefilling_.contains(id)) continue;
    unplanned += residency->sequence->rows_wanted() - residency->rows.next();
  }
  for (const Closing& closing : closing_) {
    due.Enter(closing.reserved_rows, closing.prefix.blocks);
    due.Hold(closing.rows, closing.prefix.blocks);
  }
  if (returning != num_returning_ || index_.num_on_host() > host_blocks_) {
    return absl::InternalError(absl::StrCat(num_returning_, " residents wait for blocks (counted ",
                                            returning, "), ", index_.num_on_host(),
                                            " prefix blocks are in host memory of ", host_blocks_));
  }
  if (still != num_still_ || away != num_away_) {
    return absl::InternalError(absl::StrCat("residents that stand still ", num_still_, " (counted ",
                                            still, "), whose home is elsewhere ", num_away_,
                                            " (counted ", away, ")"));
  }
  if (unplanned != unplanned_rows_ || uneven != num_uneven_) {
    return absl::InternalError(absl::StrCat("rows to plan ", unplanned_rows_, " (counted ",
                                            unplanned, "), uneven residents ", num_uneven_,
                                            " (counted ", uneven, ")"));
  }
  return books_.CheckEqual(due);
}

}  // namespace strait
