// SPDX-License-Identifier: Apache-2.0
//
// SharedParts loads the weights of CPU stages, each layer once for all stages of a worker that have it.
//
// Owns:    nothing: a part lives as long as a stage that has it, and so does its share of the budget.
// Thread:  loader thread only; parts may be given up on any.
// Errors:  ResourceExhausted, before anything is read, if the bytes that config.json announces are not
//          there, or afterwards if tensors are wider; those of LoadWeightParts.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/memory.h"
#include "worker/model/part_cache.h"

namespace strait {

template <class W>
struct HostPart {
  W weights;
  MemoryBudget::Share share;
};

struct StageParts
    : ModelParts<HostPart<LayerWeights>, HostPart<EmbeddingWeights>, HostPart<HeadWeights>> {
  uint64_t bytes = 0;  // of all, shared or not
};

class SharedParts {
 public:
  // `what` the stage is, for errors. `extra_bytes`: must be there, too.
  absl::StatusOr<StageParts> Load(WeightSource& source, LayerRange layers,
                                  const std::shared_ptr<MemoryBudget>& budget,
                                  std::string_view what, uint64_t extra_bytes, uint32_t num_threads,
                                  const LoadProgress& progress);

 private:
  PartCache<HostPart<LayerWeights>, HostPart<EmbeddingWeights>, HostPart<HeadWeights>> cache_;
};

}  // namespace strait
