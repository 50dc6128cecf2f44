// SPDX-License-Identifier: Apache-2.0
//
// CUDA errors as statuses, and the end of a process whose GPU context is lost.
//
// Thread:  any.
// Errors:  ResourceExhausted: no GPU memory; else Internal, naming the call.
// Why:     after an illegal access, a hardware error or the like every later call fails in this
//          process and only in this process: it says so and ends, and whoever supervises it
//          starts another.
#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace strait {

absl::Status CudaStatus(cudaError_t error, const char* what);

inline constexpr int kLostContextExit = 70;  // EX_SOFTWARE of sysexits.h

// Ends the process with a line that says why, if the context is lost. Otherwise returns.
void ExitIfContextLost(const absl::Status& status);
// The same, told what the device answers now.
void ExitIfContextLost(const absl::Status& status, cudaError_t now);

}  // namespace strait

#define STRAIT_CUDA_RETURN_IF_ERROR(call)                                              \
  do {                                                                                 \
    if (const cudaError_t cuda_error = (call); cuda_error != cudaSuccess) [[unlikely]] \
      return ::strait::CudaStatus(cuda_error, #call);                                  \
  } while (false)
