// SPDX-License-Identifier: Apache-2.0
//
// Products of a weight with many rows: a block makes 128 x 128 outputs (64 rows of x in the small
// form), K in steps of 64 through shared memory, filled ahead by asynchronous copies.
//
// Eight warps in two rows of four; a warp makes kTileRows/2 x 32 outputs with m16n8k16 products
// from ldmatrix. Shared rows are 128 bytes, their 16-byte chunks XORed with the row, so that no
// ldmatrix has bank conflicts. A gated product puts 64 rows of `weight` and 64 of `up` in the tile
// so that a warp has both of a column. fp8 codes are copied as they are and widened to bf16 from
// shared to shared memory; their sums are scaled every 128 k.
//
// Intensity: 64 flops a byte at 128 x 128: bound by the tensor cores' mma.sync rate, about 60 % of
// what wgmma reaches on sm_90, where gemm_hopper.cu takes its place.
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
#include "kernels/cuda/device/common.cuh"
#include "kernels/cuda/gemm/gemm_launch.cuh"

namespace strait::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kN = 128;  // columns of the tile; gated: 64 of each weight
constexpr int kK = kGemmStep;
constexpr int kStages = 3;  // of shared memory
constexpr int kRowBytes = kK * 2;

// Byte offset of 16-byte chunk `chunk` (of 8) of a row.
__device__ __forceinline__ int Swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

template <bool kFp8, int kTileRows>
struct Layout {
  static constexpr int kABytes = kTileRows * kRowBytes;
  static constexpr int kBBytes = kN * (kFp8 ? kK : kRowBytes);
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kWideBytes = kFp8 ? kN * kRowBytes : 0;  // codes widened
  static constexpr int kBytes = kStages * kStageBytes + kWideBytes;
};

template <bool kFp8, bool kGated, int kTileRows>
__global__ void __launch_bounds__(kThreads) Tiles(const __grid_constant__ GemmParams p) {
  using L = Layout<kFp8, kTileRows>;
  auto* const memory = DynamicShared<char>();
  // Weights may be read before the kernel before has ended, if no list says which.
  const bool early = p.tiles == nullptr && p.x_rows == nullptr;
  if (!early) {
    StartNext();
    WaitForEarlier();
  }
  const GemmItem item = ItemOf(p, kTileRows, blockIdx.y);
  if (item.count == 0) return;
  constexpr int kColumns = kGated ? kN / 2 : kN;
  const int n0 = blockIdx.x * kColumns;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_m = warp / 4 * (kTileRows / 2);
  const int warp_n = warp % 4 * 32;
  constexpr int kFragments = kTileRows / 32;  // of 16 rows, a warp

  // Which rows this thread copies: chunk threadIdx.x % 8 (fp8 codes: % 4) of each.
  constexpr int kACopies = kTileRows * 8 / kThreads;
  const Bf16* a_rows[kACopies];
  bool a_valid[kACopies];
#pragma unroll
  for (int i = 0; i < kACopies; ++i) {
    const int m = threadIdx.x / 8 + i * (kThreads / 8);
    a_valid[i] = m < item.count;
    const int index = item.begin + (a_valid[i] ? m : 0);
    const int64_t row = p.x_rows ? p.x_rows[index] : index;
    a_rows[i] = p.x + item.group * p.x_group_stride + row * p.x_stride;
  }
  constexpr int kBChunks = kFp8 ? kK / 16 : kK / 8;  // 16-byte chunks a row
  constexpr int kBCopies = kN * kBChunks / kThreads;
  constexpr int kElement = kFp8 ? 1 : 2;
  const char* b_rows[kBCopies];
  bool b_valid[kBCopies];
#pragma unroll
  for (int i = 0; i < kBCopies; ++i) {
    const int row = threadIdx.x / kBChunks + i * (kThreads / kBChunks);  // of the tile
    // Gated: of each 32 rows the first 16 are of `weight`, the others of `up`.
    const bool of_up = kGated && row % 32 >= 16;
    const int n = n0 + (kGated ? row / 32 * 16 + row % 16 : row);
    b_valid[i] = n < p.weight.rows;
    const Matrix& w = of_up ? p.up : p.weight;
    b_rows[i] =
        static_cast<const char*>(w.data) +
        (item.group * p.weight_group_stride + int64_t{b_valid[i] ? n : 0} * w.stride) * kElement;
  }

  const int k_end = p.weight.cols;
  // Split: a share of K, whole scales.
  const int steps_each = StepsEach(p);
  const int first_step = blockIdx.z * steps_each;
  const int num_steps = min((k_end + kK - 1) / kK - first_step, steps_each);
  const auto copy_a = [&](int step) {
    char* const stage = memory + step % kStages * L::kStageBytes;
    const int a_chunk = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kACopies; ++i) {
      const int m = threadIdx.x / 8 + i * (kThreads / 8);
      const int k = (first_step + step) * kK + a_chunk * 8;
      const int valid = a_valid[i] ? Clamp((k_end - k) * 2, 16) : 0;
      CopyAsync(SharedAddress(stage + Swizzled(m, a_chunk)), a_rows[i] + (valid > 0 ? k : 0),
                valid);
    }
  };
  const auto copy_b = [&](int step) {
    char* const b = memory + step % kStages * L::kStageBytes + L::kABytes;
    const int b_chunk = threadIdx.x % kBChunks;
#pragma unroll
    for (int i = 0; i < kBCopies; ++i) {
      const int row = threadIdx.x / kBChunks + i * (kThreads / kBChunks);
      const int k = (first_step + step) * kK + b_chunk * (16 / kElement);
      const int valid = b_valid[i] ? Clamp((k_end - k) * kElement, 16) : 0;
      const int to = kFp8 ? row * kK + b_chunk * 16 : Swizzled(row, b_chunk);
      CopyAsync(SharedAddress(b + to), b_rows[i] + (valid > 0 ? k * kElement : 0), valid);
    }
  };

  float sums[kFragments][4][4] = {};
  float scaled[kFp8 ? kFragments : 1][4][4] = {};
  const int scale_cols = (k_end + kScaleBlock - 1) / kScaleBlock;
  const int64_t scale_at =
      item.group * p.scale_group_stride + int64_t{n0 / kScaleBlock} * scale_cols + first_step / 2;

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) copy_b(step);
  }
  if (early) {
    StartNext();
    WaitForEarlier();
  }
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) copy_a(step);
    CommitCopies();  // the first takes all of b's
  }
  char* const wide = memory + kStages * L::kStageBytes;
  for (int step = 0; step < num_steps; ++step) {
    WaitCopyGroups<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < num_steps) {
      copy_a(step + kStages - 1);
      copy_b(step + kStages - 1);
    }
    CommitCopies();
    const char* const a = memory + step % kStages * L::kStageBytes;
    const char* b = a + L::kABytes;
    if (kFp8) {
#pragma unroll
      for (int i = 0; i < kN * 4 / kThreads; ++i) {
        const int index = threadIdx.x + i * kThreads;
        const int row = index / 4;
        const int chunk = index % 4;
        const uint4 codes = *reinterpret_cast<const uint4*>(b + row * kK + chunk * 16);
        uint4 first;
        uint4 second;
        WidenE4m3(codes.x, first.x, first.y);
        WidenE4m3(codes.y, first.z, first.w);
        WidenE4m3(codes.z, second.x, second.y);
        WidenE4m3(codes.w, second.z, second.w);
        *reinterpret_cast<uint4*>(wide + Swizzled(row, chunk * 2)) = first;
        *reinterpret_cast<uint4*>(wide + Swizzled(row, chunk * 2 + 1)) = second;
      }
      __syncthreads();
      b = wide;
    }
#pragma unroll
    for (int kk = 0; kk < kK / 16; ++kk) {
      uint32_t b_frag[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = warp_n + n * 16 + (lane & 7) + (lane >> 4) * 8;
        LoadMatrices(b_frag[n], SharedAddress(b + Swizzled(row, kk * 2 + (lane >> 3 & 1))));
      }
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        uint32_t a_frag[4];
        const int row = warp_m + m * 16 + (lane & 15);
        LoadMatrices(a_frag, SharedAddress(a + Swizzled(row, kk * 2 + (lane >> 4))));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          MmaBf16(sums[m][n], a_frag[0], a_frag[1], a_frag[2], a_frag[3], b_frag[n / 2][n % 2 * 2],
                  b_frag[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    if (kFp8 && (step % 2 == 1 || step + 1 == num_steps)) {
      const float first = p.weight.scales[scale_at + step / 2];
      const float second = kGated ? p.up.scales[scale_at + step / 2] : first;
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scaled[m][n][i] = fmaf(sums[m][n][i], n < 2 ? first : second, scaled[m][n][i]);
            sums[m][n][i] = 0;
          }
        }
      }
    }
  }

  const auto result = [&](int m, int n, int i) { return kFp8 ? scaled[m][n][i] : sums[m][n][i]; };
  const auto put = [&](int row, int column, float value) {
    if (row >= item.count || column >= p.weight.rows) return;
    if (gridDim.z > 1) {
      const int64_t split_row = int64_t{blockIdx.z} * p.num_rows + item.begin + row;
      p.split_sums[split_row * p.weight.rows + column] = value;
      return;
    }
    const int64_t at =
        item.group * p.y_group_stride + int64_t{item.begin + row} * p.y_stride + column;
    if (p.y_bf16 != nullptr) {
      p.y_bf16[at] = __float2bfloat16(value);
    } else {
      p.y_fp32[at] = p.accumulate ? p.y_fp32[at] + value : value;
    }
  };
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int n = 0; n < (kGated ? 2 : 4); ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_m + m * 16 + lane / 4 + i / 2 * 8;
        const int in_warp = n * 8 + lane % 4 * 2 + i % 2;
        if (kGated) {
          put(row, n0 + warp_n / 2 + in_warp, Silu(result(m, n, i)) * result(m, n + 2, i));
        } else {
          put(row, n0 + warp_n + in_warp, result(m, n, i));
        }
      }
    }
  }
}

constexpr int kAddThreads = 256;

// y (+)= the shares of K, in order.
__global__ void __launch_bounds__(kAddThreads)
    AddShares(const __grid_constant__ GemmParams p, const int num_shares) {
  StartNext();
  WaitForEarlier();
  const int64_t index = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  const int64_t count = int64_t{p.num_rows} * p.weight.rows;
  if (index >= count) return;
  float sum = 0;
  for (int share = 0; share < num_shares; ++share) sum += p.split_sums[share * count + index];
  const int64_t at = index / p.weight.rows * p.y_stride + index % p.weight.rows;
  if (p.y_bf16 != nullptr) {
    p.y_bf16[at] = __float2bfloat16(sum);
  } else {
    p.y_fp32[at] = p.accumulate ? p.y_fp32[at] + sum : sum;
  }
}

template <bool kFp8, bool kGated, int kTileRows>
cudaError_t Launch(const GemmParams& p, cudaStream_t stream) {
  constexpr int kBytes = Layout<kFp8, kTileRows>::kBytes;
  constexpr int kColumns = kGated ? kN / 2 : kN;
  const auto kernel = Tiles<kFp8, kGated, kTileRows>;
  const int shares = NumShares(p);
  const dim3 grid((p.weight.rows + kColumns - 1) / kColumns,
                  static_cast<unsigned>(NumItems(p, kTileRows)), static_cast<unsigned>(shares));
  const cudaError_t error = LaunchWithShared(kernel, grid, kThreads, kBytes, stream, p);
  return error != cudaSuccess || shares == 1 ? error : AddGemmShares(p, shares, stream);
}

}  // namespace

cudaError_t AddGemmShares(const GemmParams& p, int num_shares, cudaStream_t stream) {
  const int64_t count = int64_t{p.num_rows} * p.weight.rows;
  return LaunchChained(AddShares,
                       dim3(static_cast<unsigned>((count + kAddThreads - 1) / kAddThreads)),
                       kAddThreads, 0, stream, p, num_shares);
}

cudaError_t GemmTiles(const GemmParams& p, int32_t tile_rows, cudaStream_t stream) {
  return WithForm(p, [&](auto fp8, auto gated) {
    constexpr bool kFp8 = decltype(fp8)::value;
    constexpr bool kGated = decltype(gated)::value;
    return tile_rows == 64 ? Launch<kFp8, kGated, 64>(p, stream)
                           : Launch<kFp8, kGated, 128>(p, stream);
  });
}

}  // namespace strait::cuda
