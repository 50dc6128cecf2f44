// SPDX-License-Identifier: Apache-2.0
//
// LatentCache keeps the books of a stage's latent blocks: which physical block holds which 64 rows
// of which layer of which sequence. It never touches a row: rows belong to the backend.
//
// Owns:    page tables; the blocks in them, until it ends; those that it freed and that steps under way may
//          still use.
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
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/model/reservation.h"
#include "worker/cache/cache_memory.h"

namespace strait {

// The physical blocks of one worker: each is free or held. Blocks have one holder each; once
// sequences share a prefix, a count of holders per block comes here, and `used` stays the number of
// distinct blocks.
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

  // REQUIRES: not resident.
  void Open(SequenceId id);
  // Its blocks are free afterwards. REQUIRES: resident.
  void Close(SequenceId id);
  void CloseAll();
  // Blocks for rows [0, length) of every layer. REQUIRES: resident, length not below length(id),
  // and blocks enough: BlocksOfSequence of proto/model/reservation.h says how many that are.
  void Grow(SequenceId id, uint32_t length);

  // Blocks beyond rows [0, length) are free afterwards. REQUIRES: resident, length not above length(id).
  void Cut(SequenceId id, uint32_t length);

  // Blocks that are freed from now on are other caches' when this step is done; 0: at once.
  void KeepFreed(StepId until) { keep_until_ = until; }
  // So are all steps before it.
  void StepDone(StepId step);

  // Every block from `end` on is replaced by another; `moves` gets what the rows must follow. REQUIRES:
  // the pool was narrowed to `end`; no step is under way, nor in the calls below.
  void Compact(BlockId end, std::vector<BlockMove>* moves);

  // ---- To a successor on the same worker ----
  // The blocks of one layer, of every sequence: they are this cache's no more. What is left of it can
  // only be closed.
  std::map<SequenceId, std::vector<BlockId>> GiveLayer(uint32_t layer);
  bool given(uint32_t layer) const { return given_[layer]; }
  // A sequence of `length` rows whose blocks were given: [num_layers], each at least as long as the
  // length needs; what is beyond is free afterwards. REQUIRES: not resident.
  void Adopt(SequenceId id, uint32_t length, std::vector<std::vector<BlockId>> tables);

  bool resident(SequenceId id) const { return sequences_.count(id) > 0; }
  uint32_t length(SequenceId id) const;  // REQUIRES: resident
  uint32_t num_sequences() const { return static_cast<uint32_t>(sequences_.size()); }
  uint32_t num_layers() const { return num_layers_; }
  // In its tables.
  uint32_t blocks_used() const { return blocks_used_; }
  // That no other cache can have: also those that are kept until a step is done.
  uint32_t blocks_taken() const { return blocks_used_ + static_cast<uint32_t>(kept_.size()); }
  // Each of these.
  template <class Visit>
  void ForBlocks(Visit visit) const {
    for (const auto& [block, until] : kept_) visit(block);
    for (const auto& [id, sequence] : sequences_) {
      for (const auto& table : sequence.tables) {
        for (const BlockId block : table) visit(block);
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
    std::vector<std::vector<BlockId>> tables;      // [num_layers]
    std::vector<absl::Span<const BlockId>> views;  // [num_layers] of tables
  };

  BlockId Take();
  void Give(BlockId block);

  const uint32_t num_layers_;
  BlockPool* const pool_;
  uint32_t blocks_used_ = 0;
  uint64_t last_tables_id_ = 0;
  StepId keep_until_;
  std::vector<std::pair<BlockId, StepId>> kept_;  // by rising step
  std::vector<bool> given_;                       // [num_layers]
  std::map<SequenceId, Sequence> sequences_;      // ordered: the digest goes by rising id
};

}  // namespace strait
