// SPDX-License-Identifier: Apache-2.0
//
// What the scheduler does for a sequence that moves from one pipeline to another: it takes room where the
// sequence goes, lets it stand still where it is, and makes the new place its home. When each of these happens is
// decided in coordinator/core/migration.h.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/core.h"
#include "coordinator/core/scheduler.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

namespace strait {

using Role = Residency::Role;

absl::StatusOr<Residency*> Scheduler::Import(Sequence* sequence, uint32_t rows) {
  STRAIT_CHECK(started() && CanEverHold(*sequence) && !residents_.contains(sequence->id));
  if (residents_.size() >= context_->options.max_running) {
    return absl::ResourceExhaustedError(
        absl::StrCat(residents_.size(), " sequences are in that pipeline, --max-running is ",
                     context_->options.max_running));
  }
  const uint32_t reserved = std::max(rows, sequence->rows_wanted());
  if (!HasRoomFor(reserved)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the sequence needs ", reserved, " cache rows and some to grow beside ",
                     residents_.size(), " other(s), that pipeline has ", free_rows()));
  }
  Residency* residency = sequence->AddResidency(journal_->NextPlacement(), this);
  residency->role = Role::kIncoming;
  residency->reserved_rows = reserved;
  residency->import_rows = rows;
  while (!books_.CanEnter(reserved, residency->prefix.blocks)) {
    STRAIT_CHECK(DropOldest(nullptr), "it was let in without room");
  }
  books_.Enter(reserved, residency->prefix.blocks);
  residents_.emplace(sequence->id, residency);
  imports_due_.insert(sequence->id);
  ++num_still_;
  ++num_away_;
  return residency;
}

bool Scheduler::HasRoomFor(uint32_t rows) const {
  return books_.HasRoom(rows, StageBlocks(0), index_.num_unheld(),
                        static_cast<uint32_t>(residents_.size()));
}

bool Scheduler::GrowImport(Residency* residency, uint32_t rows) {
  STRAIT_CHECK(residency->role == Role::kIncoming && rows >= residency->import_rows);
  const uint32_t from = residency->reserved_rows;
  const uint32_t to = std::max({from, rows, residency->sequence->rows_wanted()});
  while (!books_.CanReserve(from, to)) {
    if (!DropOldest(nullptr)) return false;
  }
  books_.Reserve(from, to);
  residency->reserved_rows = to;
  residency->import_rows = rows;
  if (rows > residency->rows.next()) imports_due_.insert(residency->sequence->id);
  return true;
}

void Scheduler::PlanImports(Draft* draft) {
  for (const SequenceId id : std::exchange(imports_due_, {})) {
    Residency* residency = residents_.at(id);
    if (residency->role == Role::kHome) {
      PlanAdoption(residency, draft);
      continue;
    }
    v1::ImportSequence* import = draft->plan.add_cache_ops()->mutable_import();
    import->set_sequence_id(id.value);
    import->mutable_placement()->set_term(residency->epoch.term);
    import->mutable_placement()->set_counter(residency->epoch.counter);
    import->set_rows(residency->import_rows);
    residency->imported_by = draft->record.id;
    if (residency->opened) books_.Free(residency->rows, residency->prefix.blocks);
    residency->opened = true;
    residency->rows = StageRows(std::vector<uint32_t>(num_stages_, residency->import_rows));
    books_.Hold(residency->rows, residency->prefix.blocks);
  }
}

void Scheduler::PlanAdoption(Residency* residency, Draft* draft) {
  books_.Free(residency->rows, residency->prefix.blocks);
  books_.Leave(residency->reserved_rows, residency->prefix.blocks);
  // What it reserved beyond goes; what it needs next it has reserved.
  const uint32_t reserved = std::max(residency->adopted_rows, residency->sequence->rows_wanted());
  STRAIT_CHECK(reserved <= residency->reserved_rows);
  residency->reserved_rows = reserved;
  books_.Enter(reserved, residency->prefix.blocks);
  residency->rows = StageRows(std::vector<uint32_t>(num_stages_, residency->adopted_rows));
  // Its blocks may become prefix blocks with its first step: before, stages may not have opened it.
  PlanOpen(residency, {}, draft);
  Thaw(residency);
}

uint32_t Scheduler::RowsReported(const Residency& residency) const {
  STRAIT_CHECK(residency.rows.even());
  for (const StepRecord& record : ledger_.records()) {
    for (size_t i = 0; i < record.sequences.size(); ++i) {
      if (record.sequences[i] == residency.sequence->id) return record.first_rows[i];
    }
  }
  return residency.rows.next();
}

bool Scheduler::IsSettled(const Residency& residency) const {
  return residency.results_pending == 0 && residency.rows.even() &&
         RowsReported(residency) == residency.rows.next();
}

void Scheduler::Freeze(Residency* residency) {
  STRAIT_CHECK(residency->scheduler == this && !residency->leaving && !residency->frozen &&
               residency->role == Role::kHome && residency->rows.even());
  const Sequence& sequence = *residency->sequence;
  if (prefilling_.erase(sequence.id) == 1) {
    unplanned_rows_ -= sequence.rows_wanted() - residency->rows.next();
  }
  if (residency->ready_ticket != 0) ready_.erase(std::exchange(residency->ready_ticket, 0));
  residency->frozen = true;
  ++num_still_;
}

void Scheduler::Restore(Residency* residency) {
  const Sequence& sequence = *residency->sequence;
  const uint32_t rows = residency->rows.next();
  // Past its prompt a row is planned when its token is known, or granted.
  const bool decodes = !sequence.score_only() &&
                       rows + 1 == sequence.tokens.size() + residency->samples_pending &&
                       (residency->samples_pending > 0 || sequence.generated() > 0);
  if (decodes) {
    MakeReady(residency);
  } else if (rows < sequence.rows_wanted()) {
    unplanned_rows_ += sequence.rows_wanted() - rows;
    prefilling_.emplace(sequence.id, residency);
  }
}

void Scheduler::Thaw(Residency* residency) {
  STRAIT_CHECK(residency->scheduler == this && residency->frozen && residency->role == Role::kHome);
  residency->frozen = false;
  --num_still_;
  Restore(residency);
}

void Scheduler::HandOver(Residency* residency) {
  STRAIT_CHECK(residency->scheduler == this && residency->frozen && IsSettled(*residency));
  // Nobody is to wait for blocks that it would have filled here.
  BreakPromises(residency);
  residency->role = Role::kOutgoing;
  ++num_away_;
}

void Scheduler::Adopt(Residency* residency, uint32_t rows) {
  Sequence* sequence = residency->sequence;
  STRAIT_CHECK(residency->scheduler == this && residency->role == Role::kIncoming &&
               residency->opened && rows > 0 && rows <= residency->rows.next() &&
               imports_due_.insert(sequence->id).second && sequence->home() == nullptr);
  residency->role = Role::kHome;
  residency->frozen = true;  // until the next plan opens it
  residency->adopted_rows = rows;
  residency->shares = KeepsPrefixes() && !sequence->has_foreign_rows;
  --num_away_;
  MakePromises(residency);
}

bool Scheduler::HaveAllReported(StepId step) const {
  if (step.value == 0) return false;
  for (uint32_t s = 0; s < num_stages_; ++s) {
    if (ledger_.reported(s) < step.value) return false;
  }
  return true;
}

bool Scheduler::IsOpen(const Residency& residency) const {
  return residency.role != Role::kIncoming && HaveAllReported(residency.opened_by);
}

bool Scheduler::IsImported(const Residency& residency) const {
  return residency.import_rows == residency.rows.next() && HaveAllReported(residency.imported_by);
}

bool Scheduler::IsAdopted(const Residency& residency) const {
  return residency.adopted_rows == 0 && IsOpen(residency);
}

Residency* Scheduler::Incoming() const {
  if (num_away_ == 0) return nullptr;
  for (auto it = residents_.rbegin(); it != residents_.rend(); ++it) {
    if (it->second->role == Role::kIncoming) return it->second;
  }
  return nullptr;
}

Residency* Scheduler::Youngest() const {
  for (auto it = residents_.rbegin(); it != residents_.rend(); ++it) {
    const Residency* residency = it->second;
    if (residency->role != Role::kHome || residency->frozen) continue;
    // One that has just come could go back to where its rows still are, but not with results under way.
    const auto& places = residency->sequence->residencies;
    const bool has_just_come = std::any_of(places.begin(), places.end(), [](const auto& place) {
      return place && place->role == Role::kOutgoing;
    });
    if (!has_just_come) return it->second;
  }
  return nullptr;
}

void Scheduler::CloseIncoming(Residency* residency, Draft* draft) {
  Sequence* sequence = residency->sequence;
  if (residency->opened) {
    PlanClose({sequence->id, residency->rows, residency->reserved_rows, {}, {}}, kEnded, draft);
  } else {
    books_.Leave(residency->reserved_rows, residency->prefix.blocks);
  }
  Forget(residency);
  sequence->Remove(residency);
}

void Scheduler::LeftHome(Sequence* sequence) {
  for (std::optional<Residency>& place : sequence->residencies) {
    if (!place || place->leaving || place->role == Role::kHome) continue;
    Residency* residency = &*place;
    if (residency->role == Role::kIncoming) {
      residency->scheduler->Drop(residency);
      continue;
    }
    // What was computed since it went is computed again here: at most what no client has a token of, and one row.
    residency->scheduler->TakeBack(residency);
  }
  if (!sequence->resident()) journal_->Wait(sequence);
}

void Scheduler::TakeBack(Residency* residency) {
  residency->epoch = journal_->NextPlacement();
  residency->role = Role::kHome;
  --num_away_;
  const uint32_t from = residency->reserved_rows;
  const uint32_t to = std::max(from, residency->sequence->rows_wanted());
  while (!books_.CanReserve(from, to)) {
    if (DropOldest(nullptr)) continue;
    Drop(residency);  // others took the room meanwhile: it waits, as any that has to give way
    return;
  }
  books_.Reserve(from, to);
  residency->reserved_rows = to;
  Thaw(residency);
  MakePromises(residency);
}

absl::Status Scheduler::CheckStill(const Residency& residency) const {
  const Sequence& sequence = *residency.sequence;
  const uint32_t rows = residency.rows.next();
  bool sound = residency.scheduler == this && !residency.leaving && residency.rows.even() &&
               residency.ready_ticket == 0 && !prefilling_.contains(sequence.id) &&
               rows <= residency.reserved_rows;
  switch (residency.role) {
    case Role::kHome:
      sound = sound && (imports_due_.contains(sequence.id) == (residency.adopted_rows > 0)) &&
              (residency.adopted_rows > 0 ||
               rows <= sequence.rows_wanted() + residency.samples_pending);
      break;
    case Role::kIncoming:
      sound = sound && !residency.frozen && residency.results_pending == 0 &&
              residency.import_rows <= residency.reserved_rows &&
              imports_due_.contains(sequence.id) == (rows < residency.import_rows) &&
              sequence.home() != nullptr && sequence.home()->scheduler != this;
      break;
    case Role::kOutgoing:
      sound = sound && residency.frozen && residency.opened && residency.results_pending == 0 &&
              sequence.home() != nullptr && sequence.home()->scheduler != this;
      break;
  }
  if (sound) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("sequence ", sequence.id.value,
                                          ", which moves, is inconsistent with ", rows, " rows"));
}

}  // namespace strait
