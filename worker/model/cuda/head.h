// SPDX-License-Identifier: Apache-2.0
//
// CudaHead turns hidden states into LogitsResults: final norm, head, and scoring or sampling on the
// device; only tokens and log-probabilities come back.
//
// Owns:    pinned host memory.     Borrows: config, workspace, weights.
// Thread:  loop thread; a call returns when its results are there.
// Why:     noise is keyed by (seed, choice_index, position of the sampled token), so a sequence's
//          sampler has no state that could be lost.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/model_config.h"
#include "worker/backend.h"
#include "worker/model/cuda/pinned.h"
#include "worker/model/cuda/weights.h"
#include "worker/model/cuda/workspace.h"

namespace strait {

class CudaHead {
 public:
  static absl::StatusOr<CudaHead> Create(const ModelConfig& config, const StepLimits& limits,
                                         const CudaWorkspace& workspace, const DeviceStage& weights,
                                         cudaStream_t stream);

  // Rows of `requests` are those of the batch; the workspace's hidden states begin at `first_row`.
  absl::Status Read(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                    uint32_t first_row, std::vector<LogitsResult>* results);

 private:
  CudaHead(const ModelConfig& config, const StepLimits& limits, const CudaWorkspace& workspace,
           const DeviceStage& weights, cudaStream_t stream)
      : config_(&config), limits_(&limits), ws_(&workspace), weights_(&weights), stream_(stream) {}

  absl::Status ReadSome(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                        uint32_t first_row, std::vector<LogitsResult>* results);
  // Appends the row's lists to entries_.
  cuda::SampleRow RowOf(const StageBatch& batch, const LogitsRequest& request);

  const ModelConfig* config_;
  const StepLimits* limits_;
  const CudaWorkspace* ws_;
  const DeviceStage* weights_;
  cudaStream_t stream_;
  PinnedMemory tables_;
  PinnedMemory results_;
  std::vector<cuda::TokenEntry> entries_;
};

}  // namespace strait
