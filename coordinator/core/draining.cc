// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/draining.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

using Duty = Worker::Duty;
using Phase = Drain::Phase;
using Way = Drain::Way;

}  // namespace

const char* Name(Drain::Phase phase) {
  switch (phase) {
    case Phase::kWaiting:
      return "waiting";
    case Phase::kMoving:
      return "moving";
    case Phase::kReplacing:
      return "replacing";
    case Phase::kUnloading:
      return "unloading";
  }
  return "";
}

const char* Name(Drain::Way way) {
  switch (way) {
    case Way::kNone:
      return "none";
    case Way::kMove:
      return "move";
    case Way::kReplace:
      return "replace";
  }
  return "";
}

// ---------------------------------------------------------------- what is asked

absl::StatusOr<WorkerId> Draining::FindWorker(const std::string& name) const {
  uint64_t id = 0;
  if (absl::SimpleAtoi(name, &id) && cluster_->workers().contains(WorkerId{id})) {
    return WorkerId{id};
  }
  std::optional<WorkerId> found;
  for (const auto& [worker_id, worker] : cluster_->workers()) {
    if (worker.name != name) continue;
    if (found) {
      return absl::InvalidArgumentError(
          absl::StrCat("several workers are called ", name, ": give the id, as ", found->value));
    }
    found = worker_id;
  }
  if (found) return *found;
  return absl::NotFoundError(
      absl::StrCat("no worker ", name, " is attached (strait status lists them)"));
}

Drain* Draining::Find(WorkerId worker) {
  const auto it = std::find_if(drains_.begin(), drains_.end(),
                               [&](const Drain& drain) { return drain.worker == worker; });
  return it == drains_.end() ? nullptr : &*it;
}

Drain Draining::MakeDrain(WorkerId worker, uint64_t timeout_us, uint64_t now_us) const {
  Drain drain;
  drain.worker = worker;
  drain.name = cluster_->workers().at(worker).name;
  drain.begin_us = drain.told_us = now_us;
  drain.deadline_us = now_us + (timeout_us > 0 ? timeout_us : context_->options.migrate_timeout_us);
  return drain;
}

void Draining::OnDrain(VerbId verb, const DrainSpec& spec, uint64_t now_us) {
  const auto end = [&](absl::Status status) { context_->Send(VerbEnded{verb, std::move(status)}); };
  const absl::StatusOr<WorkerId> id = FindWorker(spec.worker);
  if (!id.ok()) return end(id.status());
  Drain drain = MakeDrain(*id, spec.timeout_us, now_us);
  drain.verb = verb;
  if (spec.undo) {
    if (spec.dry_run) {
      return end(absl::InvalidArgumentError("undo changes nothing that a dry run could tell"));
    }
    absl::Status undone = Undo(*id, now_us);
    if (!undone.ok()) return end(std::move(undone));
    DrainReport report = ReportOf(drain, now_us);
    report.phase = "serving";
    context_->Send(DrainTold{verb, std::move(report)});
    return end(absl::OkStatus());
  }
  if (Find(*id) != nullptr) {
    return end(absl::FailedPreconditionError(
        absl::StrCat("worker ", drain.name, " is being drained; wait for the end of that")));
  }
  if (spec.dry_run) return DryRun(verb, std::move(drain), now_us);
  cluster_->SetDuty(*id, Duty::kDraining);
  drains_.push_back(std::move(drain));
}

absl::Status Draining::Undo(WorkerId id, uint64_t now_us) {
  if (Drain* drain = Find(id)) {
    if (drain->leaves) {
      return absl::FailedPreconditionError(
          absl::StrCat("worker ", drain->name, " was told to stop itself; start another one"));
    }
    Finish(drain, absl::CancelledError("the drain was undone"), now_us);
    return absl::OkStatus();
  }
  const Worker& worker = cluster_->workers().at(id);
  if (worker.duty == Duty::kServes) {
    return absl::FailedPreconditionError(
        absl::StrCat("worker ", worker.name, " is not drained, nor is it being drained"));
  }
  cluster_->SetDuty(id, Duty::kServes);
  return absl::OkStatus();
}

void Draining::DryRun(VerbId verb, Drain drain, uint64_t now_us) {
  const Duty duty = cluster_->workers().at(drain.worker).duty;
  const Pipeline* pipeline = cluster_->PipelineOf(cluster_->workers().at(drain.worker));
  absl::Status found;
  if (pipeline != nullptr) {
    drain.pipeline = pipeline->id;
    cluster_->SetDuty(drain.worker, Duty::kDraining);
    if (pipeline->state == Pipeline::State::kActive) {
      found = ChooseWay(&drain, *pipeline, now_us);
    } else if (!OpenPipelines().empty()) {
      drain.way = Way::kMove;  // as Step: nobody is in it
    } else {
      found = absl::FailedPreconditionError(absl::StrCat(
          "pipeline ", pipeline->id.value, " does not serve now, and no other one does: a drain ",
          "waits until one does (strait status)"));
    }
    cluster_->SetDuty(drain.worker, duty);
  }
  drain.phase = Phase::kWaiting;
  context_->Send(DrainTold{verb, ReportOf(drain, now_us)});
  context_->Send(VerbEnded{verb, std::move(found)});
}

void Draining::OnMessage(WorkerId worker, const v1::FromWorker& message, uint64_t now_us) {
  if (!message.has_leave() || !cluster_->workers().contains(worker)) return;
  Drain* drain = Find(worker);
  if (drain == nullptr) {
    cluster_->SetDuty(worker, Duty::kDraining);
    drains_.push_back(MakeDrain(worker, 0, now_us));
    drain = &drains_.back();
  }
  drain->leaves = true;
}

// ---------------------------------------------------------------- which way

std::vector<Pipeline*> Draining::OpenPipelines() const {
  std::vector<Pipeline*> open;
  for (const auto& [id, pipeline] : cluster_->pipelines()) {
    if (pipeline->scheduler.started() && !cluster_->IsClosed(*pipeline)) {
      open.push_back(pipeline.get());
    }
  }
  return open;
}

absl::Status Draining::CheckMoves(const Pipeline& pipeline) const {
  std::vector<Pipeline*> open = OpenPipelines();
  std::erase_if(open, [&](const Pipeline* to) { return !migrations_->Agree(pipeline, *to); });
  if (open.empty()) {
    return absl::ResourceExhaustedError("no other pipeline serves that computes as it does");
  }
  const uint64_t holds = pipeline.capacity_rows(context_->model.policy());
  uint64_t roomiest = 0;
  for (const Pipeline* to : open) {
    roomiest = std::max(roomiest, to->capacity_rows(context_->model.policy()));
  }
  for (const auto& [id, sequence] : journal_->sequences()) {
    const uint64_t rows = sequence->rows_max();
    if (rows > holds || rows <= roomiest) continue;
    return absl::ResourceExhaustedError(
        absl::StrCat("sequence ", id.value, " may grow to ", rows,
                     " cache rows, the roomiest other pipeline has ", roomiest));
  }
  // Each goes where most is left by then.
  std::map<const Pipeline*, uint64_t> left, places;
  for (const Pipeline* to : open) {
    left[to] = to->scheduler.free_rows();
    const uint64_t residents = to->scheduler.residents().size();
    places[to] = context_->options.max_running -
                 std::min<uint64_t>(context_->options.max_running, residents);
  }
  for (const auto& [id, residency] : pipeline.scheduler.residents()) {
    if (residency->role != Residency::Role::kHome || migrations_->moves().contains(id)) continue;
    const uint64_t rows = ImportRowsFor(*residency->sequence, residency->rows.next());
    const Pipeline* best = nullptr;
    for (const Pipeline* to : open) {
      if (places[to] == 0 || !to->scheduler.CanEverHold(*residency->sequence)) continue;
      if (best == nullptr || left[to] > left[best]) best = to;
    }
    if (best == nullptr || left[best] < rows) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "sequence ", id.value, " needs ", rows, " cache rows in another pipeline, beside the ",
          "others the roomiest has ", best == nullptr ? 0 : left[best]));
    }
    left[best] -= rows;
    --places[best];
  }
  return absl::OkStatus();
}

Pipeline* Draining::ChooseTarget(const Pipeline& from, const Sequence& sequence) const {
  const uint32_t rows = ImportRowsFor(sequence, sequence.home()->rows.next());
  Pipeline* best = nullptr;
  for (Pipeline* to : OpenPipelines()) {
    const Scheduler& scheduler = to->scheduler;
    if (!scheduler.CanEverHold(sequence) || !scheduler.HasRoomFor(rows) ||
        scheduler.residents().size() >= context_->options.max_running ||
        !migrations_->Agree(from, *to)) {
      continue;
    }
    if (best == nullptr || scheduler.free_rows() > best->scheduler.free_rows()) best = to;
  }
  return best;
}

absl::Status Draining::ChooseWay(Drain* drain, const Pipeline& pipeline, uint64_t now_us) {
  if (drain->refusal.ok()) drain->refusal = CheckMoves(pipeline);
  if (drain->refusal.ok()) {
    drain->way = Way::kMove;
    drain->phase = Phase::kMoving;
    return absl::OkStatus();
  }
  const absl::Status replace = cluster_->CheckReplace(pipeline.id, now_us);
  if (replace.ok()) {
    drain->way = Way::kReplace;
    drain->phase = Phase::kReplacing;
    return absl::OkStatus();
  }
  return absl::Status(
      replace.code(),
      absl::StrCat("worker ", drain->name, " cannot be drained. Its sequences in pipeline ",
                   pipeline.id.value, " cannot move: ", std::string(drain->refusal.message()),
                   "; other workers cannot take its place: ", std::string(replace.message())));
}

// ---------------------------------------------------------------- how it goes on

bool Draining::Advance(uint64_t now_us) {
  if (drains_.empty()) {
    migrations_->TakeEnded();
    return false;
  }
  NoteEnded();
  bool changed = false;
  for (size_t i = 0; i < drains_.size();) {
    Drain& drain = drains_[i];
    const auto worker = cluster_->workers().find(drain.worker);
    End end;
    if (worker == cluster_->workers().end()) {
      end = absl::AbortedError(absl::StrCat("worker ", drain.name, " died, or its stream ended"));
    } else if (worker->second.stages.empty() && !drain.begun) {
      end = absl::OkStatus();
    } else if (now_us >= drain.deadline_us) {
      end = absl::DeadlineExceededError(
          absl::StrCat("worker ", drain.name, " was not drained within ",
                       (drain.deadline_us - drain.begin_us) / 1000, " ms; it serves on"));
    } else if (i == 0) {
      end = Step(&drain, &changed, now_us);
    }
    if (end) {
      Finish(&drain, *std::move(end), now_us);
      changed = true;
      i = 0;
      continue;
    }
    if (now_us >= drain.told_us + kTellEveryUs) Tell(&drain, now_us);
    ++i;
  }
  return changed;
}

Draining::End Draining::Step(Drain* drain, bool* changed, uint64_t now_us) {
  const Worker& worker = cluster_->workers().at(drain->worker);
  const Pipeline* pipeline = cluster_->PipelineOf(worker);
  if (drain->begun) return AwaitReplace(drain, changed);
  if (pipeline == nullptr) {
    drain->phase = Phase::kUnloading;
    return std::nullopt;
  }
  drain->pipeline = pipeline->id;
  if (cluster_->IsScaling()) return std::nullopt;  // that one comes first
  if (pipeline->state != Pipeline::State::kActive) {
    drain->phase = Phase::kWaiting;
    // Nobody is in it: who was goes on elsewhere.
    if (OpenPipelines().empty()) return std::nullopt;
    drain->way = Way::kMove;
    cluster_->Retire(pipeline->id, absl::AbortedError("a worker of it is drained"), now_us);
    *changed = true;
    return std::nullopt;
  }
  if (drain->phase == Phase::kWaiting) {
    absl::Status chosen = ChooseWay(drain, *pipeline, now_us);
    if (!chosen.ok()) return chosen;
    Tell(drain, now_us);
  }
  return drain->phase == Phase::kMoving ? Move(drain, *pipeline, changed, now_us)
                                        : Replace(drain, *pipeline, changed, now_us);
}

Draining::End Draining::Move(Drain* drain, const Pipeline& pipeline, bool* changed,
                             uint64_t now_us) {
  const auto& residents = pipeline.scheduler.residents();
  if (residents.empty()) {
    cluster_->Retire(pipeline.id, absl::AbortedError("a worker of it is drained"), now_us);
    drain->phase = Phase::kUnloading;
    *changed = true;
    return std::nullopt;
  }
  size_t under_way = 0;
  for (const auto& [id, move] : migrations_->moves()) under_way += move.drains;
  std::vector<Sequence*> waiting;
  bool given_up = OpenPipelines().empty();
  if (given_up) drain->refusal = absl::ResourceExhaustedError("no other pipeline serves any more");
  for (const auto& [id, residency] : residents) {
    if (migrations_->moves().contains(id) || residency->role != Residency::Role::kHome) continue;
    const auto tries = drain->tries.find(id);
    if (tries != drain->tries.end() && tries->second.failed >= kDrainTries) {
      drain->refusal = tries->second.last;
      given_up = true;
    }
    if (tries == drain->tries.end() || now_us >= tries->second.next_us) {
      waiting.push_back(residency->sequence);
    }
  }
  if (given_up) {
    if (under_way > 0) return std::nullopt;
    drain->tries.clear();
    drain->phase = Phase::kWaiting;  // for the other way, if there is one
    *changed = true;
    return std::nullopt;
  }
  for (Sequence* sequence : waiting) {
    if (under_way >= kDrainMoves) break;
    Drain::Tries& tries = drain->tries[sequence->id];
    tries.next_us = now_us + kDrainRetryUs;
    const Pipeline* to = ChooseTarget(pipeline, *sequence);
    if (to == nullptr) {
      ++tries.failed;
      tries.last = absl::ResourceExhaustedError(
          absl::StrCat("no other pipeline has room for sequence ", sequence->id.value, " now"));
      continue;
    }
    // What cannot be just now may be in a moment.
    under_way += migrations_->Begin(sequence->id, to->id, now_us).ok();
  }
  return std::nullopt;
}

Draining::End Draining::Replace(Drain* drain, const Pipeline& pipeline, bool* changed,
                                uint64_t now_us) {
  // A scale and moves do not go together.
  migrations_->set_paused(true);
  if (!migrations_->moves().empty()) return std::nullopt;
  absl::Status begun = cluster_->Replace(pipeline.id, now_us);
  if (!begun.ok()) return begun;
  drain->begun = *changed = true;
  return std::nullopt;
}

Draining::End Draining::AwaitReplace(Drain* drain, bool* changed) {
  std::optional<Cluster::Replaced> replaced = cluster_->TakeReplaced();
  if (!replaced) return std::nullopt;
  drain->begun = false;
  *changed = true;
  migrations_->set_paused(false);
  drain->pause_us = std::max<uint64_t>(drain->pause_us, replaced->reply.pause_us());
  drain->rows_kept += replaced->reply.rows_kept();
  drain->rows_lost += replaced->reply.rows_lost();
  drain->moved_bytes += replaced->reply.moved_bytes();
  drain->phase = Phase::kUnloading;
  if (replaced->status.ok()) return std::nullopt;
  drain->phase = Phase::kWaiting;
  if (++drain->replacements_failed < kDrainTries) return std::nullopt;
  return std::move(replaced->status);
}

void Draining::NoteEnded() {
  for (const Migrations::Ended& ended : migrations_->TakeEnded()) {
    Drain& drain = drains_.front();
    if (ended.status.ok()) {
      ++drain.moved;
      drain.moved_bytes += ended.bytes;
      drain.pause_us = std::max(drain.pause_us, ended.pause_us);
    } else if (!absl::IsCancelled(ended.status)) {
      Drain::Tries& tries = drain.tries[ended.sequence];
      ++tries.failed;
      tries.last = ended.status;
    }
  }
}

void Draining::Finish(Drain* drain, absl::Status status, uint64_t now_us) {
  if (drain->begun) cluster_->CancelReplace(absl::AbortedError("the drain ended"));
  cluster_->TakeReplaced();
  migrations_->set_paused(false);
  if (cluster_->workers().contains(drain->worker)) {
    const bool is_out = status.ok() || drain->leaves;
    cluster_->SetDuty(drain->worker, is_out ? Duty::kDrained : Duty::kServes);
    if (drain->leaves) {
      cluster_->Shutdown(drain->worker,
                         status.ok() ? "it is drained" : std::string(status.message()));
    }
  }
  if (drain->verb) {
    DrainReport report = ReportOf(*drain, now_us);
    if (status.ok()) report.phase = "done";
    context_->Send(DrainTold{*drain->verb, std::move(report)});
    context_->Send(VerbEnded{*drain->verb, std::move(status)});
  }
  drains_.erase(drains_.begin() + (drain - drains_.data()));
}

// ---------------------------------------------------------------- who asked

DrainReport Draining::ReportOf(const Drain& drain, uint64_t now_us) const {
  DrainReport report;
  report.worker = drain.worker;
  report.name = drain.name;
  report.pipeline = drain.pipeline;
  report.way = Name(drain.way);
  report.phase = Name(drain.phase);
  if (const auto it = cluster_->pipelines().find(drain.pipeline);
      it != cluster_->pipelines().end() && drain.way != Way::kReplace) {
    report.sequences_left = it->second->scheduler.num_residents();
  }
  report.sequences_moved = drain.moved;
  report.moved_bytes = drain.moved_bytes;
  report.rows_kept = drain.rows_kept;
  report.rows_lost = drain.rows_lost;
  report.pause_us = drain.pause_us;
  report.total_us = now_us - drain.begin_us;
  return report;
}

void Draining::Tell(Drain* drain, uint64_t now_us) {
  drain->told_us = now_us;
  if (drain->verb) context_->Send(DrainTold{*drain->verb, ReportOf(*drain, now_us)});
}

absl::Status Draining::CheckIntegrity() const {
  size_t found = 0;
  for (const auto& [id, worker] : cluster_->workers()) {
    if (worker.duty != Duty::kDraining) continue;
    ++found;
    if (std::none_of(drains_.begin(), drains_.end(),
                     [&, id = id](const Drain& drain) { return drain.worker == id; })) {
      return absl::InternalError(
          absl::StrCat("worker ", id.value, " drains, and nobody knows why"));
    }
  }
  if (found <= drains_.size()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(found, " workers drain, of ", drains_.size(), " drains"));
}

}  // namespace strait
