// SPDX-License-Identifier: Apache-2.0
#include "worker/cache/latent_cache.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "proto/wire/tables_digest.h"

namespace strait {

void BlockPool::Grow(uint32_t num_blocks) {
  STRAIT_CHECK(end_ == size() && num_blocks >= size());
  // Below what is free already: ids that were used once are used again first.
  std::vector<BlockId> free;
  free.reserve(free_.size() + num_blocks - size());
  for (BlockId block = num_blocks; block > end_; --block) free.push_back(block - 1);
  free.insert(free.end(), free_.begin(), free_.end());
  free_ = std::move(free);
  held_.resize(num_blocks, false);
  end_ = num_blocks;
}

void BlockPool::Narrow(uint32_t num_blocks) {
  STRAIT_CHECK(used_ <= num_blocks && num_blocks <= end_, "more blocks are held than are left");
  end_ = num_blocks;
  free_.erase(std::remove_if(free_.begin(), free_.end(), [&](BlockId b) { return b >= end_; }),
              free_.end());
}

void BlockPool::DropNarrowed() {
  for (BlockId block = end_; block < size(); ++block) {
    STRAIT_CHECK(!held_[block], "a block behind the pool's end is held");
  }
  held_.resize(end_);
}

BlockId BlockPool::Take() {
  STRAIT_CHECK(!free_.empty(), "the plan's blocks were counted when it was accepted");
  const BlockId block = free_.back();
  free_.pop_back();
  STRAIT_CHECK(!held_[block], "a held block was free");
  held_[block] = true;
  ++used_;
  return block;
}

void BlockPool::Give(BlockId block) {
  STRAIT_CHECK(held(block), "a block was given back twice");
  held_[block] = false;
  --used_;
  if (block < end_) free_.push_back(block);
}

absl::Status BlockPool::CheckIntegrity() const {
  std::vector<bool> seen(held_.size(), false);
  for (const BlockId block : free_) {
    if (block >= end_) return absl::InternalError(absl::StrCat("free block ", block, " is none"));
    if (held_[block])
      return absl::InternalError(absl::StrCat("block ", block, " is held and free"));
    if (seen[block]) return absl::InternalError(absl::StrCat("block ", block, " is free twice"));
    seen[block] = true;
  }
  uint32_t num_held = 0;
  uint32_t num_behind = 0;
  for (BlockId block = 0; block < size(); ++block) {
    num_held += held_[block];
    num_behind += held_[block] && block >= end_;
  }
  if (num_held != used_ || num_held - num_behind + free_.size() != end_) {
    return absl::InternalError(absl::StrCat(num_held, " held (counted ", used_, ") and ",
                                            free_.size(), " free blocks are not the pool's ",
                                            end_));
  }
  return absl::OkStatus();
}

LatentCache::LatentCache(uint32_t num_layers, BlockPool* pool)
    : num_layers_(num_layers), pool_(pool), given_(num_layers, false) {
  STRAIT_CHECK(num_layers > 0);
}

LatentCache::~LatentCache() {
  CloseAll();
  for (const auto& [block, until] : kept_) pool_->Give(block);
  for (const BlockId block : pinned_) pool_->Give(block);
  for (const auto& [block, copied] : in_copies_) {
    if (copied.is_freed) pool_->Give(block);
  }
}

BlockId LatentCache::Take() {
  ++blocks_used_;
  if (kept_.empty()) return pool_->Take();
  const BlockId block = kept_.back().first;
  kept_.pop_back();
  return block;
}

void LatentCache::Give(BlockId block) {
  --blocks_used_;
  if (const auto copied = in_copies_.find(block); copied != in_copies_.end()) {
    STRAIT_CHECK(!std::exchange(copied->second.is_freed, true), "a block is freed twice");
    ++num_freed_in_copies_;
    return;
  }
  if (keep_until_ == StepId{}) return pool_->Give(block);
  STRAIT_CHECK(kept_.empty() || kept_.back().second <= keep_until_, "steps come in order");
  kept_.emplace_back(block, keep_until_);
}

void LatentCache::StepDone(StepId step) {
  const auto end = std::find_if(kept_.begin(), kept_.end(),
                                [step](const auto& kept) { return step < kept.second; });
  for (auto it = kept_.begin(); it != end; ++it) pool_->Give(it->first);
  kept_.erase(kept_.begin(), end);
}

void LatentCache::Give(const Prefix& prefix) {
  for (uint32_t layer = num_layers_; layer-- > 0;) {
    if (!given_[layer]) Give(prefix.blocks[layer]);
  }
}

void LatentCache::LeavePrefix(Sequence* sequence, size_t num_left) {
  for (; sequence->prefix.size() > num_left; sequence->prefix.pop_back()) {
    --prefixes_.at(sequence->prefix.back()).holders;
  }
}

void LatentCache::Open(SequenceId id, absl::Span<const ContentKey> prefix) {
  const auto [it, inserted] = sequences_.try_emplace(id);
  STRAIT_CHECK(inserted, "the sequence is resident already");
  Sequence& sequence = it->second;
  sequence.tables_id = ++last_tables_id_;
  sequence.length = static_cast<uint32_t>(prefix.size()) * limits::kBlockTokens;
  sequence.prefix.assign(prefix.begin(), prefix.end());
  sequence.tables.resize(num_layers_);
  for (const ContentKey& key : prefix) {
    const auto shared = prefixes_.find(key);
    STRAIT_CHECK(shared != prefixes_.end(), "a sequence begins with a block that is not here");
    ++shared->second.holders;
    for (uint32_t layer = 0; layer < num_layers_; ++layer) {
      sequence.tables[layer].push_back(shared->second.blocks[layer]);
    }
  }
  sequence.views.assign(sequence.tables.begin(), sequence.tables.end());
}

void LatentCache::Close(SequenceId id) {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  // Backwards, so that the stack hands the blocks out again in the order that they were taken.
  for (auto table = it->second.tables.rbegin(); table != it->second.tables.rend(); ++table) {
    while (table->size() > it->second.prefix.size()) {
      Give(table->back());
      table->pop_back();
    }
  }
  LeavePrefix(&it->second, 0);
  sequences_.erase(it);
}

void LatentCache::CloseAll() {
  while (!sequences_.empty()) Close(sequences_.begin()->first);
  DropUnheldPrefixes();
}

void LatentCache::KeepPrefix(SequenceId id, const ContentKey& key) {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  Sequence& sequence = it->second;
  const size_t index = sequence.prefix.size();
  STRAIT_CHECK((index + 1) * limits::kBlockTokens <= sequence.length, "the block is not full");
  Prefix prefix{.blocks = {}, .holders = 1};
  for (const auto& table : sequence.tables) prefix.blocks.push_back(table[index]);
  STRAIT_CHECK(prefixes_.emplace(key, std::move(prefix)).second, "the key is taken");
  sequence.prefix.push_back(key);
}

void LatentCache::JoinPrefix(SequenceId id, const ContentKey& key) {
  const auto it = sequences_.find(id);
  const auto prefix = prefixes_.find(key);
  STRAIT_CHECK(it != sequences_.end() && prefix != prefixes_.end(), "there is no such block");
  Sequence& sequence = it->second;
  const size_t index = sequence.prefix.size();
  STRAIT_CHECK((index + 1) * limits::kBlockTokens <= sequence.length, "the block is not full");
  for (uint32_t layer = 0; layer < num_layers_; ++layer) {
    Give(std::exchange(sequence.tables[layer][index], prefix->second.blocks[layer]));
    sequence.views[layer] = sequence.tables[layer];
  }
  sequence.tables_id = ++last_tables_id_;
  sequence.prefix.push_back(key);
  ++prefix->second.holders;
}

void LatentCache::DropPrefix(const ContentKey& key) {
  const auto it = prefixes_.find(key);
  STRAIT_CHECK(it != prefixes_.end() && it->second.holders == 0, "a sequence has the block");
  Give(it->second);
  prefixes_.erase(it);
}

void LatentCache::TakePrefix(const ContentKey& key) {
  Prefix prefix;
  for (uint32_t layer = 0; layer < num_layers_; ++layer) prefix.blocks.push_back(Take());
  STRAIT_CHECK(prefixes_.emplace(key, std::move(prefix)).second, "the key is taken");
}

std::vector<BlockId> LatentCache::DropPinned(const ContentKey& key) {
  const auto it = prefixes_.find(key);
  STRAIT_CHECK(it != prefixes_.end() && it->second.holders == 0, "a sequence has the block");
  std::vector<BlockId> blocks = std::move(it->second.blocks);
  prefixes_.erase(it);
  blocks_used_ -= num_layers_;
  pinned_.insert(blocks.begin(), blocks.end());
  return blocks;
}

void LatentCache::Unpin(absl::Span<const BlockId> blocks) {
  for (const BlockId block : blocks) {
    STRAIT_CHECK(pinned_.erase(block) == 1, "the block is not pinned");
    ++blocks_used_;  // for the moment, so that it is freed as any other
    Give(block);
  }
}

void LatentCache::BeginCopy(absl::Span<const BlockId> blocks) {
  for (const BlockId block : blocks) ++in_copies_[block].num_copies;
}

void LatentCache::EndCopy(absl::Span<const BlockId> blocks) {
  for (const BlockId block : blocks) {
    const auto it = in_copies_.find(block);
    STRAIT_CHECK(it != in_copies_.end(), "no copy uses the block");
    if (--it->second.num_copies > 0) continue;
    const bool is_freed = it->second.is_freed;
    in_copies_.erase(it);
    if (!is_freed) continue;
    --num_freed_in_copies_;
    ++blocks_used_;  // for the moment, so that it is freed as any other
    Give(block);
  }
}

void LatentCache::DropUnheldPrefixes() {
  for (auto it = prefixes_.begin(); it != prefixes_.end();) {
    if (it->second.holders > 0) {
      ++it;
      continue;
    }
    Give(it->second);
    it = prefixes_.erase(it);
  }
}

absl::Span<const ContentKey> LatentCache::prefix(SequenceId id) const {
  const auto it = sequences_.find(id);
  STRAIT_CHECK(it != sequences_.end(), "the sequence is not resident");
  return it->second.prefix;
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
    while (table.size() < num_blocks) table.push_back(Take());
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
  const size_t num_prefix = sequence.prefix.size();
  STRAIT_CHECK(num_prefix * limits::kBlockTokens <= length || length % limits::kBlockTokens == 0,
               "a prefix block would be written");
  for (uint32_t layer = 0; layer < num_layers_; ++layer) {
    std::vector<BlockId>& table = sequence.tables[layer];
    for (; table.size() > num_blocks; table.pop_back()) {
      if (table.size() > num_prefix) Give(table.back());
    }
    sequence.views[layer] = table;
  }
  LeavePrefix(&sequence, std::min<size_t>(num_prefix, num_blocks));
}

void LatentCache::Compact(BlockId end, std::vector<BlockMove>* moves) {
  STRAIT_CHECK(kept_.empty() && pinned_.empty() && in_copies_.empty());
  const auto move = [&](BlockId* block) {
    if (*block < end) return;
    moves->push_back({*block, pool_->Take()});
    pool_->Give(*block);
    *block = moves->back().to;
  };
  for (auto& [key, prefix] : prefixes_) {
    for (uint32_t layer = 0; layer < num_layers_; ++layer) {
      if (!given_[layer]) move(&prefix.blocks[layer]);
    }
  }
  for (auto& [id, sequence] : sequences_) {
    const size_t before = moves->size();
    bool is_changed = false;
    for (size_t i = 0; i < sequence.prefix.size(); ++i) {
      const Prefix& prefix = prefixes_.at(sequence.prefix[i]);
      for (uint32_t layer = 0; layer < num_layers_; ++layer) {
        if (given_[layer]) continue;
        BlockId& block = sequence.tables[layer][i];
        is_changed = is_changed || block != prefix.blocks[layer];
        block = prefix.blocks[layer];
      }
    }
    for (std::vector<BlockId>& table : sequence.tables) {
      for (size_t i = sequence.prefix.size(); i < table.size(); ++i) move(&table[i]);
    }
    if (is_changed || moves->size() > before) sequence.tables_id = ++last_tables_id_;
  }
}

LatentCache::Layer LatentCache::GiveLayer(uint32_t layer) {
  STRAIT_CHECK(layer < num_layers_ && !given_[layer], "a layer is given once");
  STRAIT_CHECK(kept_.empty() && pinned_.empty() && in_copies_.empty());
  Layer given;
  for (auto& [id, sequence] : sequences_) {
    blocks_used_ -= static_cast<uint32_t>(sequence.tables[layer].size() - sequence.prefix.size());
    given.tables[id] = std::exchange(sequence.tables[layer], {});
    sequence.views[layer] = {};
  }
  for (const auto& [key, prefix] : prefixes_) given.prefixes.emplace(key, prefix.blocks[layer]);
  blocks_used_ -= static_cast<uint32_t>(prefixes_.size());
  given_[layer] = true;
  return given;
}

void LatentCache::AdoptPrefix(const ContentKey& key, std::vector<BlockId> blocks) {
  STRAIT_CHECK(blocks.size() == num_layers_);
  blocks_used_ += num_layers_;
  STRAIT_CHECK(prefixes_.emplace(key, Prefix{std::move(blocks), 0}).second, "the key is taken");
}

void LatentCache::Adopt(SequenceId id, uint32_t length, absl::Span<const ContentKey> prefix,
                        std::vector<std::vector<BlockId>> own) {
  STRAIT_CHECK(own.size() == num_layers_);
  Open(id, prefix);
  Sequence& sequence = sequences_.at(id);
  STRAIT_CHECK(length >= sequence.length, "it has its prefix blocks whole");
  sequence.length = length;
  for (uint32_t layer = 0; layer < num_layers_; ++layer) {
    std::vector<BlockId>& table = sequence.tables[layer];
    table.insert(table.end(), own[layer].begin(), own[layer].end());
    STRAIT_CHECK(table.size() == BlocksPerLayer(length), "other blocks were given than are needed");
    blocks_used_ += static_cast<uint32_t>(own[layer].size());
  }
  sequence.views.assign(sequence.tables.begin(), sequence.tables.end());
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

absl::Status LatentCache::CheckPrefixes(std::vector<bool>* seen, uint64_t* num_blocks) const {
  std::map<ContentKey, uint32_t> holders;
  for (const auto& [id, sequence] : sequences_) {
    for (const ContentKey& key : sequence.prefix) ++holders[key];
  }
  for (const auto& [key, prefix] : prefixes_) {
    const auto where = absl::StrCat("prefix block ", absl::Hex(key.low), ": ");
    if (holders[key] != prefix.holders) {
      return absl::InternalError(
          absl::StrCat(where, holders[key], " sequences have it (counted ", prefix.holders, ")"));
    }
    for (uint32_t layer = 0; layer < num_layers_; ++layer) {
      if (given_[layer]) continue;
      const BlockId block = prefix.blocks[layer];
      if (!pool_->held(block) || (*seen)[block]) {
        return absl::InternalError(absl::StrCat(where, "block ", block, " is not held, or twice"));
      }
      (*seen)[block] = true;
      ++*num_blocks;
    }
  }
  return absl::OkStatus();
}

absl::Status LatentCache::CheckPinned(std::vector<bool>* seen) const {
  const auto check = [&](BlockId block, const char* what) -> absl::Status {
    if (!pool_->held(block) || (*seen)[block]) {
      return absl::InternalError(
          absl::StrCat("block ", block, " is ", what, " and not held, or twice"));
    }
    (*seen)[block] = true;
    return absl::OkStatus();
  };
  for (const auto& [block, until] : kept_) STRAIT_RETURN_IF_ERROR(check(block, "kept"));
  for (const BlockId block : pinned_) STRAIT_RETURN_IF_ERROR(check(block, "pinned"));
  uint32_t num_freed = 0;
  for (const auto& [block, copied] : in_copies_) {
    if (!copied.is_freed) continue;
    ++num_freed;
    STRAIT_RETURN_IF_ERROR(check(block, "freed under a copy"));
  }
  if (num_freed == num_freed_in_copies_) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(num_freed, " blocks are freed under copies, counted ", num_freed_in_copies_));
}

absl::Status LatentCache::CheckIntegrity() const {
  STRAIT_RETURN_IF_ERROR(pool_->CheckIntegrity());
  std::vector<bool> seen(pool_->size(), false);
  STRAIT_RETURN_IF_ERROR(CheckPinned(&seen));
  uint64_t num_blocks = 0;
  for (const auto& [id, sequence] : sequences_) {
    for (uint32_t layer = 0; layer < num_layers_; ++layer) {
      const std::vector<BlockId>& table = sequence.tables[layer];
      const auto where = absl::StrCat("sequence ", id.value, ", layer ", layer, " of the stage: ");
      if (table.size() != (given_[layer] ? 0 : BlocksPerLayer(sequence.length))) {
        return absl::InternalError(
            absl::StrCat(where, table.size(), " blocks for length ", sequence.length));
      }
      if (sequence.views[layer].data() != table.data() ||
          sequence.views[layer].size() != table.size()) {
        return absl::InternalError(absl::StrCat(where, "the view is not of its table"));
      }
      if (table.empty()) continue;  // it was given, or the sequence is empty
      for (size_t i = 0; i < table.size(); ++i) {
        const BlockId block = table[i];
        if (i < sequence.prefix.size()) {
          const auto prefix = prefixes_.find(sequence.prefix[i]);
          if (prefix != prefixes_.end() && prefix->second.blocks[layer] == block) continue;
          return absl::InternalError(absl::StrCat(where, "block ", block, " is no prefix block"));
        }
        if (!pool_->held(block)) {
          return absl::InternalError(absl::StrCat(where, "block ", block, " is not held"));
        }
        if (seen[block]) {
          return absl::InternalError(absl::StrCat(where, "block ", block, " is in two tables"));
        }
        seen[block] = true;
        ++num_blocks;
      }
    }
  }
  STRAIT_RETURN_IF_ERROR(CheckPrefixes(&seen, &num_blocks));
  if (num_blocks != blocks_used_) {
    return absl::InternalError(absl::StrCat("tables and prefixes name ", num_blocks,
                                            " blocks, the pool lent ", blocks_used_));
  }
  return absl::OkStatus();
}

}  // namespace strait
