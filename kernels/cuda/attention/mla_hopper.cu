// SPDX-License-Identifier: Apache-2.0
//
// Latent attention of 512 + 64 columns on Hopper: warpgroup products on tiles of 64 (token, head)
// rows by 64 cache rows; keys and values are one tile in shared memory, loaded once.
//
// Roofline: a cache block is 73,728 bytes (fp8: 41,984) and, for one tile of 64 rows,
//   2 * 64 * 64 * (576 + 512) = 8.9 Mflop: 121 flops a byte.
//   16 and 64 heads, one token: each block is read by one tile, so 4.5 TB/s allow 545 Tflop/s of
//   products: bound by memory (16 heads use a quarter of the tile and are bound all the more).
//   128 heads or more, several tokens, prefill: tiles share blocks in L2; bound by the products,
//   and by the shared memory that feeds them: 2,176 cycles of products a block against 2,368 of
//   shared memory traffic (q and keys 1,152, weights and values 640, the copy itself 576).
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
// At 128 heads each block leaves L2 once for each of its two tiles, 3.9 TB/s in all, and a tile's
// buffer waits for that copy: likely what holds it; sharing the copy between two thread blocks
// would halve it. fp8: 0.27 of the read rate at 16 heads; widening the codes holds it.
//
// Two consumer warpgroups each hold half of the 512 output columns of all 64 rows. Even blocks of a
// stretch are scored by the first, odd ones by the second; the scorer writes its weights over the
// block's rope columns, which nobody needs any more, and tells the other. So one group's softmax
// runs beside the other's products. The running maximum passes from block to block; it moves only
// when a score passes it by 8 (a factor of 256), as weights above 1 do no harm and rescaling does.
// A third warpgroup feeds: one thread starts bulk copies (bf16), or all widen codes (fp8).
//
// One new token of a short context is bound by latency. The plan, tables and settled cache blocks are
// there before the kernel's turn: when it comes, the first blocks lie in shared memory, and only q and
// the block that holds the new row are still to be read.
#include "kernels/cuda/attention/mla_hopper_consume.cuh"
#include "kernels/cuda/attention/mla_hopper_feed.cuh"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/tensor_map.h"

namespace strait::cuda::mla {
namespace {

using namespace hopper;  // NOLINT: its own parts

template <RowFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) HopperKernel(const __grid_constant__ MlaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kBf16 = kFormat == RowFormat::kBf16;
  auto* const raw = DynamicShared<unsigned char>();
  StartNext();
  // Blocks without work make room at once; one waits, or this kernel might end before those before.
  if (p.plan.work_begin[blockIdx.x] == p.plan.work_begin[blockIdx.x + 1]) {
    if (blockIdx.x == 0) WaitForEarlier();
    return;
  }
  Shared s;
  const uint32_t start = SharedAddress(raw);
  s.address = (start + 1023) / 1024 * 1024;
  s.memory = raw + (s.address - start);
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < kNumTiles; ++i) {
      for (int half = 0; half < 2; ++half) {
        wgmma::BarrierInit(s.full(i, half), kBf16 ? 1 : kThreads - kConsumers);
        wgmma::BarrierInit(s.empty(i, half), (kBf16 ? 4 : 128) * (half + 1));
      }
    }
    wgmma::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if constexpr (kBf16) {
      wgmma::FewerRegisters<24>();
      if (threadIdx.x < kConsumers + 32) FeedBf16(p, s);
    } else {
      wgmma::FewerRegisters<56>();
      FeedFp8(p, s);
    }
  } else {
    if constexpr (kBf16) {
      wgmma::MoreRegisters<240>();
    } else {
      wgmma::MoreRegisters<224>();
    }
    if (threadIdx.x < kConsumers / 2) {
      Consumer<kFormat, 0>(p, s).Run();
    } else {
      Consumer<kFormat, 1>(p, s).Run();
    }
  }
#else
  Trap();
#endif
}

}  // namespace

cudaError_t PrepareHopper() {
  if (ComputeCapabilityMajor() != 9) return cudaSuccess;
  for (const auto kernel : {HopperKernel<RowFormat::kBf16>, HopperKernel<RowFormat::kFp8>}) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchHopper(const MlaParams& params, cudaStream_t stream) {
  const auto kernel = params.format == RowFormat::kBf16 ? HopperKernel<RowFormat::kBf16>
                                                        : HopperKernel<RowFormat::kFp8>;
  cudaLaunchAttribute early = EarlyStart();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace strait::cuda::mla

namespace strait::cuda {

cudaError_t MakeMlaPoolMap(const void* blocks, int64_t num_blocks, int64_t block_bytes,
                           MlaPoolMap* map) {
  CUtensorMap tensor_map;
  static_assert(sizeof(tensor_map) == sizeof(map->bytes));
  const TensorShape shape = {{576, kMlaBlockRows, num_blocks},
                             {RowBytes(RowFormat::kBf16, 512, 64), block_bytes},
                             {64, kMlaBlockRows, 1}};
  const cudaError_t error = MakeTensorMap(blocks, shape, &tensor_map);
  if (error == cudaSuccess) __builtin_memcpy(map->bytes, &tensor_map, sizeof(tensor_map));
  return error;
}

}  // namespace strait::cuda
