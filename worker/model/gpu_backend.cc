// SPDX-License-Identifier: Apache-2.0
#include "worker/model/gpu_backend.h"

#include <chrono>
#include <utility>

#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/cuda_backend.h"
#include "worker/transport/nccl_device.h"

namespace strait {
namespace {

// A worker that takes a killed one's place finds the GPU's memory taken for a moment.
constexpr std::chrono::seconds kMemoryPatience(10);

}  // namespace

absl::StatusOr<GpuBackend> MakeGpuBackend(
    const GpuBackendOptions& options,
    const std::function<absl::StatusOr<std::unique_ptr<WeightSource>>()>& open) {
  STRAIT_ASSIGN_OR_RETURN(const cuda::Device device, OpenCudaDevice(options.device));
  Log(LogLevel::kInfo, "GPU",
      {{"name", device.name},
       {"compute_capability", device.compute_capability},
       {"memory_bytes", device.memory_bytes},
       {"free_bytes", device.free_bytes}});
  CudaBackendOptions cuda;
  cuda.device = options.device;
  cuda.deterministic = options.deterministic;
  cuda.row_format = options.row_format;
  cuda.fp8_activations = options.fp8_activations;
  cuda.max_step_tokens = options.max_step_tokens;
  cuda.memory_patience = kMemoryPatience;
  cuda.memory_bytes =
      options.memory_bytes > 0
          ? options.memory_bytes
          : static_cast<uint64_t>(static_cast<double>(device.memory_bytes) * options.memory_share);
  STRAIT_ASSIGN_OR_RETURN(auto weights, open());
  GpuBackend made;
  made.memory_bytes = cuda.memory_bytes;
  STRAIT_ASSIGN_OR_RETURN(std::unique_ptr<CudaBackend> backend,
                          CudaBackend::Create(cuda, std::move(weights)));
  made.stage_costs = backend->stage_costs();
  made.edges = MakeCudaEdgeDevice(
      options.device,
      [arena = backend->arena()](size_t bytes) -> absl::StatusOr<std::shared_ptr<std::byte>> {
        STRAIT_ASSIGN_OR_RETURN(DeviceArena::Lease lease, arena->Take(bytes, "an NCCL edge"));
        auto owned = std::make_shared<DeviceArena::Lease>(std::move(lease));
        return std::shared_ptr<std::byte>(owned, owned->data());
      });
  made.backend = std::move(backend);
  return made;
}

}  // namespace strait
