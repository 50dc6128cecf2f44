// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/prefix_index.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"

namespace strait {

StageBlocks::StageBlocks(std::vector<uint32_t> by_stage) : by_stage_(std::move(by_stage)) {
  Even();
}

void StageBlocks::Even() {
  if (by_stage_.empty() || least() != most()) return;
  all_ = by_stage_.front();
  by_stage_.clear();
}

uint32_t StageBlocks::least() const {
  return even() ? all_ : *std::min_element(by_stage_.begin(), by_stage_.end());
}

uint32_t StageBlocks::most() const {
  return even() ? all_ : *std::max_element(by_stage_.begin(), by_stage_.end());
}

void StageBlocks::RaiseLeast() {
  if (even()) {
    ++all_;
    return;
  }
  const uint32_t least = this->least();
  for (uint32_t& blocks : by_stage_) blocks += blocks == least;
  Even();
}

void PrefixIndex::Start(uint32_t num_stages) {
  STRAIT_CHECK(nodes_.empty());
  num_on_.assign(num_stages, 0);
}

void PrefixIndex::Clear() {
  nodes_.clear();
  unheld_.clear();
  promises_.clear();
  num_on_.clear();
}

PrefixIndex::Node* PrefixIndex::Find(const ContentKey& key) {
  const auto it = nodes_.find(key);
  return it == nodes_.end() ? nullptr : &it->second;
}

PrefixIndex::Node* PrefixIndex::Add(const ContentKey& key, const Node* parent, uint32_t block) {
  STRAIT_CHECK((parent == nullptr) == (block == 0));
  const auto [it, is_new] = nodes_.try_emplace(key);
  STRAIT_CHECK(is_new, "a prefix block is there already");
  it->second = {.key = key, .parent = parent, .block = block};
  it->second.absent.assign(num_on_.size(), true);
  return &it->second;
}

void PrefixIndex::SetOn(Node* node, uint32_t stage_index) {
  STRAIT_CHECK(!node->on(stage_index));
  node->absent[stage_index] = false;
  ++num_on_[stage_index];
  if (std::find(node->absent.begin(), node->absent.end(), true) == node->absent.end()) {
    node->absent.clear();
  }
}

void PrefixIndex::SetWhole(Node* node) {
  for (uint32_t s = 0; s < num_on_.size(); ++s) {
    if (!node->on(s)) SetOn(node, s);
  }
}

void PrefixIndex::SetOff(Node* node, uint32_t stage_index) {
  STRAIT_CHECK(node->holders > 0 && node->on(stage_index));
  if (node->whole()) node->absent.assign(num_on_.size(), false);
  node->absent[stage_index] = true;
  --num_on_[stage_index];
}

void PrefixIndex::Hold(Node* node) {
  if (++node->holders == 1) unheld_.erase(AgeOf(*node));
}

bool PrefixIndex::Leave(Node* node) {
  STRAIT_CHECK(node->holders > 0);
  if (--node->holders > 0) return false;
  node->used = ++clock_;
  // A path is left as a whole, its end first: what leads to a node counts as used after it.
  if (node->whole()) unheld_.emplace(AgeOf(*node), node);
  return true;
}

void PrefixIndex::Remove(Node* node) {
  STRAIT_CHECK(node->holders == 0);
  unheld_.erase(AgeOf(*node));
  for (uint32_t s = 0; s < num_on_.size(); ++s) num_on_[s] -= node->on(s);
  nodes_.erase(ContentKey(node->key));
}

PrefixIndex::Node* PrefixIndex::Oldest() {
  return unheld_.empty() ? nullptr : unheld_.begin()->second;
}

std::vector<PrefixIndex::Node*> PrefixIndex::Unheld() {
  std::vector<Node*> nodes;
  for (const auto& [age, node] : unheld_) nodes.push_back(node);
  return nodes;
}

void PrefixIndex::Unpromise(const ContentKey& key, SequenceId by) {
  const auto it = promises_.find(key);
  if (it != promises_.end() && it->second == by) promises_.erase(it);
}

std::optional<SequenceId> PrefixIndex::Promised(const ContentKey& key) const {
  const auto it = promises_.find(key);
  return it == promises_.end() ? std::nullopt : std::optional<SequenceId>(it->second);
}

absl::Status PrefixIndex::CheckIntegrity(
    const absl::flat_hash_map<const Node*, uint32_t>& due) const {
  std::vector<uint32_t> num_on(num_on_.size(), 0);
  size_t num_unheld = 0;
  for (const auto& [key, node] : nodes_) {
    const auto where = absl::StrCat("prefix block ", absl::Hex(key.low), ": ");
    const auto it = due.find(&node);
    const uint32_t holders = it == due.end() ? 0 : it->second;
    if (holders != node.holders) {
      return absl::InternalError(
          absl::StrCat(where, node.holders, " sequences have it (counted ", holders, ")"));
    }
    if (node.holders == 0 && (!node.whole() || unheld_.count(AgeOf(node)) == 0)) {
      return absl::InternalError(absl::StrCat(where, "nobody has it, and nobody will remove it"));
    }
    if (node.block > 0) {
      const auto parent = nodes_.find(node.parent->key);
      if (parent == nodes_.end() || &parent->second != node.parent ||
          parent->second.block + 1 != node.block) {
        return absl::InternalError(absl::StrCat(where, "what leads to it is gone"));
      }
    }
    num_unheld += node.holders == 0;
    for (uint32_t s = 0; s < num_on.size(); ++s) num_on[s] += node.on(s);
  }
  if (num_unheld != unheld_.size() || num_on != num_on_) {
    return absl::InternalError(absl::StrCat(num_unheld,
                                            " prefix blocks without a sequence (counted ",
                                            unheld_.size(), "), or counts by stage are wrong"));
  }
  return absl::OkStatus();
}

}  // namespace strait
