// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/cache_books.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"

namespace strait {

void CacheBooks::Start(const CachePolicy& policy, std::vector<StageCache> stages) {
  policy_ = policy;
  stages_ = std::move(stages);
  for (const StageCache& stage : stages_) {
    STRAIT_CHECK(stage.capacity_bytes > 0 && stage.reserved_bytes == 0 && stage.held_bytes == 0);
  }
}

bool CacheBooks::CanEverHold(uint32_t rows) const {
  return std::all_of(stages_.begin(), stages_.end(), [&](const StageCache& stage) {
    return ReservedBytes(policy_, rows, stage.layers) <= stage.capacity_bytes;
  });
}

uint64_t CacheBooks::PrefixBytes(LayerRange layers) const {
  return HeldBytes(policy_, limits::kBlockTokens, layers);
}

bool CacheBooks::HasRoom(uint32_t rows, const StageBlocks& prefix, uint64_t num_free,
                         uint32_t num_growing) const {
  for (uint32_t s = 0; s < stages_.size(); ++s) {
    const StageCache& stage = stages_[s];
    // A block more in each layer for each, but no more than a sixteenth of all.
    const uint64_t block = PrefixBytes(stage.layers);
    const uint64_t most = (stage.capacity_bytes / block + 15) / 16;
    const uint64_t headroom = block * std::min<uint64_t>(num_growing, most);
    // As sums: prefix blocks that it brings along may be more than what others leave.
    if (stage.reserved_bytes + ReservedBytes(policy_, rows, stage.layers) + headroom >
        stage.capacity_bytes + block * (prefix.at(s) + num_free)) {
      return false;
    }
  }
  return true;
}

uint64_t CacheBooks::free_rows(uint64_t num_free) const {
  uint64_t rows = std::numeric_limits<uint64_t>::max();
  for (const StageCache& stage : stages_) {
    const uint64_t bytes = stage.free_bytes() + num_free * PrefixBytes(stage.layers);
    rows = std::min(rows, RowsThatFit(policy_, bytes, stage.layers));
  }
  return rows;
}

bool CacheBooks::Fits(const std::vector<uint64_t>& capacity_bytes) const {
  STRAIT_CHECK(capacity_bytes.size() == stages_.size());
  for (size_t s = 0; s < stages_.size(); ++s) {
    if (stages_[s].reserved_bytes > capacity_bytes[s]) return false;
  }
  return true;
}

void CacheBooks::Resize(const std::vector<uint64_t>& capacity_bytes) {
  STRAIT_CHECK(Fits(capacity_bytes));
  for (size_t s = 0; s < stages_.size(); ++s) {
    STRAIT_CHECK(capacity_bytes[s] > 0);
    stages_[s].capacity_bytes = capacity_bytes[s];
  }
}

bool CacheBooks::CanReserve(uint32_t from, uint32_t to) const {
  if (CostTheSame(policy_, from, to)) return true;
  return std::all_of(stages_.begin(), stages_.end(), [&](const StageCache& stage) {
    return ReservedBytes(policy_, to, stage.layers) <=
           stage.free_bytes() + ReservedBytes(policy_, from, stage.layers);
  });
}

void CacheBooks::Reserve(uint32_t from, uint32_t to) {
  if (CostTheSame(policy_, from, to)) return;
  for (StageCache& stage : stages_) {
    stage.reserved_bytes -= ReservedBytes(policy_, from, stage.layers);
    stage.reserved_bytes += ReservedBytes(policy_, to, stage.layers);
    STRAIT_CHECK(stage.reserved_bytes <= stage.capacity_bytes);
  }
}

bool CacheBooks::CanEnter(uint32_t reserved_rows, const StageBlocks& prefix) const {
  return HasRoom(reserved_rows, prefix, 0, 0);
}

void CacheBooks::Enter(uint32_t reserved_rows, const StageBlocks& prefix) {
  for (uint32_t s = 0; s < stages_.size(); ++s) {
    StageCache& stage = stages_[s];
    stage.reserved_bytes += ReservedBytes(policy_, reserved_rows, stage.layers);
    stage.reserved_bytes -= prefix.at(s) * PrefixBytes(stage.layers);
    STRAIT_CHECK(stage.reserved_bytes <= stage.capacity_bytes);
  }
}

void CacheBooks::Leave(uint32_t reserved_rows, const StageBlocks& prefix) {
  for (uint32_t s = 0; s < stages_.size(); ++s) {
    StageCache& stage = stages_[s];
    stage.reserved_bytes += prefix.at(s) * PrefixBytes(stage.layers);
    stage.reserved_bytes -= ReservedBytes(policy_, reserved_rows, stage.layers);
  }
}

void CacheBooks::AddPrefix(uint32_t stage_index) {
  StageCache& stage = stages_[stage_index];
  stage.reserved_bytes += PrefixBytes(stage.layers);
  stage.held_bytes += PrefixBytes(stage.layers);
}

void CacheBooks::RemovePrefix(uint32_t stage_index) {
  StageCache& stage = stages_[stage_index];
  stage.reserved_bytes -= PrefixBytes(stage.layers);
  stage.held_bytes -= PrefixBytes(stage.layers);
}

void CacheBooks::Hold(const StageRows& rows, const StageBlocks& prefix) {
  for (uint32_t s = 0; s < stages_.size(); ++s) {
    StageCache& stage = stages_[s];
    stage.held_bytes += HeldBytes(policy_, rows.at(s), stage.layers);
    stage.held_bytes -= prefix.at(s) * PrefixBytes(stage.layers);
  }
}

void CacheBooks::Free(const StageRows& rows, const StageBlocks& prefix) {
  for (uint32_t s = 0; s < stages_.size(); ++s) {
    StageCache& stage = stages_[s];
    stage.held_bytes += prefix.at(s) * PrefixBytes(stage.layers);
    stage.held_bytes -= HeldBytes(policy_, rows.at(s), stage.layers);
  }
}

void CacheBooks::Grow(const StageRows& rows, uint32_t num_rows) {
  const uint32_t end = rows.next() + num_rows;
  if (CostTheSame(policy_, rows.next(), end)) return;
  for (uint32_t s = 0; s < stages_.size(); ++s) {
    if (!rows.Stores(s)) continue;
    stages_[s].held_bytes -= HeldBytes(policy_, rows.next(), stages_[s].layers);
    stages_[s].held_bytes += HeldBytes(policy_, end, stages_[s].layers);
  }
}

uint64_t CacheBooks::HeldInLayer(const StageRows& rows, const StageBlocks& prefix,
                                 uint32_t stage_index, LayerIndex layer) const {
  return HeldBytes(policy_, rows.at(stage_index), {layer, layer + 1}) -
         prefix.at(stage_index) * PrefixBytes({layer, layer + 1});
}

absl::Status CacheBooks::CheckEqual(const CacheBooks& due) const {
  STRAIT_CHECK(due.stages_.size() == stages_.size());
  for (size_t s = 0; s < stages_.size(); ++s) {
    const StageCache& stage = stages_[s];
    if (stage == due.stages_[s] && stage.held_bytes <= stage.reserved_bytes &&
        stage.reserved_bytes <= stage.capacity_bytes) {
      continue;
    }
    return absl::InternalError(
        absl::StrCat("bytes of stage ", s, ": reserved ", stage.reserved_bytes, " (counted ",
                     due.stages_[s].reserved_bytes, "), held ", stage.held_bytes, " (counted ",
                     due.stages_[s].held_bytes, ") of ", stage.capacity_bytes));
  }
  return absl::OkStatus();
}

CacheBooks CacheBooks::Empty() const {
  CacheBooks empty = *this;
  for (StageCache& stage : empty.stages_) stage.reserved_bytes = stage.held_bytes = 0;
  return empty;
}

}  // namespace strait
