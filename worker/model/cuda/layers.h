// SPDX-License-Identifier: Apache-2.0
//
// CudaLayers runs one decoder layer over a tile: attention over the paged latent cache, then the
// dense or mixture-of-experts feed-forward, each added to the workspace's hidden states.
//
// Borrows: config, workspace, the pool, device memory; they outlive it.
// Thread:  loop thread only; asynchronous on one stream.
// Errors:  those of CUDA's launches.
// Why:     the residual is fp32; every product reads bf16 and sums in fp32; what goes through a
//          nonlinearity is rounded to bf16 once; a cache row to its format. With fp8 activations,
//          what fp8 weights are multiplied with becomes e4m3 codes just before; the router, the
//          absorbed projections and attention stay bf16, as DeepSeek-V3 does it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/cuda/attention/latent.h"
#include "kernels/cuda/attention/mla.h"
#include "kernels/cuda/gemm/gemm.h"
#include "kernels/cuda/moe/moe.h"
#include "proto/model/model_config.h"
#include "worker/model/cuda/cuda_workspace.h"
#include "worker/model/cuda/prompt_plan.h"
#include "worker/model/cuda/weights.h"

namespace strait {

// Rows that go through the layers together; device pointers.
struct CudaTile {
  int32_t num_rows = 0;
  const int32_t* positions = nullptr;         // [num_rows]
  const int32_t* sequence_index = nullptr;    // [num_rows] into a layer's segments
  absl::Span<const cuda::MlaPlanView> plans;  // launched one after the other; together all rows
                                              // that attend in the absorbed form
  int32_t attention_tile_rows =
      cuda::kMlaTileRows;               // of the plans' tiles, at most: MlaParams::tile_rows
  const PromptPlan* prompts = nullptr;  // which rows attend in the absorbed form, and how the
                                        // others; null: all are absorbed
};

// The latent cache on the device.
struct CudaPool {
  std::byte* blocks = nullptr;
  int64_t block_bytes = 0;
  RowFormat format = RowFormat::kBf16;
  cuda::MlaPoolMap map;  // bf16 rows of the Hopper kernel
};

class CudaLayers {
 public:
  CudaLayers(const ModelConfig& config, const CudaPool& pool, const CudaWorkspace& workspace,
             const float* inv_freq, cudaStream_t stream);

  // Fills workspace.cos_sin. Before the first layer of a tile.
  absl::Status Rotate(const CudaTile& tile);
  // `segments` [sequences of the batch]: this layer's, on the device. `next`: the layer that the tile
  // goes through right after, null for the last one; a layer may do the next one's first norm.
  absl::Status Run(const DeviceLayer& weights, const DeviceLayer* next,
                   const cuda::MlaSegment* segments, const CudaTile& tile);

 private:
  absl::Status Project(const DeviceLayer& weights, const CudaTile& tile);
  absl::Status Attend(const DeviceLayer& weights, const cuda::MlaSegment* segments,
                      const CudaTile& tile);
  // The products beside attention in the absorbed form, of some rows: queries into latent space,
  // results out of it.
  cuda::GemmParams IntoLatent(const DeviceLayer& weights, const RowRange& rows) const;
  cuda::GemmParams OutOfLatent(const DeviceLayer& weights, const RowRange& rows) const;
  // q -> attended of the prompts, in the expanded form. After all that is absorbed.
  absl::Status AttendPrompts(const DeviceLayer& weights, const cuda::MlaSegment* segments,
                             const CudaTile& tile);
  absl::Status Dense(const DeviceMlp& mlp, int32_t num_rows);
  absl::Status Moe(const DeviceLayer& weights, const DeviceLayer* next, int32_t num_rows);
  // hidden -> normed, the experts' lists.
  absl::Status ChooseExperts(const DeviceLayer& weights, const cuda::ExpertListsParams& lists);
  absl::Status NormHidden(const float* weight, int32_t num_rows);
  // Quantizes rows that the next products read, if `quantized`.
  absl::Status Quantize(bool quantized, const cuda::Bf16* x, int64_t x_stride, int32_t dim,
                        int64_t num_rows);
  absl::Status Norm(const float* x, int64_t x_stride, const float* weight, int32_t dim, double eps,
                    cuda::Bf16* y, int64_t y_stride, int32_t num_rows);

  const ModelConfig& config_;
  const CudaPool& pool_;
  const CudaWorkspace& ws_;
  const float* const inv_freq_;  // [qk_rope_head_dim / 2], on the device
  const cudaStream_t stream_;
  const float rope_scaling_;
  const float softmax_scale_;
  const int64_t hidden_stride_;  // of normed rows
  bool is_normed_ = false;       // the next layer's first norm is done
};

}  // namespace strait
