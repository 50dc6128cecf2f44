// SPDX-License-Identifier: Apache-2.0
//
// TensorMap tells Hopper's copy engine how a bf16 tensor lies in memory: it brings boxes of it into
// shared memory as warpgroup products read them (mla_wgmma.cuh).
//
// Thread:  any; host only, touches no device memory.
// Errors:  cudaErrorInvalidValue: an address or stride that is no multiple of 16 bytes;
//          cudaErrorSymbolNotFound: a driver without such maps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace strait::cuda {

// Opaque; a kernel gets it as (part of) a __grid_constant__ parameter.
struct TensorMap {
  alignas(64) unsigned char bytes[128] = {};
};

// base [sizes[2], sizes[1], sizes[0]] bf16, the innermost contiguous, the others strides[1] and
// strides[0] bytes apart. Boxes of box[i] elements, box[0] 64: 128-byte swizzle. What a box has
// outside of the tensor becomes zero.
cudaError_t MakeTensorMap(const void* base, const uint64_t (&sizes)[3],
                          const uint64_t (&strides)[2], const uint32_t (&box)[3], TensorMap* map);

}  // namespace strait::cuda
