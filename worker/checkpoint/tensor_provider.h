// SPDX-License-Identifier: Apache-2.0
//
// TensorProvider gives the tensors of one load by name: the seam between what a layer consists of
// (weights.cc) and where bytes come from (a checkpoint, or a seed).
//
// Owns:    nothing after Finish; the storage that Finish returns owns what all views point to.
// Thread:  one thread uses one provider.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/weight.h"
#include "proto/base/ids.h"
#include "proto/model/model_config.h"
#include "worker/checkpoint/weights.h"

namespace strait {

enum class TensorRole : uint8_t {
  kLinear,  // a projection; fp8 in a quantized checkpoint
  kGate,
  kEmbedding,
  kHead,
  kNorm,
  kCorrectionBias,
};

class TensorProvider {
 public:
  virtual ~TensorProvider() = default;
  virtual absl::StatusOr<WeightMatrix> Matrix(const std::string& name, uint32_t rows, uint32_t cols,
                                              TensorRole role) = 0;
  virtual absl::StatusOr<VectorView> Vector(const std::string& name, uint32_t size,
                                            TensorRole role) = 0;
  // Makes the contents of all views so far readable.
  virtual absl::StatusOr<std::shared_ptr<const void>> Finish() = 0;
};

// Names and shapes are those of the published checkpoints.
absl::StatusOr<LayerWeights> AssembleLayer(const ModelConfig& config, LayerIndex layer,
                                           TensorProvider& tensors);
absl::StatusOr<EmbeddingWeights> AssembleEmbedding(const ModelConfig& config,
                                                   TensorProvider& tensors);
absl::StatusOr<HeadWeights> AssembleHead(const ModelConfig& config, TensorProvider& tensors);

}  // namespace strait
