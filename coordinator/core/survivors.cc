// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/survivors.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"

namespace strait {

void AddHolding(SequenceId id, MayHold also, Holdings* holdings) {
  const auto [it, is_new] = holdings->emplace(id, also);
  if (is_new) return;
  it->second.planned = std::max(it->second.planned, also.planned);
  it->second.confirmed = std::min(it->second.confirmed, also.confirmed);
  it->second.prefix_blocks = std::max(it->second.prefix_blocks, also.prefix_blocks);
}

absl::Status CheckHeld(const Holdings& holdings, const HeldList& told) {
  uint64_t last_id = 0;
  for (const v1::HeldSequence& held : told) {
    if (held.sequence_id() <= last_id) {
      return absl::InvalidArgumentError(absl::StrCat("tells sequence ", held.sequence_id(),
                                                     " behind ", last_id,
                                                     ", the ids of what it has must rise"));
    }
    last_id = held.sequence_id();
    const auto it = holdings.find(SequenceId{last_id});
    if (it == holdings.end()) {
      return absl::FailedPreconditionError(absl::StrCat("tells ", held.rows(), " rows of sequence ",
                                                        last_id, ", which is not open there"));
    }
    if (held.rows() > it->second.planned) {
      return absl::FailedPreconditionError(absl::StrCat("tells ", held.rows(), " rows of sequence ",
                                                        last_id, ", at most ", it->second.planned,
                                                        " were planned there"));
    }
    const uint32_t most = std::min(it->second.prefix_blocks, held.rows() / limits::kBlockTokens);
    if (held.prefix_blocks() > most) {
      return absl::FailedPreconditionError(
          absl::StrCat("tells ", held.prefix_blocks(), " prefix blocks of sequence ", last_id,
                       " with ", held.rows(), " rows, at most ", most, " can be"));
    }
  }
  return absl::OkStatus();
}

Holdings Narrowed(const Holdings& holdings, const HeldList& told) {
  Holdings narrowed;
  for (const v1::HeldSequence& held : told) {
    const SequenceId id{held.sequence_id()};
    const uint32_t confirmed = holdings.at(id).confirmed;
    narrowed.emplace_hint(
        narrowed.end(), id,
        MayHold{held.rows(), std::min(held.rows(), confirmed), held.prefix_blocks()});
  }
  return narrowed;
}

std::vector<SequenceId> Survivors::Ids() const {
  std::set<SequenceId> ids;
  for (const Holdings& holdings : by_stage_) {
    for (const auto& [id, may_hold] : holdings) ids.insert(id);
  }
  return {ids.begin(), ids.end()};
}

KeptRows Survivors::Kept(SequenceId id, uint32_t rows_settled) const {
  KeptRows kept;
  for (const Holdings& holdings : by_stage_) {
    const auto it = holdings.find(id);
    const MayHold held = it == holdings.end() ? MayHold{} : it->second;
    uint32_t rows = std::min(held.confirmed, rows_settled);
    uint32_t prefix_blocks = held.prefix_blocks;
    if (rows < prefix_blocks * limits::kBlockTokens) {
      prefix_blocks = rows / limits::kBlockTokens;
      rows = prefix_blocks * limits::kBlockTokens;
    }
    kept.rows.push_back(rows);
    kept.prefix_blocks.push_back(prefix_blocks);
  }
  const bool any =
      std::any_of(kept.rows.begin(), kept.rows.end(), [](uint32_t rows) { return rows > 0; });
  return any ? kept : KeptRows();
}

}  // namespace strait
