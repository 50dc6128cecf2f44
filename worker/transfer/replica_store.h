// SPDX-License-Identifier: Apache-2.0
//
// ReplicaStore keeps copies of other workers' prefix blocks in host memory, by content key and layer: it fetches
// those that the coordinator names, and gives them to who shows a secret that the coordinator told it.
//
// Owns:    the memory, taken in pieces as it is needed.
// Borrows: TransferShare, which outlives it.
// Thread:  loop thread only. No I/O, no clock of its own, no threads.
// Errors:  a key that does not fit, whose source refuses it, or does not answer kMaxReplicaTries times, is told as
//          failed. What a peer is answered: NotFound, also where memory changed a block's bytes: it is dropped;
//          PermissionDenied; InvalidArgument; ResourceExhausted.
// Limits:  limit_bytes of rows; kTransferBytesUnderWay of frames that peers have not taken; kReplicaBytesUnderWay, kMaxReplicaAsks of what is asked for; kMaxReplicaKeys that
//          wait; kMaxReplicaSecrets, beyond which the oldest goes.
// Why:     nobody waits for a copy, so its asks come last, and leave room for all others. A block lies with the
//          checksum that its source made: a copy that was right when it came is looked at again when it is needed.
//          Copies are true whatever becomes of their source, so they end only with the process, when they are
//          forgotten, or with the coordinator's term; but a coordinator that came back knows nothing of them until
//          it names them again, and would never forget them: they make room for those that it names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/latent_block.h"
#include "proto/model/content_key.h"
#include "strait/v1/rows.pb.h"
#include "worker/transfer/row_pieces.h"
#include "worker/transfer/transfer_share.h"

namespace strait {

inline constexpr uint64_t kReplicaBytesUnderWay = kBulkBytesUnderWay / 2;
static_assert(kReplicaBytesUnderWay >= limits::kTransferFrameBytes);
inline constexpr size_t kMaxReplicaAsks = kMaxAsksUnderWay / 4;
inline constexpr size_t kMaxReplicaKeys = 1 << 18;
inline constexpr size_t kMaxReplicaSecrets = 256;
inline constexpr uint32_t kMaxReplicaTries = 6;
// Memory is taken in pieces of so much, or of one block.
inline constexpr uint64_t kReplicaPieceBytes = 64u << 20;

class ReplicaStore final : public RowsTaker {
 public:
  // `traits`: of the whole model.
  ReplicaStore(const RowTraits& traits, uint64_t limit_bytes, TransferShare* share);
  ~ReplicaStore() { Clear(); }
  ReplicaStore(const ReplicaStore&) = delete;
  ReplicaStore& operator=(const ReplicaStore&) = delete;

  // ---- What the coordinator says ----
  void Replicate(const v1::Replicate& replicate, uint64_t now_us);
  // REQUIRES: stage_id 0.
  void Serve(const v1::ServeRows& serve);
  // The coordinator is gone: nothing is fetched, served or told any more of what it asked for. Copies stay, until
  // there is no room for others.
  void EndTransfers();
  // Copies go, too.
  void Clear();

  // ---- What drives it ----
  // REQUIRES: stage_id 0.
  void OnAsk(PeerAskId id, const RowsAsk& ask);
  void Ask(uint64_t now_us);
  void OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) override;
  struct Told {
    uint64_t stage_id = 0;
    std::vector<ContentKey> keys;
    std::vector<ContentKey> failed;
    uint64_t fetched_bytes = 0;
    uint64_t shared_bytes = 0;  // of these: not by gRPC
  };
  // What is to be told since the last call: of each source at most one.
  std::vector<Told> Poll();
  // Poll, and Ask, are to be called every millisecond or so.
  bool busy() const { return tell_ || !to_ask_.empty() || !asked_.empty(); }

  // ---- What others may ask ----
  bool has(const ContentKey& key, LayerIndex layer) const { return blocks_.contains({key, layer}); }
  size_t num_blocks() const { return blocks_.size(); }
  // Of these, that nobody has named since the coordinator was lost.
  size_t num_unnamed() const { return unnamed_.size(); }
  uint64_t block_bytes() const { return block_bytes_; }
  uint64_t taken_bytes() const { return num_slots_ * block_bytes_; }
  // Bytes of TransferShare::asked_bytes that are its own.
  uint64_t asked_bytes() const { return asked_bytes_; }
  // Of blocks whose bytes had changed, since it began.
  uint64_t num_damaged() const { return num_damaged_; }
  // Every slot is free or a block's, and what is reserved fits.
  absl::Status CheckIntegrity() const;
  // For tests: the bytes of a block. REQUIRES: has.
  std::byte* data(const ContentKey& key, LayerIndex layer) { return blocks_.at({key, layer}).data; }

 private:
  struct Block {
    std::byte* data = nullptr;
    BlockHeader header;  // as its source made it
  };
  struct Source {
    uint64_t stage_id = 0;
    PipelineEpoch epoch;
    std::string address;
    uint64_t secret = 0;
  };
  // A key that is fetched.
  struct Wanted {
    uint64_t stage_id = 0;
    ContentKey key;
    LayerRange layers;
    size_t num_open = 0;             // cuts that are to bring it
    uint64_t num_reserved = 0;       // blocks that are kept for it
    std::vector<LayerIndex> stored;  // by it
    bool is_ended = false;
  };
  using WantedPtr = std::shared_ptr<Wanted>;
  // What one ask is for.
  struct Cut {
    std::shared_ptr<const Source> source;
    LayerRange layers;
    std::vector<WantedPtr> blocks;
    uint64_t bytes = 0;
    uint32_t tries = 0;
    uint32_t refusals = 0;
    uint32_t misses = 0;
    uint64_t not_before_us = 0;
  };

  void Forget(absl::Span<const ContentKey> keys, LayerRange layers);
  void Drop(std::map<std::pair<ContentKey, LayerIndex>, Block>::iterator block);
  // Copies that nobody named since the coordinator was lost go, as far as so many blocks more need it.
  void MakeRoom(uint64_t num_blocks);
  // Reserves memory for it. Null: it does not fit, or is here; that is told.
  WantedPtr Want(uint64_t stage_id, const ContentKey& key, LayerRange layers);
  void CutUp(std::shared_ptr<const Source> source, LayerRange layers,
             absl::Span<const WantedPtr> wanted);
  bool MayAsk(const Cut& cut, uint64_t now_us);
  RowsAsk AskOf(const Cut& cut) const;
  void OnError(Cut cut, const absl::Status& why, uint64_t now_us);
  void AskAgain(Cut cut, uint64_t pause_us, uint64_t now_us);
  void Store(const Cut& cut, const RowsFrame& frame);
  std::byte* TakeSlot();
  bool IsHere(const Wanted& wanted) const;
  // It is there in all its layers, or not: `ok`.
  void End(Wanted* wanted, bool ok);
  Told& ToldOf(uint64_t stage_id);
  absl::StatusOr<RowsFrame> FrameOf(PeerAskId id, const RowsAsk& ask);

  const RowTraits traits_;
  const uint64_t block_bytes_;
  const uint64_t most_blocks_;
  TransferShare* const share_;

  std::map<std::pair<ContentKey, LayerIndex>, Block> blocks_;
  std::set<std::pair<ContentKey, LayerIndex>> unnamed_;  // of these, since the coordinator was lost
  std::vector<std::unique_ptr<std::byte[]>> memory_;
  std::vector<std::byte*> free_;  // a stack
  uint64_t num_slots_ = 0;
  uint64_t num_reserved_ = 0;

  std::multimap<ContentKey, WantedPtr> wanted_;  // not ended
  std::deque<Cut> to_ask_;
  std::map<AskId, Cut> asked_;
  uint64_t asked_bytes_ = 0;
  uint64_t bytes_per_s_ = 0;
  int64_t allowance_ = 0;  // bytes that it may ask for by its rate; below 0: it has asked ahead
  uint64_t refilled_us_ = 0;
  std::map<uint64_t, Told> told_;  // by the source's stage
  bool tell_ = false;              // there are keys among it
  std::deque<uint64_t> secrets_;   // the newest last
  uint64_t num_damaged_ = 0;
};

}  // namespace strait
