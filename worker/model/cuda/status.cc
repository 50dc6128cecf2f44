// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/status.h"

#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "proto/base/log.h"

namespace strait {

absl::Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = absl::StrCat("CUDA: ", cudaGetErrorName(error), " (",
                                        cudaGetErrorString(error), ") in ", what);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // not a lost context: forget it
    return absl::ResourceExhaustedError(text);
  }
  return absl::InternalError(text);
}

void ExitIfContextLost(const absl::Status& status) {
  (void)cudaGetLastError();
  ExitIfContextLost(status, cudaDeviceSynchronize());
}

void ExitIfContextLost(const absl::Status& status, cudaError_t now) {
  if (now == cudaSuccess) return;
  Log(LogLevel::kError, "the GPU context is lost, this process ends and must be started again",
      {{"why", status}, {"now", cudaGetErrorString(now)}});
  std::fflush(nullptr);
  std::_Exit(kLostContextExit);
}

}  // namespace strait
