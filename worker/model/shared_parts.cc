// SPDX-License-Identifier: Apache-2.0
#include "worker/model/shared_parts.h"

#include <utility>

#include "proto/base/status_macros.h"

namespace strait {
namespace {

template <class W>
absl::StatusOr<std::shared_ptr<const HostPart<W>>> MakePart(
    W weights, const std::shared_ptr<MemoryBudget>& budget, std::string_view what) {
  STRAIT_ASSIGN_OR_RETURN(MemoryBudget::Share share,
                          MemoryBudget::Take(budget, weights.bytes, what));
  auto part = std::make_shared<HostPart<W>>();
  part->weights = std::move(weights);
  part->share = std::move(share);
  return part;
}

}  // namespace

absl::StatusOr<StageParts> SharedParts::Load(WeightSource& source, LayerRange layers,
                                             const std::shared_ptr<MemoryBudget>& budget,
                                             std::string_view what, uint64_t extra_bytes,
                                             uint32_t num_threads, const LoadProgress& progress) {
  const WeightParts needed = PartsOf(source.config(), layers);
  StageParts parts;
  static_cast<decltype(cache_)::Parts&>(parts) = cache_.Find(needed);
  const WeightParts missing = cache_.Missing(needed, parts);

  // Before anything is read: a stage that cannot fit must not push others out of the page cache.
  STRAIT_ASSIGN_OR_RETURN(
      MemoryBudget::Share announced,
      MemoryBudget::Take(budget, PartsBytes(source.config(), missing) + extra_bytes, what));
  STRAIT_ASSIGN_OR_RETURN(StageWeights loaded,
                          LoadWeightParts(source, missing, num_threads, progress));
  announced = MemoryBudget::Share();
  for (LayerWeights& weights : loaded.layers) {
    const LayerIndex layer = weights.layer;
    STRAIT_ASSIGN_OR_RETURN(parts.layers[layer - layers.begin],
                            MakePart(std::move(weights), budget, what));
  }
  if (missing.embedding) {
    STRAIT_ASSIGN_OR_RETURN(parts.embedding, MakePart(*std::move(loaded.embedding), budget, what));
  }
  if (missing.head) {
    STRAIT_ASSIGN_OR_RETURN(parts.head, MakePart(*std::move(loaded.head), budget, what));
  }
  for (const auto& part : parts.layers) parts.bytes += part->weights.bytes;
  if (parts.embedding != nullptr) parts.bytes += parts.embedding->weights.bytes;
  if (parts.head != nullptr) parts.bytes += parts.head->weights.bytes;
  cache_.Remember(needed, parts);
  return parts;
}

}  // namespace strait
