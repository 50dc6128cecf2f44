// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/replay.h"

#include <algorithm>
#include <utility>

#include "proto/base/check.h"

namespace strait {

StageRows::StageRows(std::vector<uint32_t> kept) : kept_(std::move(kept)) {
  if (!kept_.empty()) next_ = *std::min_element(kept_.begin(), kept_.end());
  Even();
}

uint32_t StageRows::at(uint32_t stage_index) const {
  return even() ? next_ : std::max(next_, kept_[stage_index]);
}

StageRows::Chunk StageRows::Cut(uint32_t rows_max) const {
  STRAIT_CHECK(rows_max > 0);
  Chunk chunk{rows_max, 0};
  bool all_store = true;
  for (uint32_t s = 0; s < kept_.size(); ++s) {
    if (Stores(s)) {
      chunk.replay_stages = s + 1;
    } else {
      all_store = false;
      chunk.num_rows = std::min(chunk.num_rows, kept_[s] - next_);
    }
  }
  if (all_store) chunk.replay_stages = 0;
  return chunk;
}

void StageRows::Advance(uint32_t num_rows) {
  STRAIT_CHECK(num_rows > 0 && num_rows <= Cut(num_rows).num_rows);
  next_ += num_rows;
  Even();
}

void StageRows::Even() {
  if (std::all_of(kept_.begin(), kept_.end(), [this](uint32_t rows) { return rows <= next_; })) {
    kept_.clear();
  }
}

}  // namespace strait
