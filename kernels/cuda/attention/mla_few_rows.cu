// SPDX-License-Identifier: Apache-2.0
//
// Latent attention of at most 16 (token, head) rows a tile over fp8 or bf16 cache rows of 512 + 64
// columns, on Hopper: decoding with 16 heads.
//
// Roofline: a cache block is 41,984 bytes and, for 16 rows, 2 * 16 * 64 * (576 + 512) = 2.2 Mflop: 53
//   flops a byte. An H200 reads 34.3 bytes a nanosecond for each multiprocessor: 1,224 ns or 2,160
//   cycles a block at 1.77 GHz, and 152 us for 128 x 8,192 rows. That is the limit. Beside it, in
//   cycles of a multiprocessor a block (estimates; to be measured):
//     products          544 of 16 x 8 x 16, 136 a quadrant at 6 to 8 cycles           820 - 1,090
//     codes to halves   1,024 conversions and 256 permutes of a warp, half rate               640
//     shared memory     328 copy, 320 + 256 rows read for scores and values, 256 partial
//                       scores, 80 weights                                                  1,240
//     instructions      840 a quadrant, one a cycle                                           840
//   So none of them is in the way of the copies as long as they overlap. Predicted and measured shares
//   of the limit: README.md here.
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
// Codes lie in shared memory as in the cache, one bulk copy without a pass that widens them. Rows are
// 656 bytes, 16 more than a multiple of 128: eight rows 16 bytes wide lie in different banks. For
// values a transposing load moves pairs of codes: two columns of two rows in one register; a permute
// makes two pairs of rows of them, one for each column. Even and odd columns are different products.
//
// bf16 rows go the same way without scales and widening, half a block at a time and 16 bytes further
// apart than in the cache: 73,728 bytes a block, 3,800 cycles.
//
// Halves have few exponents: q is brought to 2^12 by a power of two a head, weights are 2^11 at the
// maximum, scales relative to a power of two above the largest that a warp has met.
#include "kernels/cuda/attention/mla_few_rows.h"

#include <array>
#include <utility>

#include "kernels/cuda/attention/mla_few_rows.cuh"
#include "kernels/cuda/device/device.h"

namespace strait::cuda::mla {
namespace {

using namespace few;  // NOLINT: its own parts

// By its index: nvcc does not take a kernel of a variant itself.
template <int kIndex>
__global__ void __launch_bounds__((kMlaFewRowsVariants[kIndex].groups + 1) * kGroupThreads,
                                  kMlaFewRowsVariants[kIndex].blocks)
    FewRowsKernel(const __grid_constant__ MlaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr MlaFewRowsVariant kV = kMlaFewRowsVariants[kIndex];
  auto* const raw = DynamicShared<unsigned char>();
  StartNext();
  // Blocks without work make room at once; one waits, or this kernel might end before those before.
  if (p.plan.work_begin[blockIdx.x] == p.plan.work_begin[blockIdx.x + 1]) {
    if (blockIdx.x == 0) WaitForEarlier();
    return;
  }
  const Shared<kV> s(raw);
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < Layout<kV>::kFull; ++i) wgmma::BarrierInit(s.full(i), 1);
    for (int i = 0; i < kV.stages; ++i) wgmma::BarrierInit(s.empty(i), 4);
    wgmma::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= kV.groups * kGroupThreads) {
    wgmma::FewerRegisters<FeederRegisters(kV.groups)>();
    if (threadIdx.x < kV.groups * kGroupThreads + 32) Feed<kV>(p, s);
  } else {
    wgmma::MoreRegisters<ConsumerRegisters(kV.groups)>();
    Consumer<kV>(p, s).Run();
  }
#else
  Trap();
#endif
}

struct Kernel {
  MlaFewRowsVariant variant;
  void (*run)(MlaParams);
  uint32_t shared_bytes;
};

template <int kIndex>
Kernel MakeKernel() {
  constexpr MlaFewRowsVariant kV = kMlaFewRowsVariants[kIndex];
  constexpr uint32_t kBytes = Layout<kV>::kBytes;
  static_assert((kBytes + 1024) * kV.blocks <= 228 * 1024);
  return {kV, FewRowsKernel<kIndex>, kBytes};
}
template <int... kIndices>
std::array<Kernel, sizeof...(kIndices)> MakeKernels(std::integer_sequence<int, kIndices...>) {
  return {MakeKernel<kIndices>()...};
}

const Kernel* FindKernel(const MlaFewRowsVariant& variant) {
  static const auto kernels =
      MakeKernels(std::make_integer_sequence<int, std::size(kMlaFewRowsVariants)>());
  for (const Kernel& kernel : kernels) {
    if (kernel.variant == variant) return &kernel;
  }
  return nullptr;
}

}  // namespace

cudaError_t PrepareFewRows() {
  if (ComputeCapabilityMajor() != 9) return cudaSuccess;
  for (const MlaFewRowsVariant& variant : kMlaFewRowsVariants) {
    const Kernel& kernel = *FindKernel(variant);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel.run, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kernel.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchFewRows(const MlaParams& params, const MlaFewRowsVariant& variant,
                          cudaStream_t stream) {
  const Kernel* const kernel = FindKernel(variant);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  cudaLaunchAttribute early = EarlyStart();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks));
  config.blockDim = dim3(static_cast<unsigned>((variant.groups + 1) * kGroupThreads));
  config.dynamicSmemBytes = kernel->shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel->run, params);
}

bool TakesFewRows(const MlaParams& params) {
  return !params.units && params.rank == 512 && params.rope == 64 &&
         params.tile_rows <= kMlaFewRows && params.block_lse == nullptr;
}

}  // namespace strait::cuda::mla

namespace strait::cuda {

cudaError_t LaunchMlaFewRows(const MlaParams& params, const MlaFewRowsVariant& variant,
                             cudaStream_t stream) {
  if (!mla::TakesFewRows(params) || params.format != variant.format ||
      ComputeCapabilityMajor() != 9)
    return cudaErrorInvalidValue;
  const cudaError_t error = mla::LaunchFewRows(params, variant, stream);
  return error != cudaSuccess ? error : mla::LaunchMerge(params, stream);
}

}  // namespace strait::cuda
