// SPDX-License-Identifier: Apache-2.0
//
// What the attention kernels of mla.h share on the device.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/attention/mla.h"
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/device/ptx.cuh"

namespace strait::cuda::mla {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
// By how much (powers of two) a score passes a Hopper kernel's running maximum before that moves.
inline constexpr float kMaxSlack = 8.0f;

__device__ __forceinline__ float NegInf() { return __int_as_float(0xff800000); }

// The factor that brings sums relative to the maximum `from` to the maximum `to` (powers of two).
__device__ __forceinline__ float Rescale(float from, float to) {
  return from == to ? 1.0f : Exp2(from - to);
}

// Position of the token that row `row` of the tile belongs to; rows behind the tile's last: -1,
// before every cache row.
__device__ __forceinline__ int32_t RowPosition(const MlaWork& work, int32_t row,
                                               int32_t num_heads) {
  if (row >= work.num_rows) return -1;
  return work.first_position + (work.row_in_sequence + row) / num_heads;
}

__device__ __forceinline__ int32_t BlockPosition(const MlaSegment& segment, int32_t block) {
  return segment.block_positions == nullptr ? block * kMlaBlockRows
                                            : segment.block_positions[block];
}

// Rows of the work's cache that may be read.
__device__ __forceinline__ int32_t CacheRows(const MlaWork& work, const MlaSegment& segment) {
  return min(work.cache_rows, segment.num_rows);
}

// How many leading rows of the block a token at `position` sees.
__device__ __forceinline__ int32_t SeenRows(int32_t position, int32_t block_position,
                                            int32_t present) {
  return min(present, position - block_position + 1);
}

// Two e4m3 codes, lower byte first, as floats; never the codes of NaN.
__device__ __forceinline__ float2 WidenE4m3Pair(uint16_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves = E4m3PairToHalves(codes);
#else  // exponent and mantissa at their place in a half are 2^8 too small, also where subnormal
  const uint32_t pair = (codes & 0xffu) << 8 | (codes & 0xff00u) << 16;
  uint32_t halves = (pair & 0x80008000u) | (pair & 0x7f007f00u) >> 1;
  __half2 scaled = *reinterpret_cast<const __half2*>(&halves);
  scaled = __hmul2(scaled, __float2half2_rn(256.0f));
  halves = *reinterpret_cast<const uint32_t*>(&scaled);
#endif
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

// 16 e4m3 codes times their scale, as 16 bf16.
__device__ __forceinline__ void WidenRow16(const uint4& codes, float scale, uint4& low,
                                           uint4& high) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t out[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = WidenE4m3Pair(static_cast<uint16_t>(words[i] & 0xffffu));
    const float2 b = WidenE4m3Pair(static_cast<uint16_t>(words[i] >> 16));
    out[2 * i] = PackBf16(a.x * scale, a.y * scale);
    out[2 * i + 1] = PackBf16(b.x * scale, b.y * scale);
  }
  low = make_uint4(out[0], out[1], out[2], out[3]);
  high = make_uint4(out[4], out[5], out[6], out[7]);
}

// Lets a kernel begin while the one before it drains; it must wait (griddepcontrol.wait) before it
// touches memory that another kernel touches.
inline cudaLaunchAttribute EarlyStart() {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return early;
}

// Kernels of the other files.
cudaError_t LaunchPortable(const MlaParams& params, cudaStream_t stream);
cudaError_t LaunchHopper(const MlaParams& params, cudaStream_t stream);
// Of the Hopper path.
bool TakesFewRows(const MlaParams& params);
cudaError_t LaunchFewRows(const MlaParams& params, cudaStream_t stream);
bool TakesCodes(const MlaParams& params);
cudaError_t LaunchCodes(const MlaParams& params, cudaStream_t stream);
cudaError_t LaunchMerge(const MlaParams& params, cudaStream_t stream);
cudaError_t PreparePortable();
cudaError_t PrepareHopper();
cudaError_t PrepareFewRows();
cudaError_t PrepareCodes();

}  // namespace strait::cuda::mla
