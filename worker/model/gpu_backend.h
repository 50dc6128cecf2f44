// SPDX-License-Identifier: Apache-2.0
//
// MakeGpuBackend makes a CudaBackend where this build has one, and what NCCL edges need of its GPU;
// gpu_backend_absent.cc is linked where it has not, and says so.
//
// Thread:  any.
// Errors:  FailedPrecondition: no CUDA in this build, no usable GPU; those of CudaBackend::Create.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "proto/model/reservation.h"
#include "proto/model/stage_memory.h"
#include "worker/backend.h"
#include "worker/checkpoint/weights.h"
#include "worker/transport/nccl_api.h"

namespace strait {

struct GpuBackendOptions {
  int device = 0;
  uint64_t memory_bytes = 0;  // for weights, cache and workspace; 0: by share
  double memory_share = 0;    // of the GPU's memory
  bool deterministic = false;
  RowFormat row_format = RowFormat::kBf16;
  bool fp8_activations = false;
  uint32_t max_step_tokens = 0;  // at least 1
};

struct GpuBackend {
  std::unique_ptr<Backend> backend;
  uint64_t memory_bytes = 0;
  StageCosts stage_costs;
  std::shared_ptr<EdgeDevice> edges;  // whose memory is the backend's
};

// `open` is called once the GPU is known to be usable.
absl::StatusOr<GpuBackend> MakeGpuBackend(
    const GpuBackendOptions& options,
    const std::function<absl::StatusOr<std::unique_ptr<WeightSource>>()>& open);

}  // namespace strait
