// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/tensor_map.h"

#include <cuda.h>

#include <cstring>

namespace strait::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

cudaError_t FindEncode(Encode* encode) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (entry == nullptr || found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  *encode = reinterpret_cast<Encode>(entry);
  return cudaSuccess;
}

}  // namespace

cudaError_t MakeTensorMap(const void* base, const uint64_t (&sizes)[3],
                          const uint64_t (&strides)[2], const uint32_t (&box)[3], TensorMap* map) {
  static_assert(sizeof(CUtensorMap) == sizeof(map->bytes));
  static Encode encode = nullptr;
  static const cudaError_t error = FindEncode(&encode);
  if (error != cudaSuccess) return error;
  const cuuint64_t of_sizes[3] = {sizes[0], sizes[1], sizes[2]};
  const cuuint64_t of_strides[2] = {strides[0], strides[1]};
  const cuuint32_t of_box[3] = {box[0], box[1], box[2]};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  CUtensorMap tensor_map;
  const CUresult result =
      encode(&tensor_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(base), of_sizes,
             of_strides, of_box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  std::memcpy(map->bytes, &tensor_map, sizeof(tensor_map));
  return cudaSuccess;
}

}  // namespace strait::cuda
