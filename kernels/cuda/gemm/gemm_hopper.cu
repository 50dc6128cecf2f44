// SPDX-License-Identifier: Apache-2.0
//
// Products of a weight with many rows on Hopper: tiles of 128 (or 64) rows by 256 (or 128) columns,
// two warpgroups that multiply and one that feeds them through a ring of stages of 64 k.
//
// Roofline: a tile of 128 x 256 asks for 85 flops a byte that comes from L2: at the 4.6 TB/s that it
//   gives about 390 TFLOP/s, and somewhat more as neighbouring blocks read the same lines at about
//   the same time. The tensor core needs 1,024 cycles a step (790 TFLOP/s at the clock it holds), and its
//   operands 48 KiB in shared memory, written once and read once by each warpgroup: 60 % of what
//   shared memory gives. With few rows: bound by reading the weights; a block has kLag stages of
//   them on their way, 64 to 128 KiB.
//   fp8 codes are widened by the feeders, 160 issue slots a step of 512 cycles at 128 columns, and
//   sums are scaled every 128 k in registers: two sums an output, hence 128 columns.
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
//
// The feeders copy with cp.async instead of the copy engine: it gathers rows, takes any K and any
// row stride of the callers, zeroes what lies beyond, and needs no tensor map a weight. Their
// stores become visible to the products by a proxy fence before the barrier, kLag steps later. As
// many blocks as there are multiprocessors take all tiles in turn; feeders run ahead into the next
// tile while its predecessor's results are written.
//
// bf16 products whose items have more than 128 rows go to clusters of two such blocks
// (gemm_cluster.cu), unless K is cut or narrower tiles fill the device better; tiles of 128 rows by
// 256 columns are for the others: lists of experts with fewer rows, up to 128 rows, K in shares.
//
// Order of sums: k ascending, 16 at a time; fp8: 128 at a time, each scaled, then added. A row's
// bits depend on K and num_splits, never on other rows.
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_hopper_block.cuh"
#include "kernels/cuda/gemm/gemm_launch.cuh"

namespace strait::cuda {
namespace {

using namespace hopper_gemm;  // NOLINT: its own parts

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <bool kFp8, bool kGated, int kTileRows, int kColumns>
struct Feeder {
  using L = HopperLayout<kFp8, kTileRows, kColumns>;
  // A thread copies 16 bytes of every kWeightStride-th row, starting with weight_row.
  static constexpr int kElement = kFp8 ? 1 : 2;
  static constexpr int kPieces = kStepColumns * kElement / 16;  // of a row
  static constexpr int kWeightStride = kFeeders / kPieces;
  static constexpr int kWeightCopies = kColumns / kWeightStride;

  const GemmParams& p;
  Ring<L> filling;   // the stage that copies go to next
  Ring<L> arriving;  // the oldest whose copies may be on their way
  const int thread = threadIdx.x - kConsumers;

  __device__ Feeder(const GemmParams& params, uint32_t memory)
      : p(params), filling(memory), arriving(memory) {}

  // The copies of the oldest step have ended for this thread: widens its codes, gives the stage on.
  __device__ __forceinline__ void Arrive() {
    if constexpr (kFp8) {
      const int piece = thread % kPieces * 2;
      const int row = thread / kPieces;
#pragma unroll
      for (int i = 0; i < kWeightCopies; ++i) {
        const uint4 codes = wgmma::LoadPiece(arriving.codes() + (i * kFeeders + thread) * 16);
        uint4 first;
        uint4 second;
        WidenE4m3(codes.x, first.x, first.y);
        WidenE4m3(codes.y, first.z, first.w);
        WidenE4m3(codes.z, second.x, second.y);
        WidenE4m3(codes.w, second.z, second.w);
        const uint32_t to = arriving.weights();
        wgmma::StorePiece(to + wgmma::PieceOffset(row + i * kWeightStride, piece), first);
        wgmma::StorePiece(to + wgmma::PieceOffset(row + i * kWeightStride, piece + 1), second);
      }
    }
    wgmma::FenceProxy();
    wgmma::BarrierArrive(arriving.full());
    arriving.Advance();
  }

  __device__ __forceinline__ void Run(int num_shares) {
    const Work<kGated, kTileRows, kColumns, 1> work(p, num_shares);
    const int weight_piece = thread % kPieces;
    const int weight_row = thread / kPieces;
    const int k_end = p.weight.cols;
    int filled = 0;  // steps whose copies were started
    for (int unit = work.first(); unit < work.num_units; unit += work.stride()) {
      const TileUnit at = work.At(unit);
      const GemmItem item = work.RowsOf(p, at.item, 0);
      const XFeeder<kTileRows> x(p, item, thread);
      const int n0 = at.column * work.kEach + weight_row;  // of this thread's first row
      const int64_t group_at = item.group * p.weight_group_stride;
      const char* const weight = static_cast<const char*>(p.weight.data) +
                                 (group_at + int64_t{n0} * p.weight.stride) * kElement;
      const char* const up = kGated ? static_cast<const char*>(p.up.data) +
                                          (group_at + int64_t{n0} * p.up.stride) * kElement
                                    : weight;
      const int columns_left = p.weight.rows - n0;
      const int num_steps = work.Steps(p, at.share);
      const int first_step = at.share * work.steps_each;
      for (int step = 0; step < num_steps; ++step) {
        wgmma::BarrierWait(filling.empty(), filling.parity ^ 1);
        const int k0 = (first_step + step) * kStepColumns;
        x.Copy(filling.x(), k0, k_end);
        const int k = k0 + weight_piece * (16 / kElement);
        const int present = Clamp((k_end - k) * kElement, 16);
        const int64_t from = present > 0 ? int64_t{k} * kElement : 0;
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
          // weight_row < kWeightStride divides what rows are told apart by.
          const TileRow row = TileRowOf<kGated, L::kOwn>(i * kWeightStride);
          const bool valid = row.column < columns_left;
          const char* const base = kGated && row.up ? up : weight;
          const uint32_t to =
              kFp8 ? filling.codes() + (i * kFeeders + thread) * 16
                   : filling.weights() +
                         wgmma::PieceOffset(weight_row + i * kWeightStride, weight_piece);
          // A row that is not there lends the address of one that is: the first of its matrix.
          CopyAsync(to,
                    valid ? base + int64_t{row.column} * p.weight.stride * kElement + from
                          : static_cast<const char*>(p.weight.data),
                    valid ? present : 0);
        }
        CommitCopies();
        filling.Advance();
        if (++filled > L::kLag) {
          WaitCopyGroups<L::kLag>();
          Arrive();
        }
      }
    }
    WaitCopyGroups<0>();
    for (int left = min(filled, L::kLag); left > 0; --left) Arrive();
  }
};

#endif  // sm_90a

template <bool kFp8, bool kGated, int kTileRows, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    HopperTiles(const __grid_constant__ GemmParams p, const int num_shares) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = HopperLayout<kFp8, kTileRows, kColumns>;
  const uint32_t memory = (SharedAddress(DynamicShared<unsigned char>()) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    Ring<L> ring(memory);
    for (int stage = 0; stage < L::kStages; ++stage) {
      wgmma::BarrierInit(ring.full(), kFeeders);
      wgmma::BarrierInit(ring.empty(), kConsumers / 32);
      ring.Advance();
    }
    wgmma::FenceBarrierInit();
  }
  __syncthreads();
  StartNext();
  WaitForEarlier();
  if (threadIdx.x >= kConsumers) {
    wgmma::FewerRegisters<88>();
    Feeder<kFp8, kGated, kTileRows, kColumns>(p, memory).Run(num_shares);
  } else {
    wgmma::MoreRegisters<208>();
    Consumer<kFp8, kGated, kTileRows, kColumns, 1>(p, 0).Run(memory, num_shares);
  }
#else
  Trap();
#endif
}

template <bool kFp8, bool kGated, int kTileRows, int kColumns>
cudaError_t Launch(const GemmParams& p, cudaStream_t stream) {
  using L = HopperLayout<kFp8, kTileRows, kColumns>;
  const auto kernel = HopperTiles<kFp8, kGated, kTileRows, kColumns>;
  constexpr int kEach = kGated ? kColumns / 2 : kColumns;
  const int shares = NumShares(p);
  const int64_t units = NumItems(p, kTileRows) * ((p.weight.rows + kEach - 1) / kEach) * shares;
  const dim3 grid(static_cast<unsigned>(units < Multiprocessors() ? units : Multiprocessors()));
  const cudaError_t error = LaunchWithShared(kernel, grid, kThreads, L::kBytes, stream, p, shares);
  return error != cudaSuccess || shares == 1 ? error : AddGemmShares(p, shares, stream);
}

template <bool kFp8, bool kGated>
cudaError_t Choose(const GemmParams& p, int32_t tile_rows, int32_t columns, cudaStream_t stream) {
  if constexpr (!kFp8) {
    if (columns == 256) {
      return tile_rows == 64 ? Launch<kFp8, kGated, 64, 256>(p, stream)
                             : Launch<kFp8, kGated, 128, 256>(p, stream);
    }
  }
  return tile_rows == 64 ? Launch<kFp8, kGated, 64, 128>(p, stream)
                         : Launch<kFp8, kGated, 128, 128>(p, stream);
}

}  // namespace

cudaError_t GemmHopper(const GemmParams& p, int32_t tile_rows, int32_t columns,
                       cudaStream_t stream) {
  return WithForm(p, [&](auto fp8, auto gated) {
    return Choose<decltype(fp8)::value, decltype(gated)::value>(p, tile_rows, columns, stream);
  });
}

}  // namespace strait::cuda
