// SPDX-License-Identifier: Apache-2.0
//
// What a warp of the few-rows attention kernel multiplies: q with the latent columns of its quarter,
// and weights with them.
#pragma once

#include "kernels/cuda/attention/mla_few_rows_shared.cuh"
#include "kernels/cuda/attention/mla_halves.cuh"

namespace strait::cuda::mla::few {

// Exponents of fp32 as they stand in it.
inline constexpr uint32_t kOneExponent = 1u << 23;
inline constexpr uint32_t kTwiceBias = 254u << 23;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kCount>
__device__ __forceinline__ void Clear(float (&sums)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
  }
}

// A lane has, of a product, rows lane / 4 and 8 more (heads) of A and of the result, and columns
// 2 * (lane % 4) and the next of the result.
class Products {
 public:
  __device__ Products(const MlaParams& params, const Shared& shared)
      : p_(params),
        s_(shared),
        group_(static_cast<int>(threadIdx.x) / kGroupThreads),
        warp_(static_cast<int>(threadIdx.x) / 32 % 4),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

 private:
  static constexpr int kAll = 1;    // named barriers
  static constexpr int kGroup = 2;  // + group

 protected:
  __device__ __forceinline__ void SyncGroup() const { SyncSome(kGroup + group_, kGroupThreads); }
  __device__ __forceinline__ void SyncAll() const { SyncSome(kAll, kGroups * kGroupThreads); }
  __device__ __forceinline__ int row() const { return lane_ / 4; }
  __device__ __forceinline__ int quad() const { return lane_ % 4; }

  // This warp's columns of q to registers, times a power of two that brings a head's largest number to
  // 2^12: exact as halves but for numbers 2^27 smaller than it. The result becomes zero. Returns what scores of `head` are to be multiplied by for it.
  __device__ __forceinline__ float Begin(const MlaWork& work, int first, int head) {
    unit_ = kOneExponent;
    Clear(out_);
    WaitForEarlier();
    // Of 16 columns, which are one product: 4 * quad() and the next three, which a word of codes holds; of
    // rope columns 2 * quad(), the next, and those 8 further.
    uint2 latent[2][8];
    uint2 rope[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_tile = first + row() + r * 8;
      const bool inside = in_tile < work.num_rows;
      const int64_t q_row = work.first_row + in_tile;
      const auto* const from =
          static_cast<const __nv_bfloat16*>(p_.q_latent) + q_row * p_.q_latent_stride + warp_ * 128;
      const auto* const from_rope =
          reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(p_.q_rope) +
                                            q_row * p_.q_rope_stride + warp_ * 16 + quad() * 2);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        latent[r][k] =
            inside ? *reinterpret_cast<const uint2*>(from + k * 16 + quad() * 4) : make_uint2(0, 0);
      }
      rope[r] = inside ? make_uint2(from_rope[0], from_rope[4]) : make_uint2(0, 0);
    }
    return TakeHalves(latent, rope, head);
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
    const uint32_t latent = rows + warp_ * kQuarterBytes + lane_ % 8 * kRowBytes + lane_ / 8 * 16;
    const uint32_t rope =
        rows + kRopeAt + warp_ * 32 + (lane_ / 16 * 8 + lane_ % 8) * kRowBytes + lane_ / 8 % 2 * 16;
    float* const to =
        s_.partial(group_) + (warp_ * kMlaFewRows + row()) * kPartialStride + quad() * 2;
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
    Clear(score);
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t keys[4];
      LoadMatrices(keys, rope + j * kTileBytes);
      MmaBf16(score[j], rope_[0], rope_[1], rope_[2], rope_[3], keys[0], keys[1]);
      MmaBf16(score[j + 1], rope_[0], rope_[1], rope_[2], rope_[3], keys[2], keys[3]);
    }
    float sum[kTiles][4];
    Clear(sum);
    MultiplyCodes(latent, sum);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[j][i] = fmaf(sum[j][i], scale[j][i % 2], score[j][i]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float* const at = to + j * 8;
      *reinterpret_cast<float2*>(at) = make_float2(score[j][0], score[j][1]);
      *reinterpret_cast<float2*>(at + 8 * kPartialStride) = make_float2(score[j][2], score[j][3]);
    }
    MoveUnit(most);
    const float inverse = __uint_as_float(kTwiceBias - unit_);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      scales[j] = PackHalves(scale[j][0] * inverse, scale[j][1] * inverse);
    }
  }

  // out += weights . the quarter's columns; gives the stage back.
  __device__ __forceinline__ void Values(uint32_t stage, const uint32_t (&scales)[kTiles]) {
    const float factor[2] = {s_.factors(group_)[row()], s_.factors(group_)[row() + 8]};
    if (__builtin_expect(__any_sync(kFullWarp, factor[0] != 1 || factor[1] != 1), 0)) {
      Multiply(factor);
    }
    const uint32_t weights = s_.address + kWeightsAt + group_ * kWeightBytes +
                             lane_ % 16 * kWeightStride + lane_ / 16 * 16;
    const uint32_t latent =
        s_.stage(stage) + warp_ * kQuarterBytes + lane_ % 16 * kRowBytes + lane_ / 16 * 16;
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) {
      uint32_t a[4];
      LoadMatrices(a, weights + k * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = MultiplyHalves(a[i], scales[k * 2 + i / 2]);
#pragma unroll
      for (int pair = 0; pair < static_cast<int>(kQuarterBytes) / 32; ++pair) {
        // Two times 16 bytes of columns; of each two words, the second 8 rows further. A word has two
        // rows of columns 2 * row() and the next.
        uint32_t words[4];
        LoadMatricesTransposed(words, latent + k * 2 * kTileBytes + pair * 32);
        AddCodes(words, a, &out_[pair * 4]);
      }
    }
    Release(stage);
  }

  __device__ __forceinline__ void Release(uint32_t stage) const {
    __syncwarp();
    if (lane_ == 0) wgmma::BarrierArrive(s_.empty(stage));
  }

  __device__ __forceinline__ void Multiply(const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] *= factor[i / 2];
    }
  }

  // What out_ is to be multiplied by.
  __device__ __forceinline__ float Unit() const { return __uint_as_float(unit_); }

  const MlaParams& p_;
  const Shared s_;
  const int group_;
  const int warp_;  // of the group
  const int lane_;
  float out_[16][4];  // heads x 8 columns each: of 16 columns the even ones, then the odd ones

 private:
  // The exponent of the largest number of a head's q; far enough from either end to be turned round.
  __device__ __forceinline__ uint32_t QueryExponent(int head) const {
    uint32_t most = 0;
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) {
      most = max(most, s_.query(group_)[warp * kMlaFewRows + head]);
    }
    return min(max(most >> 23, 32u), 250u);
  }

  // q as halves, as Begin says.
  __device__ __forceinline__ float TakeHalves(const uint2 (&latent)[2][8], const uint2 (&rope)[2],
                                              int head) {
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
      include(rope[r].x);
      include(rope[r].y);
      most = max(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = max(most, __shfl_xor_sync(kFullWarp, most, 2));
      if (quad() == 0) s_.query(group_)[warp_ * kMlaFewRows + row() + r * 8] = most;
    }
    SyncAll();  // the others have also read what the tile before left
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t exponent = QueryExponent(row() + r * 8);
      const float factor = __uint_as_float((266 - exponent) << 23);
      const auto low = [&](uint32_t pair) { return __uint_as_float(pair << 16) * factor; };
      const auto high = [&](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u) * factor; };
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const uint2 v = latent[r][k];
        query_[k][r] = PackHalves(low(v.x), high(v.x));
        query_[k][2 + r] = PackHalves(low(v.y), high(v.y));
      }
      rope_[r] = PackBf16(low(rope[r].x), high(rope[r].x));
      rope_[2 + r] = PackBf16(low(rope[r].y), high(rope[r].y));
    }
    return __uint_as_float((QueryExponent(head) - 12) << 23);
  }

  // Of all tiles: sum = q . codes.
  __device__ __forceinline__ void MultiplyCodes(uint32_t codes, float (&sum)[kTiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[kTiles][4];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        LoadMatrices(words[j], codes + j * kTileBytes + half * 64);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          uint32_t b[2];
          E4m3QuadToHalves(words[j][k], b[0], b[1]);
          MmaF16(sum[j], query_[half * 4 + k], b[0], b[1]);
        }
      }
    }
  }

  // The result is in units of a power of two above every scale of the quarter so far, so that weight
  // times scale is a half. It moves up, by two more than it must.
  __device__ __forceinline__ void MoveUnit(float most) {
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
    const uint32_t exponent = __float_as_uint(most) & 0x7f800000u;
    if (__builtin_expect(exponent < unit_, 1)) return;
    const uint32_t to = min(exponent, 250u << 23) + 2 * kOneExponent;
    const uint32_t by = to - unit_;
    const float factor = by < 127 * kOneExponent ? __uint_as_float(127 * kOneExponent - by) : 0.0f;
    unit_ = to;
    const float factors[2] = {factor, factor};
    Multiply(factors);
  }

  // Of 32 columns, 16 rows: words [half of the columns, half of the rows].
  static __device__ __forceinline__ void AddCodes(const uint32_t (&words)[4],
                                                  const uint32_t (&a)[4], float (*out)[4]) {
    uint32_t even[4];
    uint32_t odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      E4m3QuadToHalves(__byte_perm(words[i], 0, 0x3120), even[i], odd[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      MmaF16(out[i * 2], a, even[i * 2], even[i * 2 + 1]);
      MmaF16(out[i * 2 + 1], a, odd[i * 2], odd[i * 2 + 1]);
    }
  }

  // q as A of the quarter's eight products, and of a quarter of the rope columns.
  uint32_t query_[8][4];
  uint32_t rope_[4];
  uint32_t unit_;  // of the result: a power of two, as fp32
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::few
