// SPDX-License-Identifier: Apache-2.0
//
// Shared memory of the attention kernel that widens codes in registers, the barriers in it, and the
// warp that fills it; mla_codes.cu tells the plan.
#pragma once

#include "kernels/cuda/attention/mla_device.cuh"
#include "kernels/cuda/attention/mla_halves.cuh"
#include "kernels/cuda/attention/mla_wgmma.cuh"

namespace strait::cuda::mla::codes {

inline constexpr int kTile = kMlaHalfTileRows;  // (token, head) rows at once
inline constexpr int kGroupThreads = 128;
// Two groups of scores, two of values, and one of which a warp copies and another sums.
inline constexpr int kThreads = 5 * kGroupThreads;
// Of a thread of each. A launch of 640 threads gives 96: one that asked for more than 480 in all would
// wait for ever.
inline constexpr int kScoreRegisters = 88;
inline constexpr int kValueRegisters = 128;
inline constexpr int kFeederRegisters = 48;
static_assert(2 * kScoreRegisters + 2 * kValueRegisters + kFeederRegisters <= 480);
inline constexpr uint32_t kTurns = 2;  // blocks' weights in shared memory
inline constexpr int kCopies = 4;      // bulk copies of a block

// Cache rows as they lie, also in shared memory.
inline constexpr uint32_t kRowBytes = RowBytes(RowFormat::kFp8, 512, 64);
// Eight rows 16 bytes wide lie in eight different sixteenths of the banks' width: no conflicts.
static_assert(kRowBytes % 128 == 16);
inline constexpr uint32_t kScalesAt = ScalesOffset(512);
inline constexpr uint32_t kRopeAt = RopeKeyOffset(RowFormat::kFp8, 512);
inline constexpr uint32_t kQuarterBytes = LatentBytes(RowFormat::kFp8, 128);
inline constexpr uint32_t kStageBytes = kMlaBlockRows * kRowBytes;
inline constexpr uint32_t kRatioBytes = kMlaBlockRows * 2;  // of a quarter

// Offsets from a 1,024-byte boundary.
struct Layout {
  static constexpr uint32_t kStages = 4;  // cache blocks in shared memory
  static constexpr uint32_t kChunkBytes = kTile * wgmma::kChunkRowBytes;
  static constexpr uint32_t kWeightsAt = 9 * kChunkBytes;  // q lies before
  static constexpr uint32_t kStagesAt = kWeightsAt + kTurns * kChunkBytes;
  static constexpr uint32_t kRatiosAt = kStagesAt + kStages * kStageBytes;
  static constexpr uint32_t kFactorsAt = kRatiosAt + kTurns * 4 * kRatioBytes;
  static constexpr uint32_t kSumFactorsAt = kFactorsAt + kTurns * kTile * 4;
  static constexpr uint32_t kMaximaAt = kSumFactorsAt + kTurns * kTile * 4;
  static constexpr uint32_t kBasesAt = kMaximaAt + 2 * kTile * 4;
  static constexpr uint32_t kFinalsAt = kBasesAt + 2 * kTile * 4;
  static constexpr uint32_t kPartsAt = kFinalsAt + 2 * kTile * 4;
  static constexpr uint32_t kPositionsAt = kPartsAt + 4 * kTile * 4;
  static constexpr uint32_t kWordsAt = kPositionsAt + kTile * 4;
  static constexpr uint32_t kBarriersAt = kWordsAt + 32 * 4;
  static constexpr uint32_t kBytes = kBarriersAt + (2 * kStages + 5 * 2) * 8;
  static_assert(kStagesAt % 1024 == 0 && kBytes <= 227 * 1024);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Addresses are the same for all threads and known to be so.
struct Shared : Layout {
  unsigned char* memory;  // 1,024-byte aligned
  uint32_t address;

  __device__ explicit Shared(unsigned char* at) : memory(at), address(SharedAddress(at)) {}
  // Nine chunks of kTile rows, swizzled: four of the first codes of q, 128 columns each, four of the
  // second, one of the rope columns in bf16.
  __device__ uint32_t query() const { return address; }
  // [kTile rows, 64 cache rows] halves, swizzled.
  __device__ uint32_t weights(uint32_t turn) const {
    return address + kWeightsAt + turn * kChunkBytes;
  }
  __device__ uint32_t stage(uint32_t i) const { return address + kStagesAt + i * kStageBytes; }
  // [4 quarters, 64 cache rows] halves: scales relative to the result's unit.
  __device__ unsigned char* ratios(uint32_t turn) const {
    return memory + kRatiosAt + turn * 4 * kRatioBytes;
  }
  // [kTile]: what a row's result, and its sum, are to be multiplied by, where moved() says so.
  __device__ float* factors(uint32_t turn) const { return floats(kFactorsAt) + turn * kTile; }
  __device__ float* sum_factors(uint32_t turn) const {
    return floats(kSumFactorsAt) + turn * kTile;
  }
  // [kTile], of every second stretch that has blocks: largest scores, what weights are relative to.
  __device__ float* maxima(uint32_t odd) const { return floats(kMaximaAt) + odd * kTile; }
  __device__ float* bases(uint32_t odd) const { return floats(kBasesAt) + odd * kTile; }
  // [kTile], of every second stretch: what makes results of sums.
  __device__ float* finals(uint32_t odd) const { return floats(kFinalsAt) + odd * kTile; }
  // [4 warps, kTile]
  __device__ float* parts() const { return floats(kPartsAt); }
  // [kTile]: of the row's token.
  __device__ int32_t* positions() const {
    return reinterpret_cast<int32_t*>(memory + kPositionsAt);
  }
  __device__ uint32_t* moved(uint32_t turn) const { return words() + turn; }
  // The exponent of the unit of results; of every second stretch that has blocks.
  __device__ uint32_t* unit(uint32_t odd) const { return words() + 2 + odd; }
  __device__ uint32_t* exponents() const { return words() + 4; }        // [4 warps]
  __device__ uint32_t* query_exponents() const { return words() + 8; }  // [8 warps]
  // [4 warps], of every second block of a group of scores.
  __device__ uint32_t* votes(uint32_t group, uint32_t odd) const {
    return words() + 16 + (group * 2 + odd) * 4;
  }
  // Arrived at once, by the copy warp.
  __device__ uint32_t full(uint32_t stage) const { return barrier(stage); }
  // Both groups of values are done with it, and so is that of scores.
  __device__ uint32_t empty(uint32_t stage) const { return barrier(kStages + stage); }
  // Weights are there, by four warps of scores; are used, by the eight of values and that of sums.
  __device__ uint32_t weighed(uint32_t turn) const { return barrier(2 * kStages + turn); }
  __device__ uint32_t used(uint32_t turn) const { return barrier(2 * kStages + 2 + turn); }
  // finals() are there, by the warp of sums; are taken, by the eight of values.
  __device__ uint32_t finished(uint32_t odd) const { return barrier(2 * kStages + 4 + odd); }
  __device__ uint32_t taken(uint32_t odd) const { return barrier(2 * kStages + 6 + odd); }
  // The block's maxima are settled, and the next block's may be; by the four warps of its scores.
  __device__ uint32_t settled(uint32_t turn) const { return barrier(2 * kStages + 8 + turn); }

  __device__ __forceinline__ void InitBarriers() const {
    for (uint32_t i = 0; i < kStages; ++i) {
      wgmma::BarrierInit(full(i), 1);
      wgmma::BarrierInit(empty(i), 8);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      wgmma::BarrierInit(weighed(i), 4);
      wgmma::BarrierInit(used(i), 9);
      wgmma::BarrierInit(settled(i), 4);
      wgmma::BarrierInit(finished(i), 1);
      wgmma::BarrierInit(taken(i), 8);
    }
    wgmma::FenceBarrierInit();
  }

 private:
  __device__ uint32_t barrier(uint32_t i) const { return address + kBarriersAt + i * 8; }
  __device__ uint32_t* words() const { return reinterpret_cast<uint32_t*>(memory + kWordsAt); }
  __device__ float* floats(uint32_t at) const { return reinterpret_cast<float*>(memory + at); }
};

// Shared memory that products read: wgmma::Rows of an address that is the same for all threads.
__device__ __forceinline__ wgmma::Operand Rows(uint32_t chunk) {
  return {(chunk & 0x3ffffu) / 16 | 1u << 16};
}

// Which of a ring's kCount, and the phase of its barriers.
template <uint32_t kCount>
struct Ring {
  uint32_t index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++index == kCount) {
      index = 0;
      phase ^= 1;
    }
  }
};

// One arrival a warp.
__device__ __forceinline__ void ArriveWarp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) wgmma::BarrierArrive(barrier);
}

// Blocks of the work that have rows.
__device__ __forceinline__ int NumBlocks(const MlaWork& work, int cache_rows) {
  const int rows =
      min(work.block_end * kMlaBlockRows, cache_rows) - work.block_begin * kMlaBlockRows;
  return max(rows + kMlaBlockRows - 1, 0) / kMlaBlockRows;
}

// The blocks of all stretches one after the other, into stages as these are free: lane i of kCopies a
// part of the block's rows in one piece.
class Feeder {
 public:
  __device__ Feeder(const MlaParams& params, const Shared& shared)
      : p_(params),
        s_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        work_(params.plan.work_begin[blockIdx.x] - 1),
        end_(params.plan.work_begin[blockIdx.x + 1]) {}

  __device__ __forceinline__ void Run() {
    while (Next()) continue;
  }

 private:
  // Copies the next block, if there is one, when its stage is free.
  __device__ __forceinline__ bool Next() {
    constexpr int kPart = kMlaBlockRows / kCopies;
    while (block_ == present_end_) {
      if (!NextTile()) return false;
    }
    const int i = block_ - begin_;
    if (i % 32 == 0 && i > 0) {
      pages_ = next_pages_;
      next_pages_ = Page(block_ + 32);
    }
    const uint32_t id = __shfl_sync(kFullWarp, pages_, i % 32);
    const int present = min(cache_rows_ - block_ * kMlaBlockRows, kMlaBlockRows);
    const uint32_t stage = ring_.index;
    if (block_ >= settled_) WaitForEarlier();
    if (lane_ == 0) {
      wgmma::BarrierWait(s_.empty(stage), ring_.phase ^ 1);
      wgmma::BarrierExpect(s_.full(stage), present * kRowBytes);
    }
    __syncwarp();
    const int rows = min(present - lane_ * kPart, kPart);
    if (lane_ < kCopies && rows > 0) {
      wgmma::CopyBulk(s_.stage(stage) + lane_ * kPart * kRowBytes,
                      p_.blocks + id * p_.block_bytes + lane_ * kPart * kRowBytes, rows * kRowBytes,
                      s_.full(stage));
    }
    __syncwarp();
    ++block_;
    ring_.Advance();
    return true;
  }
  // A tile of more rows than kTile is read once more for each kTile.
  __device__ __forceinline__ bool NextTile() {
    rows_left_ -= kTile;
    if (rows_left_ <= 0) {
      if (work_ + 1 >= end_) return false;
      const MlaWork& work = p_.plan.work[++work_];
      const MlaSegment& segment = p_.segments[work.sequence];
      page_table_ = segment.page_table;
      cache_rows_ = CacheRows(work, segment);
      settled_ = work.settled_blocks;
      begin_ = work.block_begin;
      present_end_ = begin_ + NumBlocks(work, cache_rows_);
      rows_left_ = work.num_rows;
    }
    block_ = begin_;
    pages_ = Page(begin_);
    next_pages_ = Page(begin_ + 32);
    return true;
  }
  // Of the block `lane` behind the first.
  __device__ __forceinline__ uint32_t Page(int first) const {
    return first + lane_ < present_end_ ? page_table_[first + lane_] : 0u;
  }

  const MlaParams& p_;
  const Shared s_;
  const int lane_;
  int work_;
  const int end_;
  int rows_left_ = 0;
  int begin_ = 0;
  int block_ = 0;
  int present_end_ = 0;
  int cache_rows_ = 0;
  int settled_ = 0;
  const uint32_t* page_table_ = nullptr;
  uint32_t pages_ = 0;
  uint32_t next_pages_ = 0;
  Ring<Layout::kStages> ring_;
};

#endif  // sm_90a

}  // namespace strait::cuda::mla::codes
