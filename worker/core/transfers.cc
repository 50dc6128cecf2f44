// SPDX-License-Identifier: Apache-2.0
//
// How a WorkerCore has its stages' rows fetched from other workers, and served to them.
#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/status.h"
#include "proto/wire/epoch_wire.h"
#include "worker/core/messages.h"
#include "worker/core/worker_core.h"

namespace strait {

void WorkerCore::OnFetch(const v1::FetchRows& fetch, uint64_t now_us) {
  const uint64_t id = fetch.stage_id();
  Hosted* const hosted = Find(id);
  const absl::Status may_fetch = [&]() -> absl::Status {
    if (share_.transfer == nullptr) {
      return absl::FailedPreconditionError("this worker moves no rows");
    }
    if (hosted == nullptr || hosted->stage == nullptr) {
      return absl::NotFoundError(absl::StrCat("stage ", id, " is not loaded here"));
    }
    // In a handover its blocks are those of the stages before it, which may still need them.
    if (hosted->stage->epoch() == PipelineEpoch{} && !shares_.WaitsFor(id).empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("stage ", id, " follows others and is no landing"));
    }
    return absl::OkStatus();
  }();
  if (!may_fetch.ok()) {
    return ports_->Tell(FetchedMessage(id, FromWire(fetch.epoch()),
                                       {.id = SequenceId{fetch.sequence_id()},
                                        .placement = FromWire(fetch.placement()),
                                        .status = may_fetch}));
  }
  hosted->stage->FetchRows(fetch, now_us);
  AskRows(now_us);
}

void WorkerCore::OnServe(const v1::ServeRows& serve) {
  if (serve.stage_id() == 0) return replicas_.Serve(serve);
  Hosted* const hosted = Find(serve.stage_id());
  if (hosted != nullptr && hosted->stage != nullptr) hosted->stage->ServeRows(serve);
}

void WorkerCore::OnDropLanded(const v1::DropLanded& drop) {
  Hosted* const hosted = Find(drop.stage_id());
  if (hosted == nullptr || hosted->stage == nullptr) return;
  hosted->stage->DropLanded(SequenceId{drop.sequence_id()});
  Settle();
}

void WorkerCore::AskRows(uint64_t now_us) {
  if (share_.transfer == nullptr) return;
  for (const bool last : {true, false}) {
    // Stages take turns in being the first.
    auto it = hosted_.upper_bound(last_asked_);
    for (size_t i = 0; i < hosted_.size(); ++i, ++it) {
      if (it == hosted_.end()) it = hosted_.begin();
      if (i == 0 && !last) last_asked_ = it->first;
      if (it->second.stage != nullptr) it->second.stage->AskRows(last, now_us);
    }
  }
  replicas_.Ask(now_us);
}

void WorkerCore::OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) {
  const auto it = share_.asks.find(id);
  if (it == share_.asks.end()) return;  // nobody waits for it any more
  it->second->OnRows(id, std::move(frame), now_us);
  AskRows(now_us);
}

void WorkerCore::OnAsk(PeerAskId id, const RowsAsk& ask, uint64_t) {
  if (ask.stage_id == 0) return replicas_.OnAsk(id, ask);
  Hosted* const hosted = Find(ask.stage_id);
  if (hosted != nullptr && hosted->stage != nullptr) return hosted->stage->OnAsk(id, ask);
  share_.transfer->Answer(
      id, absl::NotFoundError(absl::StrCat("stage ", ask.stage_id, " is not loaded here")));
}

void WorkerCore::OnServed(PeerAskId id, const std::vector<BlockHeader>& pieces, uint64_t) {
  const auto it = share_.unconfirmed.find(id);
  if (it != share_.unconfirmed.end()) it->second->OnServed(id, pieces);
}

void WorkerCore::TellMoves(uint64_t stage_id, PipelineEpoch epoch, const HostMoves& moves,
                           const RowMoves& rows) {
  if (!moves.empty()) ports_->Tell(MovedMessage(stage_id, epoch, moves));
  for (const Importer::Fetched& fetched : rows.fetched) {
    if (!fetched.status.ok()) {
      ports_->Note(LogLevel::kWarning, "rows not fetched",
                   {{"stage", stage_id},
                    {"sequence", fetched.id.value},
                    {"why", rpc::Bounded(fetched.status)}});
    }
    ports_->Tell(FetchedMessage(stage_id, epoch, fetched));
  }
  for (const Exporter::Served& served : rows.served) {
    ports_->Tell(ServedMessage(stage_id, epoch, served));
  }
}

bool WorkerCore::MovesRows() const {
  return std::any_of(hosted_.begin(), hosted_.end(), [](const auto& entry) {
    const Stage* const stage = entry.second.stage.get();
    return stage != nullptr && stage->importer().num_copies() + stage->exporter().num_copies() > 0;
  });
}

void WorkerCore::Restore(uint64_t stage_id, Hosted& hosted, const v1::ActivateStage& activate,
                         uint64_t now_us) {
  // In a handover its blocks are those of the stages before it, which may still need them.
  const uint32_t most_blocks =
      shares_.WaitsFor(stage_id).empty() ? std::numeric_limits<uint32_t>::max() : 0;
  const uint64_t until_us = now_us + uint64_t{activate.restore_timeout_ms()} * 1'000;
  hosted.stage->Restore(activate.restores(), most_blocks, until_us, now_us);
  hosted.restoring = hosted.stage->restoring();
  if (hosted.restoring) AskRows(now_us);
}

void WorkerCore::TellRestored(Hosted& hosted) {
  if (!hosted.restoring || hosted.stage->restoring()) return;
  hosted.restoring = false;
  ports_->Note(LogLevel::kInfo, "rows restored",
               {{"stage", hosted.stage->stage_id()},
                {"sequences", hosted.stage->held().size()},
                {"blocks", hosted.stage->blocks_used()},
                {"fetched_bytes", hosted.stage->importer().restored_bytes()},
                {"shared_bytes", hosted.stage->importer().restored_shared_bytes()}});
  TellActive(hosted);
}

bool WorkerCore::CopiesRows() const {
  return replicas_.busy() || std::any_of(hosted_.begin(), hosted_.end(), [](const auto& entry) {
           return entry.second.stage != nullptr && entry.second.stage->CopiesRows();
         });
}

void WorkerCore::PollCopies(uint64_t now_us) {
  bool any = replicas_.busy();
  for (const ReplicaStore::Told& told : replicas_.Poll()) ports_->Tell(ReplicatedMessage(told));
  for (auto& [id, hosted] : hosted_) {
    if (hosted.stage == nullptr || !hosted.stage->CopiesRows()) continue;
    any = true;
    HostMoves moves;
    RowMoves rows;
    hosted.stage->PollCopies(now_us, &moves, &rows);
    TellMoves(id, hosted.stage->epoch(), moves, rows);
    TellRestored(hosted);
  }
  if (!any) return;
  AskRows(now_us);
  Settle();
}

absl::Status WorkerCore::CheckTransfers() const {
  STRAIT_RETURN_IF_ERROR(replicas_.CheckIntegrity());
  uint64_t asked = replicas_.asked_bytes();
  uint64_t made = 0;
  for (const auto& [id, hosted] : hosted_) {
    if (hosted.stage == nullptr) continue;
    asked += hosted.stage->importer().asked_bytes();
    made += hosted.stage->exporter().made_bytes();
  }
  if (asked == share_.asked_bytes && made == share_.made_bytes &&
      asked <= limits::kTransferBytesUnderWay && made <= limits::kTransferBytesUnderWay) {
    return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat("stages have asked for ", asked, " bytes and make ", made,
                                          ", counted ", share_.asked_bytes, " and ",
                                          share_.made_bytes));
}

}  // namespace strait
