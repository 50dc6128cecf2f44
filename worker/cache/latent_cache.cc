// SPDX-License-Identifier: Apache-2.0
#include "worker/cache/latent_cache.h"

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "proto/wire/tables_digest.h"

namespace strait {

BlockPool::BlockPool(uint32_t num_blocks) : held_(num_blocks, false) {
  free_.reserve(num_blocks);
  for (BlockId block = num_blocks; block > 0; --block) free_.push_back(block - 1);
}

BlockId BlockPool::Take() {
  STRAIT_CHECK(!free_.empty(), "the plan's blocks were counted when it was accepted");
  const BlockId block = free_.back();
  free_.pop_back();
  STRAIT_CHECK(!held_[block], "a held block was free");
  held_[block] = true;
  return block;
}

void BlockPool::Give(BlockId block) {
  STRAIT_CHECK(held(block), "a block was given back twice");
  held_[block] = false;
  free_.push_back(block);
}

absl::Status BlockPool::CheckIntegrity() const {
  std::vector<bool> seen(held_.size(), false);
  for (const BlockId block : free_) {
    if (block >= size()) return absl::InternalError(absl::StrCat("free block ", block, " is none"));
    if (held_[block])
      return absl::InternalError(absl::StrCat("block ", block, " is held and free"));
    if (seen[block]) return absl::InternalError(absl::StrCat("block ", block, " is free twice"));
    seen[block] = true;
  }
  uint32_t num_held = 0;
  for (const bool held : held_) num_held += held;
  if (num_held + free_.size() != held_.size()) {
    return absl::InternalError(absl::StrCat(num_held, " held and ", free_.size(),
                                            " free blocks are not the pool's ", held_.size()));
  }
  return absl::OkStatus();
}

LatentCache::LatentCache(uint32_t num_layers, uint32_t num_blocks)
    : num_layers_(num_layers), pool_(num_blocks) {
  STRAIT_CHECK(num_layers > 0);
}

void LatentCache::Open(SequenceId id) {
  const auto [it, inserted] = sequences_.try_emplace(id);
  STRAIT_CHECK(inserted, "the sequence is resident already");
  it->second.tables_id = ++last_tables_id_;
  it->second.tables.resize(num_layers_);
  it->second.views.resize(num_layers_);
}

void LatentCache::Close(SequenceId id) {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  // Backwards, so that the stack hands the blocks out again in the order that they were taken.
  for (auto table = it->second.tables.rbegin(); table != it->second.tables.rend(); ++table) {
    for (auto block = table->rbegin(); block != table->rend(); ++block) pool_.Give(*block);
  }
  sequences_.erase(it);
}

void LatentCache::CloseAll() {
  while (!sequences_.empty()) Close(sequences_.begin()->first);
}

void LatentCache::Grow(SequenceId id, uint32_t length) {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  Sequence& sequence = it->second;
  STRAIT_CHECK(length >= sequence.length, "a sequence does not shrink");
  sequence.length = length;
  const uint32_t num_blocks = BlocksPerLayer(length);
  for (uint32_t layer = 0; layer < num_layers_; ++layer) {
    std::vector<BlockId>& table = sequence.tables[layer];
    if (table.size() == num_blocks) continue;
    while (table.size() < num_blocks) table.push_back(pool_.Take());
    sequence.views[layer] = table;
  }
}

void LatentCache::Cut(SequenceId id, uint32_t length) {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  Sequence& sequence = it->second;
  STRAIT_CHECK(length <= sequence.length, "a cut does not lengthen");
  const uint32_t num_blocks = BlocksPerLayer(length);
  if (num_blocks < BlocksPerLayer(sequence.length)) sequence.tables_id = ++last_tables_id_;
  sequence.length = length;
  for (uint32_t layer = 0; layer < num_layers_; ++layer) {
    std::vector<BlockId>& table = sequence.tables[layer];
    for (; table.size() > num_blocks; table.pop_back()) pool_.Give(table.back());
    sequence.views[layer] = table;
  }
}

uint32_t LatentCache::length(SequenceId id) const {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  return it->second.length;
}

absl::Span<const absl::Span<const BlockId>> LatentCache::PageTables(SequenceId id) const {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  return it->second.views;
}

uint64_t LatentCache::tables_id(SequenceId id) const {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  return it->second.tables_id;
}

uint64_t LatentCache::Digest() const {
  TablesDigest digest;
  for (const auto& [id, sequence] : sequences_) digest.Add(id, sequence.length);
  return digest.Value();
}

absl::Status LatentCache::CheckIntegrity() const {
  STRAIT_RETURN_IF_ERROR(pool_.CheckIntegrity());
  std::vector<bool> seen(pool_.size(), false);
  uint64_t num_blocks = 0;
  for (const auto& [id, sequence] : sequences_) {
    for (uint32_t layer = 0; layer < num_layers_; ++layer) {
      const std::vector<BlockId>& table = sequence.tables[layer];
      const auto where = absl::StrCat("sequence ", id.value, ", layer ", layer, " of the stage: ");
      if (table.size() != BlocksPerLayer(sequence.length)) {
        return absl::InternalError(
            absl::StrCat(where, table.size(), " blocks for length ", sequence.length));
      }
      if (sequence.views[layer].data() != table.data() ||
          sequence.views[layer].size() != table.size()) {
        return absl::InternalError(absl::StrCat(where, "the view is not of its table"));
      }
      for (const BlockId block : table) {
        if (!pool_.held(block)) {
          return absl::InternalError(absl::StrCat(where, "block ", block, " is not held"));
        }
        if (seen[block]) {
          return absl::InternalError(absl::StrCat(where, "block ", block, " is in two tables"));
        }
        seen[block] = true;
      }
      num_blocks += table.size();
    }
  }
  if (num_blocks != pool_.used()) {
    return absl::InternalError(
        absl::StrCat("tables name ", num_blocks, " blocks, the pool lent ", pool_.used()));
  }
  return absl::OkStatus();
}

}  // namespace strait
