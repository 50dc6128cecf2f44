// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

namespace strait::cuda_test {

// A kernel that ends when *flag, pinned host memory, is not 0: as one that waits for a peer.
cudaError_t LaunchWaitForHost(const int* flag, cudaStream_t stream);

}  // namespace strait::cuda_test
