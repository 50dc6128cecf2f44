// SPDX-License-Identifier: Apache-2.0
//
// LatentCache keeps the books of a stage's latent blocks: which physical block holds which 64 rows
// of which layer of which sequence. It never touches a row: rows belong to the backend.
//
// Prefix blocks. A full block of a sequence can be made a prefix block: the cache then has it by its
// content key, in all layers, and other sequences may begin with it. A sequence's prefix blocks lead its
// tables, without a gap. Nobody writes them again; they stay when their sequences go.
//
// Owns:    page tables; the blocks in them and the prefix blocks, until it ends; those that it freed and
//          that steps under way may still use.
// Borrows: the worker's BlockPool, which outlives it.
// Thread:  loop thread only.
// Errors:  none but CheckIntegrity's: whether blocks suffice was decided when the plan was
//          validated, so running out, or naming an unknown sequence, is our bug and is checked.
// Limits:  the pool's size.
// Why:     blocks are handed out last-in first-out: deterministic, and memory that was used once
//          is used again before untouched memory is. A stage's steps compute in order, those of other
//          stages beside them: so a block that is freed while a step computes is free for its own
//          stage at once, and for others when that step is done.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/model/content_key.h"
#include "proto/model/reservation.h"
#include "worker/cache/cache_memory.h"

namespace strait {

// The physical blocks of one worker: each is free or held by one cache, once. Who shares a prefix block is
// known to that cache alone.
class BlockPool {
 public:
  explicit BlockPool(uint32_t num_blocks = 0) { Grow(num_blocks); }

  // REQUIRES: num_blocks is not below size(); the pool is not narrowed.
  void Grow(uint32_t num_blocks);
  // Blocks from num_blocks on are handed out no more: what holders have of them is to be replaced.
  // REQUIRES: used() <= num_blocks <= size().
  void Narrow(uint32_t num_blocks);
  // The pool ends where it was narrowed to. REQUIRES: no block behind is held.
  void DropNarrowed();

  // REQUIRES: used() < size().
  BlockId Take();
  // REQUIRES: `block` is held.
  void Give(BlockId block);

  uint32_t size() const { return static_cast<uint32_t>(held_.size()); }
  uint32_t used() const { return used_; }
  bool held(BlockId block) const { return block < size() && held_[block]; }

  // free + held = total, no block free twice.
  absl::Status CheckIntegrity() const;

 private:
  std::vector<BlockId> free_;  // a stack; the lowest ids leave first; below end_
  std::vector<bool> held_;     // [size]
  uint32_t end_ = 0;           // size, or what it was narrowed to
  uint32_t used_ = 0;
};

class LatentCache {
 public:
  // REQUIRES: num_layers > 0.
  LatentCache(uint32_t num_layers, BlockPool* pool);
  ~LatentCache();
  LatentCache(const LatentCache&) = delete;
  LatentCache& operator=(const LatentCache&) = delete;

  // It begins with these prefix blocks. REQUIRES: not resident; has_prefix(each).
  void Open(SequenceId id, absl::Span<const ContentKey> prefix = {});
  // Its blocks are free afterwards, but for prefix blocks. REQUIRES: resident.
  void Close(SequenceId id);
  void CloseAll();  // prefix blocks too
  // Blocks for rows [0, length) of every layer. REQUIRES: resident, length not below length(id),
  // and blocks enough: BlocksOfSequence of proto/model/reservation.h says how many that are.
  void Grow(SequenceId id, uint32_t length);

  // Blocks beyond rows [0, length) are free afterwards, but for prefix blocks, which it has no more.
  // REQUIRES: resident, length not above length(id); a cut through a prefix block is at a block's end.
  void Cut(SequenceId id, uint32_t length);

  // ---- Prefix blocks ----
  // Its first block behind its prefix blocks becomes one. REQUIRES: resident, that block is full;
  // no prefix block has this key.
  void KeepPrefix(SequenceId id, const ContentKey& key);
  // That block goes, and it has the prefix block of this key in its place. REQUIRES: as KeepPrefix, but has_prefix; the rows
  // of both are the same.
  void JoinPrefix(SequenceId id, const ContentKey& key);
  // REQUIRES: has_prefix, and no sequence has it.
  void DropPrefix(const ContentKey& key);
  void DropUnheldPrefixes();
  bool has_prefix(const ContentKey& key) const { return prefixes_.count(key) > 0; }
  size_t num_prefixes() const { return prefixes_.size(); }
  // The keys of its prefix blocks. Valid until one of the calls above. REQUIRES: resident.
  absl::Span<const ContentKey> prefix(SequenceId id) const;

  // It takes blocks for a prefix block whose rows are on their way. REQUIRES: !has_prefix, and blocks enough.
  void TakePrefix(const ContentKey& key);
  // As DropPrefix, but its blocks, which a copy uses, are held and nobody's until Unpin gives them back.
  std::vector<BlockId> DropPinned(const ContentKey& key);
  void Unpin(absl::Span<const BlockId> blocks);
  // Held and nobody's, since a copy uses them.
  uint32_t num_pinned() const {
    return static_cast<uint32_t>(pinned_.size()) + num_freed_in_copies_;
  }
  // [num_layers]. REQUIRES: has_prefix.
  absl::Span<const BlockId> PrefixBlocks(const ContentKey& key) const {
    return prefixes_.at(key).blocks;
  }

  // ---- Copies of rows, in any blocks ----
  // Until EndCopy of as many, a block of these that is freed is held and nobody's, and free then.
  void BeginCopy(absl::Span<const BlockId> blocks);
  void EndCopy(absl::Span<const BlockId> blocks);
  bool in_copies() const { return !in_copies_.empty(); }

  // Blocks that are freed from now on are other caches' when this step is done; 0: at once.
  void KeepFreed(StepId until) { keep_until_ = until; }
  // So are all steps before it.
  void StepDone(StepId step);

  // Every block from `end` on is replaced by another; `moves` gets what the rows must follow. REQUIRES:
  // the pool was narrowed to `end`; no step and no copy is under way, nor in the calls below.
  void Compact(BlockId end, std::vector<BlockMove>* moves);

  // ---- To a successor on the same worker ----
  struct Layer {
    // Of every sequence, by position / 64; the leading ones are prefix blocks, where it has such.
    std::map<SequenceId, std::vector<BlockId>> tables;
    std::map<ContentKey, BlockId> prefixes;  // every one, whoever has it
  };
  // The blocks of one layer: they are this cache's no more. What is left of it can only be closed.
  Layer GiveLayer(uint32_t layer);
  bool given(uint32_t layer) const { return given_[layer]; }
  // A prefix block whose blocks, [num_layers], were given. REQUIRES: !has_prefix.
  void AdoptPrefix(const ContentKey& key, std::vector<BlockId> blocks);
  // A sequence of `length` rows that begins with these prefix blocks, and whose blocks behind them were
  // given: [num_layers], each as long as the length needs. REQUIRES: not resident; has_prefix(each).
  void Adopt(SequenceId id, uint32_t length, absl::Span<const ContentKey> prefix,
             std::vector<std::vector<BlockId>> own);

  bool resident(SequenceId id) const { return sequences_.count(id) > 0; }
  uint32_t length(SequenceId id) const;  // REQUIRES: resident
  uint32_t num_sequences() const { return static_cast<uint32_t>(sequences_.size()); }
  uint32_t num_layers() const { return num_layers_; }
  // In its tables, each counted once, and of prefix blocks.
  uint32_t blocks_used() const { return blocks_used_; }
  // That no other cache can have: also those that are kept until a step is done, and pinned ones.
  uint32_t blocks_taken() const {
    return blocks_used_ + static_cast<uint32_t>(kept_.size()) + num_pinned();
  }
  // Each of these.
  template <class Visit>
  void ForBlocks(Visit visit) const {
    for (const auto& [block, until] : kept_) visit(block);
    for (const BlockId block : pinned_) visit(block);
    for (const auto& [block, copied] : in_copies_) {
      if (copied.is_freed) visit(block);
    }
    for (const auto& [key, prefix] : prefixes_) {
      for (uint32_t layer = 0; layer < num_layers_; ++layer) {
        if (!given_[layer]) visit(prefix.blocks[layer]);
      }
    }
    for (const auto& [id, sequence] : sequences_) {
      for (const auto& table : sequence.tables) {
        for (size_t i = sequence.prefix.size(); i < table.size(); ++i) visit(table[i]);
      }
    }
  }

  // [num_layers]: that layer's blocks by position / 64. Valid until the sequence grows or closes.
  // REQUIRES: resident.
  absl::Span<const absl::Span<const BlockId>> PageTables(SequenceId id) const;
  // BatchSequence::tables_id of these: given once in the cache's life, rising, never 0. Another one as
  // soon as an entry goes or changes; Grow, which only appends, keeps it. REQUIRES: resident.
  uint64_t tables_id(SequenceId id) const;

  // StageReport.tables_digest.
  uint64_t Digest() const;

  // Its blocks are held in the pool and each in one table, every table has the blocks that its length
  // needs. Internal names the sequence, layer or block that is wrong.
  absl::Status CheckIntegrity() const;

 private:
  struct Sequence {
    uint32_t length = 0;
    uint64_t tables_id = 0;
    std::vector<ContentKey> prefix;                // of the tables' leading blocks
    std::vector<std::vector<BlockId>> tables;      // [num_layers]
    std::vector<absl::Span<const BlockId>> views;  // [num_layers] of tables
  };

  struct Prefix {
    std::vector<BlockId> blocks;  // [num_layers]
    uint32_t holders = 0;         // sequences that have it
  };

  struct InCopy {
    uint32_t num_copies = 0;
    bool is_freed = false;
  };

  BlockId Take();
  void Give(BlockId block);
  void Give(const Prefix& prefix);
  // Of all prefix blocks behind the first `num_left`, it is a holder no more.
  void LeavePrefix(Sequence* sequence, size_t num_left);
  absl::Status CheckPrefixes(std::vector<bool>* seen, uint64_t* num_blocks) const;
  // Of blocks that are held and in no table.
  absl::Status CheckPinned(std::vector<bool>* seen) const;

  const uint32_t num_layers_;
  BlockPool* const pool_;
  uint32_t blocks_used_ = 0;
  uint64_t last_tables_id_ = 0;
  StepId keep_until_;
  std::vector<std::pair<BlockId, StepId>> kept_;  // by rising step
  std::set<BlockId> pinned_;                      // in no table, and used by copies
  std::map<BlockId, InCopy> in_copies_;           // what BeginCopy said
  uint32_t num_freed_in_copies_ = 0;
  std::vector<bool> given_;                   // [num_layers]
  std::map<ContentKey, Prefix> prefixes_;     // ordered, so that blocks are freed in one order
  std::map<SequenceId, Sequence> sequences_;  // ordered: the digest goes by rising id
};

}  // namespace strait
