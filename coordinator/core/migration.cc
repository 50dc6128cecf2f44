// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/migration.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "coordinator/core/edges.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/epoch_wire.h"

namespace strait {
namespace {

// Blocks that the destination has beyond the rows that there are.
constexpr uint32_t kAheadRows = 2 * limits::kBlockTokens;

std::string NumericsOf(const Pipeline& pipeline, const Cluster& cluster) {
  std::string numerics;
  for (const StageSlot& slot : pipeline.slots) {
    const std::string& id = cluster.workers().at(slot.worker).numerics_id;
    if (numerics.empty()) numerics = id;
    if (id != numerics) return absl::StrCat(numerics, " and ", id);
  }
  return numerics;
}

}  // namespace

uint32_t ImportRowsFor(const Sequence& sequence, uint32_t rows) {
  const uint32_t wanted = std::max(rows, sequence.rows_wanted()) + kAheadRows;
  const uint32_t whole = (wanted + limits::kBlockTokens - 1) / limits::kBlockTokens;
  return std::min(whole * limits::kBlockTokens, std::max(sequence.rows_max(), rows));
}

uint32_t Migration::rows() const {
  uint32_t rows = end_row;
  for (const Fetched& stage : fetched) rows = std::min(rows, stage.rows);
  return rows;
}

uint64_t Migration::bytes() const {
  uint64_t bytes = 0;
  for (const Fetched& stage : fetched) bytes += stage.bytes;
  return bytes;
}

uint64_t Migration::shared_bytes() const {
  uint64_t bytes = 0;
  for (const Fetched& stage : fetched) bytes += stage.shared_bytes;
  return bytes;
}

uint64_t Migration::nccl_bytes() const {
  uint64_t bytes = 0;
  for (const Fetched& stage : fetched) bytes += stage.nccl_bytes;
  return bytes;
}

const char* Name(Migration::Phase phase) {
  switch (phase) {
    case Migration::Phase::kReserve:
      return "reserve";
    case Migration::Phase::kCopy:
      return "copy";
    case Migration::Phase::kFreeze:
      return "freeze";
    case Migration::Phase::kLastRows:
      return "last rows";
    case Migration::Phase::kAdopt:
      return "adopt";
  }
  return "";
}

// ---------------------------------------------------------------- what is asked

absl::StatusOr<Sequence*> Migrations::FindSequence(const std::string& name) const {
  uint64_t id = 0;
  Sequence* found = absl::SimpleAtoi(name, &id) ? journal_->Find(SequenceId{id}) : nullptr;
  const size_t slash = name.rfind('/');
  const std::string request = name.substr(0, slash);
  uint32_t choice = 0;
  const bool has_choice =
      slash != std::string::npos && absl::SimpleAtoi(name.substr(slash + 1), &choice);
  for (const auto& [each_id, sequence] : journal_->sequences()) {
    if (found != nullptr) break;
    if (sequence->request->name.empty() || sequence->request->name != request) continue;
    if (!has_choice && sequence->request->sequences.size() > 1) {
      return absl::InvalidArgumentError(absl::StrCat("request ", request, " has ",
                                                     sequence->request->sequences.size(),
                                                     " choices: name one, as ", request, "/0"));
    }
    if (!has_choice || sequence->index == choice) found = sequence;
  }
  if (found != nullptr) return found;
  return absl::NotFoundError(
      absl::StrCat("no sequence ", name, " is here, or not any more (strait status lists them)"));
}

Pipeline* Migrations::Serving(PipelineId id) const {
  const auto it = cluster_->pipelines().find(id);
  if (it == cluster_->pipelines().end() || !it->second->scheduler.started()) return nullptr;
  return it->second.get();
}

absl::StatusOr<Migration> Migrations::Plan(const MigrateSpec& spec, uint64_t now_us) const {
  STRAIT_ASSIGN_OR_RETURN(Sequence * sequence, FindSequence(spec.sequence));
  if (!cluster_->pipelines().contains(spec.to)) {
    return absl::NotFoundError(
        absl::StrCat("there is no pipeline ", spec.to.value, " (strait status lists them)"));
  }
  Pipeline* to = Serving(spec.to);
  if (to == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("pipeline ", spec.to.value, " does not serve now; wait until it does"));
  }
  if (moves_.contains(sequence->id)) {
    return absl::FailedPreconditionError(
        absl::StrCat("sequence ", sequence->id.value, " moves already; wait for the end of that"));
  }
  if (moves_.size() >= kMaxMigrations) {
    return absl::ResourceExhaustedError(
        absl::StrCat(moves_.size(), " sequences move, at most that many; come back later"));
  }
  const Residency* home = sequence->home();
  if (home == nullptr || home->leaving) {
    return absl::FailedPreconditionError(absl::StrCat(
        "sequence ", sequence->id.value,
        " waits for a place and has no rows in a pipeline; it goes where there is room"));
  }
  if (std::count_if(sequence->residencies.begin(), sequence->residencies.end(),
                    [](const auto& place) { return place.has_value(); }) > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        "sequence ", sequence->id.value, " is just leaving another place; come back in a moment"));
  }
  if (home->scheduler == &to->scheduler) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", sequence->id.value,
                                                   " is in pipeline ", spec.to.value, " already"));
  }
  if (cluster_->IsClosed(*to)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "pipeline ", spec.to.value, " takes no sequences: a worker of it is being drained"));
  }
  if (paused_) {
    return absl::FailedPreconditionError(
        "a pipeline is about to get other stages, as a worker is drained; come back after that");
  }
  if (cluster_->IsScaling()) {
    return absl::FailedPreconditionError("pipelines are being scaled; wait for the end of that");
  }
  if (!to->scheduler.CanEverHold(*sequence)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "sequence ", sequence->id.value, " may grow to ", sequence->rows_max(), " rows, pipeline ",
        spec.to.value, " has ", to->capacity_rows(context_->model.policy())));
  }
  Migration move;
  move.sequence = sequence->id;
  move.to = spec.to;
  for (const auto& [id, pipeline] : cluster_->pipelines()) {
    if (&pipeline->scheduler != home->scheduler) continue;
    move.from = id;
    const std::string here = NumericsOf(*pipeline, *cluster_);
    const std::string there = NumericsOf(*to, *cluster_);
    move.is_foreign = here != there;
    if (move.is_foreign && !spec.force_numerics) {
      return absl::FailedPreconditionError(
          absl::StrCat("pipeline ", id.value, " computes as ", here, ", pipeline ", spec.to.value,
                       " as ", there, ": later tokens may differ; --force-numerics allows it"));
    }
  }
  move.force_numerics = spec.force_numerics;
  move.home = home->epoch;
  move.begin_us = move.progress_us = now_us;
  move.deadline_us =
      now_us + (spec.timeout_us > 0 ? spec.timeout_us : context_->options.migrate_timeout_us);
  return move;
}

absl::Status Migrations::Begin(SequenceId sequence, PipelineId to, uint64_t now_us) {
  MigrateSpec spec;
  spec.sequence = absl::StrCat(sequence.value);
  spec.to = to;
  STRAIT_ASSIGN_OR_RETURN(Migration move, Plan(spec, now_us));
  move.drains = true;
  moves_.emplace(sequence, std::move(move));
  return absl::OkStatus();
}

bool Migrations::Agree(const Pipeline& a, const Pipeline& b) const {
  return NumericsOf(a, *cluster_) == NumericsOf(b, *cluster_);
}

void Migrations::OnMigrate(VerbId verb, const MigrateSpec& spec, uint64_t now_us) {
  absl::StatusOr<Migration> move = Plan(spec, now_us);
  if (!move.ok()) return context_->Send(VerbEnded{verb, move.status()});
  if (spec.dry_run) {
    MoveReport report = ReportOf(*move, now_us);
    const Sequence* sequence = journal_->Find(move->sequence);
    const bool has_room = Serving(move->to)->scheduler.HasRoomFor(
        ImportRowsFor(*sequence, sequence->home()->rows.next()));
    context_->Send(MoveTold{verb, std::move(report)});
    return context_->Send(VerbEnded{
        verb, has_room ? absl::OkStatus()
                       : absl::ResourceExhaustedError(absl::StrCat(
                             "pipeline ", move->to.value, " has no room for it now: ",
                             Serving(move->to)->scheduler.free_rows(), " cache rows are free"))});
  }
  move->verb = verb;
  moves_.emplace(move->sequence, *std::move(move));
}

// ---------------------------------------------------------------- what workers say

void Migrations::OnMessage(WorkerId worker, const v1::FromWorker& message, uint64_t now_us) {
  // Evicted, maybe for this very message, and its moves are not given up yet.
  if (!cluster_->workers().contains(worker)) return;
  const auto find = [&](const auto& told) -> Migration* {
    const auto it = moves_.find(SequenceId{told.sequence_id()});
    // Of a move that is over.
    if (it == moves_.end() || FromWire(told.placement()) != it->second.placement) return nullptr;
    return &it->second;
  };
  const auto accuse = [&](const auto& told, const std::string& what) {
    cluster_->Accuse(worker,
                     absl::FailedPreconditionError(
                         absl::StrCat("stage ", told.stage_id(), ", of sequence ",
                                      told.sequence_id(), " that moves, tells ", what)),
                     now_us);
  };
  if (message.has_rows_fetched()) {
    const v1::RowsFetched& told = message.rows_fetched();
    Migration* move = find(told);
    if (move == nullptr) return;
    const auto stage = std::find_if(move->fetched.begin(), move->fetched.end(), [&](const auto& s) {
      return s.stage_id == told.stage_id() && s.worker == worker;
    });
    if (stage == move->fetched.end()) return accuse(told, "what it was not asked for");
    if (told.error_code() != 0) {
      // What it has adopted it had fetched.
      if (move->phase == Migration::Phase::kAdopt) return;
      const absl::Status error(static_cast<absl::StatusCode>(told.error_code()),
                               told.error_message());
      failures_.emplace(move->sequence, error);
      return;
    }
    if (told.rows() < stage->rows || told.rows() > move->end_row) {
      return accuse(
          told, absl::StrCat(told.rows(), " rows, it had ", stage->rows, " of ", move->end_row));
    }
    if (told.rows() > stage->rows || told.fetched_bytes() > stage->bytes) {
      move->progress_us = now_us;
    }
    stage->rows = told.rows();
    stage->digest = told.digest();
    stage->bytes = std::max(stage->bytes, told.fetched_bytes());
    stage->shared_bytes = std::max(stage->shared_bytes, told.shared_bytes());
    stage->nccl_bytes = std::max(stage->nccl_bytes, told.nccl_bytes());
  } else if (message.has_rows_served()) {
    const v1::RowsServed& told = message.rows_served();
    Migration* move = find(told);
    if (move == nullptr || move->phase != Migration::Phase::kLastRows) return;
    const auto stage = std::find_if(move->served.begin(), move->served.end(), [&](const auto& s) {
      return s.stage_id == told.stage_id() && s.worker == worker;
    });
    if (stage == move->served.end()) return accuse(told, "what it was not asked for");
    if (told.rows() != move->end_row) {
      return accuse(told,
                    absl::StrCat(told.rows(), " rows read, ", move->end_row, " were asked for"));
    }
    stage->digest = told.digest();
    move->progress_us = now_us;
  }
}

// ---------------------------------------------------------------- what is told to workers

RowsPass Migrations::PassOf(const Migration& move) const {
  return {context_->options.edge_secret, RowsUse::kMoves, move.sequence, move.placement};
}

void Migrations::Serve(const Migration& move, uint32_t served_rows, bool end) {
  const Pipeline* from = Serving(move.from);
  if (from == nullptr) return;
  for (const Migration::Served& stage : move.served) {
    v1::ToWorker message;
    v1::ServeRows& serve = *message.mutable_serve_rows();
    serve = ServeOf(from->epoch, stage.stage_id, PassOf(move));
    serve.set_served_rows(served_rows);
    serve.set_end(end);
    context_->Send(SendToWorker{stage.worker, std::move(message)});
  }
}

void Migrations::Fetch(Migration* move, const Sequence& sequence, uint32_t end_row, bool is_last) {
  const Pipeline& from = *Serving(move->from);
  const Pipeline& to = *Serving(move->to);
  const uint32_t begin_row = std::exchange(move->end_row, end_row);
  ++move->rounds;
  for (const StageSlot& slot : to.slots) {
    v1::ToWorker message;
    v1::FetchRows& fetch = *message.mutable_fetch_rows();
    fetch = FetchFrom(from, sequence, PassOf(*move), slot.layers, begin_row, end_row,
                      [this](WorkerId id) { return cluster_->workers().at(id).data_address; });
    fetch.set_stage_id(slot.stage_id);
    ToWire(to.epoch, fetch.mutable_epoch());
    fetch.set_is_last(is_last);
    fetch.set_bytes_per_s(context_->options.migrate_bytes_per_s);
    fetch.set_any_numerics(move->force_numerics);
    context_->Send(SendToWorker{slot.worker, std::move(message)});
  }
}

// ---------------------------------------------------------------- who asked

MoveReport Migrations::ReportOf(const Migration& move, uint64_t now_us) const {
  MoveReport report;
  report.sequence = move.sequence;
  report.from = move.from;
  report.to = move.to;
  report.phase = Name(move.phase);
  report.rounds = move.rounds;
  report.rows = move.rows();
  report.moved_bytes = move.bytes();
  report.shared_bytes = move.shared_bytes();
  report.nccl_bytes = move.nccl_bytes();
  report.pause_us = move.pause_us;
  report.total_us = now_us - move.begin_us;
  report.rows_total = move.end_row;
  if (Sequence* sequence = journal_->Find(move.sequence);
      sequence != nullptr && sequence->home() != nullptr) {
    report.rows_total = std::max(report.rows_total, sequence->home()->rows.next());
  }
  return report;
}

void Migrations::Tell(Migration* move, uint64_t now_us) {
  move->told_us = now_us;
  if (move->verb) context_->Send(MoveTold{*move->verb, ReportOf(*move, now_us)});
}

absl::Status Migrations::CheckIntegrity() const {
  size_t found = 0;
  for (const auto& [id, sequence] : journal_->sequences()) {
    for (const auto& place : sequence->residencies) {
      if (!place || place->role == Residency::Role::kHome) continue;
      const auto it = moves_.find(id);
      const bool comes = place->role == Residency::Role::kIncoming;
      const bool known = it != moves_.end() &&
                         (it->second.phase == Migration::Phase::kAdopt) == !comes &&
                         place->epoch == (comes ? it->second.placement : it->second.home);
      if (!known) {
        return absl::InternalError(absl::StrCat("sequence ", id.value, " is about to ",
                                                comes ? "come" : "leave",
                                                ", and no move of it is known"));
      }
      ++found;
    }
  }
  if (found <= moves_.size()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(found, " places of ", moves_.size(), " moves"));
}

}  // namespace strait
