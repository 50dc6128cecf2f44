// SPDX-License-Identifier: Apache-2.0
//
// How a move gets from phase to phase: see coordinator/core/migration.h.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/migration.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

namespace strait {

using Phase = Migration::Phase;

bool Migrations::Advance(uint64_t now_us) {
  bool any = false;
  for (auto it = moves_.begin(); it != moves_.end();) {
    Migration& move = it->second;
    Outcome outcome = Outcome::kGoesOn;
    if (const auto failure = failures_.find(it->first); failure != failures_.end()) {
      outcome = Abort(&move, failure->second, now_us);
    }
    while (outcome == Outcome::kGoesOn) {
      outcome = Step(&move, now_us);
      any = any || outcome != Outcome::kWaits;
    }
    if (outcome == Outcome::kOver) {
      failures_.erase(it->first);
      it = moves_.erase(it);
      any = true;
      continue;
    }
    if (now_us >= move.told_us + kTellEveryUs) Tell(&move, now_us);
    ++it;
  }
  return any;
}

Migrations::Outcome Migrations::Step(Migration* move, uint64_t now_us) {
  Sequence* sequence = journal_->Find(move->sequence);
  if (sequence == nullptr) {
    // All its rows had gone over, and it went on there, or was cancelled.
    if (move->phase == Phase::kAdopt) return Finish(move, now_us);
    return Abort(move, absl::CancelledError("the sequence ended before it had moved"), now_us);
  }
  const bool is_committed = move->phase == Phase::kAdopt;
  const Residency* home = sequence->home();
  const PlacementEpoch due = is_committed ? move->placement : move->home;
  if (home == nullptr || home->leaving || home->epoch != due) {
    const PipelineId gone = is_committed ? move->to : move->from;
    return Abort(move,
                 absl::AbortedError(absl::StrCat("pipeline ", gone.value,
                                                 " failed, or the sequence had to give way there",
                                                 is_committed ? "; the source goes on" : "")),
                 now_us);
  }
  if (!is_committed && move->phase != Phase::kReserve &&
      sequence->Find(move->placement) == nullptr) {
    return Abort(move,
                 absl::AbortedError(absl::StrCat("pipeline ", move->to.value,
                                                 " failed, or others grew and needed the room")),
                 now_us);
  }
  if (absl::Status late = CheckDeadlines(*move, now_us); !late.ok()) {
    return Abort(move, std::move(late), now_us);
  }
  switch (move->phase) {
    case Phase::kReserve:
      return Reserve(move, sequence, now_us);
    case Phase::kCopy:
      return Copy(move, sequence, now_us);
    case Phase::kFreeze:
      return LetSettle(move, sequence, now_us);
    case Phase::kLastRows:
      return Commit(move, sequence, now_us);
    case Phase::kAdopt:
      return LetAdopt(move, sequence, now_us);
  }
  return Outcome::kWaits;
}

absl::Status Migrations::CheckDeadlines(const Migration& move, uint64_t now_us) const {
  // After the commit it is the destination's to go on, or to fail.
  if (move.phase == Phase::kAdopt) return absl::OkStatus();
  const auto late = [&](uint64_t since_us, uint64_t most_us, const char* flag) {
    return absl::DeadlineExceededError(absl::StrCat("the move stood in phase \"", Name(move.phase),
                                                    "\" after ", (now_us - since_us) / 1000,
                                                    " ms, ", flag, " is ", most_us / 1000, " ms"));
  };
  const CoreOptions& options = context_->options;
  if (now_us >= move.deadline_us) {
    return late(move.begin_us, move.deadline_us - move.begin_us, "the move's timeout");
  }
  if (now_us >= move.progress_us + options.migrate_stall_us) {
    return late(move.progress_us, options.migrate_stall_us, "--migrate-stall");
  }
  const bool client_waits = move.frozen_us > 0 && !move.is_held;
  if (client_waits && now_us >= move.frozen_us + options.migrate_pause_us) {
    return late(move.frozen_us, options.migrate_pause_us, "--migrate-pause");
  }
  return absl::OkStatus();
}

Migrations::Outcome Migrations::Reserve(Migration* move, Sequence* sequence, uint64_t now_us) {
  Pipeline* from = Serving(move->from);
  Pipeline* to = Serving(move->to);
  if (to == nullptr) {
    return Abort(move, absl::AbortedError(absl::StrCat("pipeline ", move->to.value, " failed")),
                 now_us);
  }
  // A stage serves what it has open: before its first step, it would not know what it is told to serve.
  const Residency& home = *sequence->home();
  if (!to->scheduler.MayImport() || !home.opened || !home.scheduler->IsOpen(home)) {
    return Outcome::kWaits;
  }
  const absl::StatusOr<Residency*> incoming =
      to->scheduler.Import(sequence, ImportRowsFor(*sequence, sequence->home()->rows.next()));
  if (!incoming.ok()) return Abort(move, incoming.status(), now_us);
  move->placement = (*incoming)->epoch;
  for (const StageSlot& slot : to->slots) move->fetched.push_back({slot.stage_id, slot.worker});
  for (const StageSlot& slot : from->slots) {
    move->served.push_back({slot.stage_id, slot.worker, std::nullopt});
  }
  Serve(*move, 0, false);
  move->phase = Phase::kCopy;
  move->progress_us = now_us;
  Tell(move, now_us);
  return Outcome::kGoesOn;
}

Migrations::Outcome Migrations::Copy(Migration* move, Sequence* sequence, uint64_t now_us) {
  Residency* home = sequence->home();
  Residency* incoming = sequence->Find(move->placement);
  // Blocks come with a plan; a replay must be over; nothing to copy, or a round is under way.
  if (!incoming->opened || !home->scheduler->IsOpen(*home) || !home->rows.even() ||
      move->rows() < move->end_row) {
    return Outcome::kWaits;
  }
  const uint32_t planned = home->rows.next();
  const uint32_t reported = home->scheduler->RowsReported(*home);
  // What it may have when it stands still: steps that are granted now, and one more.
  const uint32_t most = std::min(planned + kLastRows, std::max(sequence->rows_max(), planned));
  if (incoming->import_rows < most) {
    if (!incoming->scheduler->GrowImport(incoming, ImportRowsFor(*sequence, planned))) {
      return Abort(move,
                   absl::ResourceExhaustedError(absl::StrCat(
                       "pipeline ", move->to.value, " has no room for ", most, " rows any more")),
                   now_us);
    }
    return Outcome::kGoesOn;
  }
  const uint32_t room = incoming->rows.next();  // that stages know of
  const uint32_t rest = planned - move->end_row;
  const bool prefills = planned < sequence->rows_wanted() && sequence->generated() == 0;
  if (move->rounds > 0 && room >= most && incoming->scheduler->IsImported(*incoming)) {
    if (rest <= kLastRows || (prefills && move->rounds >= kMaxRounds)) {
      move->is_held = rest > kLastRows;
      home->scheduler->Freeze(home);
      move->phase = Phase::kFreeze;
      move->frozen_us = move->progress_us = now_us;
      Tell(move, now_us);
      return Outcome::kGoesOn;
    }
    if (move->rounds >= kMaxRounds && rest >= move->last_rest) {
      return Abort(
          move,
          absl::AbortedError(absl::StrCat("the sequence grows faster than its rows go over: ", rest,
                                          " rows are left after ", move->rounds, " rounds")),
          now_us);
    }
  }
  const uint32_t end_row = std::min(reported, room);
  if (end_row <= move->end_row) return Outcome::kWaits;
  move->last_rest = rest;
  Fetch(move, *sequence, end_row, false);
  move->progress_us = now_us;
  return Outcome::kWaits;
}

Migrations::Outcome Migrations::LetSettle(Migration* move, Sequence* sequence, uint64_t now_us) {
  Residency* home = sequence->home();
  if (!home->scheduler->IsSettled(*home)) return Outcome::kWaits;
  const uint32_t rows = home->rows.next();
  STRAIT_CHECK(rows <= sequence->Find(move->placement)->rows.next(),
               "there are blocks for its rows");
  if (rows > move->end_row) Fetch(move, *sequence, rows, true);
  Serve(*move, rows, false);
  move->phase = Phase::kLastRows;
  move->progress_us = now_us;
  return Outcome::kGoesOn;
}

Migrations::Outcome Migrations::Commit(Migration* move, Sequence* sequence, uint64_t now_us) {
  if (move->rows() < move->end_row) return Outcome::kWaits;
  uint64_t fetched = 0, served = 0;
  for (const Migration::Fetched& stage : move->fetched) fetched += stage.digest;
  for (const Migration::Served& stage : move->served) {
    if (!stage.digest) return Outcome::kWaits;
    served += *stage.digest;
  }
  if (fetched != served) {
    return Abort(move, absl::DataLossError("what the destination has is not what the source gave"),
                 now_us);
  }
  Residency* home = sequence->home();
  Residency* incoming = sequence->Find(move->placement);
  move->last_token_us = sequence->generated() > 0 ? sequence->last_token_us : 0;
  move->tokens_then = sequence->tokens.size();
  sequence->has_foreign_rows = sequence->has_foreign_rows || move->is_foreign;
  home->scheduler->HandOver(home);
  incoming->scheduler->Adopt(incoming, move->end_row);
  move->phase = Phase::kAdopt;
  move->progress_us = now_us;
  return Outcome::kGoesOn;
}

Migrations::Outcome Migrations::LetAdopt(Migration* move, Sequence* sequence, uint64_t now_us) {
  const Residency* home = sequence->home();
  if (move->last_token_us > 0 && move->pause_us == 0 &&
      sequence->tokens.size() > move->tokens_then) {
    move->pause_us = std::max<uint64_t>(1, sequence->last_token_us - move->last_token_us);
  }
  if (!home->scheduler->IsAdopted(*home)) return Outcome::kWaits;
  if (move->last_token_us > 0 && move->pause_us == 0) return Outcome::kWaits;
  return Finish(move, now_us);
}

Migrations::Outcome Migrations::Finish(Migration* move, uint64_t now_us) {
  if (Sequence* sequence = journal_->Find(move->sequence)) {
    // It may be gone: the source failed meanwhile.
    Residency* outgoing = sequence->Find(move->home);
    if (outgoing != nullptr) outgoing->scheduler->Drop(outgoing);
  }
  CoreStats& stats = context_->stats;
  ++stats.migrations;
  stats.migrated_bytes += move->bytes();
  stats.migrated_shared_bytes += move->shared_bytes();
  stats.migrated_nccl_bytes += move->nccl_bytes();
  stats.migration_pause_us += move->pause_us;
  stats.migration_pause_us_max = std::max(stats.migration_pause_us_max, move->pause_us);
  if (move->drains) {
    ended_.push_back({move->sequence, absl::OkStatus(), move->bytes(), move->pause_us});
  }
  if (move->verb) {
    MoveReport report = ReportOf(*move, now_us);
    report.phase = "done";
    report.rows_total = move->end_row;
    context_->Send(MoveTold{*move->verb, std::move(report)});
    context_->Send(VerbEnded{*move->verb, absl::OkStatus()});
  }
  return Outcome::kOver;
}

Migrations::Outcome Migrations::Abort(Migration* move, absl::Status why, uint64_t now_us) {
  Sequence* sequence = journal_->Find(move->sequence);
  if (sequence != nullptr && move->phase != Phase::kAdopt) {
    if (Residency* incoming = sequence->Find(move->placement);
        incoming != nullptr && incoming->role == Residency::Role::kIncoming) {
      incoming->scheduler->Drop(incoming);
    }
    if (Residency* home = sequence->Find(move->home);
        home != nullptr && home->frozen && !home->leaving) {
      home->scheduler->Thaw(home);
    }
  }
  if (move->phase != Phase::kReserve) Serve(*move, 0, true);
  ++context_->stats.migrations_failed;
  if (move->drains) ended_.push_back({move->sequence, why, move->bytes(), 0});
  if (move->verb) {
    Tell(move, now_us);
    context_->Send(VerbEnded{*move->verb, std::move(why)});
  }
  return Outcome::kOver;
}

}  // namespace strait
