// SPDX-License-Identifier: Apache-2.0
//
// Latent attention over fp8 cache rows of 512 + 64 columns on Hopper, tiles of 17 to 32 (token, head)
// rows: decoding with 32 heads. No widened row is ever written to shared memory.
//
// Roofline: a cache block is 41,984 bytes: 2,070 cycles of a multiprocessor at 35.8 bytes a nanosecond
//   and 1.77 GHz, or 146 us for 128 x 8,192 rows. That is the limit; measured: 224. Beside it, in cycles
//   of a multiprocessor a block:
//     products         68 of 64 x 32, 18.5 each as measured                              1,260
//     shared memory    328 copy, 288 q, 256 weights, 320 + 256 rows read                 1,450
//     instructions     two warps of values 350 each, half a warp of scores 500, one every
//                      three to four cycles of a warp: nothing else hides their latency  2,000
//
// Cache rows are A of all products, from registers, and the tile's rows are B: 32 fit as well as 64, and
// what registers take needs no pass through shared memory, no fence and no second barrier.
//   scores   S[64 cache rows, 32] = cache row . q: codes are multiplied as they lie; q is the sum of two
//            codes, whose products go into the same sums. Every quarter of the columns is then multiplied
//            by its scale. Sums of codes keep 14 bits: 128 columns at a time lose nothing that counts.
//   weights  2^(S - base) as halves, to shared memory
//   values   out[512 columns, 32] += (codes * scale) . weights: a transposing load, a permute and a
//            conversion make two registers of A of each four codes. These sums are over all rows:
//            halves, whose products are summed as fp32.
// Warpgroups: two of scores, which take blocks in turn, two of values, 256 columns each. A fifth has a
// warp that copies blocks, as they lie, and one that sums weights (products with ones).
//
// Weights are relative to a maximum that moves only where a score passes it by kSlack; both groups of
// scores share it, so they settle it in the order of blocks. Scales are relative to a power of two above
// the largest so far. Where either moves, values and sums are multiplied by what a block's factors say.
#include "kernels/cuda/attention/mla_codes_scores.cuh"
#include "kernels/cuda/attention/mla_codes_sums.cuh"
#include "kernels/cuda/attention/mla_codes_values.cuh"
#include "kernels/cuda/device/device.h"

namespace strait::cuda::mla {
namespace {

using namespace codes;  // NOLINT: its own parts

__global__ void __launch_bounds__(kThreads, 1) CodesKernel(const __grid_constant__ MlaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto* const raw = DynamicShared<unsigned char>();
  StartNext();
  // Blocks without work make room at once; one waits, or this kernel might end before those before.
  if (p.plan.work_begin[blockIdx.x] == p.plan.work_begin[blockIdx.x + 1]) {
    if (blockIdx.x == 0) WaitForEarlier();
    return;
  }
  const Shared s(raw);
  if (threadIdx.x == 0) s.InitBarriers();
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (group < 2) {
    wgmma::FewerRegisters<kScoreRegisters>();
    Scorer(p, s, static_cast<uint32_t>(group)).Run();
  } else if (group < 4) {
    wgmma::MoreRegisters<kValueRegisters>();
    Values(p, s, group - 2).Run();
  } else {
    wgmma::FewerRegisters<kFeederRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    if (warp == 0) Feeder(p, s).Run();
    if (warp == 1) Sums(p, s).Run();
  }
#else
  Trap();
#endif
}

}  // namespace

cudaError_t PrepareCodes() {
  if (ComputeCapabilityMajor() != 9) return cudaSuccess;
  return cudaFuncSetAttribute(CodesKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(Layout::kBytes));
}

cudaError_t LaunchCodes(const MlaParams& params, cudaStream_t stream) {
  cudaLaunchAttribute early = EarlyStart();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Layout::kBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, CodesKernel, params);
}

bool TakesCodes(const MlaParams& params) {
  return params.format == RowFormat::kFp8 && params.tile_rows > kMlaFewRows &&
         params.tile_rows <= kMlaHalfTileRows && params.block_lse == nullptr;
}

}  // namespace strait::cuda::mla
