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
  float max[2];   // common to both groups after each pair; moves rarely
  float base[2];  // the same where there is one, else 0: weights are 2^(score - base)
  float sum[2];   // of the blocks that this group scored
};

template <bool kShared, int kGroupIndex>
class Consumer {
 public:
  __device__ Consumer(const MlaParams& params, const Shared& shared)
      : p_(params),
        s_(shared),
        scale_(params.softmax_scale * kLog2e),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4) {}

  __device__ __forceinline__ void Run() {
    const int lane = threadIdx.x % 32;
    Phases phases;
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork work = p_.plan.work[w];
      const MlaSegment segment = p_.segments[work.sequence];
      const int cache_rows = CacheRows(work, segment);
      // Rows behind the tile's last need no mask: nobody reads what comes of them.
      const int first_position = work.first_position + work.row_in_sequence / p_.num_heads;
      State t;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        t.row[r] = warp_ * 16 + lane / 4 + r * 8;
        t.position[r] = RowPosition(work, t.row[r], p_.num_heads);
        t.max[r] = NegInf();
        t.base[r] = 0;
        t.sum[r] = 0;
      }
      float out[128];
#pragma unroll
      for (int i = 0; i < 128; ++i) out[i] = 0;
      LoadQuery(p_, work, s_);
      for (int block = work.block_begin; block < work.block_end; block += 2) {
        const bool both = block + 1 < work.block_end;
        const Block first = At(0, block, cache_rows, first_position, segment, phases);
        const Block second = At(1, block + 1, cache_rows, first_position, segment, phases);
        if constexpr (kGroupIndex == 0) {
          First(first, second, both, work, t, out);
        } else if (both) {
          Second(first, second, work, t, out);
        } else {
          SecondAlone(first, t, out);
        }
        phases.Advance(both);
      }
      Write(work, t, out);
    }
  }

 private:
  struct Block {
    int index;     // of the page table
    int present;   // rows; may be negative
    int position;  // of its first row
    bool seen;     // all of it by all tokens
    uint32_t phase;
  };
  // A block's weights as products take them from registers: A of its four steps.
  using Weights = uint32_t[4][4];

  __device__ __forceinline__ Block At(int tile, int index, int cache_rows, int first_position,
                                      const MlaSegment& segment, const Phases& phases) const {
    // Where positions are given, a block behind the stretch's last may have none.
    const bool there = index * kMlaBlockRows < cache_rows;
    Block b;
    b.index = index;
    b.present = min(cache_rows - index * kMlaBlockRows, kMlaBlockRows);
    b.position = there ? BlockPosition(segment, index) : 0;
    b.seen = b.present == kMlaBlockRows && b.position + kMlaBlockRows - 1 <= first_position;
    b.phase = phases.of(tile);
    return b;
  }

  // The first group's part of a pair: scores and weights of the first block; its columns of both.
  __device__ __forceinline__ void First(const Block& first, const Block& second, bool both,
                                        const MlaWork& work, State& t, float (&out)[128]) {
    float score[32];
    Scores<0, 2, true>(0, 0, first.phase, score);
    Scores<2, 4, false>(0, 1, first.phase, score);
    Scores<4, 6, false>(0, 2, first.phase, score);
    Scores<6, 9, false>(0, 3, first.phase, score);
    if (both) {
      wgmma::Wait<1>();
      wgmma::NamedArrive<kOrder, kConsumers>();
    }
    wgmma::Wait<0>();
    wgmma::Pin(score);
    if (!first.seen) Mask(0, first, t, score);
    Weights weights;
    OwnValues(0, first.index, work, score, t, weights, out);
    StoreWeights(s_.weights(), t, weights);
    ArriveSome(kWeights + warp_, 64);
    wgmma::Wait<0>();
    wgmma::Pin(out);
    wgmma::Pin(weights);
    Release(0);
    if (!both) return;

    wgmma::BarrierWait(s_.full(1, 0), second.phase);
    wgmma::BarrierWait(s_.full(1, 1), second.phase);
    SyncSome(kWeights + 4 + warp_, 64);
    Adopt(s_.rope(1), 1, second.present, MaximaDiffer(t), t, out);
    OtherValues(s_.rope(1), 1, out);
    wgmma::Wait<0>();
    wgmma::Pin(out);
    Release(1);
  }

  // The second group's: scores and weights of the second block, of which the half that is free first
  // comes first; its columns of both, again in the order in which that frees halves.
  __device__ __forceinline__ void Second(const Block& first, const Block& second,
                                         const MlaWork& work, State& t, float (&out)[128]) {
    float score[32];
    Scores<4, 6, true>(1, 2, second.phase, score);
    Scores<6, 8, false>(1, 3, second.phase, score);
    // The first group's scores come first: its softmax then runs beside these products.
    wgmma::BarrierWait(s_.full(1, 0), second.phase);
    wgmma::NamedSync<kOrder, kConsumers>();
    Scores<0, 2, false>(1, 0, second.phase, score);
    Scores<2, 4, false>(1, 1, second.phase, score);
    Scores<8, 9, false>(1, 1, second.phase, score);
    wgmma::Wait<0>();
    wgmma::Pin(score);
    wgmma::NamedSync<kGroup + kGroupIndex, 128>();  // all warps have read the rope columns
    if (!second.seen) Mask(1, second, t, score);
    Weights weights;
    OwnValues(1, second.index, work, score, t, weights, out);
    StoreWeights(s_.rope(1), t, weights);
    ArriveSome(kWeights + 4 + warp_, 64);
    wgmma::BarrierWait(s_.full(0, 2), first.phase);
    wgmma::BarrierWait(s_.full(0, 3), first.phase);
    SyncSome(kWeights + warp_, 64);
    const bool differ = MaximaDiffer(t);
    wgmma::Wait<0>();
    wgmma::Pin(out);
    wgmma::Pin(weights);
    Release(1);
    Adopt(s_.weights(), 0, first.present, differ, t, out);
    OtherValues(s_.weights(), 0, out);
    wgmma::Wait<0>();
    wgmma::Pin(out);
    Release(0);
  }

  // The second group's where a stretch ends with its first block.
  __device__ __forceinline__ void SecondAlone(const Block& first, State& t, float (&out)[128]) {
    wgmma::BarrierWait(s_.full(0, 2), first.phase);
    wgmma::BarrierWait(s_.full(0, 3), first.phase);
    SyncSome(kWeights + warp_, 64);
    Adopt(s_.weights(), 0, first.present, MaximaDiffer(t), t, out);
    OtherValues(s_.weights(), 0, out);
    wgmma::Wait<0>();
    wgmma::Pin(out);
    Release(0);
  }

  // score (+)= q . rows of the tile, of these chunks, which come with a quarter. Not waited for.
  template <int kFrom, int kTo, bool kFresh>
  __device__ __forceinline__ void Scores(int tile, int quarter, uint32_t phase,
                                         float (&score)[32]) {
    const wgmma::Operand q = Rows(s_.query());
    const wgmma::Operand k = Rows(s_.tile(tile));
    wgmma::BarrierWait(s_.full(tile, quarter), phase);
    wgmma::Begin();
#pragma unroll
    for (int chunk = kFrom; chunk < kTo; ++chunk) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t at = chunk * wgmma::kChunkBytes + wgmma::RowsStep(step);
        wgmma::MultiplyRows(score, q.At(at), k.At(at), !kFresh || chunk > kFrom || step > 0);
      }
    }
    wgmma::Commit();
  }

  static __device__ __forceinline__ bool Any(bool rare) {
    return __builtin_expect(__any_sync(0xffffffffu, rare), 0);
  }

  // Scores that are not seen become -inf, rows that are not present zeros.
  __device__ __forceinline__ void Mask(int tile, const Block& block, const State& t,
                                       float (&score)[32]) {
    if (block.present < kMlaBlockRows) ZeroRows(tile, block.present);
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int seen = SeenRows(t.position[r], block.position, block.present);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& value = score[i / 2 * 4 + r * 2 + i % 2];
        if (i / 2 * 8 + quad * 2 + i % 2 >= seen) value = NegInf();
      }
    }
  }

  // The maximum becomes the scores' where these are high enough, and out relative to it. Whether any
  // are needs no exchange between lanes, which would wait behind the other group's products.
  __device__ __forceinline__ void MoveMaximum(const float (&score)[32], State& t,
                                              float (&out)[128]) {
    float max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        four[i] = fmaxf(fmaxf(score[i * 4 + r * 2], score[i * 4 + r * 2 + 1]),
                        fmaxf(score[(i + 4) * 4 + r * 2], score[(i + 4) * 4 + r * 2 + 1]));
      }
      max[r] = fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3])) * scale_;
    }
    if (!Any(max[0] > t.max[0] + kMaxSlack || max[1] > t.max[1] + kMaxSlack)) return;
    float to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 1));
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 2));
      to[r] = max[r] > t.max[r] + kMaxSlack ? max[r] : t.max[r];
    }
    SetMaximum(to, t, out);
  }

  __device__ __forceinline__ void SetMaximum(const float (&to)[2], State& t, float (&out)[128]) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = Rescale(t.max[r], to[r]);
      t.max[r] = to[r];
      t.base[r] = to[r] == NegInf() ? 0.0f : to[r];
      t.sum[r] *= factor[r];
    }
#pragma unroll
    for (int n = 0; n < 32; ++n) {
      out[n * 4] *= factor[0];
      out[n * 4 + 1] *= factor[0];
      out[n * 4 + 2] *= factor[1];
      out[n * 4 + 3] *= factor[1];
    }
  }

  // Weights of kHalf of the block's rows. sum: of the two rows.
  template <int kHalf>
  __device__ __forceinline__ void Exponentials(const float (&score)[32], const State& t,
                                               float (&sum)[2], Weights& weights) {
#pragma unroll
    for (int step = kHalf * 2; step < kHalf * 2 + 2; ++step) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float e[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          e[i] = Exp2(fmaf(score[(step * 2 + i / 2) * 4 + r * 2 + i % 2], scale_, -t.base[r]));
        }
        weights[step][r] = PackBf16(e[0], e[1]);
        weights[step][2 + r] = PackBf16(e[2], e[3]);
        sum[r] += (e[0] + e[1]) + (e[2] + e[3]);
      }
    }
  }

  // Weights of the block that this group scored, and out += weights . its columns: the products of
  // half the rows run beside the exponentials of the others. Not waited for.
  __device__ __forceinline__ void OwnValues(int tile, int block, const MlaWork& work,
                                            const float (&score)[32], State& t, Weights& weights,
                                            float (&out)[128]) {
    const wgmma::Operand values = Values(tile);
    float sum[2] = {0, 0};
    MoveMaximum(score, t, out);
    Exponentials<0>(score, t, sum, weights);
    wgmma::Begin();
    wgmma::MultiplyColumns(out, weights[0], values.At(wgmma::ColumnsStep(0)), 1);
    wgmma::MultiplyColumns(out, weights[1], values.At(wgmma::ColumnsStep(1)), 1);
    Exponentials<1>(score, t, sum, weights);
    wgmma::Begin();
    wgmma::MultiplyColumns(out, weights[2], values.At(wgmma::ColumnsStep(2)), 1);
    wgmma::MultiplyColumns(out, weights[3], values.At(wgmma::ColumnsStep(3)), 1);
    wgmma::Commit();
    t.sum[0] += sum[0];
    t.sum[1] += sum[1];
    if (__builtin_expect(p_.block_lse != nullptr, 0)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        if (threadIdx.x % 4 == 0 && t.row[r] < work.num_rows) {
          p_.block_lse[(work.first_row + t.row[r]) * p_.block_lse_stride + block] =
              sum[r] > 0 ? (t.base[r] + log2f(sum[r])) * kLn2 : NegInf();
        }
      }
    }
  }

  // out += the other group's weights . this group's columns. Not waited for.
  __device__ __forceinline__ void OtherValues(uint32_t weights, int tile, float (&out)[128]) {
    const wgmma::Operand a = Rows(weights);
    const wgmma::Operand b = Values(tile);
    wgmma::Begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma::MultiplyColumns(out, a.At(wgmma::RowsStep(step)), b.At(wgmma::ColumnsStep(step)), 1);
    }
    wgmma::Commit();
  }

  // Weights to the other group, from each warp to its counterpart there: a warp's product reads its
  // own 16 rows of A alone.
  __device__ __forceinline__ void StoreWeights(uint32_t to, const State& t,
                                               const Weights& weights) {
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
      s_.max(kGroupIndex)[t.row[0]] = t.max[0];
      s_.max(kGroupIndex)[t.row[1]] = t.max[1];
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      StoreMatrices(to + wgmma::PieceOffset(warp_ * 16 + lane % 16, step * 2 + lane / 16),
                    weights[step]);
    }
    wgmma::FenceProxy();
  }
  __device__ __forceinline__ bool MaximaDiffer(const State& t) {
    return Any(s_.max(1 - kGroupIndex)[t.row[0]] != t.max[0] ||
               s_.max(1 - kGroupIndex)[t.row[1]] != t.max[1]);
  }

  // Takes the other group's weights and its maximum over: what is relative to the lower of the two
  // maxima, those weights or the result, becomes relative to the higher. One jump over all that is
  // rare: what lies behind a jump is not in the instruction cache.
  __device__ __forceinline__ void Adopt(uint32_t weights, int tile, int present, bool differ,
                                        State& t, float (&out)[128]) {
    if (__builtin_expect(!differ && present == kMlaBlockRows, 1)) return;
    if (present < kMlaBlockRows) ZeroRows(tile, present);
    if (!differ) return;
    const float other[2] = {s_.max(1 - kGroupIndex)[t.row[0]], s_.max(1 - kGroupIndex)[t.row[1]]};
    const float to[2] = {fmaxf(t.max[0], other[0]), fmaxf(t.max[1], other[1])};
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = Rescale(other[r], to[r]);
      if (factor == 1.0f) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = weights + wgmma::PieceOffset(t.row[r], quad * 2 + half);
        uint4 piece = wgmma::LoadPiece(at);
        for (uint32_t* word : {&piece.x, &piece.y, &piece.z, &piece.w}) {
          *word = PackBf16(__uint_as_float(*word << 16) * factor,
                           __uint_as_float(*word & 0xffff0000u) * factor);
        }
        wgmma::StorePiece(at, piece);
      }
    }
    wgmma::FenceProxy();
    __syncwarp();
    SetMaximum(to, t, out);
  }

  // Rows that are not present count as zeros: their weights are, but they may hold NaN.
  __device__ __forceinline__ void ZeroRows(int tile, int present) {
    const uint32_t values = s_.tile(tile) + kGroupIndex * kHalfChunks * wgmma::kChunkBytes;
    const int first = max(present, 0);
    for (int i = threadIdx.x % 128; i < (kMlaBlockRows - first) * 32; i += 128) {
      wgmma::StorePiece(values + i % 32 / 8 * wgmma::kChunkBytes +
                            (first + i / 32) * wgmma::kChunkRowBytes + i % 8 * 16,
                        make_uint4(0, 0, 0, 0));
    }
    wgmma::FenceProxy();
    wgmma::NamedSync<kGroup + kGroupIndex, 128>();
  }

  // This group's columns of the tile.
  __device__ __forceinline__ wgmma::Operand Values(int tile) const {
    return Columns(s_.tile(tile) + kGroupIndex * kHalfChunks * wgmma::kChunkBytes);
  }

  // This group is done with its columns of the tile, the last to need them. A feeder waits for one
  // arrival a warp: what the warp's other lanes wrote, the group's barrier after it has ordered.
  __device__ __forceinline__ void Release(int tile) {
    const uint32_t empty = s_.empty(tile, kGroupIndex);
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (kShared) {
      if (lane < 2) cluster::BarrierArrive(empty, lane);
    } else if (lane == 0) {
      wgmma::BarrierArrive(empty);
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
  const int warp_;  // of the group
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::hopper
