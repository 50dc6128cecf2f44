// SPDX-License-Identifier: Apache-2.0
//
// Importer brings the rows of sequences that come from another pipeline, or with which a stage begins, into
// its cache: it asks the workers that have them, piece by piece, and looks at what comes before it writes it.
//
// Owns:    the token ids of imports; frames until they are in the cache.
// Borrows: BlockCopies, whose ends are handed in; LatentCache; TransferShare. They outlive it.
// Thread:  loop thread only. No I/O, no clock of its own, no threads.
// Errors:  Unavailable is asked again with a growing pause, without end: whoever wants the rows knows how
//          long; and in frames of half the size, to kLeastFrameBytes, since a slow link may bring no whole one in
//          time. ResourceExhausted, OutOfRange and NotFound (who has the rows may hear later that they are asked for)
//          are asked again soon; of a restore, NotFound kMaxMisses times. What comes damaged, or is not what
//          was asked for, is counted and asked again, kMaxRefusals times a piece. All else ends the import;
//          of a restore only the rows from there on.
// Limits:  TransferShare; kMaxImportCopies under way.
// Why:     pieces are cut from what the coordinator asks for, and cut the same when they are asked for
//          again: so both ends sum up the same pieces (proto/wire/rows_digest.h). Rows are there when all
//          pieces of a fetch are; fetches of an import follow each other, so one number says which.
//          A block may come from a sequence that steps which are begun still use, so what is written there waits for
//          these, and for no others.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/wire/rows_digest.h"
#include "strait/v1/cluster.pb.h"
#include "worker/block_copies.h"
#include "worker/cache/latent_cache.h"
#include "worker/transfer/row_pieces.h"
#include "worker/transfer/transfer_share.h"

namespace strait {

inline constexpr size_t kMaxImportCopies = 8;
inline constexpr uint32_t kMaxRefusals = 3;
inline constexpr uint64_t kFirstPauseUs = 50'000;  // after Unavailable; doubles
inline constexpr uint64_t kMaxPauseUs = 1'000'000;
inline constexpr uint64_t kAskAgainUs = 5'000;  // after ResourceExhausted, OutOfRange, NotFound
// Of a piece with keys: a key may not be there, but who is asked may also hear later that it is to serve it.
inline constexpr uint32_t kMaxMisses = 5;
inline constexpr uint64_t kFirstMissUs = 10'000;  // doubles
inline constexpr uint64_t kTellFetchedUs = 100'000;
inline constexpr uint64_t kLeastFrameBytes = 64 << 10;  // or one piece
inline constexpr uint32_t kFramesBeforeLarger =
    64;  // that come from a peer before it is asked for larger ones again

class Importer final : public RowsTaker {
 public:
  // Of its stage, ever: that were begun, and of these, finished.
  struct Steps {
    uint64_t begun = 0;
    uint64_t finished = 0;
  };
  using CountSteps = std::function<Steps()>;

  Importer(const RowTraits& traits, BlockCopies* copies, LatentCache* cache, TransferShare* share,
           CountSteps steps)
      : traits_(traits), copies_(copies), cache_(cache), share_(share), steps_(std::move(steps)) {}
  ~Importer();  // REQUIRES: num_copies() == 0
  Importer(const Importer&) = delete;
  Importer& operator=(const Importer&) = delete;

  // ---- What plans say of imports ----
  // There are blocks for so many rows. `begins_with`: tokens of its first rows, which are here, if it is new. REQUIRES: no
  // import of another placement.
  void Take(SequenceId id, PlacementEpoch placement, uint32_t rows,
            std::vector<TokenId> begins_with = {});
  // Whether exactly these rows are here, and nothing more is on its way.
  bool IsFetched(SequenceId id, PlacementEpoch placement, uint32_t rows) const;
  // It is no import any more; its tokens. REQUIRES: IsFetched.
  std::vector<TokenId> Open(SequenceId id);
  // Rows from 0 on that are here, and their tokens; none: no import of this placement.
  absl::Span<const TokenId> TokensHere(SequenceId id, PlacementEpoch placement) const;
  // Nothing more is asked for. Copies into its blocks may be under way.
  void Close(SequenceId id);

  // ---- What the coordinator asks for ----
  // `most_rows`: for which a plan that has come takes blocks, of this placement; 0: none does.
  void Fetch(const v1::FetchRows& fetch, uint32_t most_rows, uint32_t vocab_size, uint64_t now_us);
  // It contradicts what its stage has: Poll tells.
  void RefuseFetch(const v1::FetchRows& fetch, absl::Status why);
  // The coordinator is gone: what it asked for ends, imports stay as they are.
  void EndFetches();
  // The epoch is over: no import any more. Copies may be under way.
  void Clear();

  // ---- With what a stage begins ----
  // Rows of `fetch`, whole blocks with keys, are fetched into the sequence's tables, whose first entries are of the
  // first of these rows. Nothing of it is told by Poll. Errors: what Fetch would tell; FailedPrecondition: this
  // worker moves no rows. REQUIRES: there are blocks for them; no import of this placement.
  absl::Status Restore(const v1::FetchRows& fetch, uint32_t vocab_size, uint64_t now_us);
  // Whether nothing of it is awaited any more. REQUIRES: Restore.
  bool IsRestored(SequenceId id, PlacementEpoch placement) const;
  // It is no import any more. How many of its blocks are here in all layers, before the first that is not. Copies
  // into the others may be under way. REQUIRES: Restore.
  uint32_t EndRestore(SequenceId id, PlacementEpoch placement);

  // Of all that Restore brought.
  uint64_t restored_bytes() const { return restored_bytes_; }
  uint64_t restored_shared_bytes() const {
    return restored_shared_bytes_;
  }  // of these: not by gRPC

  // ---- What drives it ----
  // Asks for as much as may be under way. `last`: for sequences that stand still; else for all others.
  void Ask(bool last, uint64_t now_us);
  void OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) override;
  // Those of others are passed over.
  void OnCopies(absl::Span<const CopyEnd> ends, uint64_t now_us);
  struct Fetched {
    SequenceId id;
    PlacementEpoch placement;
    uint32_t rows = 0;
    uint64_t digest = 0;
    uint64_t bytes = 0;
    uint64_t shared_bytes = 0;  // of these: by shared memory
    uint64_t nccl_bytes = 0;    // of these: by NCCL
    uint64_t us = 0;
    uint32_t refused_frames = 0;
    absl::Status status;
  };
  // What is to be told since the last call.
  std::vector<Fetched> Poll(uint64_t now_us);
  // Poll, and Ask, are to be called every millisecond or so.
  bool busy() const;
  size_t num_copies() const { return writing_.size(); }
  size_t num_imports() const { return imports_.size(); }
  // Bytes of TransferShare::asked_bytes that are its own.
  uint64_t asked_bytes() const { return asked_bytes_; }

 private:
  using Key = std::pair<SequenceId, PlacementEpoch>;
  struct Source {
    LayerRange layers;
    uint64_t stage_id = 0;  // 0: replicas, asked for by key
    PipelineEpoch epoch;
    std::string address;
    uint64_t secret = 0;
  };
  struct Import {
    Key key;
    bool is_restore = false;
    uint32_t first_row = 0;             // of its tables
    std::vector<uint32_t> layers_here;  // of a restore, by block: layers whose rows are here
    uint32_t rows_taken = 0;            // that there are blocks for
    // Of rows from the first on: their blocks may be used by the first steps of this number. By rising rows.
    std::deque<std::pair<uint32_t, uint64_t>> used_by_steps;
    uint32_t rows_wanted = 0;  // by all fetches
    uint32_t rows_fetched = 0;
    std::vector<TokenId> tokens;  // [rows_wanted]
    bool is_last = false;         // it stands still
    bool is_closed = false;
    RowsDigest digest;
    uint64_t bytes = 0;
    uint64_t shared_bytes = 0;
    uint64_t nccl_bytes = 0;
    uint32_t refused_frames = 0;
    absl::Status status;
    size_t num_under_way = 0;  // cuts
    uint64_t us = 0;
    uint64_t since_us = 0;  // when num_under_way last changed
    int64_t allowance = 0;  // bytes that it may ask for by its rate; below 0: it has asked ahead
    uint64_t refilled_us = 0;
    bool tell = false;
    uint64_t told_us = 0;
    uint64_t told_bytes = 0;
  };
  // What one ask is for.
  struct Cut {
    size_t source = 0;
    LayerRows range;
    uint64_t bytes = 0;
    uint32_t refusals = 0;
    uint32_t misses = 0;
    uint64_t not_before_us = 0;
  };
  struct Fetching {
    std::shared_ptr<Import> import;
    uint32_t begin_row = 0;
    uint32_t end_row = 0;
    std::vector<ContentKey> keys;         // of its blocks, or none
    uint32_t useless_row = ~uint32_t{0};  // of a restore: rows from here on are not asked for again
    std::vector<Source> sources;
    uint64_t bytes_per_s = 0;
    bool any_numerics = false;
    std::deque<Cut> to_ask;
    size_t num_open = 0;  // cuts whose rows are not here
  };
  using FetchingPtr = std::shared_ptr<Fetching>;
  // A cut that was asked for; with its frame, once that has come.
  struct UnderWay {
    FetchingPtr fetching;
    Cut cut;
    RowsFrame frame;
    std::vector<BlockId> blocks;  // while it is written
  };
  struct Peer {
    uint64_t pause_us = 0;
    uint64_t not_before_us = 0;
    uint64_t frame_bytes = limits::kTransferFrameBytes;  // that it is asked for at once
    uint32_t num_frames = 0;                             // that came since that changed
  };

  absl::StatusOr<FetchingPtr> MakeFetching(const v1::FetchRows& fetch, uint32_t most_rows,
                                           uint32_t vocab_size) const;
  absl::Status TakeKeys(const v1::FetchRows& fetch, Fetching* fetching) const;
  absl::Status TakeSources(const v1::FetchRows& fetch, Fetching* fetching) const;
  bool MayAsk(const Fetching& fetching, const Cut& cut, uint64_t now_us) const;
  // By its rate. The last rows, which are few, are not held to it.
  bool HasAllowance(const Fetching& fetching, uint64_t now_us);
  void SendAsk(const FetchingPtr& fetching, Cut cut, uint64_t now_us);
  // The cut, or the first of those that it becomes where that is too much for its source at once.
  std::deque<Cut>::iterator CutSmaller(Fetching* fetching, std::deque<Cut>::iterator cut) const;
  RowsAsk AskOf(const Fetching& fetching, const Cut& cut) const;
  // Not what was asked for, or damaged.
  void Refuse(UnderWay under_way, absl::Status why, uint64_t now_us);
  void AskAgain(UnderWay under_way, uint64_t pause_us, uint64_t now_us);
  // Behind which steps rows [.., end) of an import may be written.
  CopyAfter AfterSteps(Import* import, uint32_t end) const;
  void BeginWrites(uint64_t now_us);
  void Finish(UnderWay under_way, uint64_t now_us);
  // Of fetches that have no open cut.
  void EndDone(Import* import);
  void Fail(Import* import, absl::Status why);
  // What was asked for does not come: its import fails, or, of a restore, these rows and all behind.
  void Miss(UnderWay under_way, absl::Status why, uint64_t now_us);
  void GiveUp(UnderWay under_way, absl::Status why, uint64_t now_us);
  void GiveUpRows(const UnderWay& under_way, const absl::Status& why);
  // Of an import: what was asked for and what has come is dropped.
  void DropAsked(const Import& import);
  void Count(Import* import, int change, uint64_t now_us);
  // What was asked for is here, or given up.
  void Release(const Cut& cut);

  const RowTraits traits_;
  BlockCopies* const copies_;
  LatentCache* const cache_;
  TransferShare* const share_;
  const CountSteps steps_;

  std::map<Key, std::shared_ptr<Import>> imports_;
  std::list<FetchingPtr> fetches_;  // that have cuts to ask for or under way, in order
  std::map<AskId, UnderWay> asked_;
  std::deque<std::unique_ptr<UnderWay>> arrived_;
  std::map<CopyId, std::unique_ptr<UnderWay>> writing_;
  std::map<std::string, Peer> peers_;
  std::vector<Fetched> refused_;  // fetches of no import
  uint64_t asked_bytes_ = 0;
  uint64_t restored_bytes_ = 0;
  uint64_t restored_shared_bytes_ = 0;
};

}  // namespace strait
