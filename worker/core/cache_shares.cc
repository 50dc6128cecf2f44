// SPDX-License-Identifier: Apache-2.0
#include "worker/core/cache_shares.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"

namespace strait {

bool CacheShares::HasPredecessor(uint64_t stage_id) const {
  const std::vector<uint64_t>& before = shares_.at(stage_id).successor_of;
  return std::any_of(before.begin(), before.end(),
                     [this](uint64_t id) { return shares_.count(id) > 0; });
}

bool CacheShares::HasSuccessor(uint64_t stage_id) const {
  return std::any_of(shares_.begin(), shares_.end(), [stage_id](const auto& entry) {
    const std::vector<uint64_t>& before = entry.second.successor_of;
    return std::find(before.begin(), before.end(), stage_id) != before.end();
  });
}

bool CacheShares::AnyPredecessor() const {
  return std::any_of(shares_.begin(), shares_.end(),
                     [this](const auto& entry) { return HasPredecessor(entry.first); });
}

uint64_t CacheShares::Due() const {
  if (AnyPredecessor()) return pool_.size();
  uint64_t blocks = 0;
  for (const auto& [id, share] : shares_) blocks += share.blocks;
  return blocks;
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
  uint64_t theirs = 0;
  uint64_t successors = blocks;
  for (const uint64_t id : successor_of) {
    const auto it = shares_.find(id);
    if (it == shares_.end() || HasPredecessor(id)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "stage ", id, it == shares_.end() ? " is not here" : " itself follows another one",
          ": stage ", stage_id, " cannot be its successor"));
    }
    theirs += it->second.blocks;
  }
  for (const auto& [id, share] : shares_) {
    const bool beside = std::any_of(
        share.successor_of.begin(), share.successor_of.end(), [&successor_of](uint64_t before) {
          return std::find(successor_of.begin(), successor_of.end(), before) != successor_of.end();
        });
    if (beside) successors += share.blocks;
  }
  if (!successor_of.empty()) {
    if (successors > theirs) {
      return absl::InvalidArgumentError(absl::StrCat("successors may hold ", successors,
                                                     " latent blocks, the stages that they ",
                                                     "follow have ", theirs));
    }
    shares_[stage_id] = {blocks, std::move(successor_of)};
    return absl::OkStatus();
  }
  // Room that another share left and that has not gone yet serves as well.
  const uint64_t due = Due();
  STRAIT_RETURN_IF_ERROR(GrowTo(due + blocks));
  shares_[stage_id] = {blocks, {}};
  return absl::OkStatus();
}

void CacheShares::Remove(uint64_t stage_id) { STRAIT_CHECK(shares_.erase(stage_id) == 1); }

absl::Status CacheShares::Change(uint64_t stage_id, uint32_t blocks) {
  Share& share = shares_.at(stage_id);
  if (HasPredecessor(stage_id) || HasSuccessor(stage_id)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the cache of stage ", stage_id, " is being handed over, its size cannot be changed"));
  }
  if (blocks > share.blocks) STRAIT_RETURN_IF_ERROR(GrowTo(Due() + (blocks - share.blocks)));
  share.blocks = blocks;
  return absl::OkStatus();
}

void CacheShares::Shrink(const Compact& compact) {
  const auto end = static_cast<uint32_t>(Due());
  pool_.Narrow(end);
  std::vector<BlockMove> moves;
  compact(end, &moves);
  const absl::Status shrunk = memory_->Resize(end, moves);
  STRAIT_CHECK(shrunk.ok(), "a cache can always become smaller");
  pool_.DropNarrowed();
}

}  // namespace strait
