// SPDX-License-Identifier: Apache-2.0
//
// Products of a weight with many rows on Hopper: tiles of 128 (or 64) rows by 256 (or 128) columns,
// two warpgroups that multiply and one that feeds them through a ring of stages of 64 k.
//
// Roofline: a tile of 128 x 256 asks for 87 flops a byte that comes from L2: at 5.5 TB/s of L2 about
//   480 TFLOP/s if nothing were shared; neighbouring blocks read the same lines at about the same
//   time. The tensor core needs 1,024 cycles a step (790 TFLOP/s at the clock it holds), and its
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
// Order of sums: k ascending, 16 at a time; fp8: 128 at a time, each scaled, then added. A row's
// bits depend on K and num_splits, never on other rows.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_hopper_layout.h"
#include "kernels/cuda/gemm_hopper_write.cuh"
#include "kernels/cuda/gemm_launch.cuh"
#include "kernels/cuda/mla_wgmma.cuh"

namespace strait::cuda {
namespace {

using hopper_gemm::HopperLayout;
using hopper_gemm::kStepColumns;
using hopper_gemm::kTileRowBytes;
using hopper_gemm::TileRow;
using hopper_gemm::TileRowOf;
using hopper_gemm::TileUnit;
using hopper_gemm::TileUnitAt;

static_assert(kStepColumns == kGemmStep && kScaleBlock == 2 * kStepColumns);

constexpr int kConsumers = 256;
constexpr int kFeeders = 128;
constexpr int kThreads = kConsumers + kFeeders;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A stage of the ring and how often the ring has come round.
template <class L>
struct Ring {
  uint32_t memory;  // 1,024-byte aligned
  int stage = 0;
  uint32_t parity = 0;

  __device__ explicit Ring(uint32_t memory_in) : memory(memory_in) {}
  __device__ void Advance() {
    if (++stage == L::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ uint32_t x() const { return memory + stage * L::kStageBytes; }
  __device__ uint32_t weights() const { return x() + L::kXBytes; }
  __device__ uint32_t codes() const { return weights() + L::kWeightBytes; }
  __device__ uint32_t full() const { return memory + L::kStages * L::kStageBytes + stage * 8; }
  __device__ uint32_t empty() const { return full() + hopper_gemm::kMaxStages * 8; }
};

// What a block works through, the same for feeders and consumers.
template <bool kGated, int kTileRows, int kColumns>
struct Work {
  static constexpr int kEach = kGated ? kColumns / 2 : kColumns;  // outputs a tile
  int num_items;
  int num_columns;
  int num_units;
  int steps_each;

  __device__ explicit Work(const GemmParams& p, int num_shares) {
    num_items = p.tiles != nullptr ? *p.num_tiles
                                   : p.num_groups * ((p.num_rows + kTileRows - 1) / kTileRows);
    num_columns = (p.weight.rows + kEach - 1) / kEach;
    num_units = num_items * num_columns * num_shares;
    steps_each = StepsEach(p);
  }
  __device__ int Steps(const GemmParams& p, int share) const {
    const int steps = (p.weight.cols + kStepColumns - 1) / kStepColumns;
    return min(steps - share * steps_each, steps_each);
  }
};

template <bool kFp8, bool kGated, int kTileRows, int kColumns>
struct Feeder {
  using L = HopperLayout<kFp8, kTileRows, kColumns>;
  // A thread copies 16 bytes of every kWeightStride-th row, starting with weight_row.
  static constexpr int kElement = kFp8 ? 1 : 2;
  static constexpr int kPieces = kStepColumns * kElement / 16;  // of a row
  static constexpr int kWeightStride = kFeeders / kPieces;
  static constexpr int kWeightCopies = kColumns / kWeightStride;
  static constexpr int kXStride = kFeeders / 8;
  static constexpr int kXCopies = kTileRows / kXStride;

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
    const Work<kGated, kTileRows, kColumns> work(p, num_shares);
    const int x_piece = thread % 8;
    const int x_row = thread / 8;
    const int weight_piece = thread % kPieces;
    const int weight_row = thread / kPieces;
    const int k_end = p.weight.cols;
    int filled = 0;  // steps whose copies were started
    for (int unit = blockIdx.x; unit < work.num_units; unit += gridDim.x) {
      const TileUnit at = TileUnitAt(unit, work.num_items, work.num_columns);
      const GemmItem item = ItemOf(p, kTileRows, at.item);
      const Bf16* x_rows[kXCopies];
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        // Beyond the item's rows nothing is read.
        const int m = x_row + i * kXStride;
        const int index = item.begin + (m < item.count ? m : 0);
        const int64_t row = p.x_rows != nullptr ? p.x_rows[index] : index;
        x_rows[i] = p.x + item.group * p.x_group_stride + row * p.x_stride;
      }
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
        {
          const int k = k0 + x_piece * 8;
          const int present = Clamp((k_end - k) * 2, 16);
#pragma unroll
          for (int i = 0; i < kXCopies; ++i) {
            const int m = x_row + i * kXStride;
            CopyAsync(filling.x() + wgmma::PieceOffset(m, x_piece),
                      x_rows[i] + (present > 0 ? k : 0), m < item.count ? present : 0);
          }
        }
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

template <bool kFp8, bool kGated, int kTileRows, int kColumns>
struct Consumer {
  using L = HopperLayout<kFp8, kTileRows, kColumns>;
  static constexpr int kSums = L::kOwn / 2;  // a thread's
  static constexpr int kOutputs = kGated ? L::kOwn / 2 : L::kOwn;

  const GemmParams& p;
  const int lane = threadIdx.x % 32;
  hopper_gemm::TilePlace place;

  __device__ explicit Consumer(const GemmParams& params) : p(params) {
    const int group = threadIdx.x / 128;
    place.row = threadIdx.x % 128 / 32 * 16 + lane / 4 + (kTileRows == 128 ? group * 64 : 0);
    place.column = lane % 4 * 2 + (kTileRows == 64 ? group * kOutputs : 0);
  }

  __device__ __forceinline__ void GiveBack(Ring<L>& ring) const {
    if (lane == 0) wgmma::BarrierArrive(ring.empty());
    ring.Advance();
  }

  __device__ __forceinline__ void Run(uint32_t memory, int num_shares) const {
    const Work<kGated, kTileRows, kColumns> work(p, num_shares);
    const int group = threadIdx.x / 128;
    const wgmma::Operand x =
        wgmma::Rows(memory + (kTileRows == 128 ? group * 64 * kTileRowBytes : 0));
    const wgmma::Operand weights =
        wgmma::Rows(memory + L::kXBytes + (kTileRows == 64 ? group * L::kOwn * kTileRowBytes : 0));
    const int scale_cols = (p.weight.cols + kScaleBlock - 1) / kScaleBlock;
    Ring<L> ring(memory);      // the stage to read next
    Ring<L> returned(memory);  // the next to be given back
    for (int unit = blockIdx.x; unit < work.num_units; unit += gridDim.x) {
      const TileUnit at = TileUnitAt(unit, work.num_items, work.num_columns);
      const GemmItem item = ItemOf(p, kTileRows, at.item);
      const int n0 = at.column * work.kEach;
      const int num_steps = work.Steps(p, at.share);
      const int64_t scale_at = item.group * p.scale_group_stride +
                               int64_t{n0 / kScaleBlock} * scale_cols +
                               at.share * work.steps_each / 2;
      float sums[kSums];
      float scaled[kFp8 ? kSums : 1];
      if constexpr (kFp8) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) scaled[i] = 0;
      }
      const auto multiply = [&](int accumulate) {
        wgmma::BarrierWait(ring.full(), ring.parity);
        __syncwarp();
        wgmma::Begin();
#pragma unroll
        for (int k = 0; k < kStepColumns / 16; ++k) {
          const uint32_t offset = ring.stage * L::kStageBytes + wgmma::RowsStep(k);
          wgmma::MultiplyRows(sums, x.At(offset), weights.At(offset), k == 0 ? accumulate : 1);
        }
        wgmma::Commit();
        ring.Advance();
      };
      if constexpr (kFp8) {
        for (int step = 0; step < num_steps; step += 2) {
          const float scale = p.weight.scales[scale_at + step / 2];
          const float up_scale = kGated ? p.up.scales[scale_at + step / 2] : scale;
          multiply(0);
          const bool two = step + 1 < num_steps;
          if (two) multiply(1);
          wgmma::Wait<0>();
          wgmma::Pin(sums);
          GiveBack(returned);
          if (two) GiveBack(returned);
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            scaled[i] = fmaf(sums[i], kGated && i >= kSums / 2 ? up_scale : scale, scaled[i]);
          }
        }
      } else {
        multiply(0);
        for (int step = 1; step < num_steps; ++step) {
          multiply(1);
          wgmma::Wait<1>();
          GiveBack(returned);
        }
        wgmma::Wait<0>();
        wgmma::Pin(sums);
        GiveBack(returned);
      }
      if constexpr (kFp8) {
        hopper_gemm::WriteTile<kGated>(p, scaled, place, item, n0, at.share, num_shares);
      } else {
        hopper_gemm::WriteTile<kGated>(p, sums, place, item, n0, at.share, num_shares);
      }
    }
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
    Consumer<kFp8, kGated, kTileRows, kColumns>(p).Run(memory, num_shares);
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
