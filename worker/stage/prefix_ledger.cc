// SPDX-License-Identifier: Apache-2.0
#include "worker/stage/prefix_ledger.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace strait {
namespace {

std::string Name(const ContentKey& key) {
  return absl::StrCat("prefix block ", absl::Hex(key.high, absl::kZeroPad16),
                      absl::Hex(key.low, absl::kZeroPad16));
}

}  // namespace

void PrefixLedger::Left(SequenceId id, absl::Span<const ContentKey> prefix) {
  if (prefix.empty()) return;
  prefixes_[id].assign(prefix.begin(), prefix.end());
  for (const ContentKey& key : prefix) ++holders_[key];
}

const PrefixLedger::Keys& PrefixLedger::PrefixOf(const Change& change, SequenceId id) const {
  static const Keys kNone;
  const auto changed = change.prefixes.find(id);
  if (changed != change.prefixes.end()) return changed->second;
  const auto it = prefixes_.find(id);
  return it == prefixes_.end() ? kNone : it->second;
}

std::optional<uint32_t> PrefixLedger::Holders(const Change& change, const ContentKey& key) const {
  const auto changed = change.holders.find(key);
  if (changed != change.holders.end()) return changed->second;
  const auto it = holders_.find(key);
  return it == holders_.end() ? std::nullopt : std::optional<uint32_t>(it->second);
}

absl::Status PrefixLedger::Open(SequenceId id, Keys keys, Change* change) const {
  for (const ContentKey& key : keys) {
    const std::optional<uint32_t> holders = Holders(*change, key);
    if (!holders) {
      return absl::FailedPreconditionError(absl::StrCat(Name(key), " is not here"));
    }
    if (IsReturning(*change, key)) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(key), " is on its way back from host memory"));
    }
    change->holders[key] = *holders + 1;
  }
  change->prefixes[id] = std::move(keys);
  return absl::OkStatus();
}

void PrefixLedger::Leave(SequenceId id, size_t num_left, Change* change) const {
  const Keys& before = PrefixOf(*change, id);
  if (before.size() <= num_left) return;
  for (size_t i = num_left; i < before.size(); ++i) {
    change->holders[before[i]] = *Holders(*change, before[i]) - 1;
  }
  change->prefixes[id] = Keys(before.begin(), before.begin() + static_cast<ptrdiff_t>(num_left));
}

absl::StatusOr<PrefixLedger::Kept> PrefixLedger::Keep(SequenceId id, uint32_t first_block,
                                                      absl::Span<const ContentKey> keys,
                                                      Change* change) const {
  Keys prefix = PrefixOf(*change, id);
  Kept kept;
  if (first_block > prefix.size()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "keeps blocks from ", first_block, " on, of which the first ", prefix.size(), " are kept"));
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    const size_t block = first_block + i;
    if (block < prefix.size()) {
      if (prefix[block] == keys[i]) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("block ", block, " is ", Name(prefix[block]), ", not ", Name(keys[i])));
    }
    if (IsReturning(*change, keys[i])) {
      return absl::FailedPreconditionError(
          absl::StrCat(Name(keys[i]), " is another block, whose rows are not there yet"));
    }
    const std::optional<uint32_t> holders = Holders(*change, keys[i]);
    if (holders && std::find(prefix.begin(), prefix.end(), keys[i]) != prefix.end()) {
      return absl::FailedPreconditionError(
          absl::StrCat("block ", block, " is ", Name(keys[i]), ", which it has before"));
    }
    change->holders[keys[i]] = holders.value_or(0) + 1;
    prefix.push_back(keys[i]);
    ++kept.num_new;
    kept.num_joined += holders.has_value();
  }
  change->num_prefixes += kept.num_new - kept.num_joined;
  change->prefixes[id] = std::move(prefix);
  return kept;
}

absl::Status PrefixLedger::Drop(absl::Span<const ContentKey> keys, Change* change) const {
  for (const ContentKey& key : keys) {
    const std::optional<uint32_t> holders = Holders(*change, key);
    if (!holders) continue;
    if (*holders > 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("drop of ", Name(key), ", which ", *holders, " sequences have"));
    }
    change->holders[key] = std::nullopt;
    --change->num_prefixes;
    if (IsReturning(*change, key)) change->returning[key] = false;
  }
  return absl::OkStatus();
}

bool PrefixLedger::IsOnHost(const Change& change, const ContentKey& key) const {
  const auto changed = change.on_host.find(key);
  return changed != change.on_host.end() ? changed->second : on_host_.contains(key);
}

bool PrefixLedger::IsReturning(const Change& change, const ContentKey& key) const {
  const auto changed = change.returning.find(key);
  return changed != change.returning.end() ? changed->second : returning_.contains(key);
}

absl::Status PrefixLedger::Offload(absl::Span<const ContentKey> keys, Change* change) const {
  for (const ContentKey& key : keys) {
    const char* const why = !Holders(*change, key)      ? " is not here"
                            : IsReturning(*change, key) ? " is on its way back from host memory"
                            : IsOnHost(*change, key)    ? " is in host memory already"
                                                        : nullptr;
    if (why != nullptr) {
      return absl::FailedPreconditionError(absl::StrCat("offload: ", Name(key), why));
    }
    change->on_host[key] = true;
    ++change->num_on_host;
    const auto num_on_host = static_cast<int64_t>(on_host_.size()) + change->num_on_host;
    if (num_on_host > int64_t{host_blocks_}) {
      return absl::ResourceExhaustedError(
          absl::StrCat("offload: ", num_on_host,
                       " prefix blocks in host memory, the stage's share of it is ", host_blocks_));
    }
  }
  return absl::OkStatus();
}

absl::Status PrefixLedger::Return(absl::Span<const ContentKey> keys, Change* change) const {
  for (const ContentKey& key : keys) {
    const char* const why = !IsOnHost(*change, key) ? " is not in host memory"
                            : Holders(*change, key) ? " is here already"
                                                    : nullptr;
    if (why != nullptr) {
      return absl::FailedPreconditionError(absl::StrCat("return: ", Name(key), why));
    }
    change->holders[key] = 0;
    change->returning[key] = true;
    ++change->num_prefixes;
  }
  return absl::OkStatus();
}

absl::Status PrefixLedger::Forget(absl::Span<const ContentKey> keys, Change* change) const {
  for (const ContentKey& key : keys) {
    if (!IsOnHost(*change, key)) {
      return absl::FailedPreconditionError(
          absl::StrCat("forget: ", Name(key), " is not in host memory"));
    }
    change->on_host[key] = false;
    --change->num_on_host;
  }
  return absl::OkStatus();
}

void PrefixLedger::DropUnheld(Change* change) const {
  const auto drop = [&](const ContentKey& key, uint32_t holders) {
    if (holders > 0) return;
    change->holders[key] = std::nullopt;
    --change->num_prefixes;
  };
  for (const auto& [key, holders] : holders_) {
    if (!change->holders.contains(key)) drop(key, holders);
  }
  std::vector<ContentKey> changed;
  for (const auto& [key, holders] : change->holders) {
    if (holders && *holders == 0) changed.push_back(key);
  }
  for (const ContentKey& key : changed) drop(key, 0);
}

void PrefixLedger::Commit(const Change& change) {
  for (const auto& [key, holders] : change.holders) {
    if (holders) {
      holders_[key] = *holders;
    } else {
      holders_.erase(key);
    }
  }
  for (const auto& [key, is_there] : change.on_host) {
    if (is_there) {
      on_host_.insert(key);
    } else {
      on_host_.erase(key);
    }
  }
  for (const auto& [key, is_returning] : change.returning) {
    if (is_returning) {
      returning_.insert(key);
    } else {
      returning_.erase(key);
    }
  }
  for (const auto& [id, prefix] : change.prefixes) {
    if (prefix.empty()) {
      prefixes_.erase(id);
    } else {
      prefixes_[id] = prefix;
    }
  }
}

}  // namespace strait
