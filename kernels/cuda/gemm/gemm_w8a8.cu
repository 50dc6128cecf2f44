// SPDX-License-Identifier: Apache-2.0
//
// Products of e4m3 codes with e4m3 codes on Hopper: tiles of 128 rows of x by 128 rows of a weight,
// two warpgroups that multiply 64 rows each and one that feeds them through a ring of stages of 128 k.
//
// Sums: the tensor core keeps about 14 bits of a sum of fp8 products, so its sums go no further than
//   the 128 k that share a scale: four products of 32 k, then fp32: sum += part * (scale of x's row *
//   scale of the weight's block). A warpgroup starts the next 128 k before it adds the last, in a
//   second set of registers.
//
// Roofline: the tensor core needs 512 cycles a stage (1,979 TFLOP/s at its full clock). Shared memory
//   gives 24 KiB to each warpgroup and takes 32 KiB meanwhile: 640 cycles at 128 bytes a cycle. A tile
//   asks for 128 flops a byte from L2: about 590 TFLOP/s at 4.6 TB/s, which is the limit to hit; a
//   larger tile would need more registers for two sums an output than there are. With few rows: bound
//   by reading weights, kLag stages of 16 KiB a block on their way; the tensor core's time for 128
//   rows is still less than that.
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
//
// Order of sums: k ascending, as above. A row's bits depend on K and num_splits alone: there is one
// form of tile, and rows of a product never meet.
// Why one form: what a smaller tile would save of the tensor core's time, nothing waits for.
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_hopper_block.cuh"
#include "kernels/cuda/gemm/gemm_launch.cuh"

namespace strait::cuda {
namespace {

using hopper_gemm::kConsumers;
using hopper_gemm::kFeeders;
using hopper_gemm::kThreads;
using hopper_gemm::kTileRowBytes;
using hopper_gemm::TilePlace;
using hopper_gemm::TileRow;
using hopper_gemm::TileRowOf;
using hopper_gemm::TileUnit;
using hopper_gemm::TileUnitAt;

constexpr int kTileRows = kCodeTileRows;
constexpr int kColumns = 128;            // rows of weights in a tile; gated: 64 of each
constexpr int kStepCodes = kScaleBlock;  // of K, a stage
static_assert(kStepCodes == kTileRowBytes && kStepCodes == 2 * kGemmStep);

// Shared memory, as HopperLayout has it.
struct L {
  static constexpr int kXBytes = kTileRows * kTileRowBytes;
  static constexpr int kWeightBytes = kColumns * kTileRowBytes;
  static constexpr int kStageBytes = kXBytes + kWeightBytes;
  static constexpr int kStages = 6;
  static constexpr int kLag = kStages - 2;
  static constexpr int kBytes = kStages * kStageBytes + hopper_gemm::kBarrierBytes + 1024;
  static_assert(kStageBytes % 1024 == 0 && kBytes <= hopper_gemm::kMostBytes);
  static_assert(kLag * kWeightBytes >= 64 << 10, "weights on their way");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using Ring = hopper_gemm::Ring<L>;

// What a block works through, the same for feeders and consumers.
template <bool kGated>
struct Work {
  static constexpr int kEach = kGated ? kColumns / 2 : kColumns;  // outputs a tile
  int num_items;
  int num_columns;
  int num_units;
  int steps_each;

  __device__ explicit Work(const GemmParams& p, int num_shares) {
    num_items = p.tiles != nullptr ? *p.num_tiles : (p.num_rows + kTileRows - 1) / kTileRows;
    num_columns = (p.weight.rows + kEach - 1) / kEach;
    num_units = num_items * num_columns * num_shares;
    steps_each = StepsEach(p) / 2;
  }
  __device__ __forceinline__ int Steps(const GemmParams& p, int share) const {
    const int steps = (p.weight.cols + kStepCodes - 1) / kStepCodes;
    return min(steps - share * steps_each, steps_each);
  }
};

// Copies 16 bytes of every kStride-th row of both tiles a stage; rows and k that do not exist: zeros.
template <bool kGated>
struct Feeder {
  static constexpr int kPieces = kTileRowBytes / 16;
  static constexpr int kStride = kFeeders / kPieces;
  static constexpr int kXCopies = kTileRows / kStride;
  static constexpr int kWeightCopies = kColumns / kStride;

  const GemmParams& p;
  Ring filling;   // the stage that copies go to next
  Ring arriving;  // the oldest whose copies may be on their way
  const int thread = threadIdx.x - kConsumers;

  __device__ Feeder(const GemmParams& params, uint32_t memory)
      : p(params), filling(memory), arriving(memory) {}

  __device__ __forceinline__ void Arrive() {
    wgmma::FenceProxy();
    wgmma::BarrierArrive(arriving.full());
    arriving.Advance();
  }

  __device__ __forceinline__ void Run(int num_shares) {
    const Work<kGated> work(p, num_shares);
    const int piece = thread % kPieces;
    const int first_row = thread / kPieces;
    const int k_end = p.weight.cols;
    int filled = 0;  // steps whose copies were started
    for (int unit = blockIdx.x; unit < work.num_units; unit += gridDim.x) {
      const TileUnit at = TileUnitAt(unit, work.num_items, work.num_columns);
      const GemmItem item = ItemOf(p, kTileRows, at.item);
      const uint8_t* x_rows[kXCopies];
#pragma unroll
      for (int i = 0; i < kXCopies; ++i) {
        const int m = first_row + i * kStride;
        const int index = item.begin + (m < item.count ? m : 0);
        x_rows[i] = p.x_codes + int64_t{p.x_rows != nullptr ? p.x_rows[index] : index} * p.x_stride;
      }
      const int n0 = at.column * work.kEach + first_row;  // of this thread's first row
      const int64_t weight_at = item.group * p.weight_group_stride + int64_t{n0} * p.weight.stride;
      const auto* const weight = static_cast<const uint8_t*>(p.weight.data) + weight_at;
      const auto* const up = kGated ? static_cast<const uint8_t*>(p.up.data) + weight_at : weight;
      const int columns_left = p.weight.rows - n0;
      const int num_steps = work.Steps(p, at.share);
      int k = at.share * work.steps_each * kStepCodes + piece * 16;
      for (int step = 0; step < num_steps; ++step, k += kStepCodes) {
        wgmma::BarrierWait(filling.empty(), filling.parity ^ 1);
        const int present = Clamp(k_end - k, 16);
        const int from = present > 0 ? k : 0;
#pragma unroll
        for (int i = 0; i < kXCopies; ++i) {
          const int m = first_row + i * kStride;
          CopyAsync(filling.x() + wgmma::PieceOffset(m, piece), x_rows[i] + from,
                    m < item.count ? present : 0);
        }
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
          // first_row < kStride divides what rows are told apart by.
          const TileRow row = TileRowOf<kGated, kColumns>(i * kStride);
          const bool valid = row.column < columns_left;
          const uint8_t* const base = kGated && row.up ? up : weight;
          // A row that is not there lends the address of one that is: the first of its matrix.
          CopyAsync(filling.weights() + wgmma::PieceOffset(first_row + i * kStride, piece),
                    valid ? base + int64_t{row.column} * p.weight.stride + from
                          : static_cast<const uint8_t*>(p.weight.data),
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

template <bool kGated>
struct Consumer {
  static constexpr int kSums = kColumns / 2;  // a thread's
  using Sums = float[kSums];

  const GemmParams& p;
  Ring ring;      // the stage to read next
  Ring returned;  // the next to be given back
  const int group = threadIdx.x / 128;
  const int lane = threadIdx.x % 32;

  __device__ Consumer(const GemmParams& params, uint32_t memory)
      : p(params), ring(memory), returned(memory) {}

  // The scales of 128 k: of this thread's two rows of x, of the weights.
  struct Scales {
    float x[2];
    float weight;
    float up;
  };

  __device__ __forceinline__ void GiveBack() {
    if (lane == 0) wgmma::BarrierArrive(returned.empty());
    returned.Advance();
  }

  // Starts the next stage's products.
  __device__ __forceinline__ void Multiply(Sums& part, const wgmma::Operand& x,
                                           const wgmma::Operand& weights) {
    wgmma::BarrierWait(ring.full(), ring.parity);
    __syncwarp();
    wgmma::Begin();
#pragma unroll
    for (int k = 0; k < kStepCodes / 32; ++k) {
      const uint32_t offset = ring.stage * L::kStageBytes + wgmma::RowsStep(k);
      wgmma::MultiplyCodes(part, x.At(offset), weights.At(offset), k != 0);
    }
    wgmma::Commit();
    ring.Advance();
  }

  // What a stage's products gave, whose end was waited for.
  __device__ __forceinline__ void Add(Sums& part, const Scales& scales, Sums& sums) {
    wgmma::Pin(part);
    GiveBack();
    float factors[2][2];  // of row, of matrix
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factors[half][0] = scales.x[half] * scales.weight;
      factors[half][1] = kGated ? scales.x[half] * scales.up : 0;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = fmaf(part[i], factors[i / 2 % 2][kGated && i >= kSums / 2], sums[i]);
    }
  }

  __device__ __forceinline__ void Run(uint32_t memory, int num_shares) {
    const Work<kGated> work(p, num_shares);
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const TilePlace place = {group * 64 + warp * 16 + lane / 4, lane % 4 * 2};
    const wgmma::Operand x = wgmma::Rows(memory + group * 64 * kTileRowBytes);
    const wgmma::Operand weights = wgmma::Rows(memory + L::kXBytes);
    const int scale_cols = (p.weight.cols + kScaleBlock - 1) / kScaleBlock;
    for (int unit = blockIdx.x; unit < work.num_units; unit += gridDim.x) {
      const TileUnit at = TileUnitAt(unit, work.num_items, work.num_columns);
      const GemmItem item = ItemOf(p, kTileRows, at.item);
      const int num_steps = work.Steps(p, at.share);
      const int n0 = at.column * work.kEach;
      const int first = at.share * work.steps_each;
      int x_at[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = place.row + half * 8;
        const int index = item.begin + (m < item.count ? m : 0);
        x_at[half] = (p.x_rows != nullptr ? p.x_rows[index] : index) * scale_cols + first;
      }
      const int64_t weight_at =
          item.group * p.scale_group_stride + int64_t{n0 / kScaleBlock} * scale_cols + first;
      const auto scales = [&](int step) -> Scales {
        return {{p.x_scales[x_at[0] + step], p.x_scales[x_at[1] + step]},
                p.weight.scales[weight_at + step],
                kGated ? p.up.scales[weight_at + step] : 0};
      };
      Sums even;
      Sums odd;
      Sums sums;
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0;
      // Starts a step's products, then adds what those of the step before it gave.
      const auto turn = [&](Sums& started, Sums& part, int step) {
        const Scales of_part = scales(step);
        Multiply(started, x, weights);
        wgmma::Wait<1>();
        Add(part, of_part, sums);
      };
      Multiply(even, x, weights);
      int step = 0;
      for (; step + 2 < num_steps; step += 2) {
        turn(odd, even, step);
        turn(even, odd, step + 1);
      }
      const auto last = [&](Sums& part) {
        const Scales of_part = scales(num_steps - 1);
        wgmma::Wait<0>();
        Add(part, of_part, sums);
      };
      if (step + 1 < num_steps) {
        turn(odd, even, step);
        last(odd);
      } else {
        last(even);
      }
      hopper_gemm::WriteTile<kGated>(p, sums, place, item, n0, at.share, num_shares);
    }
  }
};

#endif  // sm_90a

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    CodeTiles(const __grid_constant__ GemmParams p, const int num_shares) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t memory = (SharedAddress(DynamicShared<unsigned char>()) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    Ring ring(memory);
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
    wgmma::FewerRegisters<72>();
    Feeder<kGated>(p, memory).Run(num_shares);
  } else {
    wgmma::MoreRegisters<216>();
    Consumer<kGated>(p, memory).Run(memory, num_shares);
  }
#else
  Trap();
#endif
}

template <bool kGated>
cudaError_t Launch(const GemmParams& p, cudaStream_t stream) {
  constexpr int kEach = kGated ? kColumns / 2 : kColumns;
  const int shares = NumShares(p);
  const int64_t units = NumItems(p, kTileRows) * ((p.weight.rows + kEach - 1) / kEach) * shares;
  const dim3 grid(static_cast<unsigned>(units < Multiprocessors() ? units : Multiprocessors()));
  const cudaError_t error =
      LaunchWithShared(CodeTiles<kGated>, grid, kThreads, L::kBytes, stream, p, shares);
  return error != cudaSuccess || shares == 1 ? error : AddGemmShares(p, shares, stream);
}

}  // namespace

cudaError_t GemmW8A8(const GemmParams& p, cudaStream_t stream) {
  return p.up.empty() ? Launch<false>(p, stream) : Launch<true>(p, stream);
}

}  // namespace strait::cuda
