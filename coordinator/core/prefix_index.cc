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
  on_host_.clear();
  num_on_host_ = 0;
  answers_due_.clear();
  promises_.clear();
  num_on_.clear();
}

PrefixIndex::Node* PrefixIndex::Find(const ContentKey& key) {
  const auto it = nodes_.find(key);
  return it == nodes_.end() ? nullptr : &it->second;
}

const PrefixIndex::Node* PrefixIndex::Find(const ContentKey& key) const {
  const auto it = nodes_.find(key);
  return it == nodes_.end() ? nullptr : &it->second;
}

PrefixIndex::Node* PrefixIndex::Add(const ContentKey& key, Node* parent, uint32_t block) {
  STRAIT_CHECK((parent == nullptr) == (block == 0));
  const auto [it, is_new] = nodes_.try_emplace(key);
  STRAIT_CHECK(is_new, "a prefix block is there already");
  it->second = {.key = key, .parent = parent, .block = block};
  it->second.absent.assign(num_on_.size(), true);
  if (parent != nullptr) parent->children.push_back(&it->second);
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
  STRAIT_CHECK(node->holders == 0 && node->children.empty());
  unheld_.erase(AgeOf(*node));
  on_host_.erase(AgeOf(*node));
  num_on_host_ -= node->on_host;
  if (node->parent != nullptr) std::erase(node->parent->children, node);
  for (uint32_t s = 0; s < num_on_.size(); ++s) num_on_[s] -= node->on(s);
  nodes_.erase(ContentKey(node->key));
}

PrefixIndex::Node* PrefixIndex::Oldest() {
  return unheld_.empty() ? nullptr : unheld_.begin()->second;
}

PrefixIndex::Node* PrefixIndex::OldestOnHost() {
  return on_host_.empty() ? nullptr : on_host_.begin()->second;
}

void PrefixIndex::ToHost(Node* node) {
  STRAIT_CHECK(node->whole() && node->holders == 0);
  unheld_.erase(AgeOf(*node));
  node->absent.assign(num_on_.size(), true);
  for (uint32_t& num : num_on_) --num;
  num_on_host_ += !node->on_host;
  node->on_host = true;
  node->returning = false;
  on_host_.emplace(AgeOf(*node), node);
}

void PrefixIndex::Return(Node* node) {
  STRAIT_CHECK(node->only_on_host() && !AnswerDue(node->key));
  on_host_.erase(AgeOf(*node));
  node->returning = true;
  SetWhole(node);
  if (node->holders == 0) unheld_.emplace(AgeOf(*node), node);
  answers_due_.emplace(node->key, std::vector<bool>(num_on_.size(), true));
}

void PrefixIndex::LeaveHost(Node* node) {
  STRAIT_CHECK(node->on_host);
  on_host_.erase(AgeOf(*node));
  --num_on_host_;
  node->on_host = false;
  if (std::exchange(node->returning, false)) return;
  SetWhole(node);
  if (node->holders == 0) unheld_.emplace(AgeOf(*node), node);
}

bool PrefixIndex::AnswerDue(const ContentKey& key, uint32_t stage_index) const {
  const auto it = answers_due_.find(key);
  return it != answers_due_.end() && it->second[stage_index];
}

bool PrefixIndex::Answer(const ContentKey& key, uint32_t stage_index) {
  STRAIT_CHECK(AnswerDue(key, stage_index));
  std::vector<bool>& due = answers_due_.at(key);
  due[stage_index] = false;
  if (std::find(due.begin(), due.end(), true) != due.end()) return false;
  answers_due_.erase(key);
  return true;
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
  size_t num_unheld = 0, num_on_host = 0, num_alone = 0, num_children = 0, num_roots = 0;
  for (const auto& [key, node] : nodes_) {
    const auto where = absl::StrCat("prefix block ", absl::Hex(key.low), ": ");
    const auto it = due.find(&node);
    const uint32_t holders = it == due.end() ? 0 : it->second;
    if (holders != node.holders) {
      return absl::InternalError(
          absl::StrCat(where, node.holders, " sequences have it (counted ", holders, ")"));
    }
    const bool on_host = node.only_on_host();
    if (node.holders == 0 && !on_host && (!node.whole() || unheld_.count(AgeOf(node)) == 0)) {
      return absl::InternalError(absl::StrCat(where, "nobody has it, and nobody will remove it"));
    }
    const bool is_anywhere =
        std::find(node.absent.begin(), node.absent.end(), false) != node.absent.end();
    if (on_host != (on_host_.count(AgeOf(node)) == 1) || (on_host && node.holders > 0) ||
        (on_host && (node.whole() || is_anywhere)) || (node.returning && !node.whole())) {
      return absl::InternalError(absl::StrCat(where, "it is and is not in host memory alone"));
    }
    for (const Node* child : node.children) {
      if (child->parent != &node) return absl::InternalError(absl::StrCat(where, "not its child"));
    }
    num_children += node.children.size();
    num_roots += node.parent == nullptr;
    num_on_host += node.on_host;
    num_alone += on_host;
    if (node.block > 0) {
      const auto parent = nodes_.find(node.parent->key);
      if (parent == nodes_.end() || &parent->second != node.parent ||
          parent->second.block + 1 != node.block) {
        return absl::InternalError(absl::StrCat(where, "what leads to it is gone"));
      }
    }
    num_unheld += node.holders == 0 && !on_host;
    for (uint32_t s = 0; s < num_on.size(); ++s) num_on[s] += node.on(s);
  }
  if (num_on_host != num_on_host_ || num_alone != on_host_.size() ||
      num_children + num_roots != nodes_.size()) {
    return absl::InternalError(absl::StrCat(num_on_host, " prefix blocks in host memory (counted ",
                                            num_on_host_, "), ", num_alone, " alone (counted ",
                                            on_host_.size(), "), or blocks without a parent"));
  }
  if (num_unheld != unheld_.size() || num_on != num_on_) {
    return absl::InternalError(absl::StrCat(num_unheld,
                                            " prefix blocks without a sequence (counted ",
                                            unheld_.size(), "), or counts by stage are wrong"));
  }
  return absl::OkStatus();
}

}  // namespace strait
