// SPDX-License-Identifier: Apache-2.0
//
// The warps of the few-rows attention kernel and the shared memory between them; mla_few_rows.cu tells
// the plan.
#pragma once

#include "kernels/cuda/attention/mla_device.cuh"
#include "kernels/cuda/attention/mla_few_rows.h"

namespace strait::cuda::mla::few {

inline constexpr int kGroupThreads = 128;
inline constexpr uint32_t kRowBytes = RowBytes(RowFormat::kFp8, 512, 64);
inline constexpr uint32_t kScalesAt = ScalesOffset(512);
inline constexpr uint32_t kRopeAt = RopeKeyOffset(RowFormat::kFp8, 512);
inline constexpr uint32_t kStageBytes = kMlaBlockRows * kRowBytes;
inline constexpr uint32_t kTileBytes = 8 * kRowBytes;  // of the rows of one product
// Eight rows 16 bytes wide are in eight different sixteenths of the banks' width: no conflicts.
static_assert(kRowBytes % 128 == 16);

inline constexpr int kTiles = kMlaBlockRows / 8;
inline constexpr uint32_t kPartialStride = 72;  // floats between heads: 8 banks further
inline constexpr uint32_t kPartialBytes = 4 * kMlaFewRows * kPartialStride * 4;
inline constexpr uint32_t kWeightStride = 144;  // bytes between heads
inline constexpr uint32_t kWeightBytes = kMlaFewRows * kWeightStride;

// Of a thread; one warp of a warpgroup of its own feeds.
constexpr int ConsumerRegisters(int groups) { return groups == 1 ? 208 : groups == 2 ? 232 : 160; }
constexpr int FeederRegisters(int groups) { return groups == 3 ? 32 : 40; }

// Weights are 2^(score - maximum + kWeightShift), and at most 2^15, as halves: the largest half is
// 65,504, the smallest 2^-24, so that a row may weigh 2^-36 of the largest before it is lost.
inline constexpr float kWeightShift = 11.0f;
inline constexpr float kSlack = 4.0f;  // by which a score passes the maximum before that moves

// Exponents of fp32 as they stand in it.
inline constexpr uint32_t kOneExponent = 1u << 23;
inline constexpr uint32_t kTwicebias = 254u << 23;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kGroups, int kStages>
struct Shared {
  unsigned char* memory;  // 1,024-byte aligned
  uint32_t address;

  static constexpr uint32_t kPartialsAt = kStages * kStageBytes;
  static constexpr uint32_t kWeightsAt = kPartialsAt + kGroups * kPartialBytes;
  static constexpr uint32_t kFactorsAt = kWeightsAt + kGroups * kWeightBytes;
  static constexpr uint32_t kStatesAt = kFactorsAt + kGroups * kMlaFewRows * 4;
  static constexpr uint32_t kQueryAt = kStatesAt + kGroups * kMlaFewRows * 8;
  static constexpr uint32_t kBarriersAt = kQueryAt + kGroups * kMlaFewRows * 16;
  static constexpr uint32_t kBytes = kBarriersAt + kStages * 16;

  __device__ uint32_t stage(uint32_t i) const { return address + i * kStageBytes; }
  __device__ uint32_t full(uint32_t i) const { return address + kBarriersAt + i * 8; }
  __device__ uint32_t empty(uint32_t i) const { return address + kBarriersAt + (kStages + i) * 8; }
  __device__ uint32_t weights(int group) const {
    return address + kWeightsAt + group * kWeightBytes;
  }
  // Scores [4 quarters, 16 heads, kPartialStride]; at a stretch's end, of all groups: one's result.
  __device__ float* partial(int group) const {
    return reinterpret_cast<float*>(memory + kPartialsAt + group * kPartialBytes);
  }
  __device__ float* factors(int group) const {
    return reinterpret_cast<float*>(memory + kFactorsAt) + group * kMlaFewRows;
  }
  // [maxima, sums][16 heads]
  __device__ float* states(int group) const {
    return reinterpret_cast<float*>(memory + kStatesAt) + group * 2 * kMlaFewRows;
  }
  // [4 warps, 16 heads]: the largest number of q, without its sign
  __device__ uint32_t* query(int group) const {
    return reinterpret_cast<uint32_t*>(memory + kQueryAt) + group * 4 * kMlaFewRows;
  }
};

// Cache blocks of the work that have rows.
__device__ __forceinline__ int NumBlocks(const MlaWork& work, int cache_rows) {
  return min(work.block_end, (cache_rows + kMlaBlockRows - 1) / kMlaBlockRows) - work.block_begin;
}

__device__ __forceinline__ uint32_t PackHalves(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t MultiplyHalves(uint32_t a, uint32_t b) {
  __half2 x;
  __half2 y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  x = __hmul2(x, y);
  memcpy(&a, &x, sizeof(a));
  return a;
}

// Codes 0 and 2 of a word, and 1 and 3, as halves that are 2^8 too small: exponent and mantissa of a
// code at their place in a half.
__device__ __forceinline__ void SpreadCodes(uint32_t codes, uint32_t& even, uint32_t& odd) {
  const uint32_t up = codes << 8;
  even = (up & 0x80008000u) | ((up >> 1) & 0x3f803f80u);
  odd = (codes & 0x80008000u) | ((codes >> 1) & 0x3f803f80u);
}
inline constexpr float kSpread = 256.0f;

// The warp that copies: lane i of kCopies copies a kCopies-th of the rows of each block.
template <int kGroups, int kStages, int kCopies>
__device__ __forceinline__ void Feed(const MlaParams& p, const Shared<kGroups, kStages>& s) {
  constexpr int kPart = kMlaBlockRows / kCopies;
  const int lane = threadIdx.x % 32;
  uint32_t at = 0;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int num_blocks = NumBlocks(work, cache_rows);
    const auto page = [&](int first) {
      return first + lane < num_blocks ? segment.page_table[work.block_begin + first + lane] : 0u;
    };
    for (int pass = 0; pass < work.num_rows; pass += kMlaFewRows) {
      uint32_t pages = page(0);
      uint32_t next_pages = page(32);
      for (int i = 0; i < num_blocks; ++i, ++at) {
        if (i % 32 == 0 && i > 0) {
          pages = next_pages;
          next_pages = page(i + 32);
        }
        const uint32_t id = __shfl_sync(kFullWarp, pages, i % 32);
        const int block = work.block_begin + i;
        const uint32_t stage = at % kStages;
        const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
        if (block >= work.settled_blocks) WaitForEarlier();
        if (lane == 0) {
          wgmma::BarrierWait(s.empty(stage), (at / kStages & 1) ^ 1);
          wgmma::BarrierExpect(s.full(stage), present * kRowBytes);
        }
        __syncwarp();
        const int rows = min(present - lane * kPart, kPart);
        if (lane < kCopies && rows > 0) {
          const uint32_t from = lane * kPart * kRowBytes;
          wgmma::CopyBulk(s.stage(stage) + from, p.blocks + id * p.block_bytes + from,
                          rows * kRowBytes, s.full(stage));
        }
        __syncwarp();
      }
    }
  }
}

// A warpgroup that multiplies. Warp w has quarter w of the latent columns, for scores and values both.
template <int kGroups, int kStages, bool kBits, bool kCopiesOnly>
class Consumer {
 public:
  __device__ Consumer(const MlaParams& params, const Shared<kGroups, kStages>& shared)
      : p_(params),
        s_(shared),
        group_(static_cast<int>(threadIdx.x) / kGroupThreads),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void Run() {
    uint32_t at = 0;  // number of the stretch's first block
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork work = p_.plan.work[w];
      const MlaSegment segment = p_.segments[work.sequence];
      const int cache_rows = CacheRows(work, segment);
      const int num_blocks = max(NumBlocks(work, cache_rows), 0);
      for (int first = 0; first < work.num_rows; first += kMlaFewRows, at += num_blocks) {
        LoadQuery(work, first);
        const int first_position =
            work.first_position + (work.row_in_sequence + first) / p_.num_heads;
        const int position = RowPosition(work, first + WeighedHead(), p_.num_heads);
        max_ = NegInf();
        base_ = -kWeightShift;
        sum_ = 0;
        unit_ = kOneExponent;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out_[n][i] = 0;
        }
        for (int i = group_; i < num_blocks; i += kGroups) {
          const int block = work.block_begin + i;
          const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
          const int block_position = BlockPosition(segment, block);
          const bool all_seen =
              present == kMlaBlockRows && block_position + kMlaBlockRows - 1 <= first_position;
          const uint32_t stage = (at + i) % kStages;
          wgmma::BarrierWait(s_.full(stage), (at + i) / kStages & 1);
          if constexpr (kCopiesOnly) {
            Release(stage);
            continue;
          }
          if (present < kMlaBlockRows) ZeroRows(stage, present);
          uint32_t scales[kTiles];
          Scores(stage, scales);
          SyncGroup();
          Weigh(all_seen ? kMlaBlockRows : SeenRows(position, block_position, present));
          SyncGroup();
          Values(stage, scales);
        }
        Write(work, first);
      }
    }
  }

 private:
  static constexpr int kAll = 1;    // named barriers
  static constexpr int kGroup = 2;  // + group
  // Tiles whose codes wait in registers: few where registers are.
  static constexpr int kTilesAtOnce = kGroups == 3 ? 4 : 8;

  __device__ __forceinline__ void SyncGroup() const { SyncSome(kGroup + group_, kGroupThreads); }
  __device__ __forceinline__ void SyncAll() const { SyncSome(kAll, kGroups * kGroupThreads); }

  // What a lane has of a product: rows lane / 4 and 8 more of A, columns 2 * (lane % 4) and the next.
  __device__ __forceinline__ int row() const { return lane_ / 4; }
  __device__ __forceinline__ int quad() const { return lane_ % 4; }
  // Between products: a warp weighs four heads, a lane eight cache rows of one.
  __device__ __forceinline__ int WeighedHead() const { return warp_ * 4 + lane_ / 8; }

  // The exponent of the largest number of a head's q; far enough from either end to be turned round.
  static __device__ __forceinline__ uint32_t QueryExponent(const uint32_t* of_warps) {
    uint32_t most = 0;
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) most = max(most, of_warps[warp * kMlaFewRows]);
    return min(max(most >> 23, 32u), 250u);
  }

  // This warp's columns of q to registers, times a power of two that brings a head's largest number to
  // 2^12: exact as halves but for numbers 2^27 smaller than it.
  __device__ __forceinline__ void LoadQuery(const MlaWork& work, int first) {
    WaitForEarlier();
    uint2 latent[2][8];
    uint32_t rope[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_tile = first + row() + r * 8;
      const bool inside = in_tile < work.num_rows;
      const int64_t q_row = work.first_row + in_tile;
      const auto* const from = static_cast<const __nv_bfloat16*>(p_.q_latent) +
                               q_row * p_.q_latent_stride + warp_ * 128 + quad() * 4;
      const auto* const from_rope = static_cast<const __nv_bfloat16*>(p_.q_rope) +
                                    q_row * p_.q_rope_stride + warp_ * 16 + quad() * 2;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        latent[r][k] = inside ? *reinterpret_cast<const uint2*>(from + k * 16) : make_uint2(0, 0);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        rope[r][k] = inside ? *reinterpret_cast<const uint32_t*>(from_rope + k * 8) : 0;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t most = 0;
      const auto include = [&](uint32_t pair) {
        most = max(most, max(pair << 16 & 0x7fff0000u, pair & 0x7fff0000u));
      };
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        include(latent[r][k].x);
        include(latent[r][k].y);
      }
      include(rope[r][0]);
      include(rope[r][1]);
      most = max(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = max(most, __shfl_xor_sync(kFullWarp, most, 2));
      if (quad() == 0) s_.query(group_)[warp_ * kMlaFewRows + row() + r * 8] = most;
    }
    SyncAll();  // the others have also read what the tile before left
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t exponent = QueryExponent(s_.query(group_) + row() + r * 8);
      const float factor = __uint_as_float((266 - exponent) << 23);
      const auto low = [&](uint32_t pair) { return __uint_as_float(pair << 16) * factor; };
      const auto high = [&](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u) * factor; };
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const uint2 v = latent[r][k];
        query_[k][r] = kBits ? PackHalves(low(v.x), low(v.y)) : PackHalves(low(v.x), high(v.x));
        query_[k][2 + r] =
            kBits ? PackHalves(high(v.x), high(v.y)) : PackHalves(low(v.y), high(v.y));
      }
      constexpr float kRope = kBits ? 1 / kSpread : 1.0f;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        rope_[k * 2 + r] = PackBf16(low(rope[r][k]) * kRope, high(rope[r][k]) * kRope);
      }
    }
    const uint32_t exponent = QueryExponent(s_.query(group_) + WeighedHead());
    scale_ = p_.softmax_scale * kLog2e * (kBits ? kSpread : 1.0f) *
             __uint_as_float((exponent - 12) << 23);
  }

  // Rows that are not present become zeros, codes and scales: what lies there may be NaN.
  __device__ __forceinline__ void ZeroRows(uint32_t stage, int present) const {
    const uint32_t from = s_.stage(stage) + present * kRowBytes;
    const int pieces = (kMlaBlockRows - present) * static_cast<int>(kRowBytes / 16);
    for (int i = static_cast<int>(threadIdx.x) % kGroupThreads; i < pieces; i += kGroupThreads) {
      wgmma::StorePiece(from + i * 16, make_uint4(0, 0, 0, 0));
    }
    wgmma::FenceProxy();
    SyncGroup();
  }

  // The quarter's part of the scores, and of the rope columns' a quarter, to shared memory. scales: of
  // the lane's rows of each tile, in units of the warp's result.
  __device__ __forceinline__ void Scores(uint32_t stage, uint32_t (&scales)[kTiles]) {
    const uint32_t rows = s_.stage(stage);
    const uint32_t codes = rows + warp_ * 128 + lane_ % 8 * kRowBytes + lane_ / 8 * 16;
    const uint32_t rope =
        rows + kRopeAt + warp_ * 32 + (lane_ / 16 * 8 + lane_ % 8) * kRowBytes + lane_ / 8 % 2 * 16;
    float scale[kTiles][2];
    float most = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[j][r] = *reinterpret_cast<const float*>(s_.memory + stage * kStageBytes + kScalesAt +
                                                      warp_ * 4 + j * kTileBytes +
                                                      (quad() * 2 + r) * kRowBytes);
        most = fmaxf(most, scale[j][r]);
      }
    }
    float score[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[j][i] = 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int from = 0; from < kTiles; from += kTilesAtOnce) {
        uint32_t words[kTilesAtOnce][4];
#pragma unroll
        for (int j = 0; j < kTilesAtOnce; ++j) {
          LoadMatrices(words[j], codes + (from + j) * kTileBytes + half * 64);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < kTilesAtOnce; ++j) {
            uint32_t b[2];
            if constexpr (kBits) {
              SpreadCodes(words[j][k], b[0], b[1]);
            } else {
              E4m3QuadToHalves(words[j][k], b[0], b[1]);
            }
            MmaF16(score[from + j], query_[half * 4 + k], b[0], b[1]);
          }
        }
      }
    }
    MoveUnit(most);
    const float inverse = __uint_as_float(kTwicebias - unit_);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      scales[j] = PackHalves(scale[j][0] * inverse, scale[j][1] * inverse);
#pragma unroll
      for (int i = 0; i < 4; ++i) score[j][i] *= scale[j][i % 2];
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t keys[4];
      LoadMatrices(keys, rope + j * kTileBytes);
      MmaBf16(score[j], rope_[0], rope_[1], rope_[2], rope_[3], keys[0], keys[1]);
      MmaBf16(score[j + 1], rope_[0], rope_[1], rope_[2], rope_[3], keys[2], keys[3]);
    }
    float* const to =
        s_.partial(group_) + (warp_ * kMlaFewRows + row()) * kPartialStride + quad() * 2;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      *reinterpret_cast<float2*>(to + j * 8) = make_float2(score[j][0], score[j][1]);
      *reinterpret_cast<float2*>(to + 8 * kPartialStride + j * 8) =
          make_float2(score[j][2], score[j][3]);
    }
  }

  // The result is in units of a power of two above every scale of the quarter so far, so that weight
  // times scale is a half. It moves up, by four more than it must.
  __device__ __forceinline__ void MoveUnit(float most) {
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
    const uint32_t exponent = __float_as_uint(most) & 0x7f800000u;
    if (__builtin_expect(exponent < unit_, 1)) return;
    const uint32_t to = min(exponent, 250u << 23) + 2 * kOneExponent;
    const uint32_t by = to - unit_;
    const float factor = by < 127 * kOneExponent ? __uint_as_float(127 * kOneExponent - by) : 0.0f;
    unit_ = to;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] *= factor;
    }
  }

  // Scores become weights, of which the first `seen` rows have one.
  __device__ __forceinline__ void Weigh(int seen) {
    const int first = lane_ % 8 * 4;
    const float* const from = s_.partial(group_) + WeighedHead() * kPartialStride + first;
    float score[8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float4 part[4];
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        part[quarter] = *reinterpret_cast<const float4*>(
            from + quarter * kMlaFewRows * kPartialStride + i * 32);
      }
      score[i * 4] = (part[0].x + part[1].x) + (part[2].x + part[3].x);
      score[i * 4 + 1] = (part[0].y + part[1].y) + (part[2].y + part[3].y);
      score[i * 4 + 2] = (part[0].z + part[1].z) + (part[2].z + part[3].z);
      score[i * 4 + 3] = (part[0].w + part[1].w) + (part[2].w + part[3].w);
    }
    if (seen < kMlaBlockRows) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (first + i / 4 * 32 + i % 4 >= seen) score[i] = NegInf();
      }
    }
    const float most = scale_ * fmaxf(fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3])),
                                      fmaxf(fmaxf(score[4], score[5]), fmaxf(score[6], score[7])));
    float factor = 1;
    if (__builtin_expect(__any_sync(kFullWarp, most > max_ + kSlack), 0)) {
      factor = MoveMaximum(most);
    }
    if (lane_ % 8 == 0) s_.factors(group_)[WeighedHead()] = factor;
    const uint32_t to = kWeightsOffset() + WeighedHead() * kWeightStride + first * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float e[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) e[k] = Exp2(fmaf(score[i * 4 + k], scale_, -base_));
      sum_ += (e[0] + e[1]) + (e[2] + e[3]);
      *reinterpret_cast<uint2*>(s_.memory + to + i * 64) =
          make_uint2(PackHalves(e[0], e[1]), PackHalves(e[2], e[3]));
    }
  }
  __device__ __forceinline__ uint32_t kWeightsOffset() const {
    return Shared<kGroups, kStages>::kWeightsAt + group_ * kWeightBytes;
  }

  // The eight lanes of a head agree on its maximum; returns what its result is to be multiplied by.
  __device__ __forceinline__ float MoveMaximum(float most) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, lanes));
    }
    const float to = most > max_ + kSlack ? most : max_;
    const float factor = Rescale(max_, to);
    max_ = to;
    base_ = (to == NegInf() ? 0.0f : to) - kWeightShift;
    sum_ *= factor;
    return factor;
  }

  // out += weights . the quarter's columns; gives the block back.
  __device__ __forceinline__ void Values(uint32_t stage, const uint32_t (&scales)[kTiles]) {
    const float factor[2] = {s_.factors(group_)[row()], s_.factors(group_)[row() + 8]};
    if (__builtin_expect(__any_sync(kFullWarp, factor[0] != 1 || factor[1] != 1), 0)) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[n][i] *= factor[i / 2];
      }
    }
    const uint32_t weights = s_.weights(group_) + lane_ % 16 * kWeightStride + lane_ / 16 * 16;
    const uint32_t codes = s_.stage(stage) + warp_ * 128 + lane_ % 16 * kRowBytes + lane_ / 16 * 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      LoadMatrices(a, weights + k * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = MultiplyHalves(a[i], scales[k * 2 + i / 2]);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        // Of 16 columns a word: 2 * row() and the next, of two rows; the second word 8 rows further.
        uint32_t words[4];
        LoadMatricesTransposed(words, codes + k * 2 * kTileBytes + pair * 32);
        uint32_t even[4];
        uint32_t odd[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kBits) {
            SpreadCodes(words[i], even[i], odd[i]);
          } else {
            E4m3QuadToHalves(__byte_perm(words[i], 0, 0x3120), even[i], odd[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          MmaF16(out_[pair * 4 + i * 2], a, even[i * 2], even[i * 2 + 1]);
          MmaF16(out_[pair * 4 + i * 2 + 1], a, odd[i * 2], odd[i * 2 + 1]);
        }
      }
    }
    Release(stage);
  }
  __device__ __forceinline__ void Release(uint32_t stage) const {
    __syncwarp();
    if (lane_ == 0) wgmma::BarrierArrive(s_.empty(stage));
  }

  // The groups' results become one, which the first writes.
  __device__ __forceinline__ void Write(const MlaWork& work, int first) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) sum_ += __shfl_xor_sync(kFullWarp, sum_, lanes);
    if (lane_ % 8 == 0) {
      s_.states(group_)[WeighedHead()] = max_;
      s_.states(group_)[kMlaFewRows + WeighedHead()] = sum_;
    }
    SyncAll();
    const float unit = __uint_as_float(unit_) * (kBits ? kSpread : 1.0f);
    float max[2];
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = row() + r * 8;
      max[r] = NegInf();
      sum[r] = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) max[r] = fmaxf(max[r], s_.states(g)[head]);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        sum[r] += s_.states(g)[kMlaFewRows + head] * Rescale(s_.states(g)[head], max[r]);
      }
      const float own = Rescale(s_.states(group_)[head], max[r]);
      const float factor = sum[r] > 0 ? own / sum[r] * unit : 0.0f;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        out_[n][r * 2] *= factor;
        out_[n][r * 2 + 1] *= factor;
      }
    }
    auto* const shared = reinterpret_cast<float4*>(s_.partial(0)) + warp_ * 16 * 32 + lane_;
#pragma unroll
    for (int g = 1; g < kGroups; ++g) {
      if (group_ == g) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          shared[n * 32] = make_float4(out_[n][0], out_[n][1], out_[n][2], out_[n][3]);
        }
      }
      SyncAll();
      if (group_ == 0) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          const float4 other = shared[n * 32];
          out_[n][0] += other.x;
          out_[n][1] += other.y;
          out_[n][2] += other.z;
          out_[n][3] += other.w;
        }
      }
      if (g + 1 < kGroups) SyncAll();
    }
    if (group_ != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_tile = first + row() + r * 8;
      if (in_tile >= work.num_rows) continue;
      const bool partial = work.partial >= 0;
      const int64_t to_row = partial ? static_cast<int64_t>(work.partial) * kMlaTileRows + in_tile
                                     : work.first_row + in_tile;
      float* const lse = partial ? p_.partial_lse : p_.lse;
      if (warp_ == 0 && quad() == 0 && lse != nullptr) {
        lse[to_row] = sum[r] > 0 ? (max[r] - kWeightShift + log2f(sum[r])) * kLn2 : NegInf();
      }
      const int64_t at = to_row * 512 + warp_ * 128 + quad() * 4;
#pragma unroll
      for (int unit16 = 0; unit16 < 8; ++unit16) {
        const float* const even = out_[unit16 * 2] + r * 2;
        const float* const odd = out_[unit16 * 2 + 1] + r * 2;
        if (partial || p_.out_fp32) {
          float* const to = partial ? p_.partial_out : static_cast<float*>(p_.out);
          *reinterpret_cast<float4*>(to + at + unit16 * 16) =
              make_float4(even[0], odd[0], even[1], odd[1]);
        } else {
          *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p_.out) + at + unit16 * 16) =
              make_uint2(PackBf16(even[0], odd[0]), PackBf16(even[1], odd[1]));
        }
      }
    }
  }

  const MlaParams& p_;
  const Shared<kGroups, kStages> s_;
  const int group_;
  const int warp_;  // of the group
  const int lane_;
  // q as A of the quarter's eight products, and of the quarter of the rope columns.
  uint32_t query_[8][4];
  uint32_t rope_[4];
  float scale_;       // of the weighed head's scores, to powers of two
  float max_;         // of the weighed head's scores, the same for its eight lanes
  float base_;        // what weights are relative to
  float sum_;         // of the lane's weights
  uint32_t unit_;     // of the result: a power of two, as fp32
  float out_[16][4];  // [8 x 16 columns, even and odd columns]: heads x 8 columns
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::few
