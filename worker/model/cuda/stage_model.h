// SPDX-License-Identifier: Apache-2.0
//
// CudaStageModel is a stage on the GPU: weights that it may share, the worker's cache, a workspace and
// page tables of its own; one stream for steps, one for copies of cache rows (device_copies.h).
//
// Owns:    leases of device memory, pinned staging, the streams.
// Borrows: CudaWorker's parts, which `alive` keeps.
// Thread:  made on the loader thread, then loop thread only.
// Stream:  a step's tables, layers and results follow those of the step before; an event ends it.
//          So device memory is there once; what the host fills, kMaxStepsBegun times.
// Errors:  Begin, Finish: those of CUDA; see CudaBackend.
// Limits:  a step of one tile and one product of the head is taken ahead; larger ones wait for the
//          stream between their tiles.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/cuda/attention/mla_plan.h"
#include "worker/backend.h"
#include "worker/model/cuda/cuda_cache.h"
#include "worker/model/cuda/device_arena.h"
#include "worker/model/cuda/device_copies.h"
#include "worker/model/cuda/device_parts.h"
#include "worker/model/cuda/device_tables.h"
#include "worker/model/cuda/graph_ledger.h"
#include "worker/model/cuda/head.h"
#include "worker/model/cuda/layers.h"
#include "worker/model/cuda/stage_layout.h"
#include "worker/model/cuda/step_tables.h"
#include "worker/model/memory.h"

namespace strait {

// What all stages of a worker have in common.
struct CudaWorker {
  std::shared_ptr<const void> alive;  // keeps what is pointed to
  const ModelConfig* config = nullptr;
  DeviceArena* arena = nullptr;
  const CudaCache* cache = nullptr;
  const CudaTraits* traits = nullptr;
  PinnedPool* pinned = nullptr;
};

class CudaStageModel final : public StageModel {
 public:
  // `graphs`: the share of the budget that decode graphs have.
  static absl::StatusOr<std::unique_ptr<CudaStageModel>> Create(CudaWorker worker,
                                                                const StageSpec& spec,
                                                                DeviceStageParts parts,
                                                                MemoryBudget::Share graphs);
  ~CudaStageModel() override;

  absl::Status Begin(const StageBatch& batch, HiddenIn hidden_in, HiddenOut hidden_out) override;
  bool TakesAhead(uint32_t num_rows, uint32_t num_logits) const override {
    return num_rows <= limits_.tile_rows && num_logits <= limits_.head_rows;
  }
  bool Done() const override;
  absl::Status Finish(std::vector<LogitsResult>* results) override;

  BlockCopies& copies() override { return *copies_; }
  // Waits for the steps that are begun.
  absl::Status SetCapacity(uint32_t pool_blocks) override;
  const StageSpec& spec() const override { return spec_; }
  uint64_t weight_bytes() const override { return bytes_.weights; }
  const DeviceTables& page_tables() const {
    return *page_tables_;
  }  // what steps bring is counted there

 private:
  CudaStageModel(CudaWorker worker, const StageSpec& spec, DeviceStageParts parts,
                 MemoryBudget::Share graphs)
      : worker_(std::move(worker)),
        config_(*worker_.config),
        spec_(spec),
        device_(worker_.arena->device()),
        parts_(std::move(parts)),
        weights_(parts_.View()),
        graphs_share_(std::move(graphs)),
        graph_ledger_(kCudaGraphBytes + spec.layers.size() * kCudaGraphBytesEachLayer) {}

  absl::Status Init();
  // What the host has of a step that is begun.
  struct Slot {
    std::optional<StepTables> tables;
    PinnedMemory arrivals;  // new entries of page tables
    PinnedMemory plan;
    PinnedMemory staging;           // [tile_rows, hidden_size] fp32; where hidden states come or go
    HeadStep head;                  // last stage
    std::byte* host_out = nullptr;  // where staging goes when it has come; null: nowhere
    size_t host_out_bytes = 0;
    cudaEvent_t done = nullptr;

    // What the step has not given back yet goes nowhere.
    void Void() {
      head.Clear();
      host_out = nullptr;
    }
  };

  size_t oldest_slot() const { return (next_slot_ + kMaxStepsBegun - num_begun_) % kMaxStepsBegun; }

  // Behind the newest step that is begun; null: none is.
  cudaEvent_t newest_step() const {
    if (num_begun_ == 0) return nullptr;
    return slots_[(next_slot_ + kMaxStepsBegun - 1) % kMaxStepsBegun].done;
  }

  absl::Status InitSlot(Slot* slot);
  absl::Status Enqueue(const StageBatch& batch, HiddenIn hidden_in, HiddenOut hidden_out,
                       Slot* slot);
  // A tile's hidden states, `offset` bytes into the step's, to and from where the layers have them:
  // on the device from one place to another, to and from the host through pinned memory.
  // Asynchronous.
  absl::Status CopyIn(const HiddenIn& hidden, size_t offset, size_t bytes, Slot* slot);
  absl::Status CopyOut(const HiddenOut& hidden, size_t offset, size_t bytes, Slot* slot);
  // What a tile has left in pinned memory goes where it belongs. REQUIRES: the stream was waited
  // for.
  void Collect(Slot* slot);
  // The layers of a tile, and the embedding where it is the first stage. Asynchronous. Hidden
  // states come and go outside, so that a graph knows no address of an edge.
  absl::Status RunTile(const CudaTile& tile, const StepTables& tables, const int32_t* token_ids);
  // The same for the only tile of a step that decodes `num_rows` sequences, as a graph.
  absl::Status ReplayTile(const CudaTile& tile, const StepTables& tables, const int32_t* token_ids);
  // Instantiates what was captured for `num_rows` rows, and takes it; others may have to go.
  absl::StatusOr<std::map<int32_t, cudaGraphExec_t>::iterator> AddGraph(int32_t num_rows,
                                                                        cudaGraph_t graph);
  // The attention plans of rows [begin, begin + tile.num_rows), on their way to the device.
  absl::Status Plan(const StageBatch& batch, uint32_t begin, Slot* slot, CudaTile* tile);

  const CudaWorker worker_;
  const ModelConfig& config_;
  StageSpec spec_;
  const int device_;
  const DeviceStageParts parts_;
  const DeviceStage weights_;  // of parts_
  const MemoryBudget::Share graphs_share_;

  // --- Constant after Init ---
  CudaStageBytes bytes_;
  StepLimits limits_;
  DeviceArena::Lease workspace_memory_;
  cudaStream_t stream_ = nullptr;
  CudaWorkspace ws_;
  std::optional<CudaLayers> layers_;
  std::optional<CudaHead> head_;  // last stage
  std::unique_ptr<DeviceCopies> copies_;

  // Made for the stage's capacity.
  DeviceArena::Lease table_memory_;
  std::optional<DeviceTables> page_tables_;

  // Used in turn.
  std::array<Slot, kMaxStepsBegun> slots_;
  size_t next_slot_ = 0;
  size_t num_begun_ = 0;

  // By rows of the step: all that a graph's launches depend on, with the addresses of the tables and
  // the tiles of attention, a token each, which follow from it. A size is captured when it is first
  // seen: capturing all at load would take longer than the load of a small model, for sizes that
  // mostly never come.
  std::map<int32_t, cudaGraphExec_t> graphs_;
  GraphLedger graph_ledger_;

  // Kept for their memory.
  cuda::MlaPlan plan_;
  cuda::MlaParts plan_parts_;
  std::vector<cuda::MlaSequence> plan_sequences_;
  PromptPlan prompts_;                         // of the tile under way
  std::vector<cuda::MlaPlanView> plan_views_;  // of the tile under way
};

}  // namespace strait
