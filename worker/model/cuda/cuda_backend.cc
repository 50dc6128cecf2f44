// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/cuda_backend.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/cuda/gemm/gemm.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/model/reservation.h"
#include "worker/model/cuda/cuda_cache.h"
#include "worker/model/cuda/device_arena.h"
#include "worker/model/cuda/device_parts.h"
#include "worker/model/cuda/stage_layout.h"
#include "worker/model/cuda/stage_model.h"
#include "worker/model/cuda/weights.h"
#include "worker/model/memory.h"

namespace strait {
namespace {

// Raise it with every change that may change a bit of the results.
constexpr int kKernelRevision = 5;

// The part of a worker's memory that is not taken at the start.
constexpr uint64_t kOthersDivisor = 32;

absl::Status CheckFp8Activations(const ModelConfig& config, const cuda::Device& device) {
  if (config.quantization != Quantization::kFp8Block128) {
    return absl::InvalidArgumentError(
        "--fp8-activations is for checkpoints of fp8 weights, and this one has none: leave it out");
  }
  if (!cuda::MultipliesCodes()) {
    return absl::FailedPreconditionError(
        absl::StrCat("--fp8-activations needs a GPU of compute capability 9.0 (and not "
                     "STRAIT_CUDA_GEMM=portable "
                     "in the environment), ",
                     device.name, " has ", device.compute_capability / 10, ".",
                     device.compute_capability % 10, ": leave it out, activations are then bf16"));
  }
  return absl::OkStatus();
}

}  // namespace

struct CudaBackend::Shared {
  cuda::Device device;
  std::unique_ptr<WeightSource> weights;
  std::shared_ptr<MemoryBudget> budget;
  CudaTraits traits;
  std::shared_ptr<DeviceArena> arena;
  std::unique_ptr<CudaCache> cache;
  // Before what takes of it.
  std::shared_ptr<PinnedPool> pinned = std::make_shared<PinnedPool>();
  DeviceParts parts;
};

absl::StatusOr<cuda::Device> OpenCudaDevice(int index) {
  cuda::Device device;
  const std::string problem = cuda::OpenDevice(index, &device);
  if (!problem.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("--backend cuda: ", problem, "; or use --backend cpu"));
  }
  return device;
}

CudaBackend::CudaBackend(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}
CudaBackend::~CudaBackend() = default;

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(
    const CudaBackendOptions& options, std::unique_ptr<WeightSource> weights) {
  if (options.row_format != RowFormat::kBf16 && options.row_format != RowFormat::kFp8) {
    return absl::InvalidArgumentError(
        "--backend cuda keeps bf16 or fp8 cache rows: use --cache-format bf16 or fp8");
  }
  auto shared = std::make_shared<Shared>();
  STRAIT_ASSIGN_OR_RETURN(shared->device, OpenCudaDevice(options.device));
  STRAIT_RETURN_IF_ERROR(CheckCudaModel(weights->config()));
  STRAIT_RETURN_IF_ERROR(CheckCudaAttention(weights->config(), shared->device));
  if (options.fp8_activations) {
    STRAIT_RETURN_IF_ERROR(CheckFp8Activations(weights->config(), shared->device));
  }
  shared->weights = std::move(weights);
  shared->traits = {.num_multiprocessors = shared->device.num_multiprocessors,
                    .deterministic = options.deterministic,
                    .row_format = options.row_format,
                    .fp8_activations = options.fp8_activations,
                    .max_step_tokens = options.max_step_tokens,
                    .has_mha_prefill = cuda::HasMhaPrefill()};
  shared->budget = std::make_shared<MemoryBudget>(options.memory_bytes);
  const int device = shared->device.index;
  STRAIT_ASSIGN_OR_RETURN(shared->traits.slab_bytes,
                          DeviceArena::SlabBytesFor(device, options.memory_bytes));
  // Decode graphs and NCCL have memory of their own, which they take when they need it.
  const ModelConfig& config = shared->weights->config();
  const uint64_t others =
      std::max(kCudaGraphBytes + config.num_hidden_layers * kCudaGraphBytesEachLayer,
               options.memory_bytes / kOthersDivisor);
  STRAIT_ASSIGN_OR_RETURN(
      shared->arena,
      DeviceArena::Create(device, shared->budget, shared->traits.slab_bytes,
                          options.memory_bytes - std::min(options.memory_bytes, others),
                          options.memory_patience));
  STRAIT_ASSIGN_OR_RETURN(shared->cache, CudaCache::Create(*shared->arena, options.memory_bytes,
                                                           config, options.row_format));
  return std::unique_ptr<CudaBackend>(new CudaBackend(std::move(shared)));
}

absl::StatusOr<std::unique_ptr<StageModel>> CudaBackend::Load(
    const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) {
  const ModelConfig& config = shared_->weights->config();
  if (spec.layers.begin >= spec.layers.end || spec.layers.end > config.num_hidden_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers ", spec.layers.begin, " to ",
                                                   spec.layers.end, " of a model with ",
                                                   config.num_hidden_layers));
  }
  if (spec.pool_blocks == 0) {
    return absl::InvalidArgumentError("a stage needs latent blocks, pool_blocks is 0");
  }
  const auto what = absl::StrCat("a stage of layers ", spec.layers.begin, " to ", spec.layers.end,
                                 " with ", spec.pool_blocks, " latent blocks");
  const CudaTraits& traits = shared_->traits;
  const bool expands = ExpandsPrompts(config, traits);
  const CudaStageBytes stage = LayOutStage(config, spec, traits, nullptr).bytes;
  const uint64_t weights = shared_->parts.MissingBytes(config, spec.layers, expands, traits);
  const uint64_t available = shared_->budget->total() - shared_->budget->used();
  if (weights + stage.workspace > available) {
    return absl::ResourceExhaustedError(
        absl::StrCat(what, " needs ", weights + stage.workspace,
                     " bytes of GPU memory beside the cache (weights ", weights, ", workspace ",
                     stage.workspace, "), available are ", available, " of ",
                     shared_->budget->total(), " on ", shared_->device.name, "; ",
                     WhatWouldFit(CudaStageCosts(config, traits), spec, available + stage.pool)));
  }
  STRAIT_ASSIGN_OR_RETURN(MemoryBudget::Share graphs,
                          MemoryBudget::Take(shared_->budget, stage.graphs, what));
  STRAIT_ASSIGN_OR_RETURN(DeviceStageParts parts,
                          shared_->parts.Load(*shared_->weights, spec.layers, expands,
                                              *shared_->arena, *shared_->pinned, what, progress));
  return CudaStageModel::Create({.alive = shared_,
                                 .config = &config,
                                 .arena = shared_->arena.get(),
                                 .cache = shared_->cache.get(),
                                 .traits = &traits,
                                 .pinned = shared_->pinned.get()},
                                spec, std::move(parts), std::move(graphs));
}

CacheMemory& CudaBackend::cache() { return *shared_->cache; }
absl::StatusOr<std::shared_ptr<void>> CudaBackend::LockPages(absl::Span<std::byte> memory) {
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(shared_->device.index));
  STRAIT_CUDA_RETURN_IF_ERROR(
      cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterPortable));
  return std::shared_ptr<void>(memory.data(),
                               [](void* locked) { (void)cudaHostUnregister(locked); });
}
uint32_t CudaBackend::hidden_row_bytes() const {
  return config().hidden_size * static_cast<uint32_t>(sizeof(float));
}
uint64_t CudaBackend::block_bytes() const {
  return BlockBytes(shared_->traits.row_format, config().kv_lora_rank, config().qk_rope_head_dim);
}
RowShape CudaBackend::row_shape() const {
  return {shared_->traits.row_format, config().kv_lora_rank, config().qk_rope_head_dim};
}
uint32_t CudaBackend::num_layers() const { return config().num_hidden_layers; }
uint32_t CudaBackend::vocab_size() const { return config().vocab_size; }
uint32_t CudaBackend::max_positions() const { return config().max_position_embeddings; }
const ModelConfig& CudaBackend::config() const { return shared_->weights->config(); }

std::string CudaBackend::numerics_id() const {
  return absl::StrCat("cuda/", kKernelRevision, "/sm_", shared_->device.compute_capability, "/",
                      RowFormatName(shared_->traits.row_format),
                      shared_->traits.fp8_activations ? "/fp8-activations" : "",
                      shared_->traits.deterministic ? "/deterministic" : "");
}

uint64_t CudaBackend::used_bytes() const { return shared_->budget->used(); }
const std::shared_ptr<DeviceArena>& CudaBackend::arena() const { return shared_->arena; }
const CudaPool& CudaBackend::cache_pool() const { return shared_->cache->pool(); }
const CudaTraits& CudaBackend::traits() const { return shared_->traits; }
StageCosts CudaBackend::stage_costs() const { return CudaStageCosts(config(), shared_->traits); }

}  // namespace strait
