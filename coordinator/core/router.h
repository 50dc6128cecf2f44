// SPDX-License-Identifier: Apache-2.0
//
// Router picks the pipeline for a sequence: (later: the longest cached prefix, then) the least
// load, then the most free latent blocks, then the oldest pipeline.
//
// Thread:  pure function.
// Why:     sequences are routed when they can start, not when they arrive, so a pipeline that
//          slows down or dies has no queue of its own to be emptied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/types/span.h"

namespace strait {

struct RouteCandidate {
  bool has_room = false;      // the sequence could start now
  uint64_t load = 0;          // rows that its residents still want, and one for each
  uint32_t free_columns = 0;  // of latent blocks
};

inline std::optional<size_t> ChoosePipeline(absl::Span<const RouteCandidate> candidates) {
  std::optional<size_t> best;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const RouteCandidate& c = candidates[i];
    if (!c.has_room) continue;
    if (!best || c.load < candidates[*best].load ||
        (c.load == candidates[*best].load && c.free_columns > candidates[*best].free_columns)) {
      best = i;
    }
  }
  return best;
}

}  // namespace strait
