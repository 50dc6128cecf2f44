// SPDX-License-Identifier: Apache-2.0
//
// Latent attention for any rank to 512 and any rope to 64, on any GPU from sm_80 on: mma.sync
// products, one tile of 64 rows a thread block, one cache block of 64 rows at a time.
//
// Roofline: a block of 64 rows is 64 * (rank + rope) * 2 bytes and 2 * 64 * 64 * (2 rank + rope)
// flops: 121 flops a byte at 512/64, bound by memory on a data centre GPU. This path is for
// shapes and GPUs that the Hopper path does not take, and to hold that path against: it loads and
// computes in turn, so it hides neither. Measured, H200: 128 x 4,096 rows, 16 heads 679 us (0.19 of
// the read rate), 128 heads 1,378 us (106 TFLOP/s).
#include <algorithm>

#include "kernels/cuda/attention/mla_device.cuh"

namespace strait::cuda::mla {
namespace {

constexpr int kThreads = 256;
constexpr int kPad = 8;  // bf16 behind each row in shared memory: no bank conflicts
constexpr int kScoreStride = kMlaBlockRows + kPad;

struct Shared {
  __nv_bfloat16* q;   // [64, width + kPad]
  __nv_bfloat16* kv;  // [64, width + kPad]
  __nv_bfloat16* p;   // [64, kScoreStride]
  float* row_max;     // [2, 64]
  float* row_sum;     // [2, 64]
  int width;          // rank + rope, rope padded with zeros to 16
  __device__ int stride() const { return width + kPad; }
};

__host__ __device__ constexpr int PaddedWidth(int rank, int rope) {
  return rank + (rope + 15) / 16 * 16;
}

constexpr int SharedBytes(int width) {
  return 2 * 64 * (width + kPad) * 2 + 64 * kScoreStride * 2 + 4 * 64 * 4;
}

// One 16-byte piece, 8 columns, of a cache row.
template <RowFormat kFormat>
__device__ __forceinline__ uint4 RowPiece(const std::byte* row, int column, int rank, int rope) {
  if (column >= rank + rope) return make_uint4(0, 0, 0, 0);
  if (kFormat == RowFormat::kBf16) return *reinterpret_cast<const uint4*>(row + column * 2);
  if (column >= rank) {  // the rope key begins at a multiple of 4 bytes
    const uint32_t* words =
        reinterpret_cast<const uint32_t*>(row + RopeKeyOffset(kFormat, rank) + (column - rank) * 2);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
  const float scale = *reinterpret_cast<const float*>(row + ScalesOffset(rank) + column / 128 * 4);
  const uint2 codes = *reinterpret_cast<const uint2*>(row + column);
  uint4 low;
  uint4 high;
  WidenRow16(make_uint4(codes.x, codes.y, 0, 0), scale, low, high);
  return low;
}

__device__ void LoadQuery(const MlaParams& p, const MlaWork& work, const Shared& s) {
  const int pieces = s.width / 8;
  for (int i = threadIdx.x; i < kMlaTileRows * pieces; i += kThreads) {
    const int row = i / pieces;
    const int column = i % pieces * 8;
    const int64_t q_row = work.first_row + row;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < work.num_rows && column < p.rank) {
      value = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_latent) +
                                              q_row * p.q_latent_stride + column);
    } else if (row < work.num_rows && column < p.rank + p.rope) {
      value = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.q_rope) +
                                              q_row * p.q_rope_stride + column - p.rank);
    }
    *reinterpret_cast<uint4*>(s.q + row * s.stride() + column) = value;
  }
}

template <RowFormat kFormat>
__device__ void LoadBlock(const MlaParams& p, const std::byte* block, int present,
                          const Shared& s) {
  const int pieces = s.width / 8;
  const int row_bytes = RowBytes(kFormat, p.rank, p.rope);
  for (int i = threadIdx.x; i < kMlaBlockRows * pieces; i += kThreads) {
    const int row = i / pieces;
    const int column = i % pieces * 8;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < present) value = RowPiece<kFormat>(block + row * row_bytes, column, p.rank, p.rope);
    *reinterpret_cast<uint4*>(s.kv + row * s.stride() + column) = value;
  }
}

// scores of 16 rows x 32 cache rows of this warp.
__device__ __forceinline__ void Scores(const Shared& s, int row0, int kv0, float (&score)[4][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[n][i] = 0;
  }
  const __nv_bfloat16* q = s.q + (row0 + lane % 16) * s.stride() + lane / 16 * 8;
  const __nv_bfloat16* k = s.kv + (kv0 + lane % 8 + lane / 16 * 8) * s.stride() + lane / 8 % 2 * 8;
  for (int column = 0; column < s.width; column += 16) {
    uint32_t a[4];
    LoadMatrices(a, SharedAddress(q + column));
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t b[4];
      LoadMatrices(b, SharedAddress(k + n * 8 * s.stride() + column));
      MmaBf16(score[n], a[0], a[1], a[2], a[3], b[0], b[1]);
      MmaBf16(score[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }
}

// kGroups: how many groups of 16 output columns a warp holds at most.
template <RowFormat kFormat, int kGroups>
__global__ void __launch_bounds__(kThreads) PortableKernel(const MlaParams p) {
  auto* const shared = DynamicShared<unsigned char>();
  Shared s;
  s.width = PaddedWidth(p.rank, p.rope);
  s.q = reinterpret_cast<__nv_bfloat16*>(shared);
  s.kv = s.q + 64 * s.stride();
  s.p = s.kv + 64 * s.stride();
  s.row_max = reinterpret_cast<float*>(s.p + 64 * kScoreStride);
  s.row_sum = s.row_max + 128;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int row0 = warp % 4 * 16;
  const int half = warp / 4;  // of the cache rows for scores, of the columns for outputs
  const int groups = p.rank / 16;
  const int first_group = half * ((groups + 1) / 2);
  const int num_groups = half == 0 ? (groups + 1) / 2 : groups / 2;
  const int rows[2] = {row0 + lane / 4, row0 + lane / 4 + 8};
  const float scale = p.softmax_scale * kLog2e;

  for (int w = p.plan.work_begin[blockIdx.x]; w < p.plan.work_begin[blockIdx.x + 1]; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int positions[2] = {RowPosition(work, rows[0], p.num_heads),
                              RowPosition(work, rows[1], p.num_heads)};
    float out[kGroups * 2][4];
#pragma unroll
    for (int n = 0; n < kGroups * 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
    float max[2] = {NegInf(), NegInf()};
    float sum[2] = {0, 0};
    __syncthreads();
    LoadQuery(p, work, s);

    for (int block = work.block_begin; block < work.block_end; ++block) {
      const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
      const int block_position = BlockPosition(segment, block);
      __syncthreads();
      if (present > 0) {
        LoadBlock<kFormat>(p, p.blocks + segment.page_table[block] * p.block_bytes, present, s);
      } else {
        LoadBlock<kFormat>(p, p.blocks, 0, s);
      }
      __syncthreads();
      float score[4][4];
      Scores(s, row0, half * 32, score);
      float block_max[2] = {NegInf(), NegInf()};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int seen = SeenRows(positions[i / 2], block_position, present);
          const bool visible = half * 32 + n * 8 + lane % 4 * 2 + i % 2 < seen;
          score[n][i] = visible ? score[n][i] * scale : NegInf();
          block_max[i / 2] = fmaxf(block_max[i / 2], score[n][i]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        block_max[r] = fmaxf(block_max[r], __shfl_xor_sync(kFullWarp, block_max[r], 1));
        block_max[r] = fmaxf(block_max[r], __shfl_xor_sync(kFullWarp, block_max[r], 2));
        if (lane % 4 == 0) s.row_max[half * 64 + rows[r]] = block_max[r];
      }
      __syncthreads();
      float block_sum[2] = {0, 0};
      float base[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float to = fmaxf(max[r], fmaxf(s.row_max[rows[r]], s.row_max[64 + rows[r]]));
        const float factor = Rescale(max[r], to);
        max[r] = to;
        base[r] = to == NegInf() ? 0.0f : to;
        sum[r] *= factor;
#pragma unroll
        for (int n = 0; n < kGroups * 2; ++n) {
          out[n][r * 2] *= factor;
          out[n][r * 2 + 1] *= factor;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float low = Exp2(score[n][r * 2] - base[r]);
          const float high = Exp2(score[n][r * 2 + 1] - base[r]);
          block_sum[r] += low + high;
          *reinterpret_cast<uint32_t*>(s.p + rows[r] * kScoreStride + half * 32 + n * 8 +
                                       lane % 4 * 2) = PackBf16(low, high);
        }
      }
      sum[0] += block_sum[0];
      sum[1] += block_sum[1];
      if (p.block_lse != nullptr) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          block_sum[r] += __shfl_xor_sync(kFullWarp, block_sum[r], 1);
          block_sum[r] += __shfl_xor_sync(kFullWarp, block_sum[r], 2);
          if (lane % 4 == 0) s.row_sum[half * 64 + rows[r]] = block_sum[r];
        }
      }
      __syncthreads();
      if (p.block_lse != nullptr && half == 0 && lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float total = s.row_sum[rows[r]] + s.row_sum[64 + rows[r]];
          if (rows[r] < work.num_rows) {
            p.block_lse[(work.first_row + rows[r]) * p.block_lse_stride + block] =
                total > 0 ? (max[r] + log2f(total)) * kLn2 : NegInf();
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kMlaBlockRows; k += 16) {
        uint32_t a[4];
        LoadMatrices(a, SharedAddress(s.p + (row0 + lane % 16) * kScoreStride + k + lane / 16 * 8));
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          if (g < num_groups) {
            uint32_t b[4];
            LoadMatricesTransposed(b, SharedAddress(s.kv + (k + lane % 16) * s.stride() +
                                                    (first_group + g) * 16 + lane / 16 * 8));
            MmaBf16(out[2 * g], a[0], a[1], a[2], a[3], b[0], b[1]);
            MmaBf16(out[2 * g + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        }
      }
    }

    // The two halves summed disjoint cache rows.
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kFullWarp, sum[r], 1);
      sum[r] += __shfl_xor_sync(kFullWarp, sum[r], 2);
      if (lane % 4 == 0) s.row_sum[half * 64 + rows[r]] = sum[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (rows[r] >= work.num_rows) continue;
      const float total = s.row_sum[rows[r]] + s.row_sum[64 + rows[r]];
      const float inverse = total > 0 ? 1.0f / total : 0.0f;
      const float lse = total > 0 ? (max[r] + log2f(total)) * kLn2 : NegInf();
      const int64_t row = work.partial < 0
                              ? work.first_row + rows[r]
                              : static_cast<int64_t>(work.partial) * kMlaTileRows + rows[r];
      float* lse_to = work.partial < 0 ? p.lse : p.partial_lse;
      if (half == 0 && lane % 4 == 0 && lse_to != nullptr) lse_to[row] = lse;
#pragma unroll
      for (int n = 0; n < kGroups * 2; ++n) {
        if (n >= num_groups * 2) continue;
        const int64_t at = row * p.rank + first_group * 16 + n * 8 + lane % 4 * 2;
        const float low = out[n][r * 2] * inverse;
        const float high = out[n][r * 2 + 1] * inverse;
        if (work.partial >= 0) {
          *reinterpret_cast<float2*>(p.partial_out + at) = make_float2(low, high);
        } else if (p.out_fp32) {
          *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at) = make_float2(low, high);
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.out) + at) =
              PackBf16(low, high);
        }
      }
    }
  }
}

using Kernel = void (*)(MlaParams);

template <RowFormat kFormat>
Kernel KernelOf(int rank) {
  return rank <= 128 ? PortableKernel<kFormat, 4> : PortableKernel<kFormat, 16>;
}

}  // namespace

cudaError_t PreparePortable() {
  int device = 0;
  int limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  for (const int rank : {128, 512}) {
    const int bytes = std::min(limit, SharedBytes(PaddedWidth(rank, 64)));
    for (const Kernel kernel :
         {KernelOf<RowFormat::kBf16>(rank), KernelOf<RowFormat::kFp8>(rank)}) {
      if (error != cudaSuccess) return error;
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    }
  }
  return error;
}

cudaError_t LaunchPortable(const MlaParams& params, cudaStream_t stream) {
  const Kernel kernel = params.format == RowFormat::kBf16 ? KernelOf<RowFormat::kBf16>(params.rank)
                                                          : KernelOf<RowFormat::kFp8>(params.rank);
  const int bytes = SharedBytes(PaddedWidth(params.rank, params.rope));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace strait::cuda::mla

namespace strait::cuda {

int64_t MlaPortableSharedBytes(int32_t rank, int32_t rope) {
  return mla::SharedBytes(mla::PaddedWidth(rank, rope));
}

}  // namespace strait::cuda
