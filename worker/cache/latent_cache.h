// SPDX-License-Identifier: Apache-2.0
//
// LatentCache keeps the books of a stage's latent blocks: which physical block holds which 64 rows
// of which layer of which sequence. It never touches a row: rows belong to the StageModel.
//
// Owns:    block ids and page tables.
// Thread:  loop thread only.
// Errors:  none but CheckIntegrity's: whether blocks suffice was decided when the plan was
//          validated, so running out, or naming an unknown sequence, is our bug and is checked.
// Limits:  the pool's size, constant.
// Why:     blocks are handed out last-in first-out: deterministic, and memory that was used once
//          is used again before untouched memory is.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/model/reservation.h"

namespace strait {

// The physical blocks of one stage: each is free or held. Blocks have one holder each; once
// sequences share a prefix, a count of holders per block comes here, and `used` stays the number of
// distinct blocks.
class BlockPool {
 public:
  explicit BlockPool(uint32_t num_blocks);

  // REQUIRES: used() < size().
  BlockId Take();
  // REQUIRES: `block` is held.
  void Give(BlockId block);

  uint32_t size() const { return static_cast<uint32_t>(held_.size()); }
  uint32_t used() const { return size() - static_cast<uint32_t>(free_.size()); }
  bool held(BlockId block) const { return block < size() && held_[block]; }

  // free + held = total, no block free twice.
  absl::Status CheckIntegrity() const;

 private:
  std::vector<BlockId> free_;  // a stack; the lowest ids leave first
  std::vector<bool> held_;     // [size]
};

class LatentCache {
 public:
  // REQUIRES: num_layers > 0.
  LatentCache(uint32_t num_layers, uint32_t num_blocks);

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

  bool resident(SequenceId id) const { return sequences_.count(id) > 0; }
  uint32_t length(SequenceId id) const;  // REQUIRES: resident
  uint32_t num_sequences() const { return static_cast<uint32_t>(sequences_.size()); }
  uint32_t num_layers() const { return num_layers_; }
  const BlockPool& pool() const { return pool_; }
  uint32_t blocks_used() const { return pool_.used(); }

  // [num_layers]: that layer's blocks by position / 64. Valid until the sequence grows or closes.
  // REQUIRES: resident.
  absl::Span<const absl::Span<const BlockId>> PageTables(SequenceId id) const;
  // BatchSequence::tables_id of these: given once in the cache's life, rising, never 0. Another one as
  // soon as an entry goes or changes; Grow, which only appends, keeps it. REQUIRES: resident.
  uint64_t tables_id(SequenceId id) const;

  // StageReport.tables_digest.
  uint64_t Digest() const;

  // Every block is free or in exactly one table, every table has the blocks that its length needs.
  // Internal names the sequence, layer or block that is wrong.
  absl::Status CheckIntegrity() const;

 private:
  struct Sequence {
    uint32_t length = 0;
    uint64_t tables_id = 0;
    std::vector<std::vector<BlockId>> tables;      // [num_layers]
    std::vector<absl::Span<const BlockId>> views;  // [num_layers] of tables
  };

  const uint32_t num_layers_;
  BlockPool pool_;
  uint64_t last_tables_id_ = 0;
  std::map<SequenceId, Sequence> sequences_;  // ordered: the digest goes by rising id
};

}  // namespace strait
