// SPDX-License-Identifier: Apache-2.0
//
// What the scheduler does about prefix blocks: who begins with which, which full blocks become such, and
// which make room.
#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "coordinator/core/core.h"
#include "coordinator/core/scheduler.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

constexpr uint32_t kBlock = limits::kBlockTokens;

}  // namespace

bool Scheduler::Survives(const Sequence& sequence) const {
  return std::binary_search(unnamed_.begin(), unnamed_.end(), sequence.id);
}

KeptRows Scheduler::KeptOf(const Sequence& sequence) const {
  if (!Survives(sequence)) return {};
  KeptRows kept = survivors_.Kept(sequence.id, sequence.rows_settled());
  const auto& blocks = kept.prefix_blocks;
  const bool has_prefix = std::any_of(blocks.begin(), blocks.end(), [](auto n) { return n > 0; });
  // Their keys would be others than stages have them by.
  return is_new_source_ && has_prefix ? KeptRows() : kept;
}

ContentKey Scheduler::KeyOf(Sequence* sequence, uint32_t block) const {
  PrefixKeys& keys = sequence->prefix_keys;
  if (!keys.is_reset() || keys.source() != source_.numerics) {
    const std::string policy = absl::StrCat("exact ", context_->model.block_bytes);
    // Where sequences do not share, each has its own blocks.
    const std::string salt = context_->options.prefix_cache
                                 ? sequence->spec.cache_salt
                                 : absl::StrCat("of sequence ", sequence->id.value);
    keys.Reset(source_.numerics, DigestOf({.model = context_->model.fingerprint,
                                           .weights = source_.weights,
                                           .numerics = source_.numerics,
                                           .policy = policy,
                                           .salt = salt}));
  }
  return keys.At(block, sequence->tokens);
}

std::optional<ContentKey> Scheduler::KeyIfKnown(Sequence* sequence, uint32_t block) const {
  if (source_.numerics.empty() || sequence->has_foreign_rows || keys_are_mixed_)
    return std::nullopt;
  return KeyOf(sequence, block);
}

std::vector<Scheduler::NewPrefix> Scheduler::AllPrefixes() const {
  std::vector<NewPrefix> all;
  // Some may be such with a plan that is under way.
  std::vector<const PrefixIndex::Node*> nodes;
  index_.ForEach([&](const PrefixIndex::Node& node) { nodes.push_back(&node); });
  // What leads to a block before it; the index has them in another order in each process.
  std::sort(nodes.begin(), nodes.end(), [](const auto* a, const auto* b) {
    return std::tie(a->block, a->key) < std::tie(b->block, b->key);
  });
  for (const PrefixIndex::Node* node : nodes) all.push_back({node->key, last_step()});
  return all;
}

Replicas::Place Scheduler::PlaceOfPrefix(const ContentKey& key) const {
  const PrefixIndex::Node* node = index_.Find(key);
  if (node->parent == nullptr) return {node->block, std::nullopt};
  return {node->block, node->parent->key};
}

bool Scheduler::IsOnHost(const ContentKey& key) const {
  const PrefixIndex::Node* node = index_.Find(key);
  return node != nullptr && node->on_host;
}

bool Scheduler::HasPrefix(const ContentKey& key, uint32_t stage_index) const {
  const PrefixIndex::Node* node = index_.Find(key);
  return node != nullptr && !node->on_host && node->on(stage_index);
}

bool Scheduler::HoldsPrefix(const ContentKey& key) const {
  const PrefixIndex::Node* node = index_.Find(key);
  return node != nullptr && node->holders > 0;
}

Scheduler::Prospect Scheduler::Look(Sequence* sequence) {
  Prospect prospect;
  if (!KeepsPrefixes() || !KeptOf(*sequence).empty()) return prospect;
  const uint32_t most = sequence->rows_settled() / kBlock;
  uint32_t block = 0;
  for (; block < most; ++block) {
    const PrefixIndex::Node* node = index_.Find(KeyOf(sequence, block));
    if (node == nullptr || !node->whole()) break;
    prospect.cached_unheld += node->holders == 0;
  }
  prospect.cached_rows = block * kBlock;
  for (; block < most; ++block) {
    const PrefixIndex::Node* node = index_.Find(KeyOf(sequence, block));
    if (node == nullptr || !node->only_on_host() || index_.AnswerDue(node->key)) break;
  }
  prospect.host_rows = block * kBlock - prospect.cached_rows;
  const uint32_t known = block;
  // Of what was on its way back and had to leave again, soon nothing is under way any more.
  for (; block < most; ++block) {
    const PrefixIndex::Node* node = index_.Find(KeyOf(sequence, block));
    if (node == nullptr || !node->only_on_host() || !index_.AnswerDue(node->key)) break;
  }
  for (; block < most; ++block) {
    const std::optional<SequenceId> by = index_.Promised(KeyOf(sequence, block));
    if (!by || *by == sequence->id) break;
    prospect.promised = KeyOf(sequence, block);
  }
  prospect.promised_rows = (block - known) * kBlock;
  return prospect;
}

bool Scheduler::Await(const ContentKey& promised) {
  if (!index_.Promised(promised)) return false;
  is_awaited_ = true;
  return true;
}

bool Scheduler::HasRoom(Sequence* sequence, const Prospect& prospect) {
  if (!started() || residents_.size() >= context_->options.max_running) return false;
  if (!CanEverHold(*sequence)) return false;
  const KeptRows kept = KeptOf(*sequence);
  // What the first plan does not name begins behind it: what it would share might go with that plan.
  if (kept.empty() && !unnamed_.empty()) return false;
  // Of its prefix blocks those that are there already cost nothing, and cannot make room.
  std::vector<uint32_t> there(num_stages_, prospect.cached_rows / kBlock);
  uint64_t num_free = index_.num_unheld() - prospect.cached_unheld;
  uint32_t end = 0;
  for (const uint32_t blocks : kept.prefix_blocks) end = std::max(end, blocks);
  for (uint32_t block = 0; block < end; ++block) {
    const PrefixIndex::Node* node = index_.Find(KeyOf(sequence, block));
    if (node == nullptr) break;
    num_free -= node->holders == 0;
    for (uint32_t s = 0; s < kept.prefix_blocks.size(); ++s) {
      there[s] += block < kept.prefix_blocks[s] && node->on(s);
    }
  }
  // Residents grow; without some room left for that, whoever is placed would be preempted at once.
  // Who has rows here was a resident, and would lose them.
  const size_t growing = Survives(*sequence) ? 0 : residents_.size();
  return books_.HasRoom(sequence->rows_wanted(), StageBlocks(std::move(there)), num_free,
                        static_cast<uint32_t>(growing));
}

void Scheduler::TakeCached(Residency* residency) {
  Sequence* sequence = residency->sequence;
  const Prospect prospect = Look(sequence);
  const uint32_t cached = prospect.cached_rows / kBlock;
  const uint32_t end = cached + prospect.host_rows / kBlock;
  for (uint32_t block = 0; block < end; ++block) {
    PrefixIndex::Node* node = index_.Find(KeyOf(sequence, block));
    // At once, so that what makes room for it does not give it up.
    if (block >= cached) index_.Return(node);
    index_.Hold(node);
    residency->returns = residency->returns || node->returning;
    residency->prefix.path.push_back(node);
  }
  sequence->has_foreign_rows = false;
  residency->prefix.blocks = StageBlocks(cached);
  residency->shares = KeepsPrefixes();
  num_returning_ += residency->returns;
}

void Scheduler::EnterCached(Residency* residency) {
  Sequence* sequence = residency->sequence;
  const auto& path = residency->prefix.path;
  const auto end = static_cast<uint32_t>(path.size());
  std::vector<ContentKey> keys;
  for (uint32_t block = residency->prefix.blocks.least(); block < end; ++block) {
    for (uint32_t s = 0; s < num_stages_; ++s) books_.AddPrefix(s);
    keys.push_back(path[block]->key);
  }
  if (!keys.empty()) {
    *due_ops_.Add()->mutable_return_prefix()->mutable_keys() = Pack(keys);
    ops_are_urgent_ = true;
  }
  residency->prefix.blocks = StageBlocks(end);
  residency->rows = StageRows(std::vector<uint32_t>(num_stages_, end * kBlock));
  residency->rows_done = end * kBlock;
  context_->stats.cached_rows += end * kBlock;
  if (sequence->was_placed) return;
  sequence->was_placed = true;
  sequence->cached_tokens = end * kBlock;
  if (end == 0) return;
  context_->Send(PromptCached{sequence->request->id, sequence->index, sequence->cached_tokens});
}

void Scheduler::TakeKept(Residency* residency, const KeptRows& kept) {
  Sequence* sequence = residency->sequence;
  residency->rows = StageRows(kept.rows);
  residency->prefix.blocks = StageBlocks(kept.prefix_blocks);
  residency->shares = KeepsPrefixes() && !sequence->has_foreign_rows;
  PrefixIndex::Node* parent = nullptr;
  for (uint32_t block = 0; block < residency->prefix.blocks.most(); ++block) {
    const ContentKey key = KeyOf(sequence, block);
    PrefixIndex::Node* node = index_.Find(key);
    if (node == nullptr) node = index_.Add(key, parent, block);
    for (uint32_t s = 0; s < num_stages_; ++s) {
      if (block >= kept.prefix_blocks[s] || node->on(s)) continue;
      index_.SetOn(node, s);
      books_.AddPrefix(s);
    }
    index_.Hold(node);
    if (context_->replicates) new_prefixes_.push_back({key, StepId{1}});
    ++context_->stats.prefix_blocks_survived;
    residency->prefix.path.push_back(node);
    parent = node;
  }
}

void Scheduler::MakePromises(Residency* residency) {
  if (!residency->shares) return;
  Sequence* sequence = residency->sequence;
  residency->promised_end = sequence->rows_wanted() / kBlock;
  for (uint32_t b = residency->prefix.blocks.least(); b < residency->promised_end; ++b) {
    const ContentKey key = KeyOf(sequence, b);
    const PrefixIndex::Node* node = index_.Find(key);
    if (node == nullptr || !node->whole()) index_.Promise(key, sequence->id);
  }
}

void Scheduler::BreakPromises(Residency* residency) {
  const uint32_t end = std::exchange(residency->promised_end, 0);
  for (uint32_t b = 0; b < end; ++b) {
    index_.Unpromise(KeyOf(residency->sequence, b), residency->sequence->id);
  }
}

void Scheduler::MarkDone(const std::vector<FilledRows>& filled) {
  for (const FilledRows& rows : filled) {
    Sequence* sequence = journal_->Find(rows.sequence);
    Residency* residency = sequence == nullptr ? nullptr : sequence->Find(rows.placement);
    if (residency == nullptr || residency->leaving || !residency->shares) continue;
    STRAIT_CHECK(rows.end <= sequence->tokens.size(), "a row is done whose token is not known");
    residency->rows_done = std::max(residency->rows_done, rows.end);
    keepers_.insert(sequence->id);
  }
}

PrefixKeep Scheduler::Keepable(Residency* residency) {
  PrefixKeep keep{.first_block = residency->prefix.blocks.least(), .keys = {}};
  if (!residency->shares) return keep;
  for (uint32_t b = keep.first_block; b < residency->rows_done / kBlock; ++b) {
    keep.keys.push_back(KeyOf(residency->sequence, b));
  }
  return keep;
}

bool Scheduler::PlanKeep(SequenceId id, const PrefixKeep& keep, PrefixHold* hold, Draft* draft) {
  v1::KeepPrefix op;
  op.set_sequence_id(id.value);
  op.set_first_block(keep.first_block);
  bool all = true;
  for (uint32_t i = 0; i < keep.keys.size() && all; ++i) {
    const ContentKey& key = keep.keys[i];
    const uint32_t block = keep.first_block + i;
    PrefixIndex::Node* node = index_.Find(key);
    if (node == nullptr) {
      STRAIT_CHECK(hold->path.size() == block && hold->blocks.even());
      node = index_.Add(key, block == 0 ? nullptr : hold->path.back(), block);
      index_.Hold(node);
      hold->path.push_back(node);
      ++context_->stats.prefix_blocks_made;
    } else if (node->only_on_host()) {
      // It was computed again: its copy in host memory is not needed.
      STRAIT_CHECK(hold->path.size() == block && hold->blocks.even());
      index_.LeaveHost(node);
      index_.Hold(node);
      hold->path.push_back(node);
      AddKey(KeyOp::kForget, key, draft->plan.mutable_cache_ops());
    } else if (hold->path.size() == block && hold->blocks.even() && node->whole() &&
               !node->returning) {
      // A twin's, a sequence of the same tokens, or its own of when it was here before: it has that one from now on,
      // and its own block is free.
      index_.Hold(node);
      hold->path.push_back(node);
      for (uint32_t s = 0; s < num_stages_; ++s) books_.RemovePrefix(s);
    } else {
      // It may make whole what it has itself wherever that is.
      all = !node->whole() && hold->path.size() > block && hold->path[block] == node;
      for (uint32_t s = 0; s < num_stages_ && all; ++s) {
        all = node->on(s) == (hold->blocks.at(s) > block);
      }
      if (!all) break;
      ++context_->stats.prefix_blocks_mended;
    }
    if (context_->replicates) new_prefixes_.push_back({key, draft->record.id});
    // What was its own becomes the prefix block's: the books stay as they are.
    index_.SetWhole(node);
    hold->blocks.RaiseLeast();
    index_.Unpromise(key, id);
    AppendTo(key, op.mutable_keys());
  }
  if (!op.keys().empty()) *draft->plan.add_cache_ops()->mutable_keep_prefix() = std::move(op);
  return all;
}

void Scheduler::PlanKeeps(Draft* draft) {
  for (int i = 0; i < kMaxKeeps && !keepers_.empty(); ++i) {
    Residency* residency = residents_.at(*keepers_.begin());
    keepers_.erase(keepers_.begin());
    if (PlanKeep(residency->sequence->id, Keepable(residency), &residency->prefix, draft)) continue;
    residency->shares = false;
    BreakPromises(residency);
  }
}

void Scheduler::RemovePrefix(PrefixIndex::Node* node) {
  for (uint32_t s = 0; s < num_stages_; ++s) {
    if (node->on(s)) books_.RemovePrefix(s);
  }
  index_.Remove(node);
}

void Scheduler::RemoveUnheld() {
  for (PrefixIndex::Node* node : index_.Unheld()) RemovePrefix(node);
  // Stages told it of different sequences, and those of one stage are gone.
  std::vector<absl::flat_hash_set<const PrefixIndex::Node*>> held(num_stages_);
  for (const auto& [id, residency] : residents_) {
    const PrefixHold& hold = residency->prefix;
    for (uint32_t s = 0; s < num_stages_; ++s) {
      held[s].insert(hold.path.begin(), hold.path.begin() + hold.blocks.at(s));
    }
  }
  for (const auto& [id, residency] : residents_) {
    for (PrefixIndex::Node* node : residency->prefix.path) {
      for (uint32_t s = 0; s < num_stages_; ++s) {
        if (!node->on(s) || held[s].contains(node)) continue;
        index_.SetOff(node, s);
        books_.RemovePrefix(s);
      }
    }
  }
}

void Scheduler::LeavePrefix(PrefixHold* hold, Draft* draft, bool ended) {
  const bool is_own = ended && !context_->options.prefix_cache && !hold->path.empty();
  const ContentKey first = is_own ? hold->path.front()->key : ContentKey{};
  for (; !hold->path.empty(); hold->path.pop_back()) {
    PrefixIndex::Node* node = hold->path.back();
    if (!index_.Leave(node) || node->whole()) continue;
    if (draft != nullptr) AddKey(KeyOp::kDrop, node->key, draft->plan.mutable_cache_ops());
    RemovePrefix(node);
  }
  hold->blocks = {};
  if (is_own) GiveUpOwn(first, OpsOf(draft));
}

uint64_t Scheduler::prefix_bytes(uint64_t num_blocks) const {
  uint64_t bytes = 0;
  for (const StageCache& stage : stages()) bytes += num_blocks * books_.PrefixBytes(stage.layers);
  return bytes;
}

absl::Status Scheduler::CheckPrefixes(CacheBooks* due) const {
  absl::flat_hash_map<const PrefixIndex::Node*, uint32_t> holders;
  const auto count = [&](SequenceId id, const PrefixHold& hold,
                         const StageRows& rows) -> absl::Status {
    for (const PrefixIndex::Node* node : hold.path) ++holders[node];
    bool sound = hold.path.size() == hold.blocks.most();
    for (uint32_t s = 0; s < num_stages_; ++s) {
      sound = sound && hold.blocks.at(s) * kBlock <= rows.at(s);
      for (uint32_t b = 0; b < hold.blocks.at(s) && sound; ++b) sound = hold.path[b]->on(s);
    }
    if (sound) return absl::OkStatus();
    return absl::InternalError(absl::StrCat(
        "sequence ", id.value, " has prefix blocks that are none, or no rows for them"));
  };
  for (const auto& [id, residency] : residents_) {
    STRAIT_RETURN_IF_ERROR(count(id, residency->prefix, residency->rows));
  }
  for (const Closing& closing : closing_) {
    STRAIT_RETURN_IF_ERROR(count(closing.id, closing.prefix, closing.rows));
  }
  for (uint32_t s = 0; s < num_stages_; ++s) {
    for (uint32_t i = 0; i < index_.num_on(s); ++i) due->AddPrefix(s);
  }
  return index_.CheckIntegrity(holders);
}

}  // namespace strait
