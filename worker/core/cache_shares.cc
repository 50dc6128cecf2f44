// SPDX-License-Identifier: Apache-2.0
#include "worker/core/cache_shares.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {

void CacheShares::Count() {
  needed_ = 0;
  for (const auto& [id, share] : shares_) {
    if (share.handover == 0) needed_ += share.most;
  }
  for (const auto& [id, handover] : handovers_) needed_ += handover.blocks;
}

std::vector<uint64_t> CacheShares::WaitsFor(uint64_t stage_id) const {
  const uint64_t id = shares_.at(stage_id).handover;
  if (id == 0) return {};
  const Handover& handover = handovers_.at(id);
  const auto& successors = handover.successors;
  const bool waits = std::find(successors.begin(), successors.end(), stage_id) != successors.end();
  return waits ? handover.predecessors : std::vector<uint64_t>();
}

absl::Status CacheShares::GrowTo(uint64_t blocks) {
  if (blocks <= pool_.size()) return absl::OkStatus();
  if (blocks > std::numeric_limits<BlockId>::max()) {
    return absl::ResourceExhaustedError(absl::StrCat("the worker's stages would have ", blocks,
                                                     " latent blocks together, at most ",
                                                     std::numeric_limits<BlockId>::max()));
  }
  STRAIT_RETURN_IF_ERROR(memory_->Resize(static_cast<uint32_t>(blocks), {}));
  pool_.Grow(static_cast<uint32_t>(blocks));
  return absl::OkStatus();
}

absl::Status CacheShares::Add(uint64_t stage_id, uint32_t blocks,
                              std::vector<uint64_t> successor_of) {
  STRAIT_CHECK(shares_.count(stage_id) == 0, "the stage has a share already");
  if (!successor_of.empty()) return AddSuccessor(stage_id, blocks, std::move(successor_of));
  // Room that another share left and that has not gone yet serves as well.
  STRAIT_RETURN_IF_ERROR(GrowTo(needed_ + blocks));
  shares_[stage_id] = {.blocks = blocks, .most = blocks};
  Count();
  return absl::OkStatus();
}

absl::Status CacheShares::AddSuccessor(uint64_t stage_id, uint32_t blocks,
                                       std::vector<uint64_t> successor_of) {
  Handover joined{.successors_blocks = blocks, .successors = {stage_id}};
  std::set<uint64_t> parts;  // handovers that become this one
  for (const uint64_t id : successor_of) {
    const char* const why = shares_.count(id) == 0  ? " is not here"
                            : !WaitsFor(id).empty() ? " itself follows another one"
                            : !IsSettled(id)        ? " still holds more than its cache is to have"
                                                    : nullptr;
    if (why != nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("stage ", id, why, ": stage ", stage_id, " cannot be its successor"));
    }
    const Share& share = shares_.at(id);
    if (share.handover != 0) {
      parts.insert(share.handover);
      continue;
    }
    joined.blocks += share.blocks;
    joined.predecessors.push_back(id);
  }
  for (const uint64_t id : parts) {
    const Handover& part = handovers_.at(id);
    joined.blocks += part.blocks;
    joined.successors_blocks += part.successors_blocks;
    joined.predecessors.insert(joined.predecessors.end(), part.predecessors.begin(),
                               part.predecessors.end());
    joined.successors.insert(joined.successors.end(), part.successors.begin(),
                             part.successors.end());
  }
  if (joined.successors_blocks > joined.blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("with stage ", stage_id, " successors may hold ", joined.successors_blocks,
                     " latent blocks, the stages that they follow have ", joined.blocks));
  }
  std::sort(joined.predecessors.begin(), joined.predecessors.end());
  shares_[stage_id] = {.blocks = blocks, .most = blocks, .successor_of = std::move(successor_of)};
  for (const uint64_t id : parts) handovers_.erase(id);
  ++last_handover_;
  for (const auto* const ids : {&joined.predecessors, &joined.successors}) {
    for (const uint64_t id : *ids) shares_.at(id).handover = last_handover_;
  }
  handovers_[last_handover_] = std::move(joined);
  Count();
  return absl::OkStatus();
}

void CacheShares::LeaveHandover(uint64_t stage_id, const Share& share) {
  const auto it = handovers_.find(share.handover);
  if (it == handovers_.end()) return;
  Handover& handover = it->second;
  if (std::erase(handover.successors, stage_id) > 0) handover.successors_blocks -= share.blocks;
  std::erase(handover.predecessors, stage_id);
  for (const uint64_t id : handover.successors) std::erase(shares_.at(id).successor_of, stage_id);
  if (!handover.predecessors.empty() && !handover.successors.empty()) return;
  for (const auto* const ids : {&handover.predecessors, &handover.successors}) {
    for (const uint64_t id : *ids) shares_.at(id).handover = 0;
  }
  handovers_.erase(it);
}

void CacheShares::Remove(uint64_t stage_id) {
  const Share share = shares_.at(stage_id);
  shares_.erase(stage_id);
  LeaveHandover(stage_id, share);
  Count();
}

void CacheShares::Clear() {
  shares_.clear();
  handovers_.clear();
  Count();
}

absl::Status CacheShares::Change(uint64_t stage_id, uint32_t blocks) {
  Share& share = shares_.at(stage_id);
  if (share.handover != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the cache of stage ", stage_id, " is being handed over, its size cannot be changed"));
  }
  const uint32_t most = std::max(share.most, blocks);
  STRAIT_RETURN_IF_ERROR(GrowTo(needed_ + (most - share.most)));
  share.blocks = blocks;
  share.most = most;
  Count();
  return absl::OkStatus();
}

void CacheShares::Settle(uint64_t stage_id) {
  Share& share = shares_.at(stage_id);
  share.most = share.blocks;
  Count();
}

void CacheShares::Shrink(const Compact& compact) {
  const auto end = static_cast<uint32_t>(needed_);
  pool_.Narrow(end);
  std::vector<BlockMove> moves;
  compact(end, &moves);
  const absl::Status shrunk = memory_->Resize(end, moves);
  STRAIT_CHECK(shrunk.ok(), "a cache can always become smaller");
  pool_.DropNarrowed();
}

absl::Status CacheShares::CheckIntegrity() const {
  if (pool_.size() < needed_ || pool_.used() > needed_ || pool_.size() != memory_->num_blocks()) {
    return absl::InternalError(absl::StrCat("shares need ", needed_, " latent blocks, ",
                                            pool_.used(), " are held, the pool has ", pool_.size(),
                                            " and the cache ", memory_->num_blocks()));
  }
  return pool_.CheckIntegrity();
}

}  // namespace strait
