// SPDX-License-Identifier: Apache-2.0
//
// Router picks the pipeline for a sequence: the fewest rows to compute before it is done with its
// prompt, others' and its own, then the most room, then the oldest pipeline. Rows that are in prefix
// blocks, or that another sequence computes now, need not be computed. (What stages kept over an epoch is
// no matter of routing: Scheduler::Start places it.)
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
  bool has_room = false;  // the sequence could start now
  uint64_t load =
      0;  // rows that its residents still want, and one for each; and its own, less cached ones
  uint64_t free_rows =
      0;  // that its fullest stage could take: bytes do not compare, as layers differ
};

inline std::optional<size_t> ChoosePipeline(absl::Span<const RouteCandidate> candidates) {
  std::optional<size_t> best;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const RouteCandidate& c = candidates[i];
    if (!c.has_room) continue;
    if (!best || c.load < candidates[*best].load ||
        (c.load == candidates[*best].load && c.free_rows > candidates[*best].free_rows)) {
      best = i;
    }
  }
  return best;
}

}  // namespace strait
