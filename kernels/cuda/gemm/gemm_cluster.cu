// SPDX-License-Identifier: Apache-2.0
//
// Products of a bf16 weight with many rows on Hopper: clusters of two blocks that take 256 rows of x
// times 256 columns, 128 rows each, and load the columns' weights once for both.
//
// Roofline: a block of gemm_hopper.cu asks L2 for 48 KiB a step of 64 k (16 of x, 32 of weights), 85
//   flops a byte, and 4.6 TB/s of L2 hold it to 390 TFLOP/s. Here a block loads half of the weights'
//   tile and the copy engine delivers it to both: 32 KiB a step and block, 128 flops a byte, 590
//   TFLOP/s at the same rate. The tensor core needs 1,024 cycles a step (790 TFLOP/s at the clock it
//   holds); shared memory sees 48 KiB written and 80 read in them, as before.
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
//
// A stage of the ring is full when this block's feeders have copied their rows of x and both halves
// of the weights have come; it is empty when the consumers of both blocks have given it back, as
// both blocks' copies go into both. So the two blocks go through K side by side, never more than a
// ring apart, and a block whose half of an item has no rows works for the other alone.
//
// x goes on being copied with cp.async: it is gathered, 16 bytes a thread, where a box of the copy
// engine would need its rows side by side. Weights come by tensor maps of [group, row, k], which
// give zeros beyond N and K.
//
// Order of sums: that of gemm_hopper.cu, of which a row has the same bits: k ascending, 16 at a
// time, K never in shares.
//
// Why not more: with a third warpgroup of 64 rows a block would ask for 154 flops a byte, but its 512
// threads have 128 registers each: 160 for those who multiply and hold 128 sums, which take 200.
// Clusters of four, two by two, would share x as well, 24 KiB a step, but each of four blocks would
// wait for the slowest, and four multiprocessors of one kind have to be free.
#include "kernels/cuda/device/tensor_map.h"
#include "kernels/cuda/gemm/gemm_hopper_block.cuh"
#include "kernels/cuda/gemm/gemm_launch.cuh"

namespace strait::cuda {
namespace {

using namespace hopper_gemm;  // NOLINT: its own parts

constexpr int kBlocks = 2;
constexpr int kTileRows = kClusterTileRows / kBlocks;
constexpr int kColumns = kClusterColumns;
constexpr int kHalf = kColumns / kBlocks;  // rows of weights that a block loads
constexpr uint16_t kBoth = (1 << kBlocks) - 1;
using L = HopperLayout<false, kTileRows, kColumns>;
constexpr int kLag = L::kLag;  // at most; with less x is given on sooner, if its copies have ended
static_assert(kHalf * kTileRowBytes * kBlocks == L::kWeightBytes);
// The half of block 1 is `up` if the product is gated.
static_assert(TileRowOf<true, L::kOwn>(kHalf).up && TileRowOf<true, L::kOwn>(kHalf).column == 0);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <bool kGated>
__device__ __forceinline__ void Feed(const GemmParams& p, const CUtensorMap& weight,
                                     const CUtensorMap& up, uint32_t memory, int rank) {
  const Work<kGated, kTileRows, kColumns, kBlocks> work(p, 1);
  const int thread = threadIdx.x - kConsumers;
  const CUtensorMap* const map = kGated && rank == 1 ? &up : &weight;
  const int first_row = kGated ? 0 : rank * kHalf;
  const int num_steps = work.Steps(p, 0);
  Ring<L> filling(memory);   // the stage that copies go to next
  Ring<L> arriving(memory);  // the oldest whose copies of x may be on their way
  const auto arrive = [&] {
    wgmma::FenceProxy();
    wgmma::BarrierArrive(arriving.full());
    arriving.Advance();
  };
  int filled = 0;  // steps whose copies were started
  for (int unit = work.first(); unit < work.num_units; unit += work.stride()) {
    const TileUnit at = work.At(unit);
    const GemmItem item = work.RowsOf(p, at.item, rank);
    const XFeeder<kTileRows> x(p, item, thread);
    for (int step = 0; step < num_steps; ++step) {
      wgmma::BarrierWait(filling.empty(), filling.parity ^ 1);
      if (thread == 0) {
        wgmma::BarrierExpect(filling.full(), L::kWeightBytes);
        cluster::LoadBox(filling.weights() + rank * kHalf * kTileRowBytes, map, step * kStepColumns,
                         at.column * work.kEach + first_row, item.group, filling.full(), kBoth);
      }
      if (item.count > 0) x.Copy(filling.x(), step * kStepColumns, p.weight.cols);
      CommitCopies();
      filling.Advance();
      if (++filled > kLag) {
        WaitCopyGroups<kLag>();
        arrive();
      }
    }
  }
  WaitCopyGroups<0>();
  for (int left = min(filled, kLag); left > 0; --left) arrive();
}

#endif  // sm_90a

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    ClusterTiles(const __grid_constant__ GemmParams p, const __grid_constant__ CUtensorMap weight,
                 const __grid_constant__ CUtensorMap up) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t memory = (SharedAddress(DynamicShared<unsigned char>()) + 1023) / 1024 * 1024;
  const int rank = static_cast<int>(cluster::Rank());
  if (threadIdx.x == 0) {
    cluster::PrefetchMap(&weight);
    if (kGated) cluster::PrefetchMap(&up);
    Ring<L> ring(memory);
    for (int stage = 0; stage < L::kStages; ++stage) {
      wgmma::BarrierInit(ring.full(), kFeeders + 1);  // and who says what weights are to come
      wgmma::BarrierInit(ring.empty(), kBlocks * kConsumers / 32);
      ring.Advance();
    }
    wgmma::FenceBarrierInit();
  }
  cluster::Sync();
  StartNext();
  WaitForEarlier();
  if (threadIdx.x >= kConsumers) {
    wgmma::FewerRegisters<88>();
    Feed<kGated>(p, weight, up, memory, rank);
  } else {
    wgmma::MoreRegisters<208>();
    Consumer<false, kGated, kTileRows, kColumns, kBlocks>(p, rank).Run(memory, 1);
  }
  cluster::Sync();  // the other block may still give stages back to this one
#else
  Trap();
#endif
}

cudaError_t MapWeights(const GemmParams& p, const Matrix& m, CUtensorMap* map) {
  const int64_t row_bytes = int64_t{m.stride} * sizeof(Bf16);
  const int64_t group_bytes =
      p.num_groups > 1 ? p.weight_group_stride * int64_t{sizeof(Bf16)} : m.rows * row_bytes;
  return MakeTensorMap(
      m.data, {{m.cols, m.rows, p.num_groups}, {row_bytes, group_bytes}, {kStepColumns, kHalf, 1}},
      map);
}

template <bool kGated>
cudaError_t Launch(const GemmParams& p, cudaStream_t stream) {
  const auto kernel = ClusterTiles<kGated>;
  CUtensorMap weight;
  CUtensorMap up = {};
  cudaError_t error = MapWeights(p, p.weight, &weight);
  if (error == cudaSuccess && kGated) error = MapWeights(p, p.up, &up);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kBlocks, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(Multiprocessors() / kBlocks * kBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = L::kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  // As many as run at the same time: two blocks must find room in one cluster of multiprocessors.
  static const int most = [&] {
    int clusters = 0;
    const auto code = reinterpret_cast<const void*>(kernel);
    const bool known = cudaOccupancyMaxActiveClusters(&clusters, code, &config) == cudaSuccess;
    return known && clusters > 0 ? clusters : Multiprocessors() / kBlocks;
  }();
  constexpr int kEach = kGated ? kColumns / 2 : kColumns;
  const int64_t units = NumItems(p, kClusterTileRows) * ((p.weight.rows + kEach - 1) / kEach);
  config.gridDim = dim3(static_cast<unsigned>(units < most ? units : most) * kBlocks);
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, p, weight, up);
}

}  // namespace

cudaError_t GemmCluster(const GemmParams& p, cudaStream_t stream) {
  return p.up.empty() ? Launch<false>(p, stream) : Launch<true>(p, stream);
}

}  // namespace strait::cuda
