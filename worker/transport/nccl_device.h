// SPDX-License-Identifier: Apache-2.0
//
// MakeCudaEdgeDevice makes the EdgeDevice of a GPU; only in builds with CUDA.
//
// Thread:  any; the memory's source likewise.
// Errors:  CUDA's, as Unavailable or ResourceExhausted, naming the call.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"

#include "worker/transport/nccl_api.h"

namespace strait {

// Device memory that goes back where it came from with its last owner.
using EdgeMemory = std::function<absl::StatusOr<std::shared_ptr<std::byte>>(size_t bytes)>;

// `memory`: where edges' places lie; none: CUDA's own.
std::shared_ptr<EdgeDevice> MakeCudaEdgeDevice(int index, EdgeMemory memory = {});

}  // namespace strait
