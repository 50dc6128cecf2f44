// SPDX-License-Identifier: Apache-2.0
//
// PrefixIndex knows the prefix blocks of one pipeline: which there are, on which stages, how many
// sequences have each, and which of those that none has was used longest ago. It also knows which blocks
// are being computed right now and will be prefix blocks (promises).
//
// Owns:    nodes; their addresses are stable until they are removed.
// Thread:  loop thread only.
// Limits:  none of its own: each node has bytes in the CacheBooks.
// Why:     a node's parent is used whenever it is, so of nodes that none has the one used longest ago, the
//          deeper first, never leaves a child behind. After a stage was lost, a node may be on some
//          stages alone; nobody begins with it until a sequence that replays it makes it whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "proto/model/content_key.h"

namespace strait {

// How many leading blocks, by stage: mostly the same on all.
class StageBlocks {
 public:
  StageBlocks() = default;
  explicit StageBlocks(uint32_t all) : all_(all) {}
  explicit StageBlocks(std::vector<uint32_t> by_stage);

  uint32_t at(uint32_t stage_index) const { return even() ? all_ : by_stage_[stage_index]; }
  bool even() const { return by_stage_.empty(); }
  uint32_t least() const;
  uint32_t most() const;
  // The same on all from now on where it was the least; others stay.
  void RaiseLeast();

 private:
  void Even();

  uint32_t all_ = 0;
  std::vector<uint32_t> by_stage_;
};

class PrefixIndex {
 public:
  struct Node {
    ContentKey key;
    Node* parent = nullptr;
    uint32_t block = 0;        // its index in a sequence
    uint32_t holders = 0;      // sequences that have it, on any stage
    std::vector<bool> absent;  // by stage; empty: it is on all
    uint64_t used = 0;         // when it was left by the last holder
    std::vector<Node*> children;
    bool on_host = false;    // there is a copy in every stage's host memory
    bool returning = false;  // likewise, and its rows are on their way from there to all stages
    bool only_on_host() const { return on_host && !returning; }
    bool whole() const { return absent.empty(); }
    bool on(uint32_t stage_index) const { return absent.empty() || !absent[stage_index]; }
  };

  void Start(uint32_t num_stages);
  void Clear();

  bool Has(const ContentKey& key) const { return nodes_.count(key) > 0; }
  // Null: none.
  Node* Find(const ContentKey& key);
  const Node* Find(const ContentKey& key) const;
  template <class Visit>
  void ForEach(Visit visit) const {
    for (const auto& [key, node] : nodes_) visit(node);
  }
  // On no stage. REQUIRES: not there; parent is, unless block is 0.
  Node* Add(const ContentKey& key, Node* parent, uint32_t block);
  // REQUIRES: it was not on this stage, or on any of those where it was not.
  void SetOn(Node* node, uint32_t stage_index);
  void SetWhole(Node* node);
  // REQUIRES: it has a holder, and is on this stage.
  void SetOff(Node* node, uint32_t stage_index);

  void Hold(Node* node);
  // Whether it has no holder any more. One that is not whole is to be removed then.
  bool Leave(Node* node);
  // REQUIRES: no holder, no child.
  void Remove(Node* node);
  // Of whole nodes without a holder; null: there is none.
  Node* Oldest();
  std::vector<Node*> Unheld();

  // ---- Host memory: a node is on stages, or there, or returns ----
  // It is there alone from now on. REQUIRES: whole, no holder.
  void ToHost(Node* node);
  // It begins to return. REQUIRES: it is there alone; no answer is due of an earlier return.
  void Return(Node* node);
  // It is on all stages and not there. REQUIRES: on_host.
  void LeaveHost(Node* node);
  // Of nodes that are there alone; null: there is none.
  Node* OldestOnHost();
  // It was left by its last holder before the other one was.
  static bool IsOlder(const Node& a, const Node& b) { return AgeOf(a) < AgeOf(b); }
  // A stage has not told yet what became of this return, whatever became of the node.
  bool AnswerDue(const ContentKey& key) const { return answers_due_.contains(key); }
  bool AnswerDue(const ContentKey& key, uint32_t stage_index) const;
  // True: all stages have answered. REQUIRES: AnswerDue.
  bool Answer(const ContentKey& key, uint32_t stage_index);
  size_t num_on_host() const { return num_on_host_; }

  size_t num_nodes() const { return nodes_.size(); }
  size_t num_unheld() const { return unheld_.size(); }
  uint32_t num_on(uint32_t stage_index) const { return num_on_[stage_index]; }

  // ---- Promises ----
  void Promise(const ContentKey& key, SequenceId by) { promises_.emplace(key, by); }
  void Unpromise(const ContentKey& key, SequenceId by);
  std::optional<SequenceId> Promised(const ContentKey& key) const;
  size_t num_promises() const { return promises_.size(); }

  // `due`: sequences that have each node. Internal names what is wrong.
  absl::Status CheckIntegrity(const absl::flat_hash_map<const Node*, uint32_t>& due) const;

 private:
  using Age = std::tuple<uint64_t, uint32_t, ContentKey>;  // used, deeper first
  static Age AgeOf(const Node& node) { return {node.used, ~node.block, node.key}; }

  absl::node_hash_map<ContentKey, Node, ContentKeyHash> nodes_;
  std::map<Age, Node*> unheld_;
  std::map<Age, Node*> on_host_;  // those that are there alone
  size_t num_on_host_ = 0;        // with those that return
  std::vector<uint32_t> num_on_;  // nodes, by stage
  absl::flat_hash_map<ContentKey, std::vector<bool>, ContentKeyHash> answers_due_;  // by stage
  absl::flat_hash_map<ContentKey, SequenceId, ContentKeyHash> promises_;
  uint64_t clock_ = 0;
};

}  // namespace strait
