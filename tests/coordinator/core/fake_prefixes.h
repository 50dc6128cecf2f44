// SPDX-License-Identifier: Apache-2.0
//
// FakePrefixes is what a test's stage knows of prefix blocks: keys, who has them, and what an honest worker would
// refuse.
//
// Thread:  the test's.
// Why:     it counts on its own, as FakeWorker does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "proto/model/content_key.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

class FakePrefixes {
 public:
  using Problem = std::function<void(const std::string&)>;

  uint32_t num_keys() const { return static_cast<uint32_t>(holders_.size()); }
  uint32_t Of(SequenceId id) const {
    const auto it = keys_.find(id);
    return it == keys_.end() ? 0 : static_cast<uint32_t>(it->second.size());
  }
  const std::vector<ContentKey>& KeysOf(SequenceId id) const {
    static const std::vector<ContentKey> kNone;
    const auto it = keys_.find(id);
    return it == keys_.end() ? kNone : it->second;
  }
  bool Has(const ContentKey& key) const { return holders_.contains(key); }
  void Clear() { *this = {}; }

  // How many rows it begins with.
  uint32_t Open(const v1::OpenSequence& open, const Problem& problem) {
    const SequenceId id{open.sequence_id()};
    const std::vector<ContentKey> keys = Parse(open.prefix_keys(), problem);
    for (const ContentKey& key : keys) {
      if (!Has(key)) problem("a sequence begins with a block that is not here");
      ++holders_[key];
    }
    const auto rows = static_cast<uint32_t>(keys.size()) * limits::kBlockTokens;
    if (open.prefix_tokens().ids_size() != static_cast<int>(rows)) problem("prefix tokens lack");
    if (rows > 0 && !open.kept_rows().empty()) problem("keeps rows and begins with a prefix");
    if (rows > 0) keys_[id] = keys;
    return rows;
  }
  void Leave(SequenceId id, uint32_t num_left) {
    const auto it = keys_.find(id);
    if (it == keys_.end()) return;
    for (; it->second.size() > num_left; it->second.pop_back()) --holders_.at(it->second.back());
    if (num_left == 0) keys_.erase(it);
  }
  void Keep(const v1::KeepPrefix& keep, uint32_t rows, const Problem& problem) {
    const std::vector<ContentKey> keys = Parse(keep.keys(), problem);
    std::vector<ContentKey>& has = keys_[SequenceId{keep.sequence_id()}];
    if (keep.first_block() > has.size()) problem("keeps blocks behind a gap");
    for (size_t i = 0; i < keys.size(); ++i) {
      const size_t block = keep.first_block() + i;
      if ((block + 1) * limits::kBlockTokens > rows) problem("keeps a block that is not full");
      if (block < has.size()) {
        if (has[block] != keys[i]) problem("keeps a block by another key");
        continue;
      }
      if (std::find(has.begin(), has.end(), keys[i]) != has.end()) problem("keeps one key twice");
      ++holders_[keys[i]];
      has.push_back(keys[i]);
    }
  }
  void Drop(const v1::DropPrefix& drop, const Problem& problem) {
    for (const ContentKey& key : Parse(drop.keys(), problem)) {
      const auto it = holders_.find(key);
      if (it == holders_.end()) continue;
      if (it->second > 0) problem("drops a prefix block that a sequence has");
      holders_.erase(it);
      dropped.push_back(key);
    }
  }
  void DropUnheld() {
    std::erase_if(holders_, [](const auto& entry) { return entry.second == 0; });
  }
  // As a successor, what others had.
  void Adopt(SequenceId id, std::vector<ContentKey> keys) {
    for (const ContentKey& key : keys) ++holders_[key];
    if (!keys.empty()) keys_[id] = std::move(keys);
  }

  std::vector<ContentKey> dropped;  // by plans, in their order

 private:
  static std::vector<ContentKey> Parse(const std::string& packed, const Problem& problem) {
    absl::StatusOr<std::vector<ContentKey>> keys = ParseContentKeys(packed);
    if (!keys.ok()) problem(keys.status().ToString());
    return keys.ok() ? *std::move(keys) : std::vector<ContentKey>();
  }

  std::map<SequenceId, std::vector<ContentKey>> keys_;
  std::map<ContentKey, uint32_t> holders_;
};

}  // namespace strait
