// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/replicas.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"

namespace strait {
namespace {

// Copies of held blocks that are passed over in one search for room.
constexpr int kMaxPassed = 64;

bool Overlap(LayerRange a, LayerRange b) { return a.begin < b.end && b.begin < a.end; }

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

void Replicas::Begin(const ContentKey& key, LayerRange layers, uint64_t stage_id, WorkerId worker,
                     uint64_t bytes) {
  Keeper& keeper = keepers_.at(worker);
  STRAIT_CHECK(bytes <= keeper.limit_bytes - keeper.used_bytes);
  keeper.used_bytes += bytes;
  std::vector<Copy>& copies = copies_[key];
  STRAIT_CHECK(std::none_of(copies.begin(), copies.end(), [&](const Copy& copy) {
    return copy.worker == worker && Overlap(copy.layers, layers);
  }));
  copies.push_back({.worker = worker, .layers = layers, .stage_id = stage_id, .bytes = bytes});
}

void Replicas::Drop(const ContentKey& key, size_t index) {
  const auto it = copies_.find(key);
  const Copy copy = it->second[index];
  Keeper& keeper = keepers_.at(copy.worker);
  keeper.used_bytes -= copy.bytes;
  if (copy.is_there) {
    keeper.by_age.erase(copy.age);
    --num_there_;
  }
  it->second.erase(it->second.begin() + static_cast<ptrdiff_t>(index));
  if (it->second.empty()) copies_.erase(it);
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
    copy.age = ++last_age_;
    keepers_.at(worker).by_age.emplace(copy.age, key);
    ++num_there_;
    return true;
  }
  return false;
}

std::optional<std::vector<Replicas::Gone>> Replicas::MakeRoom(
    WorkerId worker, uint64_t bytes, const std::function<bool(const ContentKey&)>& is_held) {
  std::vector<Gone> gone;
  Keeper& keeper = keepers_.at(worker);
  if (bytes > keeper.limit_bytes) return std::nullopt;
  for (int passed = 0; keeper.limit_bytes - keeper.used_bytes < bytes;) {
    if (keeper.by_age.empty() || passed == kMaxPassed) {
      // What is dropped already stays so: nobody has it.
      return gone.empty() ? std::nullopt : std::optional(std::move(gone));
    }
    const auto oldest = keeper.by_age.begin();
    const ContentKey key = oldest->second;
    std::vector<Copy>& copies = copies_.at(key);
    size_t index = 0;
    while (copies[index].age != oldest->first || copies[index].worker != worker) ++index;
    if (is_held(key)) {
      // It is in use: as if it were made now.
      ++passed;
      keeper.by_age.erase(oldest);
      copies[index].age = ++last_age_;
      keeper.by_age.emplace(last_age_, key);
      continue;
    }
    gone.push_back({key, copies[index].layers});
    Drop(key, index);
  }
  return gone;
}

std::vector<std::pair<WorkerId, Replicas::Gone>> Replicas::DropUnheld(
    const std::function<bool(const ContentKey&)>& is_held) {
  std::vector<std::pair<WorkerId, Gone>> gone;
  for (const auto& [worker, keeper] : keepers_) {
    const std::map<uint64_t, ContentKey> by_age = keeper.by_age;
    for (const auto& [age, key] : by_age) {
      if (is_held(key)) continue;
      const std::vector<Copy>& copies = copies_.at(key);
      size_t index = 0;
      while (copies[index].age != age || copies[index].worker != worker) ++index;
      gone.push_back({worker, {key, copies[index].layers}});
      Drop(key, index);
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
    num_layers += std::min(copy.layers.end, layers.end) - std::max(copy.layers.begin, layers.begin);
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
    if (keeper.used_bytes == used[worker] && keeper.used_bytes <= keeper.limit_bytes) continue;
    return absl::InternalError(absl::StrCat("worker ", worker.value, " has copies of ",
                                            used[worker], " bytes, counted ", keeper.used_bytes,
                                            " of ", keeper.limit_bytes));
  }
  if (there == num_there_ && used.size() == keepers_.size()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(there, " copies are there, counted ", num_there_));
}

}  // namespace strait
