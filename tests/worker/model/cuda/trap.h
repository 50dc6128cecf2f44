// SPDX-License-Identifier: Apache-2.0
//
// LaunchTrap loses this process its GPU context, for tests of what follows.
//
// Thread:  any; asynchronous. The launch itself succeeds.
#pragma once

#include <cuda_runtime_api.h>

namespace strait::cuda_test {

cudaError_t LaunchTrap();

}  // namespace strait::cuda_test
