// SPDX-License-Identifier: Apache-2.0
//
// CudaBackend runs real checkpoints on one NVIDIA GPU: bf16 weights, fp8 ones kept in fp8, the
// latent cache in bf16 or fp8 rows; hidden states come and go as fp32, in host memory or on the
// device.
//
// Owns:    the weight source, the arena of device memory, the cache. A stage keeps what it needs of
//          these alive, so it may outlive the backend.
// Thread:  Load any; steps of a stage by one thread.
// Stream:  one a stage, in order.
// Errors:  Create: FailedPrecondition: no GPU, driver too old, compute capability without code;
//          InvalidArgument: a model or a row format that the kernels do not take, fp8_activations
//          without fp8 weights; ResourceExhausted if the GPU has not the bytes. Load: as CpuBackend's.
//          Steps: Internal; if the GPU context is lost, the process ends
//          (worker/model/cuda/status.h).
// Limits:  all stages together within memory_bytes: weights as the device stores them, cache and
//          workspace (stage_layout.h). What CUDA itself takes for the process comes on top.
// Why:     device memory is taken once, at the start, in slabs that are lent to weights, workspaces and
//          the cache (device_arena.h): nothing is taken in a step.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda/device/device.h"
#include "proto/base/limits.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "proto/model/stage_memory.h"
#include "worker/backend.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cuda/cuda_workspace.h"
#include "worker/model/cuda/device_arena.h"
#include "worker/model/cuda/layers.h"

namespace strait {

struct CudaBackendOptions {
  int device = 0;
  uint64_t memory_bytes = 0;  // for weights, caches and workspaces of all stages
  // A sequence's bits are a function of the sequence alone (ARCHITECTURE.md, The same tokens).
  bool deterministic = false;
  RowFormat row_format = RowFormat::kBf16;  // or kFp8
  // Products of fp8 weights with many rows, deterministic with any number, read activations as e4m3
  // codes (kernels/cuda/gemm/gemm.h, W8A8).
  bool fp8_activations = false;
  // How long Create waits for memory that the GPU has not yet.
  std::chrono::milliseconds memory_patience{0};
  // Workspaces are made for steps of so many rows; larger ones go through the layers in parts.
  uint32_t max_step_tokens = limits::kMaxStepTokens;
};

// Opens GPU `index`, for a worker to know its memory before it makes a backend.
absl::StatusOr<cuda::Device> OpenCudaDevice(int index);

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const CudaBackendOptions& options,
                                                             std::unique_ptr<WeightSource> weights);
  ~CudaBackend() override;

  absl::StatusOr<std::unique_ptr<StageModel>> Load(
      const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) override;

  CacheMemory& cache() override;
  absl::StatusOr<std::shared_ptr<void>> LockPages(absl::Span<std::byte> memory) override;
  uint32_t hidden_row_bytes() const override;
  uint32_t num_layers() const override;
  uint32_t vocab_size() const override;
  uint32_t max_positions() const override;
  uint64_t block_bytes() const override;
  RowShape row_shape() const override;
  std::string numerics_id() const override;

  const ModelConfig& config() const;
  // How the memory of its stages is counted; for the coordinator.
  StageCosts stage_costs() const;
  const CudaTraits& traits() const;
  // Of memory_bytes.
  uint64_t used_bytes() const;
  const CudaPool& cache_pool() const;
  const std::shared_ptr<DeviceArena>& arena() const;

  struct Shared;  // what stages keep alive

 private:
  explicit CudaBackend(std::shared_ptr<Shared> shared);
  const std::shared_ptr<Shared> shared_;
};

}  // namespace strait
