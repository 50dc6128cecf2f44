// SPDX-License-Identifier: Apache-2.0
//
// CudaHead turns hidden states into LogitsResults: final norm, head, and scoring or sampling on the
// device; only tokens and log-probabilities come back.
//
// Owns:    nothing; a HeadStep owns pinned host memory.     Borrows: config, workspace, weights.
// Thread:  loop thread; asynchronous on the stream, but for requests beyond the workspace's.
// Errors:  those of CUDA. Logits that are no numbers are a LogitsResult's DataLoss.
// Why:     noise is keyed by (seed, choice_index, position of the sampled token), so a sequence's
//          sampler has no state that could be lost.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/model/model_config.h"
#include "worker/backend.h"
#include "worker/model/cuda/cuda_workspace.h"
#include "worker/model/cuda/pinned.h"
#include "worker/model/cuda/weights.h"

namespace strait {

// What one step asks of the head, until its results are taken.
class HeadStep {
 public:
  static absl::StatusOr<HeadStep> Create(PinnedPool& pinned, const StepLimits& limits);
  void Clear() {
    num_top_.clear();
    done_.clear();
  }

 private:
  friend class CudaHead;
  PinnedMemory tables_;
  PinnedMemory results_;
  std::vector<uint32_t> num_top_;   // of those on their way
  std::vector<LogitsResult> done_;  // that came before
};

class CudaHead {
 public:
  CudaHead(const ModelConfig& config, const StepLimits& limits, const CudaWorkspace& workspace,
           const DeviceStage& weights, cudaStream_t stream)
      : config_(&config), limits_(&limits), ws_(&workspace), weights_(&weights), stream_(stream) {
    entries_.reserve(limits.head_entries);
  }

  // Rows of `requests` are those of the batch, of which they are the ones from `first_request` on;
  // the workspace's hidden states begin at `first_row`. Requests beyond StepLimits::head_rows or
  // head_entries wait for those before them.
  absl::Status Ask(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                   uint32_t first_request, uint32_t first_row, HeadStep* step);
  // Keeps what is on its way. REQUIRES: it has come (the stream was waited for).
  void Collect(HeadStep* step) const;
  // All results of the step. REQUIRES: as Collect.
  std::vector<LogitsResult> Take(HeadStep* step) const;

 private:
  // As many of the requests as have room for their lists: at least one has. How many they are.
  absl::StatusOr<size_t> AskSome(const StageBatch& batch, absl::Span<const LogitsRequest> requests,
                                 uint32_t first_request, uint32_t first_row, HeadStep* step);
  // Appends the row's lists to entries_.
  cuda::SampleRow RowOf(const StageBatch& batch, const LogitsRequest& request);

  const ModelConfig* config_;
  const StepLimits* limits_;
  const CudaWorkspace* ws_;
  const DeviceStage* weights_;
  cudaStream_t stream_;
  std::vector<cuda::TokenEntry> entries_;  // kept for its memory
};

}  // namespace strait
