// SPDX-License-Identifier: Apache-2.0
#include "worker/model/gpu_backend.h"

namespace strait {

absl::StatusOr<GpuBackend> MakeGpuBackend(
    const GpuBackendOptions&,
    const std::function<absl::StatusOr<std::unique_ptr<WeightSource>>()>&) {
  return absl::FailedPreconditionError(
      "--backend cuda: this build has no CUDA backend; build the cuda preset (cmake --preset "
      "cuda)");
}

}  // namespace strait
