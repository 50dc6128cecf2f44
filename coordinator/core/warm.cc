// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/warm.h"

#include <algorithm>
#include <tuple>

namespace strait {

uint64_t WarmCacheBytes(const ModelShape& model, LayerRange layers) {
  return layers.size() * model.block_bytes;
}

std::optional<LayerRange> NextWarm(const CoreOptions& options, const ModelShape& model,
                                   const WorkerMemory& memory, const HostedStages& warm,
                                   absl::Span<const WarmRange> ranges) {
  const auto has = [&](LayerRange layers) {
    return std::any_of(warm.begin(), warm.end(),
                       [&](const auto& entry) { return entry.second.layers == layers; });
  };
  const auto fits = [&](const WarmRange& range) {
    if (StageRowsMax(options, model, range.layers, memory) < range.planned_rows / 2) return false;
    HostedStages with = warm;
    const uint64_t id = with.empty() ? 1 : with.rbegin()->first + 1;
    with[id] = {.layers = range.layers, .cache_bytes = WarmCacheBytes(model, range.layers)};
    return BookedBytes(options, model, memory, with) <= memory.bytes;
  };
  const auto rank = [&](const WarmRange& range) {
    return std::tuple(range.num_covers, -int64_t{range.num_stages},
                      -static_cast<int64_t>(StageWeightBytes(model, range.layers)),
                      range.layers.begin, range.layers.end);
  };
  const WarmRange* best = nullptr;
  for (const WarmRange& range : ranges) {
    if (has(range.layers) || (best != nullptr && rank(*best) <= rank(range)) || !fits(range)) {
      continue;
    }
    best = &range;
  }
  if (best == nullptr) return std::nullopt;
  return best->layers;
}

}  // namespace strait
