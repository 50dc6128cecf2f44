// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/importer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/model/content_key.h"
#include "proto/wire/epoch_wire.h"

namespace strait {

Importer::~Importer() {
  STRAIT_CHECK(writing_.empty(), "copies into a cache that ends");
  Clear();
}

// ---------------------------------------------------------------- what plans say

void Importer::Take(SequenceId id, PlacementEpoch placement, uint32_t rows,
                    std::vector<TokenId> begins_with) {
  std::shared_ptr<Import>& import = imports_[{id, placement}];
  if (import == nullptr) {
    import = std::make_shared<Import>();
    import->rows_wanted = import->rows_fetched = static_cast<uint32_t>(begins_with.size());
    import->tell = !begins_with.empty();
    import->tokens = std::move(begins_with);
  }
  import->key = {id, placement};
  if (const uint64_t begun = steps_().begun; rows > import->rows_taken && begun > 0) {
    const uint32_t num_blocks =
        (import->rows_taken + limits::kBlockTokens - 1) / limits::kBlockTokens;
    import->used_by_steps.emplace_back(num_blocks * limits::kBlockTokens, begun);
  }
  import->rows_taken = rows;
}

CopyAfter Importer::AfterSteps(Import* import, uint32_t end) const {
  const uint64_t finished = steps_().finished;
  auto& used = import->used_by_steps;
  while (!used.empty() && used.front().second <= finished) used.pop_front();
  return used.empty() || end <= used.front().first ? CopyAfter::kFinishedSteps
                                                   : CopyAfter::kBegunSteps;
}

bool Importer::IsFetched(SequenceId id, PlacementEpoch placement, uint32_t rows) const {
  const auto it = imports_.find({id, placement});
  return it != imports_.end() && it->second->status.ok() && it->second->rows_taken >= rows &&
         it->second->rows_wanted == rows && it->second->rows_fetched == rows;
}

std::vector<TokenId> Importer::Open(SequenceId id) {
  for (auto& [key, import] : imports_) {
    if (key.first != id || import->rows_taken == 0) continue;
    STRAIT_CHECK(import->num_under_way == 0, "an import is opened while its rows come");
    std::vector<TokenId> tokens = std::move(import->tokens);
    imports_.erase(key);
    return tokens;
  }
  STRAIT_CHECK(false, "it is not imported");
  return {};
}

absl::Span<const TokenId> Importer::TokensHere(SequenceId id, PlacementEpoch placement) const {
  const auto it = imports_.find({id, placement});
  if (it == imports_.end()) return {};
  return absl::MakeConstSpan(it->second->tokens).first(it->second->rows_fetched);
}

void Importer::Close(SequenceId id) {
  for (const auto& [key, import] : imports_) {
    // One that no plan has taken blocks for is of a plan that comes.
    if (key.first != id || import->rows_taken == 0) continue;
    import->is_closed = true;
    DropAsked(*import);
    imports_.erase(key);
    return;
  }
}

// ---------------------------------------------------------------- what the coordinator asks for

absl::Status Importer::TakeKeys(const v1::FetchRows& fetch, Fetching* fetching) const {
  STRAIT_ASSIGN_OR_RETURN(fetching->keys, ParseContentKeys(fetch.keys()));
  if (fetching->keys.empty()) return absl::OkStatus();
  const uint64_t num_rows = fetch.end_row() - fetch.begin_row();
  if (fetch.begin_row() % limits::kBlockTokens == 0 &&
      fetching->keys.size() * limits::kBlockTokens == num_rows) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(fetching->keys.size(), " keys of rows ",
                                                 fetch.begin_row(), " to ", fetch.end_row(),
                                                 ": a key is of a whole block"));
}

absl::Status Importer::TakeSources(const v1::FetchRows& fetch, Fetching* fetching) const {
  LayerIndex next = traits_.layers.begin;
  for (const v1::RowsSource& wire : fetch.sources()) {
    if (wire.layer_begin() != next || wire.layer_end() <= next ||
        wire.layer_end() > traits_.layers.end || wire.data_address().empty() ||
        wire.secret() == 0 || (wire.stage_id() == 0 && fetching->keys.empty())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a source of layers ", wire.layer_begin(), " to ", wire.layer_end(), " at \"",
          wire.data_address(), "\", layer ", next, " of ", traits_.layers.end,
          " is next, each has an address and a secret, and replicas are asked for by keys"));
    }
    next = wire.layer_end();
    fetching->sources.push_back({.layers = {wire.layer_begin(), wire.layer_end()},
                                 .stage_id = wire.stage_id(),
                                 .epoch = FromWire(wire.epoch()),
                                 .address = wire.data_address(),
                                 .secret = wire.secret()});
  }
  if (next == traits_.layers.end) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("its sources end before layer ", next));
}

absl::StatusOr<Importer::FetchingPtr> Importer::MakeFetching(const v1::FetchRows& fetch,
                                                             uint32_t most_rows,
                                                             uint32_t vocab_size) const {
  if (most_rows == 0) {
    return absl::InvalidArgumentError("no plan that came before imports it for this placement");
  }
  const auto it = imports_.find({SequenceId{fetch.sequence_id()}, FromWire(fetch.placement())});
  const uint32_t begin = it == imports_.end() ? 0 : it->second->rows_wanted;
  if (fetch.begin_row() != begin || fetch.end_row() <= begin || fetch.end_row() > most_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows ", fetch.begin_row(), " to ", fetch.end_row(), ": row ", begin,
                     " is next, and plans have blocks for ", most_rows));
  }
  if (static_cast<uint32_t>(fetch.tokens().ids_size()) != fetch.end_row() - begin) {
    return absl::InvalidArgumentError(
        absl::StrCat(fetch.tokens().ids_size(), " tokens of ", fetch.end_row() - begin, " rows"));
  }
  for (const uint32_t token : fetch.tokens().ids()) {
    if (token < vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("token id ", token, ", the vocabulary has ", vocab_size));
  }
  auto fetching = std::make_shared<Fetching>();
  STRAIT_RETURN_IF_ERROR(TakeKeys(fetch, fetching.get()));
  STRAIT_RETURN_IF_ERROR(TakeSources(fetch, fetching.get()));
  fetching->begin_row = begin;
  fetching->end_row = fetch.end_row();
  fetching->bytes_per_s = fetch.bytes_per_s();
  fetching->any_numerics = fetch.any_numerics();
  for (size_t source = 0; source < fetching->sources.size(); ++source) {
    const LayerRows all = {fetching->sources[source].layers, begin, fetch.end_row() - begin};
    for (const LayerRows& range :
         fetching->keys.empty()
             ? CutRange(traits_, all, share_->frame_bytes)
             : CutBlocks(traits_, all, std::min(share_->frame_bytes, kReplicaFrameBytes))) {
      fetching->to_ask.push_back(
          {.source = source, .range = range, .bytes = BytesOf(traits_, range)});
    }
  }
  if (!fetching->keys.empty()) {
    std::stable_sort(fetching->to_ask.begin(), fetching->to_ask.end(),
                     [](const Cut& a, const Cut& b) { return a.range.first < b.range.first; });
  }
  fetching->num_open = fetching->to_ask.size();
  return fetching;
}

void Importer::Fetch(const v1::FetchRows& fetch, uint32_t most_rows, uint32_t vocab_size,
                     uint64_t now_us) {
  const Key key = {SequenceId{fetch.sequence_id()}, FromWire(fetch.placement())};
  absl::StatusOr<FetchingPtr> made = MakeFetching(fetch, most_rows, vocab_size);
  const auto it = imports_.find(key);
  if (!made.ok() && it == imports_.end()) {
    refused_.push_back({.id = key.first, .placement = key.second, .status = made.status()});
    return;
  }
  std::shared_ptr<Import>& import = imports_[key];
  if (import == nullptr) import = std::make_shared<Import>();
  import->key = key;
  if (!import->status.ok()) {
    import->tell = true;
    return;
  }
  if (!made.ok()) return Fail(import.get(), made.status());
  if (import->rows_wanted == 0) import->told_us = now_us;
  import->is_last = import->is_last || fetch.is_last();
  import->rows_wanted = fetch.end_row();
  import->tokens.insert(import->tokens.end(), fetch.tokens().ids().begin(),
                        fetch.tokens().ids().end());
  (*made)->import = import;
  fetches_.push_back(*std::move(made));
}

void Importer::RefuseFetch(const v1::FetchRows& fetch, absl::Status why) {
  const Key key = {SequenceId{fetch.sequence_id()}, FromWire(fetch.placement())};
  if (const auto it = imports_.find(key); it != imports_.end()) {
    return Fail(it->second.get(), std::move(why));
  }
  refused_.push_back({.id = key.first, .placement = key.second, .status = std::move(why)});
}

void Importer::EndFetches() {
  for (const auto& [key, import] : imports_) {
    if (import->rows_wanted == import->rows_fetched && import->status.ok()) continue;
    STRAIT_CHECK(!import->is_restore, "what a stage begins with ends first");
    Fail(import.get(), absl::UnavailableError("the coordinator that asked for it is gone"));
    import->tell = false;
  }
  refused_.clear();
}

void Importer::Clear() {
  for (const auto& [key, import] : imports_) {
    import->is_closed = true;
    DropAsked(*import);
  }
  imports_.clear();
  peers_.clear();
  refused_.clear();
}

void Importer::DropAsked(const Import& import) {
  fetches_.remove_if([&](const FetchingPtr& f) { return f->import.get() == &import; });
  for (auto it = asked_.begin(); it != asked_.end();) {
    if (it->second.fetching->import.get() != &import) {
      ++it;
      continue;
    }
    share_->transfer->Forget(it->first);
    share_->asks.erase(it->first);
    Release(it->second.cut);
    it = asked_.erase(it);
  }
  const auto gone = std::stable_partition(arrived_.begin(), arrived_.end(), [&](const auto& a) {
    return a->fetching->import.get() != &import;
  });
  for (auto it = gone; it != arrived_.end(); ++it) Release((*it)->cut);
  arrived_.erase(gone, arrived_.end());
}

void Importer::Fail(Import* import, absl::Status why) {
  if (!import->status.ok() || import->is_closed) return;
  import->status = std::move(why);
  import->tell = true;
  DropAsked(*import);
  import->num_under_way = 0;
}

// ---------------------------------------------------------------- what comes

void Importer::AskAgain(UnderWay under_way, uint64_t pause_us, uint64_t now_us) {
  Release(under_way.cut);
  Import* const import = under_way.fetching->import.get();
  Count(import, -1, now_us);
  if (under_way.cut.range.first >= under_way.fetching->useless_row) {
    --under_way.fetching->num_open;
    return EndDone(import);
  }
  under_way.cut.not_before_us = now_us + pause_us;
  under_way.fetching->to_ask.push_front(under_way.cut);
}

void Importer::Refuse(UnderWay under_way, absl::Status why, uint64_t now_us) {
  ++under_way.fetching->import->refused_frames;
  if (++under_way.cut.refusals < kMaxRefusals) return AskAgain(std::move(under_way), 0, now_us);
  GiveUp(std::move(under_way), std::move(why), now_us);
}

void Importer::OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) {
  const auto it = asked_.find(id);
  if (it == asked_.end()) return;
  UnderWay under_way = std::move(it->second);
  asked_.erase(it);
  share_->asks.erase(id);
  Import* const import = under_way.fetching->import.get();
  Peer& peer = peers_[under_way.fetching->sources[under_way.cut.source].address];
  switch (frame.status().code()) {
    case absl::StatusCode::kOk:
      break;
    case absl::StatusCode::kUnavailable:
      // All that was asked of a peer fails with its connection: that is one failure.
      if (now_us >= peer.not_before_us) {
        peer.pause_us = std::clamp(peer.pause_us * 2, kFirstPauseUs, kMaxPauseUs);
        peer.not_before_us = now_us + peer.pause_us;
        peer.frame_bytes = std::max(peer.frame_bytes / 2, kLeastFrameBytes);
        peer.num_frames = 0;
      }
      return AskAgain(std::move(under_way), 0, now_us);
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kOutOfRange:
      return AskAgain(std::move(under_way), kAskAgainUs, now_us);
    case absl::StatusCode::kNotFound:
      if (!import->is_restore) return AskAgain(std::move(under_way), kAskAgainUs, now_us);
      return Miss(std::move(under_way), frame.status(), now_us);
    case absl::StatusCode::kPermissionDenied:
      if (!import->is_restore) return GiveUp(std::move(under_way), frame.status(), now_us);
      return Miss(std::move(under_way), frame.status(), now_us);
    case absl::StatusCode::kDataLoss:
      return Refuse(std::move(under_way), frame.status(), now_us);
    default:
      return GiveUp(std::move(under_way), frame.status(), now_us);
  }
  peer.pause_us = peer.not_before_us = 0;
  if (++peer.num_frames >= kFramesBeforeLarger) {
    peer.frame_bytes = std::min<uint64_t>(peer.frame_bytes * 2, limits::kTransferFrameBytes);
    peer.num_frames = 0;
  }
  if (const absl::Status checked = CheckFrame(traits_, AskOf(*under_way.fetching, under_way.cut),
                                              under_way.fetching->any_numerics, *frame);
      !checked.ok()) {
    return Refuse(std::move(under_way), checked, now_us);
  }
  under_way.frame = *std::move(frame);
  auto arrived = std::make_unique<UnderWay>(std::move(under_way));
  if (import->is_last) {
    arrived_.push_front(std::move(arrived));
  } else {
    arrived_.push_back(std::move(arrived));
  }
  BeginWrites(now_us);
}

void Importer::BeginWrites(uint64_t now_us) {
  while (!arrived_.empty() && writing_.size() < kMaxImportCopies && !share_->holds_copies) {
    std::unique_ptr<UnderWay>& next = arrived_.front();
    Import* const import = next->fetching->import.get();
    const auto tables = cache_->PageTables(import->key.first);
    std::vector<BlockRows> list;
    list.reserve(next->frame.pieces.size());
    next->blocks.clear();
    uint32_t end = 0;
    for (const BlockHeader& piece : next->frame.pieces) {
      const uint32_t layer = piece.layer - traits_.layers.begin;
      const BlockId block =
          tables[layer].at((piece.first_position - import->first_row) / limits::kBlockTokens);
      list.push_back({layer, block, piece.first_position % limits::kBlockTokens, piece.num_rows});
      next->blocks.push_back(block);
      end = std::max(end, piece.first_position + piece.num_rows);
    }
    const absl::StatusOr<CopyId> copy =
        copies_->Write(list, {std::as_const(next->frame).bytes(), next->frame.on_device()},
                       AfterSteps(import, end));
    if (absl::IsResourceExhausted(copy.status())) return;
    std::unique_ptr<UnderWay> begun = std::move(next);
    arrived_.pop_front();
    if (!copy.ok()) {
      GiveUp(std::move(*begun), copy.status(), now_us);
      continue;
    }
    cache_->BeginCopy(begun->blocks);
    writing_.emplace(*copy, std::move(begun));
  }
}

void Importer::OnCopies(absl::Span<const CopyEnd> ends, uint64_t now_us) {
  for (const CopyEnd& end : ends) {
    const auto it = writing_.find(end.id);
    if (it == writing_.end()) continue;
    const std::unique_ptr<UnderWay> written = std::move(it->second);
    writing_.erase(it);
    cache_->EndCopy(written->blocks);
    share_->transfer->GiveRows(std::move(written->frame.rows));
    Import* const import = written->fetching->import.get();
    if (import->is_closed || !import->status.ok()) {
      Release(written->cut);
    } else if (!end.status.ok()) {
      GiveUp(std::move(*written), end.status, now_us);
    } else {
      Finish(std::move(*written), now_us);
    }
  }
}

void Importer::Finish(UnderWay written, uint64_t now_us) {
  Import& import = *written.fetching->import;
  Release(written.cut);
  Count(&import, -1, now_us);
  for (const BlockHeader& piece : written.frame.pieces) {
    import.digest.Add(piece);
    if (!import.is_restore) continue;
    ++import.layers_here[(piece.first_position - import.first_row) / limits::kBlockTokens];
  }
  import.bytes += written.cut.bytes;
  if (written.frame.on_device()) {
    import.nccl_bytes += written.cut.bytes;
  } else if (written.frame.lent.any()) {
    import.shared_bytes += written.cut.bytes;
  }
  --written.fetching->num_open;
  EndDone(&import);
}

void Importer::EndDone(Import* import) {
  // A later fetch may be done before an earlier one.
  for (auto it = fetches_.begin(); it != fetches_.end();) {
    if ((*it)->import.get() != import) {
      ++it;
      continue;
    }
    if ((*it)->num_open > 0) return;
    import->rows_fetched = (*it)->end_row;
    import->tell = !import->is_restore;
    it = fetches_.erase(it);
  }
}

std::vector<Importer::Fetched> Importer::Poll(uint64_t now_us) {
  BeginWrites(now_us);
  std::vector<Fetched> told = std::exchange(refused_, {});
  for (const auto& [key, import] : imports_) {
    if (import->is_restore) continue;
    const bool is_due =
        import->bytes != import->told_bytes && now_us >= import->told_us + kTellFetchedUs;
    if (!import->tell && !is_due) continue;
    Count(import.get(), 0, now_us);
    import->tell = false;
    import->told_us = now_us;
    import->told_bytes = import->bytes;
    told.push_back({.id = key.first,
                    .placement = key.second,
                    .rows = import->rows_fetched,
                    .digest = import->digest.Value(),
                    .bytes = import->bytes,
                    .shared_bytes = import->shared_bytes,
                    .nccl_bytes = import->nccl_bytes,
                    .us = import->us,
                    .refused_frames = import->refused_frames,
                    .status = import->status});
  }
  return told;
}

bool Importer::busy() const {
  if (!fetches_.empty() || !writing_.empty() || !refused_.empty()) return true;
  return std::any_of(imports_.begin(), imports_.end(),
                     [](const auto& entry) { return entry.second->tell; });
}

}  // namespace strait
