// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/exporter.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "worker/transport/nccl_api.h"

namespace strait {

Exporter::~Exporter() {
  STRAIT_CHECK(reading_.empty(), "copies from a cache that ends");
  Clear();
}

void Exporter::Serve(const v1::ServeRows& serve) {
  const Key key = KeyOf(SequenceId{serve.sequence_id()},
                        {serve.placement().term(), serve.placement().counter()});
  if (serve.end()) {
    if (const auto it = services_.find(key); it != services_.end()) End(it);
    return;
  }
  const bool of_prefixes = key.first == SequenceId{};
  if (serve.secret() == 0 || (!of_prefixes && !finished_(key.first))) return;
  Service& service = services_[key];
  service.secret = serve.secret();
  if (service.served_rows != serve.served_rows()) service.is_told = false;
  service.served_rows = of_prefixes ? 0 : serve.served_rows();
  tell_ = tell_ || IsServed(service);
}

bool Exporter::IsServed(const Service& service) const {
  return service.served_rows > 0 && !service.is_told &&
         service.digest.num_rows() >= uint64_t{service.served_rows} * traits_.layers.size();
}

void Exporter::Close(SequenceId id) {
  for (auto it = services_.lower_bound({id, {}}); it != services_.end() && it->first.first == id;
       it = services_.lower_bound({id, {}})) {
    End(it);
  }
  Abort(id, "the sequence left while it was read");
}

void Exporter::End(std::map<Key, Service>::iterator service) {
  // A peer that is gone confirms nothing.
  for (auto it = unconfirmed_.begin(); it != unconfirmed_.end();) {
    if (it->second != service->first) {
      ++it;
      continue;
    }
    share_->unconfirmed.erase(it->first);
    it = unconfirmed_.erase(it);
  }
  services_.erase(service);
}

void Exporter::Clear() {
  services_.clear();
  Abort(std::nullopt, "the epoch ended while it was read");
  for (const auto& [id, key] : unconfirmed_) share_->unconfirmed.erase(id);
  unconfirmed_.clear();
  tell_ = false;
}

void Exporter::Abort(std::optional<SequenceId> id, const char* why) {
  const auto is_meant = [&](const Making& making) { return !id || making.ask.sequence == *id; };
  for (std::unique_ptr<Making>& making : waiting_) {
    if (is_meant(*making)) Answer(making.get(), absl::AbortedError(why));
  }
  std::erase_if(waiting_, [](const auto& making) { return making->is_answered; });
  for (const auto& [copy, making] : reading_) {
    if (is_meant(*making) && !making->is_answered) {
      Answer(making.get(), absl::AbortedError(why));
    }
  }
}

// ---------------------------------------------------------------- asks

absl::Status Exporter::CheckKeys(const RowsAsk& ask) const {
  if (ask.keys.empty()) {
    return absl::InvalidArgumentError("prefix blocks are asked for by their keys");
  }
  for (const ContentKey& key : ask.keys) {
    if (has_prefix_(key)) continue;
    return absl::NotFoundError(
        absl::StrCat("block ", absl::Hex(key.low), " is no prefix block here"));
  }
  return absl::OkStatus();
}

absl::Status Exporter::Check(const RowsAsk& ask) const {
  const auto service = services_.find(KeyOf(ask));
  const bool of_prefixes = ask.sequence == SequenceId{};
  const std::optional<uint32_t> finished = finished_(ask.sequence);
  if (service == services_.end() || (!of_prefixes && !finished)) {
    return absl::NotFoundError(absl::StrCat("nothing is served of sequence ", ask.sequence.value,
                                            " to placement ", ToString(ask.placement)));
  }
  // One comparison of words: its time tells nothing.
  if ((service->second.secret ^ ask.secret) != 0) {
    return absl::PermissionDeniedError("not the secret that the coordinator gave");
  }
  STRAIT_RETURN_IF_ERROR(CheckAsk(traits_, ask));
  if (of_prefixes) return CheckKeys(ask);
  if (!ask.keys.empty()) {
    return absl::InvalidArgumentError("rows of a sequence are asked for without keys");
  }
  const uint64_t end = uint64_t{ask.first_row} + ask.num_rows;
  if (end <= *finished) return absl::OkStatus();
  return absl::OutOfRangeError(
      absl::StrCat("rows to ", end, ", of which ", *finished, " are finished here"));
}

bool Exporter::StandsStill(const RowsAsk& ask) const {
  const auto service = services_.find(KeyOf(ask));
  return service != services_.end() && service->second.served_rows > 0;
}

void Exporter::OnAsk(PeerAskId id, const RowsAsk& ask) {
  if (absl::Status checked = Check(ask); !checked.ok()) {
    return share_->transfer->Answer(id, std::move(checked));
  }
  const uint64_t bytes = BytesOf(traits_, RangeOf(ask));
  // As who asks does: what is read of sequences that stand still finds room.
  const bool is_last = StandsStill(ask);
  if (share_->made_bytes + bytes > (is_last ? limits::kTransferBytesUnderWay : kBulkBytesMade) ||
      share_->num_made >= (is_last ? kMaxFramesMade : kMaxFramesMade / 2)) {
    return share_->transfer->Answer(id, absl::ResourceExhaustedError(absl::StrCat(
                                            share_->num_made, " frames of ", share_->made_bytes,
                                            " bytes are being made: ask again")));
  }
  share_->made_bytes += bytes;
  made_bytes_ += bytes;
  ++share_->num_made;
  auto making = std::make_unique<Making>();
  making->id = id;
  making->ask = ask;
  making->bytes = bytes;
  const auto behind = is_last ? std::find_if(waiting_.begin(), waiting_.end(),
                                             [&](const auto& m) { return !StandsStill(m->ask); })
                              : waiting_.end();
  waiting_.insert(behind, std::move(making));
  BeginReads();
}

void Exporter::BeginReads() {
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (reading_.size() >= kMaxExportCopies || share_->holds_copies) return;
    const Begun begun = BeginRead(&*it);
    if (begun == Begun::kNoCopy) return;
    it = begun == Begun::kGone ? waiting_.erase(it) : std::next(it);
  }
}

Exporter::Begun Exporter::BeginRead(std::unique_ptr<Making>* next) {
  Making* const making = next->get();
  const RowsAsk& ask = making->ask;
  if (absl::Status checked = Check(ask); !checked.ok()) {
    Answer(making, std::move(checked));
    return Begun::kGone;
  }
  // It has memory if there was no room for its copy before.
  if (making->frame.bytes().empty() &&
      !share_->transfer->TakeRows(making->id, making->bytes,
                                  traits_.shape.row_bytes() > kShortPieceBytes, &making->frame)) {
    return Begun::kNoMemory;
  }
  absl::Span<const absl::Span<const BlockId>> tables;
  if (ask.keys.empty()) tables = cache_->PageTables(ask.sequence);
  std::vector<BlockRows> list;
  RowsFrame& frame = making->frame;
  frame.sequence = ask.sequence;
  frame.placement = ask.placement;
  frame.pieces.clear();
  making->blocks.clear();
  const auto add = [&](LayerIndex layer, uint32_t first, uint32_t count) {
    const uint32_t index = layer - traits_.layers.begin;
    BlockHeader header = PieceHeader(traits_, layer, first, count);
    BlockId block = 0;
    if (ask.keys.empty()) {
      block = tables[index].at(first / limits::kBlockTokens);
    } else {
      header.content_key = ask.keys[(first - ask.first_row) / limits::kBlockTokens];
      block = cache_->PrefixBlocks(header.content_key)[index];
    }
    list.push_back({index, block, first % limits::kBlockTokens, count});
    making->blocks.push_back(block);
    frame.pieces.push_back(header);
  };
  ForPieces(RangeOf(ask), add);
  // Rows of finished steps, which no step writes again; of prefix blocks nobody knows.
  const CopyAfter after = ask.keys.empty() ? CopyAfter::kFinishedSteps : CopyAfter::kBegunSteps;
  const absl::StatusOr<CopyId> copy =
      copies_->Read(list, {frame.bytes(), frame.on_device()}, after);
  if (absl::IsResourceExhausted(copy.status())) return Begun::kNoCopy;
  if (!copy.ok()) {
    Answer(making, copy.status());
    return Begun::kGone;
  }
  // No step that is begun from now on may write these blocks, whoever would have them.
  cache_->BeginCopy(making->blocks);
  reading_.emplace(*copy, std::move(*next));
  return Begun::kGone;
}

void Exporter::Release(const Making& making) {
  share_->made_bytes -= making.bytes;
  made_bytes_ -= making.bytes;
  --share_->num_made;
}

void Exporter::Answer(Making* making, absl::Status why) {
  making->is_answered = true;
  Release(*making);
  share_->transfer->Answer(making->id, std::move(why));
}

void Exporter::OnCopies(absl::Span<const CopyEnd> ends) {
  for (const CopyEnd& end : ends) {
    const auto it = reading_.find(end.id);
    if (it == reading_.end()) continue;
    const std::unique_ptr<Making> making = std::move(it->second);
    reading_.erase(it);
    cache_->EndCopy(making->blocks);
    if (making->is_answered) {
      share_->transfer->GiveRows(std::move(making->frame.rows));
      continue;
    }
    const Key key = KeyOf(making->ask);
    if (!end.status.ok()) {
      Answer(making.get(), end.status);
    } else if (!services_.contains(key)) {
      Answer(making.get(), absl::AbortedError("it is served no more"));
    } else {
      Release(*making);
      if (key.first != SequenceId{}) {
        unconfirmed_.emplace(making->id, key);
        share_->unconfirmed.emplace(making->id, this);
      }
      share_->transfer->Answer(making->id, std::move(making->frame));
    }
  }
}

void Exporter::OnServed(PeerAskId id, absl::Span<const BlockHeader> pieces) {
  const auto it = unconfirmed_.find(id);
  if (it == unconfirmed_.end()) return;
  const Key key = it->second;
  unconfirmed_.erase(it);
  share_->unconfirmed.erase(id);
  const auto service = services_.find(key);
  if (service == services_.end()) return;
  for (const BlockHeader& piece : pieces) service->second.digest.Add(piece);
  tell_ = tell_ || IsServed(service->second);
}

std::vector<Exporter::Served> Exporter::Poll() {
  BeginReads();
  std::vector<Served> told;
  if (!std::exchange(tell_, false)) return told;
  for (auto& [key, service] : services_) {
    if (!IsServed(service)) continue;
    service.is_told = true;
    told.push_back({key.first, key.second, service.served_rows, service.digest.Value()});
  }
  return told;
}

}  // namespace strait
