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

void CacheShares::Regroup() {
  for (auto& [id, share] : shares_) {
    share.group = id;
    share.has_successor = false;
  }
  for (bool more = true; more;) {
    more = false;
    for (auto& [id, share] : shares_) {
      for (const uint64_t before : share.successor_of) {
        const auto it = shares_.find(before);
        if (it == shares_.end()) continue;
        const uint64_t group = std::min(share.group, it->second.group);
        more |= group != share.group || group != it->second.group;
        share.group = it->second.group = group;
        it->second.has_successor = true;
      }
    }
  }
  std::set<uint64_t> handovers;
  for (const auto& [id, share] : shares_) {
    if (share.has_successor && !share.is_gone) handovers.insert(share.group);
  }
  needed_ = 0;
  for (auto it = shares_.begin(); it != shares_.end();) {
    Share& share = it->second;
    share.is_in_handover = handovers.count(share.group) > 0;
    if (!share.is_in_handover && share.is_gone) {
      it = shares_.erase(it);
      continue;
    }
    if (!share.is_in_handover) share.successor_of.clear();
    if (!share.is_in_handover || share.has_successor) needed_ += share.most;
    ++it;
  }
}

std::vector<uint64_t> CacheShares::WaitsFor(uint64_t stage_id) const {
  std::vector<uint64_t> before;
  const Share& mine = shares_.at(stage_id);
  if (!mine.is_in_handover || mine.has_successor) return before;
  for (const auto& [id, share] : shares_) {
    if (share.group == mine.group && share.has_successor && !share.is_gone) before.push_back(id);
  }
  return before;
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
  if (const auto it = shares_.find(stage_id); it != shares_.end()) {
    STRAIT_CHECK(it->second.is_gone, "the stage has a share already");
    return absl::AlreadyExistsError(absl::StrCat(
        "stage ", stage_id, " was unloaded, and others that are handed over with it were not"));
  }
  if (!successor_of.empty()) return AddSuccessor(stage_id, blocks, std::move(successor_of));
  // Room that another share left and that has not gone yet serves as well.
  STRAIT_RETURN_IF_ERROR(GrowTo(needed_ + blocks));
  shares_[stage_id] = {.blocks = blocks, .most = blocks};
  Regroup();
  return absl::OkStatus();
}

absl::Status CacheShares::AddSuccessor(uint64_t stage_id, uint32_t blocks,
                                       std::vector<uint64_t> successor_of) {
  for (const uint64_t id : successor_of) {
    const auto it = shares_.find(id);
    const char* why = nullptr;
    if (it == shares_.end() || it->second.is_gone) {
      why = " is not here";
    } else if (!WaitsFor(id).empty()) {
      why = " itself follows another one";
    } else if (!IsSettled(id)) {
      why = " still holds more than its cache is to have";
    }
    if (why == nullptr) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("stage ", id, why, ": stage ", stage_id, " cannot be its successor"));
  }
  shares_[stage_id] = {.blocks = blocks, .most = blocks, .successor_of = std::move(successor_of)};
  Regroup();
  const uint64_t group = shares_.at(stage_id).group;
  uint64_t theirs = 0;
  uint64_t successors = 0;
  for (const auto& [id, share] : shares_) {
    if (share.group == group) (share.has_successor ? theirs : successors) += share.blocks;
  }
  if (successors <= theirs) return absl::OkStatus();
  shares_.erase(stage_id);
  Regroup();
  return absl::InvalidArgumentError(
      absl::StrCat("with stage ", stage_id, " successors may hold ", successors,
                   " latent blocks, the stages that they follow have ", theirs));
}

void CacheShares::Remove(uint64_t stage_id) {
  Share& share = shares_.at(stage_id);
  STRAIT_CHECK(!share.is_gone, "a share goes once");
  if (share.has_successor) {
    share.is_gone = true;
  } else {
    shares_.erase(stage_id);
  }
  Regroup();
}

void CacheShares::Clear() {
  shares_.clear();
  Regroup();
}

absl::Status CacheShares::Change(uint64_t stage_id, uint32_t blocks) {
  Share& share = shares_.at(stage_id);
  if (share.is_in_handover) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the cache of stage ", stage_id, " is being handed over, its size cannot be changed"));
  }
  const uint32_t most = std::max(share.most, blocks);
  STRAIT_RETURN_IF_ERROR(GrowTo(needed_ + (most - share.most)));
  share.blocks = blocks;
  share.most = most;
  Regroup();
  return absl::OkStatus();
}

void CacheShares::Settle(uint64_t stage_id) {
  Share& share = shares_.at(stage_id);
  share.most = share.blocks;
  Regroup();
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
