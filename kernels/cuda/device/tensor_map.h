// SPDX-License-Identifier: Apache-2.0
//
// MakeTensorMap describes a bf16 array to Hopper's copy engine: boxes of it go to shared memory in
// rows of 128 bytes, their 16-byte pieces XORed with the row (mla_wgmma.cuh).
//
// Thread:  any; nothing is taken from the device: a map is 128 bytes that go with a launch.
// Shapes:  three dimensions, the innermost contiguous. What a box has beyond them is zero.
// Errors:  cudaErrorSymbolNotFound: no such function in the driver; cudaErrorInvalidValue: data or a
//          stride is not a multiple of 16 bytes.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace strait::cuda {

struct TensorShape {
  int64_t sizes[3];          // elements; the innermost first
  int64_t strides_bytes[2];  // of the second and the third dimension
  uint32_t box[3];           // box[0]: 64
  bool wide = true;          // what is read brings the 256 bytes around it to L2: good where rows'
                             // next boxes come soon, a waste of L2's lines where they come now
};

cudaError_t MakeTensorMap(const void* data, const TensorShape& shape, CUtensorMap* map);

}  // namespace strait::cuda
