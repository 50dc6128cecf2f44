// SPDX-License-Identifier: Apache-2.0
//
// DeviceParts loads the weights of GPU stages, each layer once for all stages of a worker that have it:
// every part is a lease of its own.
//
// Owns:    nothing: a part lives as long as a stage that has it, and so does its memory.
// Thread:  loader thread only; parts may be given up on any.
// Errors:  ResourceExhausted, before anything is read; those of UploadLayer.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "worker/model/cuda/cuda_workspace.h"
#include "worker/model/cuda/device_arena.h"
#include "worker/model/cuda/pinned.h"
#include "worker/model/cuda/weights.h"
#include "worker/model/part_cache.h"

namespace strait {

// What lies in memory of its own.
template <class W>
struct DevicePart {
  W weights;
  DeviceArena::Lease memory;
};

struct DeviceStageParts
    : ModelParts<DevicePart<DeviceLayer>, DevicePart<cuda::Matrix>, DevicePart<DeviceHead>> {
  // As the kernels want them.
  DeviceStage View() const;
};

class DeviceParts {
 public:
  absl::StatusOr<DeviceStageParts> Load(WeightSource& source, LayerRange layers, bool expands,
                                        DeviceArena& arena, PinnedPool& pinned,
                                        std::string_view what, const LoadProgress& progress);

  // Of device memory, in slabs, what a stage with these layers would add.
  uint64_t MissingBytes(const ModelConfig& config, LayerRange layers, bool expands,
                        const CudaTraits& traits) const;

 private:
  PartCache<DevicePart<DeviceLayer>, DevicePart<cuda::Matrix>, DevicePart<DeviceHead>> cache_;
};

// Device memory of each part.
uint64_t DeviceLayerBytes(const ModelConfig& config, LayerIndex layer, bool expands);
uint64_t DeviceEmbeddingBytes(const ModelConfig& config);
uint64_t DeviceHeadBytes(const ModelConfig& config);

}  // namespace strait
