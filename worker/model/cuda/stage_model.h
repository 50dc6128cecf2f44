// SPDX-License-Identifier: Apache-2.0
//
// CudaStageModel is a stage on the GPU: one allocation for weights, cache and workspace, one stream.
//
// Owns:    device memory, pinned staging, the stream.
// Thread:  made on the loader thread, then loop thread only.
// Errors:  Forward: those of CUDA; see CudaBackend.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/cuda/mla_plan.h"
#include "worker/backend.h"
#include "worker/model/cuda/graph_ledger.h"
#include "worker/model/cuda/head.h"
#include "worker/model/cuda/layers.h"
#include "worker/model/cuda/stage_layout.h"
#include "worker/model/cuda/step_tables.h"
#include "worker/model/memory.h"

namespace strait {

class CudaStageModel final : public StageModel {
 public:
  // Takes the memory and reads the weights. `alive`: kept as long as the stage lives; `config`
  // belongs to it.
  static absl::StatusOr<std::unique_ptr<CudaStageModel>> Create(
      std::shared_ptr<const void> alive, WeightSource& source, const StageSpec& spec, int device,
      const CudaTraits& traits, MemoryBudget::Share share, const LoadProgress& progress);
  ~CudaStageModel() override;

  absl::Status Forward(const StageBatch& batch, HiddenIn hidden_in, HiddenOut hidden_out,
                       std::vector<LogitsResult>* results) override;

  const StageSpec& spec() const override { return spec_; }
  uint64_t weight_bytes() const override { return bytes_.weights; }
  uint64_t cache_bytes() const override { return bytes_.pool; }

 private:
  CudaStageModel(std::shared_ptr<const void> alive, const ModelConfig& config,
                 const StageSpec& spec, int device, MemoryBudget::Share share)
      : alive_(std::move(alive)),
        config_(config),
        spec_(spec),
        device_(device),
        share_(std::move(share)),
        graph_ledger_(kCudaGraphBytes + spec.layers.size() * kCudaGraphBytesEachLayer) {}

  absl::Status Init(WeightSource& source, const CudaTraits& traits, const LoadProgress& progress);
  absl::Status Run(const StageBatch& batch, HiddenIn hidden_in, HiddenOut hidden_out,
                   std::vector<LogitsResult>* results);
  // A tile's hidden states, `offset` bytes into the step's, to and from where the layers have them:
  // on the device from one place to another, to and from the host through pinned memory. CopyIn is
  // asynchronous; CopyOut too, but for host memory, which is written when it returns.
  absl::Status CopyIn(const HiddenIn& hidden, size_t offset, size_t bytes);
  absl::Status CopyOut(const HiddenOut& hidden, size_t offset, size_t bytes);
  // The layers of a tile, and the embedding where it is the first stage. Asynchronous. Hidden
  // states come and go outside, so that a graph knows no address of an edge.
  absl::Status RunTile(const CudaTile& tile, const int32_t* token_ids);
  // The same for the only tile of a step that decodes `num_rows` sequences, as a graph.
  absl::Status ReplayTile(const CudaTile& tile, const int32_t* token_ids);
  // Instantiates what was captured for `num_rows` rows, and takes it; others may have to go.
  absl::StatusOr<std::map<int32_t, cudaGraphExec_t>::iterator> AddGraph(int32_t num_rows,
                                                                        cudaGraph_t graph);
  // The attention plans of rows [begin, begin + tile.num_rows), on their way to the device.
  absl::Status Plan(const StageBatch& batch, uint32_t begin, CudaTile* tile);

  const std::shared_ptr<const void> alive_;
  const ModelConfig& config_;
  const StageSpec spec_;
  const int device_;
  const MemoryBudget::Share share_;

  // --- Constant after Init ---
  CudaStageBytes bytes_;
  StepLimits limits_;
  DeviceMemory memory_;
  cudaStream_t stream_ = nullptr;
  DeviceStage weights_;
  CudaPool pool_;
  CudaWorkspace ws_;
  std::optional<StepTables> tables_;
  std::optional<CudaLayers> layers_;
  std::optional<CudaHead> head_;  // last stage
  PinnedMemory staging_;          // [tile_rows, hidden_size] fp32
  PinnedMemory plan_host_;

  // By rows of the step: all that a graph's launches depend on, with the addresses of the tables,
  // which follow from it. A size is captured when it is first seen: capturing all at load would
  // take longer than the load of a small model, for sizes that mostly never come.
  std::map<int32_t, cudaGraphExec_t> graphs_;
  GraphLedger graph_ledger_;

  // Kept for their memory.
  cuda::MlaPlan plan_;
  cuda::MlaParts plan_parts_;
  std::vector<cuda::MlaSequence> plan_sequences_;
  std::vector<cuda::MlaPlanView> plan_views_;  // of the tile under way
};

}  // namespace strait
