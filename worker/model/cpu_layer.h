// SPDX-License-Identifier: Apache-2.0
//
// CpuLayers runs one decoder layer over a tile: attention over the paged latent cache, then the
// dense or mixture-of-experts feed-forward, each added to `hidden`.
//
// Borrows: context, config, workspace; they outlive it.
// Thread:  loop thread only.
// Shapes:  hidden [tile.num_rows, hidden_size] fp32, changed in place.
// Why:     a row's bits depend on its sequence alone: kernels promise it for rows, threads and
//          instruction sets, and nothing here depends on which rows share a tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cache.h"
#include "kernels/cpu/context.h"
#include "kernels/gemm.h"
#include "kernels/rope.h"
#include "proto/model/model_config.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cpu_workspace.h"

namespace strait {

// Rows that go through the layers together; workspace.cos_sin holds the rotation of their
// positions.
struct Tile {
  uint32_t num_rows = 0;
  const int32_t* positions = nullptr;       // [num_rows]
  const int32_t* sequence_index = nullptr;  // [num_rows] row of page_tables
  const uint8_t* is_cached = nullptr;       // [sequences of the batch]
};

class CpuLayers {
 public:
  CpuLayers(cpu::Context& context, const ModelConfig& config, const CacheLayout& layout,
            std::byte* blocks, CpuWorkspace& workspace);

  // `page_tables` [sequences of the batch]: this layer's.
  void Run(const LayerWeights& weights, const uint32_t* const* page_tables, const Tile& tile,
           float* hidden);
  // Fills workspace.cos_sin. Before the first layer of a tile.
  void Rotate(const Tile& tile);

 private:
  void Project(const AttentionWeights& weights, const Tile& tile);
  void RotateProjected(const Tile& tile);
  void Attend(const AttentionWeights& weights, const uint32_t* const* page_tables,
              const Tile& tile);
  void Dense(const MlpWeights& weights, uint32_t num_rows, float* hidden);
  void Moe(const MoeWeights& weights, uint32_t num_rows, float* hidden);
  void Norm(const float* x, int64_t x_stride, VectorView weight, double eps, float* y,
            int64_t y_stride, uint32_t num_rows);

  cpu::Context& context_;
  const ModelConfig& config_;
  const CacheLayout layout_;
  std::byte* const blocks_;
  CpuWorkspace& ws_;
  const RopeConfig rope_;
  std::vector<float> inv_freq_;  // [qk_rope_head_dim / 2], constant
  const float rope_scaling_;
  const float softmax_scale_;
  std::vector<GemmParams>
      products_;  // of a grouped product; kept, so that a step allocates nothing
};

}  // namespace strait
