// SPDX-License-Identifier: Apache-2.0
//
// What the scheduler does about prefix blocks in the workers' host memory: which go there to make room, which
// are given up, and what stages say of those that return.
//
// Why: parking a sequence is nothing else. Its full blocks are prefix blocks; when it is preempted nobody has
//      them, so they are the next to make room; when it is placed again they are what it begins with. At most
//      the rows behind its last full block are computed again.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/core/core.h"
#include "coordinator/core/scheduler.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

// How far back an operation of the same kind is looked for.
constexpr int kOpsBack = 4;
// Steps of fewer rows than a block say little of how fast many rows are computed.
constexpr uint32_t kMeasuredRows = limits::kBlockTokens;
constexpr double kRecent = 1.0 / 8;

// Null: it is another operation.
std::string* KeysOf(v1::CacheOp* op) {
  if (op->has_drop_prefix()) return op->mutable_drop_prefix()->mutable_keys();
  if (op->has_offload_prefix()) return op->mutable_offload_prefix()->mutable_keys();
  if (op->has_forget_prefix()) return op->mutable_forget_prefix()->mutable_keys();
  return nullptr;
}

bool Contains(const std::string& packed, const ContentKey& key) {
  std::string one;
  AppendTo(key, &one);
  for (size_t at = 0; at < packed.size(); at += kContentKeyBytes) {
    if (packed.compare(at, kContentKeyBytes, one) == 0) return true;
  }
  return false;
}

}  // namespace

void Scheduler::AddKey(KeyOp kind, const ContentKey& key, Ops* ops) {
  for (int back = 1; back <= std::min(ops->size(), kOpsBack); ++back) {
    v1::CacheOp* op = ops->Mutable(ops->size() - back);
    std::string* keys = KeysOf(op);
    if (keys == nullptr) break;
    const bool is_same = kind == KeyOp::kDrop      ? op->has_drop_prefix()
                         : kind == KeyOp::kOffload ? op->has_offload_prefix()
                                                   : op->has_forget_prefix();
    if (is_same) return AppendTo(key, keys);
    // What is forgotten makes room for what is offloaded behind it.
    if ((kind == KeyOp::kOffload && op->has_forget_prefix()) || Contains(*keys, key)) break;
  }
  v1::CacheOp* op = ops->Add();
  switch (kind) {
    case KeyOp::kOffload:
      return AppendTo(key, op->mutable_offload_prefix()->mutable_keys());
    case KeyOp::kDrop:
      return AppendTo(key, op->mutable_drop_prefix()->mutable_keys());
    case KeyOp::kForget:
      return AppendTo(key, op->mutable_forget_prefix()->mutable_keys());
  }
}

double Scheduler::copy_block_us() const {
  double us = 0;
  for (uint32_t s = 0; s < num_stages_; ++s) {
    const auto bytes = static_cast<double>(books_.PrefixBytes(stages()[s].layers));
    us = std::max(us, bytes / rates_[s].copy_bytes_per_us);
  }
  return us;
}

double Scheduler::compute_block_us() const {
  double us = 0;
  for (const Rates& rates : rates_) us = std::max(us, rates.compute_us_per_row);
  return us * limits::kBlockTokens;
}

void Scheduler::MeasureStep(uint32_t stage_index, uint32_t num_rows, uint64_t compute_us) {
  // The most rows so far, or many, are what a replay would go in.
  Rates& rates = rates_[stage_index];
  if (num_rows < std::min(rates.most_rows, kMeasuredRows)) return;
  const double us = static_cast<double>(compute_us) / num_rows;
  const double weight = num_rows > rates.most_rows && rates.most_rows < kMeasuredRows ? 1 : kRecent;
  rates.compute_us_per_row += weight * (us - rates.compute_us_per_row);
  rates.most_rows = std::max(rates.most_rows, num_rows);
}

bool Scheduler::IsWorthOffloading() const {
  // An epoch's first plan finds no host memory yet.
  if (host_blocks_ == 0 || ledger_.next_step().value == 1) return false;
  switch (context_->options.preempt) {
    case PreemptMode::kReplay:
      return false;
    case PreemptMode::kPark:
      return true;
    case PreemptMode::kAuto:
      break;
  }
  return copy_block_us() < compute_block_us();
}

bool Scheduler::MayOffload(const PrefixIndex::Node& node, Ops* ops) {
  while (index_.num_on_host() >= host_blocks_) {
    PrefixIndex::Node* oldest = index_.OldestOnHost();
    if (oldest == nullptr || !PrefixIndex::IsOlder(*oldest, node)) return false;
    ++context_->stats.prefix_blocks_forgotten;
    GiveUp(oldest, ops);
  }
  return true;
}

bool Scheduler::DropOldest(Draft* draft) {
  PrefixIndex::Node* node = index_.Oldest();
  if (node == nullptr) return false;
  Ops* ops = OpsOf(draft);
  const bool offloads = !node->on_host && IsWorthOffloading() && MayOffload(*node, ops);
  if (!node->on_host && !offloads) {
    ++context_->stats.prefix_blocks_dropped;
    GiveUp(node, ops);
    return true;
  }
  if (offloads) {
    ++context_->stats.prefix_blocks_offloaded;
    AddKey(KeyOp::kOffload, node->key, ops);
  }
  AddKey(KeyOp::kDrop, node->key, ops);
  for (uint32_t s = 0; s < num_stages_; ++s) books_.RemovePrefix(s);
  index_.ToHost(node);
  return true;
}

void Scheduler::GiveUp(PrefixIndex::Node* node, Ops* ops) {
  while (!node->children.empty()) GiveUp(node->children.back(), ops);
  if (node->on_host) AddKey(KeyOp::kForget, node->key, ops);
  if (!node->only_on_host()) AddKey(KeyOp::kDrop, node->key, ops);
  RemovePrefix(node);
}

void Scheduler::GiveUpOwn(const ContentKey& first, Ops* ops) {
  PrefixIndex::Node* node = index_.Find(first);
  // Held: the sequence is here twice, once on its way out. Who holds them last gives them up.
  if (node == nullptr || node->holders > 0) return;
  GiveUp(node, ops);
  ops_are_urgent_ = ops_are_urgent_ || ops == &due_ops_;
}

void Scheduler::GiveUpEnded() {
  for (auto it = parked_.begin(); it != parked_.end();) {
    const Sequence* sequence = journal_->Find(it->first);
    const Residency* home = sequence == nullptr ? nullptr : sequence->home();
    if (sequence != nullptr && (home == nullptr || home->scheduler == this)) {
      ++it;
      continue;
    }
    GiveUpOwn(it->second, &due_ops_);
    it = parked_.erase(it);
  }
}

void Scheduler::Flush() {
  while (PrefixIndex::Node* node = index_.Oldest()) GiveUp(node, &due_ops_);
  while (PrefixIndex::Node* node = index_.OldestOnHost()) GiveUp(node, &due_ops_);
  ops_are_urgent_ = !due_ops_.empty();
}

absl::Status Scheduler::OnMoved(uint32_t stage_index, const v1::PrefixesMoved& moved) {
  STRAIT_CHECK(started());
  STRAIT_ASSIGN_OR_RETURN(const std::vector<ContentKey> returned,
                          ParseContentKeys(moved.returned()));
  STRAIT_ASSIGN_OR_RETURN(const std::vector<ContentKey> lost, ParseContentKeys(moved.lost()));
  const auto check_due = [&](const ContentKey& key) {
    if (index_.AnswerDue(key, stage_index)) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(
        "tells that prefix block ", absl::Hex(key.high, absl::kZeroPad16),
        absl::Hex(key.low, absl::kZeroPad16), " moved, which was not to return there"));
  };
  for (const ContentKey& key : returned) {
    STRAIT_RETURN_IF_ERROR(check_due(key));
    if (index_.Answer(key, stage_index)) OnReturned(key);
  }
  for (const ContentKey& key : lost) {
    STRAIT_RETURN_IF_ERROR(check_due(key));
    (void)index_.Answer(key, stage_index);
    OnLost(key);
  }
  RefreshReturning();
  context_->stats.host_copied_bytes += moved.copied_bytes();
  context_->stats.host_copying_us += moved.copying_us();
  if (moved.copied_bytes() > 0 && moved.copying_us() > 0) {
    Rates& rates = rates_[stage_index];
    const double rate =
        static_cast<double>(moved.copied_bytes()) / static_cast<double>(moved.copying_us());
    const double weight = std::exchange(rates.copies_measured, true) ? kRecent : 1;
    rates.copy_bytes_per_us += weight * (rate - rates.copy_bytes_per_us);
  }
  return absl::OkStatus();
}

void Scheduler::OnReturned(const ContentKey& key) {
  PrefixIndex::Node* node = index_.Find(key);
  if (node == nullptr || !node->returning) return;  // it made room meanwhile
  ++context_->stats.prefix_blocks_returned;
  index_.LeaveHost(node);
  AddKey(KeyOp::kForget, key, &due_ops_);
}

void Scheduler::OnLost(const ContentKey& key) {
  ++context_->stats.prefix_blocks_lost;
  PrefixIndex::Node* node = index_.Find(key);
  if (node == nullptr || !node->on_host) return;
  // Whoever waits for it goes back to the queue, and computes it when its turn comes.
  std::vector<Residency*> waiting;
  for (const auto& [id, residency] : prefilling_) {
    const auto& path = residency->prefix.path;
    if (std::find(path.begin(), path.end(), node) != path.end()) waiting.push_back(residency);
  }
  for (Residency* residency : waiting) {
    STRAIT_CHECK(residency->returns && !residency->opened);
    Preempt(residency, nullptr);
  }
  GiveUp(node, &due_ops_);
  ops_are_urgent_ = true;
}

void Scheduler::RefreshReturning() {
  for (const auto& [id, residency] : prefilling_) {
    const auto& path = residency->prefix.path;
    const bool returns =
        residency->returns &&
        std::any_of(path.begin(), path.end(), [](auto* node) { return node->returning; });
    num_returning_ -= residency->returns && !returns;
    residency->returns = returns;
  }
}

bool Scheduler::IsParked(const Sequence& sequence) const {
  const std::optional<ContentKey> first = sequence.prefix_keys.First();
  return first && index_.Has(*first);
}

}  // namespace strait
