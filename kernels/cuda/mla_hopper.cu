// SPDX-License-Identifier: Apache-2.0
//
// Latent attention of 512 + 64 columns on Hopper: warpgroup products on tiles of 64 (token, head)
// rows by 64 cache rows; keys and values are one tile in shared memory, loaded once.
//
// Roofline: a cache block is 73,728 bytes (fp8: 41,984) and, for one tile of 64 rows,
//   2 * 64 * 64 * (576 + 512) = 8.9 Mflop: 121 flops a byte.
//   16 and 64 heads, one token: each block is read by one tile, so 4.5 TB/s allow 545 Tflop/s of
//   products: bound by memory (16 heads use a quarter of the tile and are bound all the more).
//   128 heads or more, several tokens, prefill: tiles share blocks in L2; bound by the products,
//   and by the shared memory that feeds them: 2,176 cycles of products a block against 2,368 of
//   shared memory traffic (q and keys 1,152, weights and values 640, the copy itself 576).
// Measured share: see the table in tests/bench/cuda/mla_bench.cc's output; none is claimed here.
//
// Two consumer warpgroups each hold half of the 512 output columns of all 64 rows. Even blocks of a
// stretch are scored by the first, odd ones by the second; the scorer writes its weights over the
// block's rope columns, which nobody needs any more, and tells the other. So one group's softmax
// runs beside the other's products. The running maximum passes from block to block; it moves only
// when a score passes it by 8 (a factor of 256), as weights above 1 do no harm and rescaling does.
// A third warpgroup feeds: one thread starts bulk copies (bf16), or all widen codes (fp8).
#include <cuda.h>

#include "kernels/cuda/mla_device.cuh"
#include "kernels/cuda/mla_wgmma.cuh"

namespace strait::cuda::mla {
namespace {

constexpr int kThreads = 384;
constexpr int kConsumers = 256;
constexpr int kChunks = 9;
constexpr int kHalfChunks = 4;   // the columns of a group's half of the output
constexpr int kWeightChunk = 8;  // rope columns, then weights
constexpr uint32_t kTileBytes = kChunks * wgmma::kChunkBytes;
constexpr uint32_t kNumTiles = 2;
constexpr float kMaxSlack = 8.0f;

// Offsets from a 1,024-byte boundary.
constexpr uint32_t kQueryAt = 0;
constexpr uint32_t kTilesAt = kTileBytes;
constexpr uint32_t kBarriersAt = kTilesAt + kNumTiles * kTileBytes;  // full[2, 2], empty[2, 2]
constexpr uint32_t kMaxAt = kBarriersAt + 64;                        // [2, 64] fp32
constexpr uint32_t kSumAt = kMaxAt + 2 * 64 * 4;                     // [2, 64] fp32
constexpr uint32_t kFlagAt = kSumAt + 2 * 64 * 4;                    // int
constexpr uint32_t kSharedBytes = kFlagAt + 16 + 1024;

// Named barriers; 0 is __syncthreads'.
constexpr int kAllConsumers = 1;
constexpr int kGroup = 2;    // + group
constexpr int kWeights = 4;  // + group whose weights are ready

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Shared {
  unsigned char* memory;
  uint32_t address;
  __device__ uint32_t query() const { return address + kQueryAt; }
  __device__ uint32_t tile(uint32_t index) const {
    return address + kTilesAt + index % kNumTiles * kTileBytes;
  }
  // A tile comes and goes in halves: chunks 0 to 3, chunks 4 to 8.
  __device__ uint32_t full(uint32_t index, int half) const {
    return address + kBarriersAt + (index % kNumTiles * 2 + half) * 8;
  }
  __device__ uint32_t empty(uint32_t index, int half) const {
    return address + kBarriersAt + 32 + (index % kNumTiles * 2 + half) * 8;
  }
  __device__ float* max(int group) const {
    return reinterpret_cast<float*>(memory + kMaxAt) + group * 64;
  }
  __device__ float* sum(int group) const {
    return reinterpret_cast<float*>(memory + kSumAt) + group * 64;
  }
  __device__ volatile int* flag() const { return reinterpret_cast<int*>(memory + kFlagAt); }
};

__device__ __forceinline__ uint32_t FullParity(uint32_t index) { return index / kNumTiles % 2; }

__device__ __forceinline__ bool BarrierTest(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// q into shared memory by the consumers; rows behind the tile's last are zeros.
__device__ __forceinline__ void LoadQuery(const MlaParams& p, const MlaWork& work,
                                          const Shared& s) {
#pragma unroll 6
  for (int i = threadIdx.x; i < kMlaTileRows * kChunks * 8; i += kConsumers) {
    const int row = i / (kChunks * 8);
    const int piece = i % (kChunks * 8);
    const uint32_t to = s.query() + piece / 8 * wgmma::kChunkBytes +
                        wgmma::PieceOffset(static_cast<uint32_t>(row), piece % 8);
    if (row >= work.num_rows) {
      wgmma::StorePiece(to, make_uint4(0, 0, 0, 0));
      continue;
    }
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

template <int kGroupIndex>
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
            *s_.flag() = pair && BarrierTest(s_.full(tile + 1, 1), FullParity(tile + 1));
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
    if (threadIdx.x % 32 == 0) {  // both groups have read the weights, each its own columns
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

// Blocks that are brought to L2 before their tile is free: by then they are near.
constexpr int kAhead = 2;

__device__ __forceinline__ void PrefetchBlock(const std::byte* block, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(block), "r"(bytes) : "memory");
}

// One warp; lane 0 starts the copies, all lanes read the page table ahead.
__device__ __forceinline__ void FeedBf16(const MlaParams& p, const Shared& s) {
  const int lane = threadIdx.x % 32;
  uint32_t tile = 0;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork work = p.plan.work[w];
    const MlaSegment segment = p.segments[work.sequence];
    const int cache_rows = CacheRows(work, segment);
    const int present_end = min(work.block_end, (cache_rows + kMlaBlockRows - 1) / kMlaBlockRows);
    const auto page = [&](int first) {
      return first + lane < present_end ? segment.page_table[first + lane] : 0u;
    };
    uint32_t pages = page(work.block_begin);
    uint32_t next_pages = page(work.block_begin + 32);
    for (int block = work.block_begin; block < work.block_end; ++block, ++tile) {
      const int at = (block - work.block_begin) % 32;
      if (at == 0 && block != work.block_begin) {
        pages = next_pages;
        next_pages = page(block + 32);
      }
      const uint32_t id = __shfl_sync(0xffffffffu, pages, at);
      if (lane == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          constexpr int kFirst[3] = {0, kHalfChunks, kChunks};
          const uint32_t full = s.full(tile, half);
          wgmma::BarrierWait(s.empty(tile, half), FullParity(tile) ^ 1);
          if (block >= present_end) {
            wgmma::BarrierArrive(full);
            continue;
          }
          wgmma::BarrierExpect(full, (kFirst[half + 1] - kFirst[half]) * wgmma::kChunkBytes);
#pragma unroll
          for (int chunk = kFirst[half]; chunk < kFirst[half + 1]; ++chunk) {
            wgmma::LoadChunk(s.tile(tile) + chunk * wgmma::kChunkBytes, &p.pool_map, chunk * 64,
                             static_cast<int>(id), full);
          }
        }
      }
      __syncwarp();
    }
  }
}

constexpr int kFp8RowBytes = MlaRowBytes(MlaRowFormat::kFp8, 512, 64);
constexpr int kFp8RopeAt = MlaRopeOffset(MlaRowFormat::kFp8, 512);

// 16 codes of a row; none of a row that is not present.
__device__ __forceinline__ uint4 Codes(const std::byte* row, bool present) {
  if (!present) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(row);
}

// A warpgroup; a warp takes 16 rows, a lane 16 codes of a row. Four rows are always on their way,
// those of the next block too: no more, as a register that does not fit waits for its load. Rope
// columns are copied as they are.
__device__ __forceinline__ void FeedFp8(const MlaParams& p, const Shared& s) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % 4;
  const uint32_t chunk = lane / 4 * wgmma::kChunkBytes;
  const uint32_t piece = lane % 4 * 2;
  const uint32_t swap = lane / 4 % 2;  // neighbours in the next chunk use the other banks
  uint32_t tile = 0;
  const int end = p.plan.work_begin[blockIdx.x + 1];
  for (int w = p.plan.work_begin[blockIdx.x]; w < end; ++w) {
    const MlaWork& work = p.plan.work[w];
    const MlaSegment& segment = p.segments[work.sequence];
    const uint32_t* page_table = segment.page_table;
    const int block_end = work.block_end;
    // of this warp's rows in the stretch: how many there are from a block on
    int present = CacheRows(work, segment) - work.block_begin * kMlaBlockRows - warp * 16;
    const auto rows_of = [&](int block, int present_there) -> const std::byte* {
      if (block >= block_end || present_there <= 0) return nullptr;
      return p.blocks + page_table[block] * p.block_bytes + warp * 16 * kFp8RowBytes;
    };
    int block = work.block_begin;
    const std::byte* now = rows_of(block, present);
    const std::byte* next = rows_of(block + 1, present - kMlaBlockRows);
    uint4 codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = Codes(now + i * kFp8RowBytes + lane * 16, now != nullptr && i < present);
    }
    for (; block < block_end; ++block, ++tile) {
      const int now_present = now != nullptr ? present : 0;
      const int next_present = next != nullptr ? present - kMlaBlockRows : 0;
      const std::byte* after = rows_of(block + 2, present - 2 * kMlaBlockRows);
      if (lane == 0 && after != nullptr) {
        PrefetchBlock(after, min(present - 2 * kMlaBlockRows, 16) * kFp8RowBytes);
      }
      float scales[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = i * 8 + lane / 4;
        if (row < now_present) {
          scales[i] =
              *reinterpret_cast<const float*>(now + row * kFp8RowBytes + 512 + lane % 4 * 4);
        }
      }
      wgmma::BarrierWait(s.empty(tile, 0), FullParity(tile) ^ 1);
      wgmma::BarrierWait(s.empty(tile, 1), FullParity(tile) ^ 1);
      const uint32_t to = s.tile(tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane / 8;
        const uint32_t rope_to =
            to + kWeightChunk * wgmma::kChunkBytes + wgmma::PieceOffset(warp * 16 + row, lane % 8);
        if (row < now_present) {
          wgmma::CopyPiece(rope_to, now + row * kFp8RowBytes + kFp8RopeAt + lane % 8 * 16);
        } else {
          wgmma::StorePiece(rope_to, make_uint4(0, 0, 0, 0));
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t row = warp * 16 + i;
        const float scale = __shfl_sync(0xffffffffu, scales[i / 8], i % 8 * 4 + lane / 8);
        uint4 low;
        uint4 high;
        WidenRow16(codes[i % 4], scale, low, high);
        codes[i % 4] =
            i < 12 ? Codes(now + (i + 4) * kFp8RowBytes + lane * 16, i + 4 < now_present)
                   : Codes(next + (i - 12) * kFp8RowBytes + lane * 16, i - 12 < next_present);
        wgmma::StorePiece(to + chunk + wgmma::PieceOffset(row, piece + swap), swap ? high : low);
        wgmma::StorePiece(to + chunk + wgmma::PieceOffset(row, piece + 1 - swap),
                          swap ? low : high);
      }
      wgmma::WaitCopies();
      wgmma::FenceProxy();
      wgmma::BarrierArrive(s.full(tile, 0));
      wgmma::BarrierArrive(s.full(tile, 1));
      now = next;
      next = after;
      present -= kMlaBlockRows;
    }
  }
}

#endif  // sm_90a

template <MlaRowFormat kFormat>
__global__ void __launch_bounds__(kThreads, 1) HopperKernel(const __grid_constant__ MlaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kBf16 = kFormat == MlaRowFormat::kBf16;
  extern __shared__ unsigned char raw[];
  Shared s;
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(raw));
  s.address = (start + 1023) / 1024 * 1024;
  s.memory = raw + (s.address - start);
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < kNumTiles; ++i) {
      for (int half = 0; half < 2; ++half) {
        wgmma::BarrierInit(s.full(i, half), kBf16 ? 1 : kThreads - kConsumers);
        wgmma::BarrierInit(s.empty(i, half), half == 0 ? 4 : 8);  // warps that read it last
      }
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x >= kConsumers) {
    if constexpr (kBf16) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
      if (threadIdx.x < kConsumers + 32) FeedBf16(p, s);
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
      FeedFp8(p, s);
    }
  } else {
    if constexpr (kBf16) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    } else {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    }
    if (threadIdx.x < kConsumers / 2) {
      Consumer<0>(p, s).Run();
    } else {
      Consumer<1>(p, s).Run();
    }
  }
#else
  asm volatile("trap;");
#endif
}

}  // namespace

cudaError_t PrepareHopper() {
  int device = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess || major != 9) return error;
  for (const auto kernel : {HopperKernel<MlaRowFormat::kBf16>, HopperKernel<MlaRowFormat::kFp8>}) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kSharedBytes));
    if (error != cudaSuccess) return error;
  }
  return error;
}

cudaError_t LaunchHopper(const MlaParams& params, cudaStream_t stream) {
  const auto kernel = params.format == MlaRowFormat::kBf16 ? HopperKernel<MlaRowFormat::kBf16>
                                                           : HopperKernel<MlaRowFormat::kFp8>;
  cudaLaunchAttribute early = EarlyStart();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(params.plan.limits.num_thread_blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace strait::cuda::mla

namespace strait::cuda {

cudaError_t MakeMlaPoolMap(const void* blocks, int64_t num_blocks, int64_t block_bytes,
                           MlaPoolMap* map) {
  static_assert(sizeof(CUtensorMap) == sizeof(map->bytes));
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (entry == nullptr || found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  const cuuint64_t sizes[3] = {576, kMlaBlockRows, static_cast<cuuint64_t>(num_blocks)};
  const cuuint64_t strides[2] = {1152, static_cast<cuuint64_t>(block_bytes)};
  const cuuint32_t box[3] = {64, kMlaBlockRows, 1};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  CUtensorMap tensor_map;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &tensor_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(blocks), sizes, strides,
      box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  __builtin_memcpy(map->bytes, &tensor_map, sizeof(tensor_map));
  return cudaSuccess;
}

}  // namespace strait::cuda
