// SPDX-License-Identifier: Apache-2.0
//
// MakeCudaEdgeDevice makes the EdgeDevice of a GPU; only in builds with CUDA.
//
// Thread:  any.
// Errors:  CUDA's, as Unavailable or ResourceExhausted, naming the call.
#pragma once

#include <memory>

#include "worker/transport/nccl_api.h"

namespace strait {

std::shared_ptr<EdgeDevice> MakeCudaEdgeDevice(int index);

}  // namespace strait
