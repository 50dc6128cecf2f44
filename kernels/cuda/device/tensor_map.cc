// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device/tensor_map.h"

namespace strait::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver; null: it has none. Asked for once.
Encode FindEncode() {
  static const Encode encode = []() -> Encode {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    const bool known = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return known ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
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
