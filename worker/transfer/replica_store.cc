// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/replica_store.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/wire/block_codec.h"
#include "proto/wire/epoch_wire.h"
#include "worker/transfer/importer.h"

namespace strait {
namespace {

// Source rows may be of any numerics: their header says which, and who asks for them looks.
constexpr bool kAnyNumerics = true;

}  // namespace

ReplicaStore::ReplicaStore(const RowTraits& traits, uint64_t limit_bytes, TransferShare* share)
    : traits_(traits),
      block_bytes_(uint64_t{limits::kBlockTokens} * traits.shape.row_bytes()),
      most_blocks_(block_bytes_ == 0 ? 0 : limit_bytes / block_bytes_),
      share_(share) {}

// ---------------------------------------------------------------- what the coordinator says

void ReplicaStore::Replicate(const v1::Replicate& replicate, uint64_t now_us) {
  bytes_per_s_ = replicate.bytes_per_s();
  if (const auto forget = ParseContentKeys(replicate.forget()); forget.ok()) {
    Forget(*forget, {replicate.layer_begin(), replicate.layer_end()});
  }
  const auto keys = ParseContentKeys(replicate.keys());
  if (!keys.ok() || !replicate.has_source()) return;
  const v1::RowsSource& wire = replicate.source();
  const LayerRange layers = {wire.layer_begin(), wire.layer_end()};
  const bool is_well = layers.begin < layers.end && layers.end <= traits_.layers.end &&
                       wire.stage_id() != 0 && wire.secret() != 0 && !wire.data_address().empty() &&
                       share_->transfer != nullptr;
  std::vector<WantedPtr> wanted;
  for (const ContentKey& key : *keys) {
    if (!is_well) {
      ToldOf(wire.stage_id()).failed.push_back(key);
      tell_ = true;
    } else if (WantedPtr one = Want(wire.stage_id(), key, layers)) {
      wanted.push_back(std::move(one));
    }
  }
  CutUp(std::make_shared<const Source>(Source{.stage_id = wire.stage_id(),
                                              .epoch = FromWire(wire.epoch()),
                                              .address = wire.data_address(),
                                              .secret = wire.secret()}),
        layers, wanted);
  Ask(now_us);
}

void ReplicaStore::MakeRoom(uint64_t num_blocks) {
  while (!unnamed_.empty() && blocks_.size() + num_reserved_ + num_blocks > most_blocks_) {
    Drop(blocks_.find(*unnamed_.begin()));
  }
}

ReplicaStore::WantedPtr ReplicaStore::Want(uint64_t stage_id, const ContentKey& key,
                                           LayerRange layers) {
  uint64_t num_missing = 0;
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
    num_missing += !has(key, layer);
    unnamed_.erase({key, layer});
  }
  if (num_missing == 0) {
    ToldOf(stage_id).keys.push_back(key);
    tell_ = true;
    return nullptr;
  }
  MakeRoom(num_missing);
  if (blocks_.size() + num_reserved_ + num_missing > most_blocks_ ||
      wanted_.size() >= kMaxReplicaKeys) {
    ToldOf(stage_id).failed.push_back(key);
    tell_ = true;
    return nullptr;
  }
  auto wanted = std::make_shared<Wanted>();
  wanted->stage_id = stage_id;
  wanted->key = key;
  wanted->layers = layers;
  wanted->num_reserved = num_missing;
  num_reserved_ += num_missing;
  wanted_.emplace(key, wanted);
  return wanted;
}

void ReplicaStore::CutUp(std::shared_ptr<const Source> source, LayerRange layers,
                         absl::Span<const WantedPtr> wanted) {
  if (wanted.empty()) return;
  const auto count = static_cast<uint32_t>(wanted.size()) * limits::kBlockTokens;
  const uint64_t frame_bytes = std::min(share_->frame_bytes, kReplicaFrameBytes);
  for (const LayerRows& range : CutBlocks(traits_, {layers, 0, count}, frame_bytes)) {
    const absl::Span<const WantedPtr> keys =
        wanted.subspan(range.first / limits::kBlockTokens, range.count / limits::kBlockTokens);
    for (const WantedPtr& key : keys) ++key->num_open;
    to_ask_.push_back({.source = source,
                       .layers = range.layers,
                       .blocks = {keys.begin(), keys.end()},
                       .bytes = BytesOf(traits_, range)});
  }
}

void ReplicaStore::Forget(absl::Span<const ContentKey> keys, LayerRange layers) {
  for (const ContentKey& key : keys) {
    // One that is on its way would stay.
    std::vector<WantedPtr> coming;
    const auto [first, last] = wanted_.equal_range(key);
    for (auto it = first; it != last; ++it) {
      const LayerRange theirs = it->second->layers;
      if (theirs.begin < layers.end && layers.begin < theirs.end) coming.push_back(it->second);
    }
    for (const WantedPtr& wanted : coming) End(wanted.get(), false);
    auto it = blocks_.lower_bound({key, layers.begin});
    while (it != blocks_.end() && it->first.first == key && it->first.second < layers.end) {
      Drop(it++);
    }
  }
}

void ReplicaStore::Drop(std::map<std::pair<ContentKey, LayerIndex>, Block>::iterator block) {
  free_.push_back(block->second.data);
  unnamed_.erase(block->first);
  blocks_.erase(block);
}

void ReplicaStore::Serve(const v1::ServeRows& serve) {
  if (serve.secret() == 0) return;
  std::erase(secrets_, serve.secret());
  if (serve.end()) return;
  if (secrets_.size() >= kMaxReplicaSecrets) secrets_.pop_front();
  secrets_.push_back(serve.secret());
}

void ReplicaStore::EndTransfers() {
  for (const auto& [id, cut] : asked_) {
    share_->transfer->Forget(id);
    share_->asks.erase(id);
    share_->asked_bytes -= cut.bytes;
  }
  asked_.clear();
  asked_bytes_ = 0;
  to_ask_.clear();
  while (!wanted_.empty()) End(wanted_.begin()->second.get(), false);
  told_.clear();
  tell_ = false;
  secrets_.clear();
  for (const auto& [at, block] : blocks_) unnamed_.insert(unnamed_.end(), at);
}

void ReplicaStore::Clear() {
  EndTransfers();
  unnamed_.clear();
  blocks_.clear();
  free_.clear();
  memory_.clear();
  num_slots_ = 0;
}

// ---------------------------------------------------------------- what is fetched

bool ReplicaStore::MayAsk(const Cut& cut, uint64_t now_us) {
  if (now_us < cut.not_before_us) return false;
  if (bytes_per_s_ == 0) return true;
  // A tenth of a second's worth at most is saved up.
  const uint64_t idle_us = std::min<uint64_t>(now_us - refilled_us_, 100'000);
  const auto rate = static_cast<double>(bytes_per_s_);
  const auto refill = static_cast<int64_t>(rate * static_cast<double>(idle_us) / 1e6);
  if (refill > 0) {
    allowance_ = std::min(allowance_ + refill, static_cast<int64_t>(rate / 10));
    refilled_us_ = now_us;
  }
  return allowance_ >= 0;
}

RowsAsk ReplicaStore::AskOf(const Cut& cut) const {
  RowsAsk ask = {.stage_id = cut.source->stage_id,
                 .epoch = cut.source->epoch,
                 .sequence = {},
                 .placement = {},
                 .secret = cut.source->secret,
                 .layers = cut.layers,
                 .first_row = 0,
                 .num_rows = static_cast<uint32_t>(cut.blocks.size()) * limits::kBlockTokens,
                 .keys = {},
                 .bytes = cut.bytes};
  for (const WantedPtr& wanted : cut.blocks) ask.keys.push_back(wanted->key);
  return ask;
}

void ReplicaStore::Ask(uint64_t now_us) {
  for (auto it = to_ask_.begin(); it != to_ask_.end();) {
    const bool is_wanted = std::any_of(it->blocks.begin(), it->blocks.end(),
                                       [](const WantedPtr& wanted) { return !wanted->is_ended; });
    if (!is_wanted) {
      it = to_ask_.erase(it);
      continue;
    }
    if (asked_.size() >= kMaxReplicaAsks || share_->asks.size() >= kBulkAsksUnderWay ||
        share_->asked_bytes + it->bytes > kReplicaBytesUnderWay) {
      return;
    }
    if (!MayAsk(*it, now_us)) {
      ++it;
      continue;
    }
    Cut cut = std::move(*it);
    it = to_ask_.erase(it);
    const AskId id{++share_->last_ask.value};
    share_->asks.emplace(id, this);
    share_->asked_bytes += cut.bytes;
    asked_bytes_ += cut.bytes;
    if (bytes_per_s_ > 0) allowance_ -= static_cast<int64_t>(cut.bytes);
    const RowsAsk ask = AskOf(cut);
    const std::string address = cut.source->address;
    asked_.emplace(id, std::move(cut));
    share_->transfer->Ask(id, address, ask);
  }
}

void ReplicaStore::OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) {
  const auto it = asked_.find(id);
  if (it == asked_.end()) return;
  Cut cut = std::move(it->second);
  asked_.erase(it);
  share_->asks.erase(id);
  share_->asked_bytes -= cut.bytes;
  asked_bytes_ -= cut.bytes;
  if (!frame.ok()) return OnError(std::move(cut), frame.status(), now_us);
  if (const absl::Status checked = CheckFrame(traits_, AskOf(cut), kAnyNumerics, *frame);
      !checked.ok()) {
    return OnError(std::move(cut), absl::DataLossError(checked.message()), now_us);
  }
  Store(cut, *frame);
  share_->transfer->GiveRows(std::move(frame->rows));
}

void ReplicaStore::AskAgain(Cut cut, uint64_t pause_us, uint64_t now_us) {
  cut.not_before_us = now_us + pause_us;
  to_ask_.push_back(std::move(cut));
}

void ReplicaStore::OnError(Cut cut, const absl::Status& why, uint64_t now_us) {
  if (absl::IsResourceExhausted(why)) return AskAgain(std::move(cut), kAskAgainUs, now_us);
  if (absl::IsUnavailable(why) && ++cut.tries < kMaxReplicaTries) {
    const uint64_t pause_us = std::min(kFirstPauseUs << (cut.tries - 1), kMaxPauseUs);
    return AskAgain(std::move(cut), pause_us, now_us);
  }
  if (absl::IsDataLoss(why) && ++cut.refusals < kMaxRefusals) {
    return AskAgain(std::move(cut), 0, now_us);
  }
  // Its source may hear later that it is to serve it.
  if ((absl::IsNotFound(why) || absl::IsPermissionDenied(why)) && cut.misses < kMaxMisses) {
    const uint64_t pause_us = kFirstMissUs << cut.misses++;
    return AskAgain(std::move(cut), pause_us, now_us);
  }
  if (absl::IsNotFound(why) && cut.blocks.size() > 1) {
    // One of its blocks is not there: which one?
    for (const WantedPtr& wanted : cut.blocks) {
      Cut one = cut;
      one.blocks = {wanted};
      one.bytes = cut.layers.size() * block_bytes_;
      to_ask_.push_back(std::move(one));
    }
    return;
  }
  for (const WantedPtr& wanted : cut.blocks) End(wanted.get(), false);
}

std::byte* ReplicaStore::TakeSlot() {
  if (free_.empty()) {
    const uint64_t num = std::min(std::max<uint64_t>(kReplicaPieceBytes / block_bytes_, 1),
                                  most_blocks_ - num_slots_);
    if (num == 0) return nullptr;
    std::unique_ptr<std::byte[]> piece(new (std::nothrow) std::byte[num * block_bytes_]);
    if (piece == nullptr) return nullptr;
    for (uint64_t i = num; i-- > 0;) free_.push_back(piece.get() + i * block_bytes_);
    memory_.push_back(std::move(piece));
    num_slots_ += num;
  }
  std::byte* const slot = free_.back();
  free_.pop_back();
  return slot;
}

void ReplicaStore::Store(const Cut& cut, const RowsFrame& frame) {
  size_t at = 0;
  size_t index = 0;
  for (const BlockHeader& piece : frame.pieces) {
    Wanted& wanted = *cut.blocks[index++ % cut.blocks.size()];
    const absl::Span<const std::byte> rows = frame.bytes().subspan(at, piece.payload_bytes);
    at += piece.payload_bytes;
    if (wanted.is_ended || has(wanted.key, piece.layer)) continue;
    std::byte* const slot = TakeSlot();
    if (slot == nullptr) {
      End(&wanted, false);
      continue;
    }
    std::memcpy(slot, rows.data(), rows.size());
    blocks_.emplace(std::pair(wanted.key, piece.layer), Block{slot, piece});
    wanted.stored.push_back(piece.layer);
    // One that it had found here may have been forgotten meanwhile: then none is kept for it.
    if (wanted.num_reserved == 0) continue;
    --wanted.num_reserved;
    --num_reserved_;
  }
  for (const WantedPtr& wanted : cut.blocks) {
    Told& told = ToldOf(wanted->stage_id);
    told.fetched_bytes += cut.bytes / cut.blocks.size();
    if (frame.lent.any()) told.shared_bytes += cut.bytes / cut.blocks.size();
    if (--wanted->num_open == 0 && !wanted->is_ended) End(wanted.get(), IsHere(*wanted));
  }
}

bool ReplicaStore::IsHere(const Wanted& wanted) const {
  for (LayerIndex layer = wanted.layers.begin; layer < wanted.layers.end; ++layer) {
    if (!has(wanted.key, layer)) return false;
  }
  return true;
}

void ReplicaStore::End(Wanted* wanted, bool ok) {
  if (std::exchange(wanted->is_ended, true)) return;
  num_reserved_ -= std::exchange(wanted->num_reserved, 0);
  const auto [first, last] = wanted_.equal_range(wanted->key);
  const auto own =
      std::find_if(first, last, [&](const auto& entry) { return entry.second.get() == wanted; });
  // Held on here: the books may have had the last of it.
  const WantedPtr held = own->second;
  for (auto it = first; ok && it != last; ++it) {
    // What was told to be here stays, also where another fetch of it has brought it and fails.
    std::erase_if(it->second->stored, [&](LayerIndex layer) {
      return layer >= wanted->layers.begin && layer < wanted->layers.end;
    });
  }
  // A part of it is of no use, and nobody would forget it.
  for (const LayerIndex layer : wanted->stored) {
    if (const auto it = blocks_.find({wanted->key, layer}); it != blocks_.end()) Drop(it);
  }
  wanted_.erase(own);
  Told& told = ToldOf(wanted->stage_id);
  (ok ? told.keys : told.failed).push_back(wanted->key);
  tell_ = true;
}

ReplicaStore::Told& ReplicaStore::ToldOf(uint64_t stage_id) {
  Told& told = told_[stage_id];
  told.stage_id = stage_id;
  return told;
}

std::vector<ReplicaStore::Told> ReplicaStore::Poll() {
  std::vector<Told> all;
  if (!std::exchange(tell_, false)) return all;
  for (auto& [stage_id, told] : std::exchange(told_, {})) all.push_back(std::move(told));
  return all;
}

// ---------------------------------------------------------------- what is served

void ReplicaStore::OnAsk(PeerAskId id, const RowsAsk& ask) {
  share_->transfer->Answer(id, FrameOf(id, ask));
}

absl::StatusOr<RowsFrame> ReplicaStore::FrameOf(PeerAskId id, const RowsAsk& ask) {
  if (secrets_.empty()) return absl::NotFoundError("no replicas are served here");
  bool is_known = false;
  // All of them, and words: the time tells nothing.
  for (const uint64_t secret : secrets_) is_known |= (secret ^ ask.secret) == 0;
  if (!is_known) return absl::PermissionDeniedError("not a secret that the coordinator gave");
  STRAIT_RETURN_IF_ERROR(CheckAsk(traits_, ask));
  if (ask.keys.empty()) return absl::InvalidArgumentError("replicas are asked for by their keys");
  const uint64_t bytes = BytesOf(traits_, RangeOf(ask));
  if (share_->made_bytes + share_->transfer->WaitingBytes() + bytes >
      limits::kTransferBytesUnderWay) {
    return absl::ResourceExhaustedError("too many frames wait to be read: ask again");
  }
  RowsFrame frame{.sequence = ask.sequence, .placement = ask.placement, .pieces = {}, .rows = {}};
  (void)share_->transfer->TakeRows(id, bytes, /*may_be_device=*/false, &frame);
  size_t at = 0;
  for (LayerIndex layer = ask.layers.begin; layer < ask.layers.end; ++layer) {
    for (size_t i = 0; i < ask.keys.size(); ++i) {
      const auto it = blocks_.find({ask.keys[i], layer});
      if (it == blocks_.end()) {
        return absl::NotFoundError(absl::StrCat("there is no replica of block ",
                                                absl::Hex(ask.keys[i].low), " in layer ", layer));
      }
      const absl::Span<const std::byte> rows(it->second.data, block_bytes_);
      BlockHeader header = it->second.header;
      if (!CheckRows(header, rows).ok()) {
        Drop(it);
        ++num_damaged_;
        return absl::NotFoundError(absl::StrCat("the replica of block ", absl::Hex(ask.keys[i].low),
                                                " in layer ", layer,
                                                " has other bytes than it had"));
      }
      header.first_position = ask.first_row + static_cast<uint32_t>(i) * limits::kBlockTokens;
      frame.pieces.push_back(header);
      std::memcpy(frame.bytes().data() + at, rows.data(), rows.size());
      at += rows.size();
    }
  }
  return frame;
}

absl::Status ReplicaStore::CheckIntegrity() const {
  uint64_t reserved = 0;
  for (const auto& [key, wanted] : wanted_) reserved += wanted->num_reserved;
  if (blocks_.size() + free_.size() == num_slots_ && num_slots_ <= most_blocks_ &&
      reserved == num_reserved_) {
    return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat(blocks_.size(), " replicas and ", free_.size(),
                                          " free slots of ", num_slots_, ", at most ", most_blocks_,
                                          "; ", reserved, " reserved, counted ", num_reserved_));
}

}  // namespace strait
