// SPDX-License-Identifier: Apache-2.0
//
// The warpgroups of the few-rows attention kernel that multiply; mla_few_rows.cu tells the plan.
#pragma once

#include "kernels/cuda/attention/mla_few_rows_products.cuh"

namespace strait::cuda::mla::few {

// Weights are 2^(score - maximum + kWeightShift), and at most 2^15, as halves: the largest half is
// 65,504, the smallest 2^-24, so that a row may weigh 2^-36 of the largest before it is lost.
inline constexpr float kWeightShift = 11.0f;
inline constexpr float kSlack = 4.0f;  // by which a score passes the maximum before that moves

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// One warp of a group. Between products it weighs four heads, a lane four rows of every 32 of one.
class Consumer : Products {
 public:
  using Products::Products;

  __device__ __forceinline__ void Run() {
    uint32_t at = 0;  // number of the stretch's first block
    const int end = p_.plan.work_begin[blockIdx.x + 1];
    for (int w = p_.plan.work_begin[blockIdx.x]; w < end; ++w) {
      const MlaWork work = p_.plan.work[w];
      const MlaSegment segment = p_.segments[work.sequence];
      const int cache_rows = CacheRows(work, segment);
      const int num_blocks = NumBlocks(work, cache_rows);
      for (int first = 0; first < work.num_rows; first += kMlaFewRows, at += num_blocks) {
        scale_ = p_.softmax_scale * kLog2e * Begin(work, first, WeighedHead());
        max_ = NegInf();
        base_ = -kWeightShift;
        sum_ = 0;
        const int first_position =
            work.first_position + (work.row_in_sequence + first) / p_.num_heads;
        const int position = RowPosition(work, first + WeighedHead(), p_.num_heads);
        for (int i = group_; i < num_blocks; i += kGroups) {
          const int block = work.block_begin + i;
          const int present = min(cache_rows - block * kMlaBlockRows, kMlaBlockRows);
          const int block_position = BlockPosition(segment, block);
          const bool all_seen =
              present == kMlaBlockRows && block_position + kMlaBlockRows - 1 <= first_position;
          const uint32_t stage = (at + i) % kStages;
          wgmma::BarrierWait(s_.full(stage), (at + i) / kStages & 1);
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
  __device__ __forceinline__ int WeighedHead() const { return warp_ * 4 + lane_ / 8; }

  // Scores become weights, of which the first `seen` rows have one.
  __device__ __forceinline__ void Weigh(int seen) {
    constexpr int kRuns = kMlaBlockRows / 32;
    const int first = lane_ % 8 * 4;
    const float* const from = s_.partial(group_) + WeighedHead() * kPartialStride + first;
    float score[kRuns][4];
    float most = NegInf();
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      float4 part[4];
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        part[quarter] = *reinterpret_cast<const float4*>(
            from + quarter * kMlaFewRows * kPartialStride + i * 32);
      }
      score[i][0] = (part[0].x + part[1].x) + (part[2].x + part[3].x);
      score[i][1] = (part[0].y + part[1].y) + (part[2].y + part[3].y);
      score[i][2] = (part[0].z + part[1].z) + (part[2].z + part[3].z);
      score[i][3] = (part[0].w + part[1].w) + (part[2].w + part[3].w);
    }
    if (seen < kMlaBlockRows) {
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (first + i * 32 + k >= seen) score[i][k] = NegInf();
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      most = fmaxf(most, fmaxf(fmaxf(score[i][0], score[i][1]), fmaxf(score[i][2], score[i][3])));
    }
    most *= scale_;
    float factor = 1;
    if (__builtin_expect(__any_sync(kFullWarp, most > max_ + kSlack), 0)) {
      factor = MoveMaximum(most);
    }
    if (lane_ % 8 == 0) s_.factors(group_)[WeighedHead()] = factor;
    unsigned char* const to = s_.weights(group_) + WeighedHead() * kWeightStride + first * 2;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      float e[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) e[k] = Exp2(fmaf(score[i][k], scale_, -base_));
      sum_ += (e[0] + e[1]) + (e[2] + e[3]);
      *reinterpret_cast<uint2*>(to + i * 64) =
          make_uint2(PackHalves(e[0], e[1]), PackHalves(e[2], e[3]));
    }
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

  // The groups' results become one, which the first writes.
  __device__ __forceinline__ void Write(const MlaWork& work, int first) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) sum_ += __shfl_xor_sync(kFullWarp, sum_, lanes);
    if (lane_ % 8 == 0) {
      s_.states(group_)[WeighedHead()] = max_;
      s_.states(group_)[kMlaFewRows + WeighedHead()] = sum_;
    }
    SyncAll();
    float max[2];
    float sum[2];
    float factor[2];
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
      factor[r] = sum[r] > 0 ? own / sum[r] * Unit() : 0.0f;
    }
    Multiply(factor);
    AddGroups();
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
      const int64_t at = to_row * 512 + warp_ * 128;
#pragma unroll
      for (int n = 0; n < 16; n += 2) {
        const float* const one = out_[n] + r * 2;
        const float* const other = out_[n + 1] + r * 2;
        Store(partial, at + n * 8 + quad() * 4, one[0], other[0]);
        Store(partial, at + n * 8 + quad() * 4 + 2, one[1], other[1]);
      }
    }
  }

  // To the first group's results all others, in order.
  __device__ __forceinline__ void AddGroups() {
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
  }

  __device__ __forceinline__ void Store(bool partial, int64_t at, float x, float y) const {
    if (partial || p_.out_fp32) {
      float* const to = partial ? p_.partial_out : static_cast<float*>(p_.out);
      *reinterpret_cast<float2*>(to + at) = make_float2(x, y);
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p_.out) + at) = PackBf16(x, y);
    }
  }

  float scale_;  // of the weighed head's scores, to powers of two
  float max_;    // of the weighed head's scores, the same for its eight lanes
  float base_;   // what weights are relative to
  float sum_;    // of the lane's weights
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::few
