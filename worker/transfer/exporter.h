// SPDX-License-Identifier: Apache-2.0
//
// Exporter gives rows of a stage's sequences, and its prefix blocks by their keys, to workers that ask for them:
// what the coordinator said may be read, to who shows the secret that it was told.
//
// Owns:    frames until they are answered.
// Borrows: BlockCopies, whose ends are handed in; LatentCache; TransferShare. They outlive it.
// Thread:  loop thread only. No I/O, no clock of its own, no threads.
// Errors:  what a peer is answered: NotFound (also a key that is no prefix block here), PermissionDenied, Aborted (the sequence left, or the epoch
//          ended, while it was read), OutOfRange (rows that are not finished), InvalidArgument,
//          ResourceExhausted, Internal (the copy).
// Limits:  kTransferBytesUnderWay, kMaxFramesMade of the worker; kMaxExportCopies under way.
// Why:     a peer's ask is looked at when it comes and again when its copy begins, for the sequence may
//          have left between. What is read of a sequence that stands still goes first: its client waits.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/wire/rows_digest.h"
#include "strait/v1/cluster.pb.h"
#include "worker/block_copies.h"
#include "worker/cache/latent_cache.h"
#include "worker/transfer/row_pieces.h"
#include "worker/transfer/transfer_share.h"

namespace strait {

inline constexpr size_t kMaxExportCopies = 8;
inline constexpr size_t kMaxFramesMade = 256;
// Of these limits, for all but sequences that stand still.
inline constexpr uint64_t kBulkBytesMade = limits::kTransferBytesUnderWay / 4 * 3;

class Exporter {
 public:
  // Rows of finished steps; absent: the sequence is not here.
  using FinishedRows = std::function<std::optional<uint32_t>(SequenceId)>;
  // Whether the cache has such a prefix block, with its rows.
  using HasPrefix = std::function<bool(const ContentKey&)>;

  Exporter(const RowTraits& traits, BlockCopies* copies, LatentCache* cache, TransferShare* share,
           FinishedRows finished, HasPrefix has_prefix)
      : traits_(traits),
        copies_(copies),
        cache_(cache),
        share_(share),
        finished_(std::move(finished)),
        has_prefix_(std::move(has_prefix)) {}
  ~Exporter();  // REQUIRES: num_copies() == 0
  Exporter(const Exporter&) = delete;
  Exporter& operator=(const Exporter&) = delete;

  // One that is not here is passed over.
  void Serve(const v1::ServeRows& serve);
  // The sequence leaves.
  void Close(SequenceId id);
  // Nothing is served any more. Copies may be under way; who asked for them is answered now.
  void Clear();

  // REQUIRES: the ask is for this stage, and of its epoch.
  void OnAsk(PeerAskId id, const RowsAsk& ask);
  // An ask that is not for it.
  void Refuse(PeerAskId id, absl::Status why) { share_->transfer->Answer(id, std::move(why)); }
  void OnServed(PeerAskId id, absl::Span<const BlockHeader> pieces);
  // Those of others are passed over.
  void OnCopies(absl::Span<const CopyEnd> ends);
  struct Served {
    SequenceId id;
    PlacementEpoch placement;
    uint32_t rows = 0;
    uint64_t digest = 0;
  };
  // What is to be told since the last call.
  std::vector<Served> Poll();
  // Poll is to be called every millisecond or so.
  bool busy() const { return !waiting_.empty() || !reading_.empty() || tell_; }
  size_t num_copies() const { return reading_.size(); }
  size_t num_services() const { return services_.size(); }
  // Its prefix blocks are served: for the rest of the epoch.
  bool serves_prefixes() const { return services_.contains({SequenceId{}, PlacementEpoch{}}); }
  // Bytes of TransferShare::made_bytes that are its own.
  uint64_t made_bytes() const { return made_bytes_; }

 private:
  using Key = std::pair<SequenceId, PlacementEpoch>;  // of prefix blocks: 0, 0
  static Key KeyOf(SequenceId sequence, PlacementEpoch placement) {
    return {sequence, sequence == SequenceId{} ? PlacementEpoch{} : placement};
  }
  static Key KeyOf(const RowsAsk& ask) { return KeyOf(ask.sequence, ask.placement); }
  struct Service {
    uint64_t secret = 0;
    uint32_t served_rows = 0;  // not 0: it stands still, and this is to be told once
    bool is_told = false;
    RowsDigest digest;
  };
  struct Making {
    PeerAskId id;
    RowsAsk ask;
    uint64_t bytes = 0;
    bool is_answered = false;  // before its copy ended
    RowsFrame frame;
    std::vector<BlockId> blocks;
  };

  absl::Status Check(const RowsAsk& ask) const;
  absl::Status CheckKeys(const RowsAsk& ask) const;
  bool StandsStill(const RowsAsk& ask) const;
  void BeginReads();
  // kGone: it has begun, or is answered. Else not now: for want of memory of its own, or of copies, which no other
  // gets either.
  enum class Begun { kGone, kNoMemory, kNoCopy };
  Begun BeginRead(std::unique_ptr<Making>* next);
  void Answer(Making* making, absl::Status why);
  void Release(const Making& making);
  void End(std::map<Key, Service>::iterator service);
  // Of a sequence, or of all.
  void Abort(std::optional<SequenceId> id, const char* why);
  // All that was to be read was, and nobody was told.
  bool IsServed(const Service& service) const;

  const RowTraits traits_;
  BlockCopies* const copies_;
  LatentCache* const cache_;
  TransferShare* const share_;
  const FinishedRows finished_;
  const HasPrefix has_prefix_;

  std::map<Key, Service> services_;
  std::deque<std::unique_ptr<Making>> waiting_;
  std::map<CopyId, std::unique_ptr<Making>> reading_;
  std::map<PeerAskId, Key> unconfirmed_;  // answered, and OnServed has not come
  bool tell_ = false;
  uint64_t made_bytes_ = 0;
};

}  // namespace strait
