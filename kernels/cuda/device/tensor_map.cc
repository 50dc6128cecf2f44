// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device/tensor_map.h"

#include "kernels/cuda/device/driver_entry.h"

namespace strait::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null: the driver has none. Asked for once.
Encode FindEncode() {
  static const Encode encode = STRAIT_DRIVER_ENTRY(cuTensorMapEncodeTiled, 12000);
  return encode;
}

}  // namespace

cudaError_t MakeTensorMap(const void* data, const TensorShape& shape, CUtensorMap* map) {
  const Encode encode = FindEncode();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  cuuint64_t sizes[3];
  for (int i = 0; i < 3; ++i) sizes[i] = static_cast<cuuint64_t>(shape.sizes[i]);
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(shape.strides_bytes[0]),
                                 static_cast<cuuint64_t>(shape.strides_bytes[1])};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), sizes, strides,
             shape.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             shape.wide ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace strait::cuda
