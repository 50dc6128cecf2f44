// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/replicas.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "coordinator/core/recompute_cost.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

// Ends that are looked at in one search for room.
constexpr int kMaxLookedAt = 64;

bool Overlap(LayerRange a, LayerRange b) { return Intersection(a, b).size() > 0; }

}  // namespace

void Replicas::Offer(WorkerId worker, uint64_t bytes) {
  if (bytes > 0) keepers_[worker].limit_bytes = bytes;
}

void Replicas::Forget(WorkerId worker) {
  if (keepers_.erase(worker) == 0) return;
  for (auto it = copies_.begin(); it != copies_.end();) {
    std::vector<Copy>& copies = it->second;
    for (const Copy& copy : copies) num_there_ -= copy.worker == worker && copy.is_there;
    std::erase_if(copies, [&](const Copy& copy) { return copy.worker == worker; });
    if (copies.empty()) {
      copies_.erase(it++);
    } else {
      ++it;
    }
  }
  ++losses_;
}

bool Replicas::HasBefore(const Place& place, WorkerId worker) const {
  if (!place.before) return true;
  const auto& blocks = keepers_.at(worker).blocks;
  const auto it = blocks.find(*place.before);
  return it != blocks.end() && it->second.num_copies > 0;
}

void Replicas::Begin(const ContentKey& key, const Place& place, LayerRange layers,
                     uint64_t stage_id, WorkerId worker, uint64_t bytes) {
  STRAIT_CHECK(HasBefore(place, worker));
  Keeper& keeper = keepers_.at(worker);
  STRAIT_CHECK(bytes <= keeper.limit_bytes - keeper.used_bytes);
  keeper.used_bytes += bytes;
  std::vector<Copy>& copies = copies_[key];
  STRAIT_CHECK(std::none_of(copies.begin(), copies.end(), [&](const Copy& copy) {
    return copy.worker == worker && Overlap(copy.layers, layers);
  }));
  copies.push_back({.worker = worker, .layers = layers, .stage_id = stage_id, .bytes = bytes});
  const auto [it, is_new] = keeper.blocks.try_emplace(key);
  ++it->second.num_copies;
  ++it->second.num_coming;
  if (is_new) {
    it->second.place = place;
    it->second.rank = {RecomputeCost(place.block), ++last_age_};
    if (place.before) {
      ++keeper.blocks.at(*place.before).num_after;
      Settle(&keeper, *place.before);
    }
  }
  Settle(&keeper, key);
}

void Replicas::Settle(Keeper* keeper, ContentKey key) {
  for (;;) {
    const auto it = keeper->blocks.find(key);
    Block& block = it->second;
    if (block.is_end()) {
      keeper->EndsOf(block).emplace(block.rank, key);
    } else {
      keeper->EndsOf(block).erase(block.rank);
    }
    if (block.num_copies > 0 || block.num_after > 0) return;
    const std::optional<ContentKey> before = block.place.before;
    keeper->blocks.erase(it);
    if (!before) return;
    --keeper->blocks.at(*before).num_after;
    key = *before;
  }
}

void Replicas::Drop(const ContentKey& key, size_t index) {
  const auto it = copies_.find(key);
  const Copy copy = it->second[index];
  Keeper& keeper = keepers_.at(copy.worker);
  keeper.used_bytes -= copy.bytes;
  num_there_ -= copy.is_there;
  Block& block = keeper.blocks.at(key);
  --block.num_copies;
  block.num_coming -= !copy.is_there;
  const ContentKey own = key;  // `key` may be of what goes
  it->second.erase(it->second.begin() + static_cast<ptrdiff_t>(index));
  if (it->second.empty()) copies_.erase(it);
  Settle(&keeper, own);
}

bool Replicas::End(const ContentKey& key, uint64_t stage_id, WorkerId worker, bool ok) {
  const auto it = copies_.find(key);
  if (it == copies_.end()) return false;
  for (size_t i = 0; i < it->second.size(); ++i) {
    Copy& copy = it->second[i];
    if (copy.worker != worker || copy.stage_id != stage_id || copy.is_there) continue;
    if (!ok) {
      Drop(key, i);
      return true;
    }
    copy.is_there = true;
    ++num_there_;
    Keeper& keeper = keepers_.at(worker);
    --keeper.blocks.at(key).num_coming;
    Settle(&keeper, key);
    return true;
  }
  return false;
}

void Replicas::LookAgain(Keeper* keeper, const std::function<bool(const ContentKey&)>& is_held) {
  Ends& held = keeper->held_ends;
  auto it = held.upper_bound(keeper->looked_at);
  const size_t most = std::min<size_t>(kMaxLookedAt, held.size());
  for (size_t i = 0; i < most && !held.empty(); ++i) {
    if (it == held.end()) it = held.begin();
    keeper->looked_at = it->first;
    if (is_held(it->second)) {
      ++it;
      continue;
    }
    keeper->blocks.at(it->second).is_held = false;
    keeper->free_ends.emplace(it->first, it->second);
    it = held.erase(it);
  }
}

void Replicas::DropBlock(const ContentKey& key, WorkerId worker, std::vector<Gone>* gone) {
  for (;;) {
    const auto it = copies_.find(key);
    if (it == copies_.end()) return;
    size_t index = 0;
    while (index < it->second.size() && it->second[index].worker != worker) ++index;
    if (index == it->second.size()) return;
    gone->push_back({key, it->second[index].layers});
    Drop(key, index);
  }
}

std::optional<std::vector<Replicas::Gone>> Replicas::MakeRoom(
    WorkerId worker, uint64_t bytes, const Place& place,
    const std::function<bool(const ContentKey&)>& is_held) {
  std::vector<Gone> gone;
  Keeper& keeper = keepers_.at(worker);
  if (bytes > keeper.limit_bytes) return std::nullopt;
  const auto lacks = [&] { return keeper.limit_bytes - keeper.used_bytes < bytes; };
  // What comes is of no use without what leads to it.
  const auto first_of = [&](const Ends& ends) {
    auto it = ends.begin();
    return it != ends.end() && place.before && it->second == *place.before ? std::next(it) : it;
  };
  if (lacks()) LookAgain(&keeper, is_held);
  for (int looked_at = 0; lacks() && looked_at < kMaxLookedAt;) {
    const auto it = first_of(keeper.free_ends);
    if (it == keeper.free_ends.end()) break;
    const auto [rank, key] = *it;
    if (!is_held(key)) {
      DropBlock(key, worker, &gone);
      continue;
    }
    ++looked_at;
    keeper.blocks.at(key).is_held = true;
    keeper.held_ends.emplace(rank, key);
    keeper.free_ends.erase(it);
  }
  while (lacks()) {
    const auto it = first_of(keeper.held_ends);
    if (it == keeper.held_ends.end() || it->first.first >= RecomputeCost(place.block)) break;
    const ContentKey key = it->second;
    DropBlock(key, worker, &gone);
    ++losses_;
  }
  // What is dropped already stays so.
  if (lacks() && gone.empty()) return std::nullopt;
  return gone;
}

std::vector<std::pair<WorkerId, Replicas::Gone>> Replicas::DropUnheld(
    const std::function<bool(const ContentKey&)>& is_held) {
  std::vector<std::pair<WorkerId, Gone>> gone;
  for (const auto& [worker, keeper] : keepers_) {
    std::vector<std::pair<Rank, ContentKey>> unheld;  // each keeper's in one order
    for (const auto& [key, block] : keeper.blocks) {
      if (block.num_copies > block.num_coming && !is_held(key)) unheld.push_back({block.rank, key});
    }
    std::sort(unheld.begin(), unheld.end());
    for (const auto& [rank, key] : unheld) {
      for (size_t index = copies_.at(key).size(); index-- > 0;) {
        const Copy copy = copies_.at(key)[index];
        if (copy.worker != worker || !copy.is_there) continue;
        gone.push_back({worker, {key, copy.layers}});
        Drop(key, index);
        if (!copies_.contains(key)) break;
      }
    }
  }
  return gone;
}

bool Replicas::Covers(const ContentKey& key, LayerRange layers, WorkerId worker,
                      bool are_there) const {
  const auto it = copies_.find(key);
  if (it == copies_.end()) return false;
  // Of one worker no two overlap.
  uint32_t num_layers = 0;
  for (const Copy& copy : it->second) {
    if (copy.worker != worker || !Overlap(copy.layers, layers)) continue;
    if (are_there && !copy.is_there) return false;
    num_layers += Intersection(copy.layers, layers).size();
  }
  return num_layers == layers.size();
}

bool Replicas::Has(const ContentKey& key, LayerRange layers, WorkerId worker) const {
  return Covers(key, layers, worker, false);
}

bool Replicas::IsThere(const ContentKey& key, LayerRange layers, WorkerId worker) const {
  return Covers(key, layers, worker, true);
}

std::vector<WorkerId> Replicas::KeepersOf(const ContentKey& key, LayerRange layers) const {
  std::vector<WorkerId> workers;
  const auto it = copies_.find(key);
  if (it == copies_.end()) return workers;
  for (const Copy& copy : it->second) {
    const bool is_new = std::find(workers.begin(), workers.end(), copy.worker) == workers.end();
    if (is_new && IsThere(key, layers, copy.worker)) workers.push_back(copy.worker);
  }
  return workers;
}

std::optional<std::vector<Replicas::Gone>> Replicas::MakeWay(const ContentKey& key,
                                                             LayerRange layers, WorkerId worker) {
  std::vector<Gone> gone;
  const auto it = copies_.find(key);
  if (it == copies_.end()) return gone;
  const auto is_in_the_way = [&](const Copy& copy) {
    return copy.worker == worker && Overlap(copy.layers, layers);
  };
  for (const Copy& copy : it->second) {
    if (is_in_the_way(copy) && !copy.is_there) return std::nullopt;
  }
  for (size_t i = it->second.size(); i-- > 0;) {
    if (!is_in_the_way(it->second[i])) continue;
    gone.push_back({key, it->second[i].layers});
    const bool is_last = it->second.size() == 1;
    Drop(key, i);
    ++losses_;
    if (is_last) break;
  }
  return gone;
}

std::vector<Replicas::Part> Replicas::Find(const ContentKey& key, LayerRange layers) const {
  std::vector<Part> parts;
  const auto it = copies_.find(key);
  if (it == copies_.end()) return parts;
  for (LayerIndex next = layers.begin; next < layers.end;) {
    const Copy* found = nullptr;
    for (const Copy& copy : it->second) {
      if (copy.is_there && copy.layers.begin <= next && copy.layers.end > next) found = &copy;
    }
    if (found == nullptr) return {};
    parts.push_back({found->worker, {next, std::min(found->layers.end, layers.end)}});
    next = parts.back().layers.end;
  }
  return parts;
}

absl::Status Replicas::CheckEnds(WorkerId worker, const Keeper& keeper) const {
  absl::flat_hash_map<ContentKey, uint32_t, ContentKeyHash> after;
  size_t num_ends = 0;
  for (const auto& [key, block] : keeper.blocks) {
    if (block.place.before) ++after[*block.place.before];
    num_ends += block.is_end();
    const Ends& ends = block.is_held ? keeper.held_ends : keeper.free_ends;
    const auto it = copies_.find(key);
    uint32_t copies = 0, coming = 0;
    for (size_t i = 0; it != copies_.end() && i < it->second.size(); ++i) {
      copies += it->second[i].worker == worker;
      coming += it->second[i].worker == worker && !it->second[i].is_there;
    }
    if (copies == block.num_copies && coming == block.num_coming &&
        ends.contains(block.rank) == block.is_end()) {
      continue;
    }
    return absl::InternalError(absl::StrCat("worker ", worker.value, " has ", copies,
                                            " copies of a block, ", coming,
                                            " on their way; counted ", block.num_copies, ", ",
                                            block.num_coming, ", or it is no end and among them"));
  }
  for (const auto& [key, block] : keeper.blocks) {
    if (block.num_after == after[key]) continue;
    return absl::InternalError(absl::StrCat(after[key], " blocks follow one at worker ",
                                            worker.value, ", counted ", block.num_after));
  }
  if (num_ends == keeper.free_ends.size() + keeper.held_ends.size()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("worker ", worker.value, " has ", num_ends,
                                          " ends, listed ",
                                          keeper.free_ends.size() + keeper.held_ends.size()));
}

absl::Status Replicas::CheckIntegrity() const {
  std::map<WorkerId, uint64_t> used;
  uint64_t there = 0;
  for (const auto& [key, copies] : copies_) {
    for (const Copy& copy : copies) {
      used[copy.worker] += copy.bytes;
      there += copy.is_there;
    }
  }
  for (const auto& [worker, keeper] : keepers_) {
    STRAIT_RETURN_IF_ERROR(CheckEnds(worker, keeper));
    if (keeper.used_bytes == used[worker] && keeper.used_bytes <= keeper.limit_bytes) continue;
    return absl::InternalError(absl::StrCat("worker ", worker.value, " has copies of ",
                                            used[worker], " bytes, counted ", keeper.used_bytes,
                                            " of ", keeper.limit_bytes));
  }
  if (there == num_there_ && used.size() == keepers_.size()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(there, " copies are there, counted ", num_there_));
}

}  // namespace strait
