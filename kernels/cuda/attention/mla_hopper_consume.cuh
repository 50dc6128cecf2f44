// SPDX-License-Identifier: Apache-2.0
//
// The two warpgroups of the Hopper attention kernel that multiply; mla_hopper.cu tells the plan.
#pragma once

#include "kernels/cuda/attention/mla_hopper_shared.cuh"

namespace strait::cuda::mla::hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where 16 bytes of q lie in shared memory.
__device__ __forceinline__ uint32_t QueryPiece(const Shared& s, int row, int piece) {
  return s.query() + piece / 8 * wgmma::kChunkBytes +
         wgmma::PieceOffset(static_cast<uint32_t>(row), piece % 8);
}

// q into shared memory by the consumers; rows behind the tile's last are zeros, before their turn.
__device__ __forceinline__ void LoadQuery(const MlaParams& p, const MlaWork& work,
                                          const Shared& s) {
  constexpr int kPieces = kChunks * 8;
  const int pieces = work.num_rows * kPieces;
  for (int i = pieces + threadIdx.x; i < kMlaTileRows * kPieces; i += kConsumers) {
    wgmma::StorePiece(QueryPiece(s, i / kPieces, i % kPieces), make_uint4(0, 0, 0, 0));
  }
  WaitForEarlier();
#pragma unroll 3
  for (int i = threadIdx.x; i < pieces; i += kConsumers) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const uint32_t to = QueryPiece(s, row, piece);
    const int64_t q_row = work.first_row + row;
    const __nv_bfloat16* from = piece < 64 ? static_cast<const __nv_bfloat16*>(p.q_latent) +
                                                 q_row * p.q_latent_stride + piece * 8
                                           : static_cast<const __nv_bfloat16*>(p.q_rope) +
                                                 q_row * p.q_rope_stride + (piece - 64) * 8;
    wgmma::CopyPiece(to, from);
  }
  wgmma::WaitCopies();
  wgmma::FenceProxy();
  wgmma::NamedSync<kAllConsumers, kConsumers>();
}

// What one consumer thread knows of its two rows, and its part of the result.
struct State {
  int row[2];
  int position[2];
  float max[2];  // common to both groups after each block
  float sum[2];  // of the blocks that this group scored
};

template <RowFormat kFormat, int kGroupIndex>
class Consumer {
 public:
  __device__ Consumer(const MlaParams& params, const Shared& shared)
      : p_(params), s_(shared), scale_(params.softmax_scale * kLog2e) {}

  __device__ __forceinline__ void Run() {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    uint32_t tile = 0;  // of all stretches
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork work = p_.plan.work[w];
      const MlaSegment segment = p_.segments[work.sequence];
      const int cache_rows = CacheRows(work, segment);
      State t;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        t.row[r] = warp * 16 + lane / 4 + r * 8;
        t.position[r] = RowPosition(work, t.row[r], p_.num_heads);
        t.max[r] = NegInf();
        t.sum[r] = 0;
      }
      float out[128];
#pragma unroll
      for (int i = 0; i < 128; ++i) out[i] = 0;
      LoadQuery(p_, work, s_);
      const int count = work.block_end - work.block_begin;
      for (int i = 0; i < count; i += 2) {
        const bool pair = i + 1 < count;
        const int block = work.block_begin + i;
        const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
        const int next_present = min(
            present == kMlaBlockRows ? cache_rows - (block + 1) * kMlaBlockRows : 0, kMlaBlockRows);
        if constexpr (kGroupIndex == 0) {
          float factor[2];
          Score(tile, block, present, work, segment, t, factor);
          RescaleOut(out, factor);
          StartValues(tile, present, out);
          FinishValues(tile, out);
          if (pair) {
            Adopt(t, factor);
            RescaleOut(out, factor);
            StartValues(tile + 1, next_present, out);
            FinishValues(tile + 1, out);
          }
        } else {
          // Score first if the block is there: then that runs beside the other group's softmax.
          // If not, do not hold the other block up. All four warps must go the same way.
          if (threadIdx.x == kConsumers / 2) {
            *s_.flag() = pair && wgmma::BarrierTest(s_.full(tile + 1, 1), FullParity(tile + 1));
          }
          wgmma::NamedSync<kGroup + kGroupIndex, 128>();
          const bool early = *s_.flag() != 0;
          float score[32];
          float factor[2];
          if (early) Products(tile + 1, score);
          Adopt(t, factor);
          RescaleOut(out, factor);
          StartValues(tile, present, out);
          if (early) {
            Softmax(tile + 1, block + 1, next_present, work, segment, t, score, factor);
          }
          FinishValues(tile, out);
          if (pair) {
            if (!early) Score(tile + 1, block + 1, next_present, work, segment, t, factor);
            RescaleOut(out, factor);
            StartValues(tile + 1, next_present, out);
            FinishValues(tile + 1, out);
          }
        }
        tile += pair ? 2 : 1;
      }
      Write(work, t, out);
    }
  }

 private:
  // score = q . rows of the tile.
  __device__ __forceinline__ void Products(uint32_t tile, float (&score)[32]) {
    const wgmma::Operand q = wgmma::Rows(s_.query());
    const wgmma::Operand k = wgmma::Rows(s_.tile(tile));
    wgmma::BarrierWait(s_.full(tile, 0), FullParity(tile));
    wgmma::Begin();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk == kHalfChunks) {
        wgmma::Commit();
        wgmma::BarrierWait(s_.full(tile, 1), FullParity(tile));
        wgmma::Begin();
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t at = chunk * wgmma::kChunkBytes + wgmma::RowsStep(step);
        wgmma::MultiplyRows(score, q.At(at), k.At(at), chunk + step != 0);
      }
    }
    wgmma::Commit();
    wgmma::Wait<0>();
    wgmma::Pin(score);
  }

  // Weights of the tile into its last chunk, the new maximum to the other group; factor is what
  // the result so far must be multiplied by.
  __device__ __forceinline__ void Softmax(uint32_t tile, int block, int present,
                                          const MlaWork& work, const MlaSegment& segment, State& t,
                                          float (&score)[32], float (&factor)[2]) {
    const int quad = threadIdx.x % 4;
    const int block_position = BlockPosition(segment, block);
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int seen = SeenRows(t.position[r], block_position, present);
      float max = NegInf();
      if (seen < kMlaBlockRows) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float& value = score[i / 2 * 4 + r * 2 + i % 2];
          if (i / 2 * 8 + quad * 2 + i % 2 >= seen) value = NegInf();
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) max = fmaxf(max, score[i / 2 * 4 + r * 2 + i % 2]);
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2)) * scale_;
      const float to = max > t.max[r] + kMaxSlack ? max : t.max[r];
      factor[r] = Rescale(t.max[r], to);
      t.max[r] = to;
      base[r] = to == NegInf() ? 0.0f : to;
      t.sum[r] *= factor[r];
      if (quad == 0) s_.max(kGroupIndex)[t.row[r]] = to;
    }
    wgmma::NamedSync<kGroup + kGroupIndex, 128>();  // all warps have read the rope columns
    const uint32_t weights = s_.tile(tile) + kWeightChunk * wgmma::kChunkBytes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float low = Exp2(fmaf(score[n * 4 + r * 2], scale_, -base[r]));
        const float high = Exp2(fmaf(score[n * 4 + r * 2 + 1], scale_, -base[r]));
        sum += low + high;
        wgmma::StoreWord(weights + wgmma::PieceOffset(t.row[r], n) + quad * 4, PackBf16(low, high));
      }
      t.sum[r] += sum;
      if (p_.block_lse != nullptr) {
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (quad == 0 && t.row[r] < work.num_rows) {
          p_.block_lse[(work.first_row + t.row[r]) * p_.block_lse_stride + block] =
              sum > 0 ? (base[r] + log2f(sum)) * kLn2 : NegInf();
        }
      }
    }
    wgmma::FenceProxy();
    wgmma::NamedArrive<kWeights + kGroupIndex, kConsumers>();
    wgmma::NamedSync<kGroup + kGroupIndex, 128>();
  }

  __device__ __forceinline__ void Score(uint32_t tile, int block, int present, const MlaWork& work,
                                        const MlaSegment& segment, State& t, float (&factor)[2]) {
    float score[32];
    Products(tile, score);
    Softmax(tile, block, present, work, segment, t, score, factor);
  }

  // Waits for the other group's weights and takes over its maximum.
  __device__ __forceinline__ void Adopt(State& t, float (&factor)[2]) {
    wgmma::NamedSync<kWeights + 1 - kGroupIndex, kConsumers>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float to = s_.max(1 - kGroupIndex)[t.row[r]];
      factor[r] = Rescale(t.max[r], to);
      t.sum[r] *= factor[r];
      t.max[r] = to;
    }
  }

  __device__ __forceinline__ void RescaleOut(float (&out)[128], const float (&factor)[2]) {
    if (__all_sync(0xffffffffu, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
    for (int n = 0; n < 32; ++n) {
      out[n * 4] *= factor[0];
      out[n * 4 + 1] *= factor[0];
      out[n * 4 + 2] *= factor[1];
      out[n * 4 + 3] *= factor[1];
    }
  }

  // out += weights . this group's half of the columns; rows not present count as zeros.
  __device__ __forceinline__ void StartValues(uint32_t tile, int present, float (&out)[128]) {
    wgmma::BarrierWait(s_.full(tile, kGroupIndex), FullParity(tile));
    const uint32_t weights = s_.tile(tile) + kWeightChunk * wgmma::kChunkBytes;
    const uint32_t values = s_.tile(tile) + kGroupIndex * 4 * wgmma::kChunkBytes;
    if (present < kMlaBlockRows) {
      const int first = max(present, 0);
      for (int i = threadIdx.x % 128; i < (kMlaBlockRows - first) * 32; i += 128) {
        wgmma::StorePiece(values + i % 32 / 8 * wgmma::kChunkBytes +
                              (first + i / 32) * wgmma::kChunkRowBytes + i % 8 * 16,
                          make_uint4(0, 0, 0, 0));
      }
      wgmma::FenceProxy();
      wgmma::NamedSync<kGroup + kGroupIndex, 128>();
    }
    const wgmma::Operand a = wgmma::Rows(weights);
    const wgmma::Operand b = wgmma::Columns(values);
    wgmma::Begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma::MultiplyColumns(out, a.At(wgmma::RowsStep(step)), b.At(wgmma::ColumnsStep(step)), 1);
    }
    wgmma::Commit();
  }

  __device__ __forceinline__ void FinishValues(uint32_t tile, float (&out)[128]) {
    wgmma::Wait<0>();
    wgmma::Pin(out);
    // Both groups have read the weights, each its own columns. Bulk copies wait for one arrival a
    // warp; the fp8 feeder, which writes as ordinary threads do, for every thread that wrote.
    if (kFormat == RowFormat::kFp8 || threadIdx.x % 32 == 0) {
      if (kGroupIndex == 0) wgmma::BarrierArrive(s_.empty(tile, 0));
      wgmma::BarrierArrive(s_.empty(tile, 1));
    }
  }

  __device__ __forceinline__ void Write(const MlaWork& work, State& t, const float (&out)[128]) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      t.sum[r] += __shfl_xor_sync(0xffffffffu, t.sum[r], 1);
      t.sum[r] += __shfl_xor_sync(0xffffffffu, t.sum[r], 2);
      if (quad == 0) s_.sum(kGroupIndex)[t.row[r]] = t.sum[r];
    }
    wgmma::NamedSync<kAllConsumers, kConsumers>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (t.row[r] >= work.num_rows) continue;
      const float sum = s_.sum(0)[t.row[r]] + s_.sum(1)[t.row[r]];
      const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
      const int64_t row = work.partial < 0
                              ? work.first_row + t.row[r]
                              : static_cast<int64_t>(work.partial) * kMlaTileRows + t.row[r];
      float* lse = work.partial < 0 ? p_.lse : p_.partial_lse;
      if (kGroupIndex == 0 && quad == 0 && lse != nullptr) {
        lse[row] = sum > 0 ? (t.max[r] + log2f(sum)) * kLn2 : NegInf();
      }
      const int64_t at = row * 512 + kGroupIndex * 256 + quad * 2;
      if (work.partial >= 0 || p_.out_fp32) {
        float* to = (work.partial >= 0 ? p_.partial_out : static_cast<float*>(p_.out)) + at;
#pragma unroll
        for (int n = 0; n < 32; ++n) {
          *reinterpret_cast<float2*>(to + n * 8) =
              make_float2(out[n * 4 + r * 2] * inverse, out[n * 4 + r * 2 + 1] * inverse);
        }
      } else {
        __nv_bfloat16* to = static_cast<__nv_bfloat16*>(p_.out) + at;
#pragma unroll
        for (int n = 0; n < 32; ++n) {
          *reinterpret_cast<uint32_t*>(to + n * 8) =
              PackBf16(out[n * 4 + r * 2] * inverse, out[n * 4 + r * 2 + 1] * inverse);
        }
      }
    }
  }

  const MlaParams& p_;
  const Shared s_;
  const float scale_;
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::hopper
