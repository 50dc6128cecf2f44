// SPDX-License-Identifier: Apache-2.0
//
// What Cluster does about faults: who is late, what a failed step or link leads to, and which workers are parted. Whom to
// blame FaultPolicy says.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/cluster.h"
#include "proto/base/check.h"

namespace strait {

// ---------------------------------------------------------------- who is late

void Cluster::OnTick(uint64_t now_us) {
  look_again_ = true;  // backoffs run out
  CountProtected(now_us);
  CopyAgain(now_us);
  using Late = std::vector<std::pair<WorkerId, absl::Status>>;
  Late silent;
  for (const auto& [id, worker] : workers_) {
    const uint64_t silent_us = now_us - std::min(now_us, worker.last_heard_us);
    if (silent_us <= context_->options.heartbeat_timeout_us) continue;
    silent.emplace_back(id, absl::DeadlineExceededError(
                                absl::StrCat("no heartbeat for ", silent_us / 1000, " ms, at most ",
                                             context_->options.heartbeat_timeout_us / 1000)));
  }
  for (auto& [id, why] : silent) EndStream(id, std::move(why), now_us);
  TickScale(now_us);
  Late late;
  for (const auto& [id, pipeline] : pipelines_) CollectLate(*pipeline, now_us, &late);
  for (const auto& [id, worker] : workers_) CollectLate(worker, now_us, &late);
  for (auto& [id, why] : late) {
    if (FindWorker(id) != nullptr) Evict(id, std::move(why), /*died=*/true, now_us);
  }
}

void Cluster::CollectLate(const Pipeline& pipeline, uint64_t now_us,
                          std::vector<std::pair<WorkerId, absl::Status>>* late) const {
  const bool scales = scale_ && scale_->prepares() && scale_->pipeline == pipeline.id;
  for (const std::vector<StageSlot>* slots :
       {&pipeline.slots, scales ? &scale_->next : nullptr, scales ? &scale_->landings : nullptr}) {
    if (slots == nullptr) continue;
    for (const StageSlot& slot : *slots) {
      const bool waits_for_worker = slot.state == StageSlot::State::kLoading ||
                                    (slot.was_warm && slot.state == StageSlot::State::kLoaded);
      if (!waits_for_worker ||
          now_us <= std::max(slot.load_progress_us, workers_.at(slot.worker).load_progress_us) +
                        context_->options.load_timeout_us) {
        continue;
      }
      late->emplace_back(
          slot.worker, absl::DeadlineExceededError(absl::StrCat(
                           "loading stands still at ", slot.bytes_loaded, " of ", slot.bytes_total,
                           " bytes for ", context_->options.load_timeout_us / 1000, " ms")));
    }
  }
  const StepLedger& ledger = pipeline.scheduler.ledger();
  if (pipeline.state == Pipeline::State::kActivating &&
      now_us > pipeline.since_us + context_->options.activation_timeout_us) {
    // Who waits to be let in by one that has not answered either is not to blame.
    const size_t num_stages = pipeline.slots.size();
    const auto waits = [&](size_t i) {
      return (i + 1 < num_stages || IsRing()) && pipeline.slots[(i + 1) % num_stages].owes_answer();
    };
    size_t owing = 0, waiting = 0;
    for (size_t i = 0; i < num_stages; ++i) {
      owing += pipeline.slots[i].owes_answer();
      waiting += pipeline.slots[i].owes_answer() && waits(i);
    }
    for (size_t i = 0; i < num_stages; ++i) {
      const StageSlot& slot = pipeline.slots[i];
      if (!slot.owes_answer() || (waits(i) && waiting < owing)) continue;
      late->emplace_back(slot.worker, absl::DeadlineExceededError("activation not answered"));
    }
  }
  if (pipeline.state != Pipeline::State::kActive || ledger.in_flight() == 0) return;
  const uint64_t patience_us = PatienceWithStep(pipeline);
  if (now_us <= ledger.last_progress_us() + patience_us) return;
  late->emplace_back(
      pipeline.slots[ledger.SlowestStage()].worker,
      absl::DeadlineExceededError(absl::StrCat("step ", ledger.records().front().id.value,
                                               " not reported for ", patience_us / 1000, " ms")));
}

void Cluster::CollectLate(const Worker& worker, uint64_t now_us,
                          std::vector<std::pair<WorkerId, absl::Status>>* late) const {
  for (const auto& [stage_id, stage] : worker.stages) {
    const HostedStage::Warm& warm = stage.warm;
    if (stage.role == HostedStage::Role::kWarm && !warm.is_loaded &&
        now_us > std::max(warm.load_progress_us, worker.load_progress_us) +
                     context_->options.load_timeout_us) {
      late->emplace_back(
          worker.id, absl::DeadlineExceededError(absl::StrCat(
                         "loading stands still at ", warm.bytes_loaded, " of ", warm.bytes_total,
                         " bytes for ", context_->options.load_timeout_us / 1000, " ms")));
    }
    if (!stage.resize || now_us <= stage.resize->asked_us + kMemoryTimeoutUs) {
      continue;
    }
    // Until the next epoch's first plan nothing closes what is in the way.
    const auto pipeline = pipelines_.find(stage.pipeline);
    if (pipeline != pipelines_.end() && pipeline->second->state != Pipeline::State::kActive) {
      continue;
    }
    late->emplace_back(worker.id, absl::DeadlineExceededError(absl::StrCat(
                                      "the cache of stage ", stage_id, " not resized for ",
                                      kMemoryTimeoutUs / 1000, " ms")));
  }
}

uint64_t Cluster::PatienceWithStep(const Pipeline& pipeline) const {
  const StepLedger& ledger = pipeline.scheduler.ledger();
  const uint32_t slowest = ledger.SlowestStage();
  const StageSlot& slot = pipeline.slots[slowest];
  const StageTimes& now = pipeline.scheduler.times(slowest);
  return StepPatienceUs(now.steps > 0 ? now : slot.times, ledger.records().front().num_rows,
                        slot.weight_bytes, context_->options.step_timeout_us);
}

// ---------------------------------------------------------------- what failed

void Cluster::OnStageError(Worker* worker, const Seat& seat, const absl::Status& error,
                           const v1::LinkFailure& link, uint64_t now_us) {
  Pipeline* pipeline = seat.pipeline;
  const bool is_link = absl::IsUnavailable(error) || absl::IsDeadlineExceeded(error) ||
                       absl::IsAborted(error) || absl::IsCancelled(error);
  worker->last_error = std::string(error.message());
  if (!is_link && faults_.OnStageError(seat.slot->stage_id)) {
    return Evict(worker->id,
                 absl::Status(error.code(), absl::StrCat("its stage failed ", kMaxStageErrors,
                                                         " times without a step in between, last: ",
                                                         std::string(error.message()))),
                 /*died=*/true, now_us);
  }
  const std::string between = is_link ? OnLinkFailed(*pipeline, link, error, now_us) : "";
  const absl::Status why(error.code(), absl::StrCat(between.empty() ? "worker " : between,
                                                    between.empty() ? worker->name : "", ": ",
                                                    std::string(error.message())));
  if (is_link) {
    for (const auto& [id, residency] : pipeline->scheduler.residents()) {
      uint64_t& since_us = residency->sequence->blame.links_since_us;
      // While links carried steps it was not for their sake that no token came.
      if (residency->opened && (since_us == 0 || pipeline->links_worked)) since_us = now_us;
    }
  }
  Fail(pipeline, why, now_us);
  pipeline->retry_at_us =
      now_us + Doubling(kActivateBackoffUs, pipeline->failures++, kActivateBackoffMaxUs);
  if (is_link) EndUnreachable(why, now_us);
}

std::string Cluster::OnLinkFailed(const Pipeline& pipeline, const v1::LinkFailure& link,
                                  const absl::Status& error, uint64_t now_us) {
  const auto num_stages = static_cast<uint32_t>(pipeline.slots.size());
  for (uint32_t i = 0; i < num_stages && num_stages > 1; ++i) {
    const StageSlot& from = pipeline.slots[i];
    const StageSlot& to = pipeline.slots[(i + 1) % num_stages];
    if (from.stage_id != link.from_stage_id() || to.stage_id != link.to_stage_id()) continue;
    const std::string between = absl::StrCat("link from worker ", FindWorker(from.worker)->name,
                                             " to worker ", FindWorker(to.worker)->name);
    // One that its peer ended, or NCCL's, which has its own way out: the next one is gRPC.
    const bool over_nccl = i + 1 < num_stages && to.edge.over_nccl;
    if (over_nccl || absl::IsAborted(error) || absl::IsCancelled(error)) return between;
    // It is active when its receiver has answered.
    faults_.OnLinkFailed(from.worker, to.worker, from.state == StageSlot::State::kActive,
                         std::string(error.message()), now_us);
    return between;
  }
  return "";
}

void Cluster::OnStepFinished(Pipeline* pipeline, uint64_t now_us) {
  for (const StageSlot& slot : pipeline->slots) faults_.ForgiveStage(slot.stage_id);
  if (!pipeline->scheduler.links_proven()) return;
  pipeline->failures = 0;
  if (std::exchange(pipeline->links_worked, true)) return;
  for (const auto& [id, sequence] : journal_->waiting()) sequence->blame.links_since_us = 0;
  const size_t num_stages = pipeline->slots.size();
  for (size_t i = 0; i + (IsRing() ? 0 : 1) < num_stages && num_stages > 1; ++i) {
    faults_.OnLinkWorked(pipeline->slots[i].worker, pipeline->slots[(i + 1) % num_stages].worker,
                         now_us);
  }
}

void Cluster::EndUnreachable(const absl::Status& why, uint64_t now_us) {
  const std::map<SequenceId, Sequence*> waiting = journal_->waiting();
  for (const auto& [id, sequence] : waiting) {
    uint64_t& since_us = sequence->blame.links_since_us;
    // Who has not run yet waits for the same links, where there are no others.
    if (since_us == 0 && num_active_ == 0) since_us = now_us;
    if (since_us == 0 || now_us < since_us + context_->options.replay_timeout_us) continue;
    if (sequence->home() != nullptr) continue;  // it leaves another place
    journal_->End(
        sequence, FinishReason::kError, std::nullopt,
        absl::UnavailableError(absl::StrCat(
            "links between workers failed for ", (now_us - since_us) / 1'000'000,
            " s without a token of this sequence in between (--replay-timeout); the last failure: ",
            std::string(why.message()))));
  }
}

void Cluster::CountDeath(const Worker& worker, const absl::Status& why) {
  std::vector<SequenceId> counted;
  for (const auto& [stage_id, stage] : worker.stages) {
    if (stage.role != HostedStage::Role::kPlace) continue;
    const Scheduler& scheduler = pipelines_.at(stage.pipeline)->scheduler;
    if (!scheduler.started()) continue;
    for (const SequenceId id : scheduler.InHand(stage.slot_index)) {
      Sequence* sequence = journal_->Find(id);
      if (sequence == nullptr) continue;
      if (++sequence->blame.deaths > kDeathsToReplayAlone) {
        deadly_ = absl::StrCat("worker ", worker.name, ": ", std::string(why.message()));
      }
      counted.push_back(id);
    }
  }
  faults_.OnDied(worker.instance, std::move(counted));
}

void Cluster::Uncount(uint64_t instance) {
  for (const SequenceId id : faults_.OnReturned(instance)) {
    Sequence* sequence = journal_->Find(id);
    if (sequence == nullptr || sequence->home() != nullptr) continue;
    sequence->blame.deaths -= std::min(sequence->blame.deaths, 1u);
  }
}

void Cluster::EndDeadly() {
  if (deadly_.empty()) return;
  const std::string last = std::exchange(deadly_, {});
  const std::map<SequenceId, Sequence*> waiting = journal_->waiting();
  for (const auto& [id, sequence] : waiting) {
    if (sequence->blame.deaths <= kDeathsToReplayAlone || sequence->home() != nullptr) continue;
    journal_->End(
        sequence, FinishReason::kError, std::nullopt,
        absl::InternalError(absl::StrCat(
            "this sequence was in the unfinished step of ", sequence->blame.deaths,
            " workers that died, the last time with no other sequence beside it, so it is taken "
            "for the cause and not replayed again; the last death: ",
            last)));
  }
}

// ---------------------------------------------------------------- who is parted

std::vector<WorkerId> Cluster::WorkerIdsOf(const Pipeline& pipeline) const {
  std::vector<WorkerId> ids;
  for (const StageSlot& slot : pipeline.slots) {
    ids.push_back(slot.state == StageSlot::State::kVacant ? WorkerId() : slot.worker);
  }
  return ids;
}

size_t Cluster::ChooseForSlot(const std::vector<WorkerId>& workers, uint32_t slot_index,
                              const std::vector<Worker*>& idle, uint64_t now_us) const {
  size_t best = 0;
  uint32_t least = 0;
  for (size_t w = 0; w < idle.size(); ++w) {
    std::vector<WorkerId> tried = workers;
    tried[slot_index] = idle[w]->id;
    const uint32_t cost = faults_.CostOf(tried, IsRing(), now_us);
    if (w > 0 && cost >= least) continue;
    least = cost;
    best = w;
  }
  return best;
}

bool Cluster::PartBlamed(Pipeline* pipeline, uint64_t now_us) {
  const std::vector<WorkerId> workers = WorkerIdsOf(*pipeline);
  const uint32_t cost = faults_.CostOf(workers, IsRing(), now_us);
  if (cost == 0) return false;
  const std::vector<WorkerId> order = faults_.BestOrder(workers, IsRing(), now_us);
  const uint32_t cost_in_order = faults_.CostOf(order, IsRing(), now_us);
  // Another in one place: first where a failed link ends, for an address that nobody answers at is the receiver's.
  uint32_t least = cost, place = 0;
  for (const bool receivers : {true, false}) {
    for (uint32_t i = 0; i < workers.size(); ++i) {
      const WorkerId before = workers[(i + workers.size() - 1) % workers.size()];
      const bool receives = faults_.CostOfLink(before, workers[i], now_us) > 1;
      if (receives != receivers) continue;
      for (const Worker* spare : IdleWorkers(now_us)) {
        if (StageRowsMax(context_->options, context_->model, pipeline->slots[i].layers,
                         spare->memory()) == 0) {
          continue;
        }
        std::vector<WorkerId> tried = workers;
        tried[i] = spare->id;
        const uint32_t cost_tried = faults_.CostOf(tried, IsRing(), now_us);
        if (cost_tried >= least) continue;
        least = cost_tried;
        place = i;
      }
    }
  }
  if (least >= cost && cost_in_order >= cost) return false;  // no better choice: they are needed
  const bool follows = scale_ && scale_->pipeline == pipeline->id && !scale_->prepares() &&
                       scale_->phase != Scale::Phase::kWaiting;
  if (cost_in_order < least || follows) {
    Dissolve(pipeline->id);
    return true;
  }
  const StageSlot& slot = pipeline->slots[place];
  if (scale_ && scale_->prepares())
    AbortScale(pipeline->id, absl::UnavailableError("a link failed"));
  Unload(FindWorker(slot.worker), slot.stage_id);
  Vacate(pipeline, place, now_us);
  FillVacancies(pipeline, now_us);
  return true;
}

}  // namespace strait
