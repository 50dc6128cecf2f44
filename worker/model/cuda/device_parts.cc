// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/device_parts.h"

#include <algorithm>
#include <utility>

#include "proto/base/status_macros.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cuda/uploader.h"

namespace strait {

uint64_t DeviceLayerBytes(const ModelConfig& config, LayerIndex layer, bool expands) {
  Region region(nullptr);
  LayOutLayer(config, layer, expands, region);
  return region.end();
}

uint64_t DeviceEmbeddingBytes(const ModelConfig& config) {
  Region region(nullptr);
  LayOutEmbedding(config, region);
  return region.end();
}

uint64_t DeviceHeadBytes(const ModelConfig& config) {
  Region region(nullptr);
  LayOutHead(config, region);
  return region.end();
}

DeviceStage DeviceStageParts::View() const {
  DeviceStage stage;
  for (const auto& layer : layers) stage.layers.push_back(layer->weights);
  if (embedding != nullptr) stage.embed_tokens = embedding->weights;
  if (head != nullptr) {
    stage.norm = head->weights.norm;
    stage.lm_head = head->weights.lm_head;
  }
  return stage;
}

uint64_t DeviceParts::MissingBytes(const ModelConfig& config, LayerRange layers, bool expands,
                                   const CudaTraits& traits) const {
  const WeightParts needed = PartsOf(config, layers);
  const WeightParts missing = cache_.Missing(needed, cache_.Find(needed));
  uint64_t bytes = 0;
  for (const LayerIndex layer : missing.layers) {
    bytes += traits.RoundUp(DeviceLayerBytes(config, layer, expands));
  }
  if (missing.embedding) bytes += traits.RoundUp(DeviceEmbeddingBytes(config));
  if (missing.head) bytes += traits.RoundUp(DeviceHeadBytes(config));
  return bytes;
}

absl::StatusOr<DeviceStageParts> DeviceParts::Load(WeightSource& source, LayerRange layers,
                                                   bool expands, DeviceArena& arena,
                                                   PinnedPool& pinned, std::string_view what,
                                                   const LoadProgress& progress) {
  const ModelConfig& config = source.config();
  const WeightParts needed = PartsOf(config, layers);
  DeviceStageParts parts;
  static_cast<decltype(cache_)::Parts&>(parts) = cache_.Find(needed);
  const WeightParts missing = cache_.Missing(needed, parts);

  // All memory first: nothing is read for a stage that does not fit.
  std::vector<std::shared_ptr<DevicePart<DeviceLayer>>> new_layers(missing.layers.size());
  std::shared_ptr<DevicePart<cuda::Matrix>> new_embedding;
  std::shared_ptr<DevicePart<DeviceHead>> new_head;
  uint64_t total_bytes = 0;
  const auto take = [&](uint64_t bytes, auto* part) -> absl::Status {
    *part = std::make_shared<typename std::decay_t<decltype(*part)>::element_type>();
    total_bytes += bytes;
    STRAIT_ASSIGN_OR_RETURN((*part)->memory, arena.Take(bytes, what));
    return absl::OkStatus();
  };
  for (size_t i = 0; i < missing.layers.size(); ++i) {
    const LayerIndex layer = missing.layers[i];
    STRAIT_RETURN_IF_ERROR(take(DeviceLayerBytes(config, layer, expands), &new_layers[i]));
    Region region(new_layers[i]->memory.data());
    new_layers[i]->weights = LayOutLayer(config, layer, expands, region);
  }
  if (missing.embedding) {
    STRAIT_RETURN_IF_ERROR(take(DeviceEmbeddingBytes(config), &new_embedding));
    Region region(new_embedding->memory.data());
    new_embedding->weights = LayOutEmbedding(config, region);
  }
  if (missing.head) {
    STRAIT_RETURN_IF_ERROR(take(DeviceHeadBytes(config), &new_head));
    Region region(new_head->memory.data());
    new_head->weights = LayOutHead(config, region);
  }

  STRAIT_ASSIGN_OR_RETURN(std::unique_ptr<Uploader> up, Uploader::Create(pinned));
  const auto tell = [&] {
    if (progress) progress(std::min(up->bytes(), total_bytes), total_bytes);
  };
  for (size_t i = 0; i < missing.layers.size(); ++i) {
    const LayerIndex layer = missing.layers[i];
    STRAIT_ASSIGN_OR_RETURN(const LayerWeights weights, source.LoadLayer(layer));
    STRAIT_RETURN_IF_ERROR(UploadLayer(*up, config, weights, new_layers[i]->weights));
    tell();
  }
  if (missing.embedding) {
    STRAIT_ASSIGN_OR_RETURN(const EmbeddingWeights weights, source.LoadEmbedding());
    STRAIT_RETURN_IF_ERROR(up->Matrix(weights.embed_tokens, new_embedding->weights));
    tell();
  }
  if (missing.head) {
    STRAIT_ASSIGN_OR_RETURN(const HeadWeights weights, source.LoadHead());
    STRAIT_RETURN_IF_ERROR(up->Vector(weights.norm, new_head->weights.norm));
    STRAIT_RETURN_IF_ERROR(up->Matrix(weights.lm_head, new_head->weights.lm_head));
  }
  STRAIT_RETURN_IF_ERROR(up->Finish());
  for (size_t i = 0; i < missing.layers.size(); ++i) {
    parts.layers[missing.layers[i] - layers.begin] = std::move(new_layers[i]);
  }
  if (missing.embedding) parts.embedding = std::move(new_embedding);
  if (missing.head) parts.head = std::move(new_head);
  cache_.Remember(needed, parts);
  if (progress) progress(total_bytes, total_bytes);
  return parts;
}

}  // namespace strait
