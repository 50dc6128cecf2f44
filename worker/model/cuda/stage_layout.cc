// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/stage_layout.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/model/reservation.h"
#include "worker/model/cuda/device_parts.h"
#include "worker/model/cuda/device_tables.h"

namespace strait {
namespace {

uint64_t PoolBlockBytes(const ModelConfig& c, const CudaTraits& traits) {
  return BlockBytes(traits.row_format, c.kv_lora_rank, c.qk_rope_head_dim);
}

bool Fits(const StageCosts& costs, LayerRange layers, uint64_t pool_blocks, uint64_t bytes) {
  const uint64_t fixed = StageFixedBytes(costs, layers);
  return fixed <= bytes && pool_blocks <= (bytes - fixed) / costs.block_bytes;
}

}  // namespace

CudaStageLayout LayOutStage(const ModelConfig& c, const StageSpec& spec, const CudaTraits& traits,
                            std::byte* base) {
  const StageCosts costs = CudaStageCosts(c, traits);
  CudaStageLayout l;
  l.bytes.weights =
      StageWeightBytes(costs.layer_bytes, costs.embedding_bytes, costs.head_bytes, spec.layers);
  l.bytes.pool = traits.RoundUp(uint64_t{spec.pool_blocks} * PoolBlockBytes(c, traits));
  Region region(base);
  l.inv_freq = region.Take<float>(c.qk_rope_head_dim / 2);
  l.limits =
      MakeStepLimits(c, spec.layers, TileRowsOf(costs, spec.layers, l.bytes.weights), traits);
  l.workspace = LayOutCudaWorkspace(c, spec.layers, l.limits, region);
  l.region_end = region.end();
  l.bytes.graphs = kCudaGraphBytes + spec.layers.size() * kCudaGraphBytesEachLayer;
  l.bytes.workspace =
      traits.RoundUp(region.end()) +
      traits.RoundUp(DeviceTables::DeviceBytes(spec.layers.size(), spec.pool_blocks)) +
      l.bytes.graphs;
  return l;
}

uint32_t TileRowsOf(const StageCosts& costs, LayerRange layers, uint64_t weight_bytes) {
  const size_t chosen = ChooseWorkspace(WorkspaceSizesOf(costs, layers), weight_bytes);
  return kCudaMinTileRows * static_cast<uint32_t>(chosen + 1);
}

StageCosts CudaStageCosts(const ModelConfig& c, const CudaTraits& traits) {
  const uint32_t n = c.num_hidden_layers;
  StageCosts costs;
  for (LayerIndex layer = 0; layer < n; ++layer) {
    costs.layer_bytes.push_back(
        traits.RoundUp(DeviceLayerBytes(c, layer, ExpandsPrompts(c, traits))));
  }
  costs.embedding_bytes = traits.RoundUp(DeviceEmbeddingBytes(c));
  costs.head_bytes = traits.RoundUp(DeviceHeadBytes(c));
  costs.block_bytes = PoolBlockBytes(c, traits) + DeviceTables::kBytesEachBlock;
  costs.layer_workspace_bytes =
      kCudaGraphBytesEachLayer + limits::kMaxStepSequences * sizeof(cuda::MlaSegment);
  static_assert(limits::kMaxStepSequences * sizeof(cuda::MlaSegment) % Region::kAlign == 0);
  // The fixed part of the page tables, and what they, the workspace and the cache are rounded up by.
  costs.stage_bytes = DeviceTables::DeviceBytes(n, 0) + 2 * Region::kAlign + 3 * traits.slab_bytes;
  costs.edge_bytes = traits.slab_bytes;  // that an edge's places are rounded up by
  const uint32_t most = std::clamp(traits.max_step_tokens, kCudaMinTileRows,
                                   traits.deterministic ? kCudaMaxFixedTileRows : kCudaMaxTileRows);
  for (uint32_t rows = kCudaMinTileRows; rows <= most; rows += kCudaMinTileRows) {
    // Of stages without a layer, in the middle and at the end.
    for (const LayerRange none : {LayerRange{0, 0}, LayerRange{n, n}}) {
      Region region(nullptr);
      region.Take<float>(c.qk_rope_head_dim / 2);
      LayOutCudaWorkspace(c, none, MakeStepLimits(c, none, rows, traits), region);
      (none.end == n ? costs.last_workspace_bytes : costs.workspace_bytes)
          .push_back(region.end() + kCudaGraphBytes);
    }
  }
  return costs;
}

std::string WhatWouldFit(const StageCosts& costs, const StageSpec& spec, uint64_t bytes) {
  const uint64_t columns = spec.pool_blocks / spec.layers.size();
  uint64_t fewer = columns;
  while (fewer > 0 && !Fits(costs, spec.layers, fewer * spec.layers.size(), bytes)) fewer /= 2;
  if (fewer > 0) {
    return absl::StrCat("with a cache of ", fewer * spec.layers.size(), " latent blocks (",
                        fewer * limits::kBlockTokens, " tokens) it would fit");
  }
  LayerRange layers = spec.layers;
  while (layers.size() > 0 && !Fits(costs, layers, columns * layers.size(), bytes)) --layers.end;
  return layers.size() > 0
             ? absl::StrCat("its layers ", layers.begin, " to ", layers.end,
                            " would fit with that cache: use more stages")
             : std::string(
                   "not one of its layers would fit with that cache: use a larger GPU, or "
                   "more stages with less cache");
}

}  // namespace strait
