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
//   2,176 cycles a block, by the shared memory that feeds them, 2,300 (q and keys 1,152, weights and
//   values 576, the copy itself 576), and in decoding by how long a copy takes: there is room for two
//   blocks, and one that must be read anew is away for about 1,400 (L2) to 2,500 cycles (memory).
// What was reached, tried and why: README.md here. Measured shares: tests/reports/gpu.md, written by
// tests/gpu.sh.
//
// Two consumer warpgroups each hold half of the 512 output columns of all 64 rows. Blocks go in pairs:
// the first group scores the first block, the second the second. Each multiplies its own weights from
// registers, and the other's, which it gets through shared memory, with its own columns of either
// block; the second's lie over their block's rope columns, which nobody needs any more. In one pair:
//   first group    scores 1 ......... softmax, values 1 left ..(weights 2).. values 2 left
//   second group   scores 2a ........ scores 2b, softmax, values 2 right, values 1 right
// The second group's last scores wait for the first's (kOrder), so that one group's softmax runs
// beside the other's products. Halves of blocks are free, and filled again, in the order in which
// they are needed: 1 left, 2 right, 1 right, 2 left.
//
// Both groups take their weights relative to the maximum after the last pair, or their own block's if
// that passes it by 8 (a factor of 256): weights above 1 do no harm, rescaling does. Which group's is
// higher shows when weights are handed over; results and weights relative to the lower one are then
// rescaled. That is rare, so nothing on the way to the first product waits for other lanes: exchanges
// between them stand in one queue with the products.
// A third warpgroup feeds: one thread starts bulk copies (bf16), or all widen codes (fp8). The two
// tiles of 128 heads are a cluster of two thread blocks that copy each half of a block to both.
//
// One new token of a short context is bound by latency. The plan, tables and settled cache blocks are
// there before the kernel's turn: when it comes, the first blocks lie in shared memory, and only q and
// the block that holds the new row are still to be read.
#include "kernels/cuda/attention/mla_hopper_consume.cuh"
#include "kernels/cuda/attention/mla_hopper_feed.cuh"
#include "kernels/cuda/attention/mla_hopper_feed_fp8.cuh"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/tensor_map.h"

namespace strait::cuda::mla {
namespace {

using namespace hopper;  // NOLINT: its own parts

// kShared: clusters of two thread blocks, whose stretches are of the same cache rows.
template <Feed kFeed, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) HopperKernel(const __grid_constant__ MlaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kFp8 = kFeed == Feed::kFp8;
  static_assert(!(kFp8 && kShared));
  auto* const raw = DynamicShared<unsigned char>();
  StartNext();
  // Blocks without work make room at once; one waits, or this kernel might end before those before.
  if (p.plan.work_begin[blockIdx.x] == p.plan.work_begin[blockIdx.x + 1]) {
    if (blockIdx.x == 0) WaitForEarlier();
    return;
  }
  const Shared s = {raw, SharedAddress(raw)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kNumTiles; ++i) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        wgmma::BarrierInit(s.full(i, quarter), kFp8 ? 4 : 1);
      }
      for (int half = 0; half < 2; ++half) wgmma::BarrierInit(s.empty(i, half), kShared ? 8 : 4);
    }
    wgmma::FenceBarrierInit();
  }
  if constexpr (kShared) {
    cluster::Sync();
  } else {
    __syncthreads();
  }
  if (threadIdx.x >= kConsumers) {
    wgmma::FewerRegisters<FeederRegisters(kFeed)>();
    if constexpr (kFp8) {
      FeedFp8(p, s);
    } else if (threadIdx.x < kConsumers + 32) {
      if constexpr (kFeed == Feed::kUnits) {
        FeedUnits<kShared>(p, s);
      } else {
        FeedBf16<kShared>(p, s);
      }
    }
  } else {
    wgmma::MoreRegisters<ConsumerRegisters(kFeed)>();
    if (threadIdx.x < kConsumers / 2) {
      Consumer<kShared, 0>(p, s).Run();
    } else {
      Consumer<kShared, 1>(p, s).Run();
    }
  }
  if constexpr (kShared) cluster::Sync();  // the other block may still give tiles back to this one
#else
  Trap();
#endif
}

}  // namespace

cudaError_t PrepareHopper() {
  if (ComputeCapabilityMajor() != 9) return cudaSuccess;
  for (const auto kernel : {HopperKernel<Feed::kRows, false>, HopperKernel<Feed::kRows, true>,
                            HopperKernel<Feed::kUnits, false>, HopperKernel<Feed::kUnits, true>,
                            HopperKernel<Feed::kFp8, false>}) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchHopper(const MlaParams& params, cudaStream_t stream) {
  const int32_t num_blocks = params.plan.limits.num_thread_blocks;
  const bool bf16 = params.format == RowFormat::kBf16;
  const bool shared = bf16 && num_blocks % 2 == 0 && MlaTilesInPairs(params.num_heads, num_blocks);
  auto kernel = HopperKernel<Feed::kFp8, false>;
  if (bf16 && params.units) {
    kernel = shared ? HopperKernel<Feed::kUnits, true> : HopperKernel<Feed::kUnits, false>;
  } else if (bf16) {
    kernel = shared ? HopperKernel<Feed::kRows, true> : HopperKernel<Feed::kRows, false>;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0] = EarlyStart();
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shared ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace strait::cuda::mla

namespace strait::cuda {
namespace {

cudaError_t MakeMap(const void* data, const TensorShape& shape, MlaPoolMap* map) {
  CUtensorMap tensor_map;
  static_assert(sizeof(tensor_map) == sizeof(map->bytes));
  const cudaError_t error = MakeTensorMap(data, shape, &tensor_map);
  if (error == cudaSuccess) __builtin_memcpy(map->bytes, &tensor_map, sizeof(tensor_map));
  return error;
}

}  // namespace

cudaError_t MakeMlaPoolMap(const void* blocks, int64_t num_blocks, int64_t block_bytes,
                           MlaPoolMap* map) {
  return MakeMap(blocks,
                 {{576, kMlaBlockRows, num_blocks},
                  {RowBytes(RowFormat::kBf16, 512, 64), block_bytes},
                  {64, kMlaBlockRows, 1},
                  false},
                 map);
}

cudaError_t MakeMlaUnitMap(const void* units, int64_t num_units, bool wide, MlaPoolMap* map) {
  return MakeMap(units,
                 {{64, kMlaBlockRows, num_units},
                  {kMlaUnitBytes / kMlaBlockRows, kMlaUnitBytes},
                  {64, kMlaBlockRows, 1},
                  wide},
                 map);
}

}  // namespace strait::cuda
