// SPDX-License-Identifier: Apache-2.0
//
// The warpgroup of scores and weights of the attention kernel that widens codes in registers;
// mla_codes.cu tells the plan.
#pragma once

#include "kernels/cuda/attention/mla_codes_shared.cuh"

namespace strait::cuda::mla::codes {

// Weights are 2^(score - maximum + kWeightShift), and at most 2^15, as halves.
inline constexpr float kWeightShift = 11.0f;
inline constexpr float kSlack = 4.0f;  // by which a score passes the maximum before that moves

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Cache rows are A, rows of the tile B: a thread has, of the block's scores, those of cache rows
// row() and 8 further and of rows 8 * i + 2 * quad() and the next of the tile. Of two groups either has
// every second block.
class Scorer {
  static constexpr int kRuns = kTile / 8;
  static constexpr uint32_t kStages = Layout::kStages;
  static constexpr uint32_t kChunkBytes = Layout::kChunkBytes;

 public:
  __device__ Scorer(const MlaParams& params, const Shared& shared, uint32_t group)
      : p_(params),
        s_(shared),
        group_(group),
        thread_(static_cast<int>(threadIdx.x) % kGroupThreads),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void Run() {
    Ring<kStages> stage;
    Ring<kTurns> turn;
    uint32_t stretch = 0;  // of those that have blocks, whether it is an odd one
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork& work = p_.plan.work[w];
      const MlaSegment& segment = p_.segments[work.sequence];
      const int cache_rows = CacheRows(work, segment);
      const int num_blocks = NumBlocks(work, cache_rows);
      const int block_begin = work.block_begin;
      const int32_t* const block_positions = segment.block_positions;
      for (int first = 0; first < work.num_rows; first += kTile) {
        scale_ = p_.softmax_scale * kLog2e * LoadQuery(work, first);
        const int first_position =
            work.first_position + (work.row_in_sequence + first) / p_.num_heads;
#pragma unroll 1
        for (int i = 0; i < num_blocks; ++i, turn.Advance(), stage.Advance()) {
          if (turn.index != group_) continue;
          const int block = block_begin + i;
          const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
          const int position =
              block_positions == nullptr ? block * kMlaBlockRows : block_positions[block];
          wgmma::BarrierWait(s_.full(stage.index), stage.phase);
          if (present < kMlaBlockRows) ZeroRows(stage.index, present);
          Block b;
          b.stage = stage.index;
          Scores(b);
          if (present < kMlaBlockRows || position + kMlaBlockRows - 1 > first_position) {
            Mask(position, present, b.score);
          }
          Weigh(turn.phase, stretch, i == 0, b);
        }
        if (num_blocks > 0) stretch ^= 1;
      }
    }
  }

 private:
  struct Block {
    float score[kTile / 2];
    uint32_t stage;
    uint32_t exponent[2];  // of the largest scales of the thread's cache rows
  };

  __device__ __forceinline__ int row() const { return lane_ / 4; }
  __device__ __forceinline__ int quad() const { return lane_ % 4; }
  __device__ __forceinline__ int warp() const { return thread_ / 32; }
  // Of the block.
  __device__ __forceinline__ int cache_row() const { return warp() * 16 + row(); }
  __device__ __forceinline__ void SyncGroup() const {
    SyncSome(1 + static_cast<int>(group_), kGroupThreads);
  }
  static __device__ __forceinline__ void SyncBoth() { SyncSome(3, 2 * kGroupThreads); }

  // q to shared memory. All is multiplied by a power of two that brings the largest number to 2^7 and
  // more. Latent columns are then the sum of two codes, good to 2^-8 and a little more; rope columns
  // stay bf16; rows behind the tile's last are zeros. Returns what scores are to be multiplied by.
  __device__ __forceinline__ float LoadQuery(const MlaWork& work, int first) {
    WaitForEarlier();
    SyncBoth();  // nobody multiplies the tile before any more
    uint32_t most = CopyQuery(work.first_row + first, min(work.num_rows - first, kTile));
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      most = max(most, __shfl_xor_sync(kFullWarp, most, lanes));
    }
    if (lane_ == 0) s_.query_exponents()[group_ * 4 + warp()] = most >> 23;
    if (threadIdx.x < kTile) {
      const int row = static_cast<int>(threadIdx.x);
      s_.positions()[row] = RowPosition(work, first + row, p_.num_heads);
    }
    SyncBoth();
    most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max(most, s_.query_exponents()[i]);
    const uint32_t exponent = min(max(most, 32u), 250u);
    SplitQuery(__uint_as_float((261 - exponent) << 23));
    wgmma::FenceProxy();
    SyncBoth();
    return __uint_as_float((exponent - 7) << 23);
  }

  // Where 16 columns of a row of the tile lie, as bf16 in two halves, then as codes: the pieces of the
  // first and the second of two codes, rope columns side by side.
  static constexpr int kPieces = 36;
  static constexpr uint32_t kRopeQueryAt = 8 * kChunkBytes;
  __device__ __forceinline__ uint32_t QueryPiece(int in_tile, int piece, int half) const {
    if (piece >= 32) {
      return s_.query() + kRopeQueryAt + wgmma::PieceOffset(in_tile, (piece - 32) * 2 + half);
    }
    return s_.query() + (half * 4 + piece / 8) * kChunkBytes +
           wgmma::PieceOffset(in_tile, piece % 8);
  }

  // Returns the thread's largest number without its sign.
  __device__ __forceinline__ uint32_t CopyQuery(int64_t first_row, int rows) const {
    uint32_t most = 0;
#pragma unroll 5
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kPieces; i += 2 * kGroupThreads) {
      const int in_tile = i / kPieces;
      const int piece = i % kPieces;
      uint4 a = make_uint4(0, 0, 0, 0);
      uint4 b = a;
      if (in_tile < rows) {
        const int64_t q_row = first_row + in_tile;
        const auto* const from = reinterpret_cast<const uint4*>(
            piece < 32 ? static_cast<const __nv_bfloat16*>(p_.q_latent) +
                             q_row * p_.q_latent_stride + piece * 16
                       : static_cast<const __nv_bfloat16*>(p_.q_rope) + q_row * p_.q_rope_stride +
                             (piece - 32) * 16);
        a = from[0];
        b = from[1];
      }
      for (const uint32_t pair : {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}) {
        most = max(most, max(pair << 16 & 0x7fff0000u, pair & 0x7fff0000u));
      }
      wgmma::StorePiece(QueryPiece(in_tile, piece, 0), a);
      wgmma::StorePiece(QueryPiece(in_tile, piece, 1), b);
    }
    return most;
  }

  // Each thread what it copied.
  __device__ __forceinline__ void SplitQuery(float factor) const {
    const auto low = [&](uint32_t pair) { return __uint_as_float(pair << 16) * factor; };
    const auto high = [&](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u) * factor; };
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kPieces; i += 2 * kGroupThreads) {
      const int in_tile = i / kPieces;
      const int piece = i % kPieces;
      const uint4 a = wgmma::LoadPiece(QueryPiece(in_tile, piece, 0));
      const uint4 b = wgmma::LoadPiece(QueryPiece(in_tile, piece, 1));
      const uint32_t pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      uint32_t out[8];
      if (piece < 32) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          out[k] = 0;
          out[4 + k] = 0;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t pair = pairs[k * 2 + half];
            const uint32_t first = FloatsToE4m3Pair(low(pair), high(pair));
            const float2 is = WidenE4m3Pair(static_cast<uint16_t>(first));
            out[k] |= first << half * 16;
            out[4 + k] |= FloatsToE4m3Pair(low(pair) - is.x, high(pair) - is.y) << half * 16;
          }
        }
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) out[k] = PackBf16(low(pairs[k]), high(pairs[k]));
      }
      wgmma::StorePiece(QueryPiece(in_tile, piece, 0), make_uint4(out[0], out[1], out[2], out[3]));
      wgmma::StorePiece(QueryPiece(in_tile, piece, 1), make_uint4(out[4], out[5], out[6], out[7]));
    }
  }

  // Rows that are not present become zeros, codes and scales: what lies there may be NaN.
  __device__ __forceinline__ void ZeroRows(uint32_t stage, int present) const {
    const uint32_t from = s_.stage(stage) + present * kRowBytes;
    const int pieces = (kMlaBlockRows - present) * static_cast<int>(kRowBytes / 16);
    for (int i = thread_; i < pieces; i += kGroupThreads) {
      wgmma::StorePiece(from + i * 16, make_uint4(0, 0, 0, 0));
    }
    wgmma::FenceProxy();
    SyncGroup();
  }

  // The four scales of the thread's row r.
  __device__ __forceinline__ uint4 Scales(uint32_t stage, int r) const {
    return wgmma::LoadPiece(s_.stage(stage) + (cache_row() + r * 8) * kRowBytes + kScalesAt);
  }

  // b.score = q . cache rows: rope columns, then latent columns a quarter at a time, each 32 columns'
  // codes as they lie, with either code of q.
  __device__ __forceinline__ void Scores(Block& b) const {
    float sum[kTile / 2];
    uint32_t a[4][4];
    uint32_t rows = RowsOf(b.stage);
#pragma unroll
    for (int step = 0; step < 4; ++step) LoadMatrices(a[step], rows + kRopeAt + step * 32);
    const wgmma::Operand rope = Rows(s_.query() + kRopeQueryAt);
    wgmma::Begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma::MultiplyRows(b.score, a[step], rope.At(wgmma::RowsStep(step)), step > 0);
    }
    wgmma::Commit();
    wgmma::Wait<0>();
    wgmma::Pin(b.score);
    wgmma::Pin(a);
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      const wgmma::Operand q = Rows(s_.query() + quarter * kChunkBytes);
      const float scale[2] = {Scale(b.stage, 0, quarter), Scale(b.stage, 1, quarter)};
#pragma unroll
      for (int step = 0; step < 4; ++step) LoadMatrices(a[step], rows + step * 32);
      wgmma::Begin();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int code = 0; code < 2; ++code) {
          wgmma::MultiplyCodeRows(
              sum, a[step], q.At(code * 4 * kChunkBytes + wgmma::RowsStep(step)), step + code > 0);
        }
      }
      wgmma::Commit();
      rows += kQuarterBytes;
      wgmma::Wait<0>();
      wgmma::Pin(sum);
      wgmma::Pin(a);
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) {
        b.score[i] = fmaf(sum[i], scale[i / 2 % 2], b.score[i]);
      }
    }
  }

  // Of a lane's row of four matrices.
  __device__ __forceinline__ uint32_t RowsOf(uint32_t stage) const {
    return s_.stage(stage) + (warp() * 16 + lane_ % 16) * kRowBytes + lane_ / 16 * 16;
  }

  __device__ __forceinline__ float Scale(uint32_t stage, int r, int quarter) const {
    return *reinterpret_cast<const float*>(s_.memory + Layout::kStagesAt + stage * kStageBytes +
                                           kScalesAt + quarter * 4 +
                                           (cache_row() + r * 8) * kRowBytes);
  }

  // Scores that are not seen become -inf.
  __device__ __forceinline__ void Mask(int block_position, int present,
                                       float (&score)[kTile / 2]) const {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int seen = SeenRows(s_.positions()[i * 8 + quad() * 2 + e], block_position, present);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (cache_row() + r * 8 >= seen) score[i * 4 + r * 2 + e] = NegInf();
        }
      }
    }
  }

  // A block's scores become weights, which go to shared memory. phase: of the group's blocks. fresh: the
  // stretch's first block.
  __device__ __forceinline__ void Weigh(uint32_t phase, uint32_t stretch, bool fresh, Block& b) {
    wgmma::BarrierWait(s_.used(group_), phase ^ 1);
    // By the block before, which the other group has: the first group's comes after its turn before.
    wgmma::BarrierWait(s_.settled(group_ ^ 1), group_ == 0 ? phase ^ 1 : phase);
    bool moves = false;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) Relate(quarter, stretch, fresh, b, moves);
    Settle(phase, stretch, fresh, moves, b);
#pragma unroll
    for (int part = 0; part < kRuns / 2; ++part) StoreWeights(part, b);
    wgmma::FenceProxy();
    ArriveWarp(s_.weighed(group_));
  }

  // A quarter of the scores become relative to what weights are; moves: one is too large for that.
  __device__ __forceinline__ void Relate(int quarter, uint32_t stretch, bool fresh, Block& b,
                                         bool& moves) const {
    float most = NegInf();
#pragma unroll
    for (int i = quarter * kRuns / 4; i < (quarter + 1) * kRuns / 4; ++i) {
      const float2 base = Base(stretch, fresh, i);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& by = b.score[i * 4 + k];
        by = fmaf(by, scale_, k % 2 == 0 ? -base.x : -base.y);
        most = fmaxf(most, by);
      }
    }
    if (quarter == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 scales = Scales(b.stage, r);
        b.exponent[r] = max(max(scales.x, scales.y), max(scales.z, scales.w)) >> 23;
      }
      moves = fresh || max(b.exponent[0], b.exponent[1]) > *s_.unit(stretch);
    }
    moves = moves || most > kWeightShift + kSlack;
  }

  // All warps know whether the maxima move, and so does the other group; then come scales.
  __device__ __forceinline__ void Settle(uint32_t phase, uint32_t stretch, bool fresh, bool moves,
                                         Block& b) {
    const bool any = __any_sync(kFullWarp, moves);
    if (lane_ == 0) s_.votes(group_, phase)[warp()] = any ? 1 : 0;
    SyncGroup();
    const auto votes = *reinterpret_cast<const uint4*>(s_.votes(group_, phase));
    const bool move = (votes.x | votes.y | votes.z | votes.w) != 0;
    if (__builtin_expect(move, 0)) Move(group_, stretch, fresh, b);
    const uint32_t unit = *s_.unit(stretch);
    ArriveWarp(s_.settled(group_));
    if (thread_ == 0) *s_.moved(group_) = move ? 1 : 0;
    StoreRatios(group_, unit, b);
  }

  // Of 16 rows of the tile.
  __device__ __forceinline__ void StoreWeights(int part, const Block& b) const {
    uint32_t four[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* const by = b.score + part * 8 + k * 2;
      four[k] = PackHalves(Exp2(by[0]), Exp2(by[1]));
    }
    StoreMatricesTransposed(
        s_.weights(group_) +
            wgmma::PieceOffset((part * 2 + lane_ / 16) * 8 + lane_ % 8, warp() * 2 + lane_ / 8 % 2),
        four);
  }

  // What weights of rows 8 * i + 2 * quad() and the next of the tile are relative to.
  __device__ __forceinline__ float2 Base(uint32_t stretch, bool fresh, int i) const {
    const float2 base = *reinterpret_cast<const float2*>(s_.bases(stretch) + i * 8 + quad() * 2);
    return fresh ? make_float2(0, 0) : base;
  }

  // Scales as halves relative to the result's unit; lane quad() stores its quarter's.
  __device__ __forceinline__ void StoreRatios(uint32_t turn, uint32_t unit, const Block& b) const {
    auto* const to =
        reinterpret_cast<__half*>(s_.ratios(turn)) + quad() * kMlaBlockRows + cache_row();
    const float inverse = __uint_as_float((254 - unit) << 23);
#pragma unroll
    for (int r = 0; r < 2; ++r) to[r * 8] = __float2half(Scale(b.stage, r, quad()) * inverse);
  }

  // Maxima become those of the block where these are high enough, the unit one above all scales so
  // far, by two powers more than it must; factors say what results and sums are to be multiplied by.
  // score: relative to the bases before, then to those after.
  __device__ __forceinline__ void Move(uint32_t turn, uint32_t stretch, bool fresh, Block& b) {
    float(&score)[kTile / 2] = b.score;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const float2 base = Base(stretch, fresh, i);
#pragma unroll
      for (int k = 0; k < 4; ++k) score[i * 4 + k] += k % 2 == 0 ? base.x : base.y;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float most = fmaxf(score[i * 4 + e], score[i * 4 + 2 + e]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, lanes));
        }
        if (lane_ < 4) s_.parts()[warp() * kTile + i * 8 + quad() * 2 + e] = most;
      }
    }
    uint32_t exponent = max(b.exponent[0], b.exponent[1]);
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      exponent = max(exponent, __shfl_xor_sync(kFullWarp, exponent, lanes));
    }
    if (lane_ == 0) s_.exponents()[warp()] = exponent;
    SyncGroup();
    const auto all = *reinterpret_cast<const uint4*>(s_.exponents());
    exponent = max(max(all.x, all.y), max(all.z, all.w));
    const uint32_t unit_before = fresh ? 0 : *s_.unit(stretch);
    const uint32_t unit = exponent > unit_before ? min(exponent, 250u) + 2 : unit_before;
    const uint32_t by = unit - unit_before;
    if (thread_ < kTile) {
      float most = NegInf();
#pragma unroll
      for (int i = 0; i < 4; ++i) most = fmaxf(most, s_.parts()[i * kTile + thread_]);
      const float before = fresh ? NegInf() : s_.maxima(stretch)[thread_];
      const float to = most > before + kSlack ? most : before;
      const float factor = Rescale(before, to);
      s_.maxima(stretch)[thread_] = to;
      s_.bases(stretch)[thread_] = (to == NegInf() ? 0.0f : to) - kWeightShift;
      s_.sum_factors(turn)[thread_] = factor;
      s_.factors(turn)[thread_] = by < 127 ? factor * __uint_as_float((127 - by) << 23) : 0.0f;
    }
    SyncGroup();
    if (thread_ == 0) *s_.unit(stretch) = unit;
    SyncGroup();
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const float2 base = Base(stretch, false, i);
#pragma unroll
      for (int k = 0; k < 4; ++k) score[i * 4 + k] -= k % 2 == 0 ? base.x : base.y;
    }
  }

  const MlaParams& p_;
  const Shared s_;
  const uint32_t group_;
  const int thread_;  // of the group
  const int lane_;
  float scale_;  // of scores, to powers of two
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::codes
