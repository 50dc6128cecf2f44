// SPDX-License-Identifier: Apache-2.0
//
// Latent attention of at most 16 (token, head) rows a tile over fp8 cache rows of 512 + 64 columns, on
// Hopper: decoding with 16 heads.
//
// Roofline: a cache block is 41,984 bytes and, for 16 rows, 2 * 16 * 64 * (576 + 512) = 2.2 Mflop: 53
//   flops a byte. An H200 reads 35.8 bytes a nanosecond for each multiprocessor: 1,172 ns or 2,070
//   cycles a block at 1.77 GHz, and 146 us for 128 x 8,192 rows. That is the limit; measured: 177.
//   Beside it, in cycles of a multiprocessor a block (estimates, not measured one by one):
//     products          544 of 16 x 8 x 16, 136 a quadrant at 6 to 8 cycles           820 - 1,090
//     codes to halves   1,024 conversions and 256 permutes of a warp, half rate               640
//     shared memory     328 copy, 320 + 256 rows read for scores and values, 256 partial
//                       scores, 80 weights                                                  1,240
//     instructions      840 a quadrant, one a cycle                                           840
//   So none of them is in the way of the copies as long as they overlap. All figures: README.md here.
//
// Why not warpgroup products: these take tiles of 64 rows of A. 16 heads are a quarter of one; cache
// rows as A would fill it, but must come through registers widened, and registers that such a product
// reads may not change until it is waited for. Products of a warp have 16 rows of A, exactly the heads,
// and take codes as B straight from the registers that widen them; the tensor cores are at most half
// busy. A code is widened to a half, which is one instruction for two codes; to bf16 it takes seven for
// four.
//
// A warp of a group of four has a quarter of the latent columns, 128 that share a scale, for scores and
// values both. Its part of q stays in registers. In one block:
//   scores   S_w[16 heads, 64 rows] = (q . codes) * scale[row] + a quarter of the rope columns' part
//   weights  the four parts are added through shared memory; a warp weighs four heads
//   values   out[16, 128] += (weights * scale[row]) . codes
// Between scores and values, and between values and scores of the next block, a group waits for its
// slowest warp and for shared memory; the other group, which has every second block, runs meanwhile.
// At the end of a stretch the groups' results are added.
//
// Codes lie in shared memory as in the cache, by bulk copies without a pass that widens them. Rows are
// 656 bytes, 16 more than a multiple of 128: eight rows 16 bytes wide lie in different banks. For
// values a transposing load moves pairs of codes: two columns of two rows in one register; a permute
// makes two pairs of rows of them, one for each column. Even and odd columns are different products.
//
// Halves have few exponents: q is brought to 2^12 by a power of two a head, weights are 2^11 at the
// maximum, scales relative to a power of two above the largest that a warp has met.
#include "kernels/cuda/attention/mla_few_rows.cuh"
#include "kernels/cuda/device/device.h"

namespace strait::cuda::mla {
namespace {

using namespace few;  // NOLINT: its own parts

__global__ void __launch_bounds__(kThreads, 1) FewRowsKernel(const __grid_constant__ MlaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto* const raw = DynamicShared<unsigned char>();
  StartNext();
  // Blocks without work make room at once; one waits, or this kernel might end before those before.
  if (p.plan.work_begin[blockIdx.x] == p.plan.work_begin[blockIdx.x + 1]) {
    if (blockIdx.x == 0) WaitForEarlier();
    return;
  }
  const Shared s(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) wgmma::BarrierInit(s.full(i), 1);
    for (int i = 0; i < kStages; ++i) wgmma::BarrierInit(s.empty(i), 4);
    wgmma::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= kGroups * kGroupThreads) {
    wgmma::FewerRegisters<kFeederRegisters>();
    if (threadIdx.x < kGroups * kGroupThreads + 32) Feed(p, s);
  } else {
    wgmma::MoreRegisters<kConsumerRegisters>();
    Consumer(p, s).Run();
  }
#else
  Trap();
#endif
}

}  // namespace

cudaError_t PrepareFewRows() {
  if (ComputeCapabilityMajor() != 9) return cudaSuccess;
  return cudaFuncSetAttribute(FewRowsKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

cudaError_t LaunchFewRows(const MlaParams& params, cudaStream_t stream) {
  cudaLaunchAttribute early = EarlyStart();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, FewRowsKernel, params);
}

bool TakesFewRows(const MlaParams& params) {
  return params.format == RowFormat::kFp8 && params.tile_rows <= kMlaFewRows &&
         params.block_lse == nullptr;
}

}  // namespace strait::cuda::mla
