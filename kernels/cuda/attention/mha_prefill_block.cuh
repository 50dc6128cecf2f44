// SPDX-License-Identifier: Apache-2.0
//
// A thread block of the kernel of prompts: what it works on, its shared memory, the thread that feeds
// it; mha_prefill.cu tells the plan.
#pragma once

#include <cuda.h>

#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/cuda/attention/mla_wgmma.cuh"
#include "kernels/cuda/device/common.cuh"

namespace strait::cuda::mha {

inline constexpr int kThreads = 384;
inline constexpr int kConsumers = 256;
inline constexpr int kTileTokens = 128;
inline constexpr int kGroupTokens = 64;
inline constexpr int kHeadsTogether = 8;

// A chunk: 128 rows of 64 columns. q and keys: two of them, and one of rope; values: two.
inline constexpr uint32_t kChunkBytes = 128 * wgmma::kChunkRowBytes;
inline constexpr int kKeyChunks = 3;
inline constexpr int kValueChunks = 2;
inline constexpr uint32_t kKeyBytes = kKeyChunks * kChunkBytes;
inline constexpr uint32_t kValueBytes = kValueChunks * kChunkBytes;
inline constexpr uint32_t kStages = 2;

// Offsets from a 1,024-byte boundary.
inline constexpr uint32_t kQueryAt = 0;
inline constexpr uint32_t kKeysAt = kKeyBytes;
inline constexpr uint32_t kValuesAt = kKeysAt + kStages * kKeyBytes;
inline constexpr uint32_t kBarriersAt =
    kValuesAt + kStages * kValueBytes;  // query, 4 kinds a stage
inline constexpr uint32_t kSharedBytes = kBarriersAt + 8 + kStages * 4 * 8 + 1024;

inline constexpr int kTurn = 1;  // named barriers: + the group whose turn it is

struct Launch {
  CUtensorMap q;
  CUtensorMap q_rope;
  CUtensorMap keys;
  CUtensorMap values;
  CUtensorMap rope_keys;
  MhaPiece pieces[kMhaMaxPieces];
  int32_t num_tiles;  // of all pieces
  int32_t num_heads;
  float scale;  // of scores, to powers of two
  Bf16* out;
  int64_t out_stride;
  float* state;
  int64_t state_stride;
};

__host__ __device__ constexpr int32_t TilesOf(int32_t num_tokens) {
  return (num_tokens + kTileTokens - 1) / kTileTokens;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Shared {
  uint32_t address;
  __device__ uint32_t query() const { return address + kQueryAt; }
  __device__ uint32_t keys(uint32_t i) const { return address + kKeysAt + i % kStages * kKeyBytes; }
  __device__ uint32_t values(uint32_t i) const {
    return address + kValuesAt + i % kStages * kValueBytes;
  }
  __device__ uint32_t query_full() const { return address + kBarriersAt; }
  __device__ uint32_t barrier(uint32_t kind, uint32_t i) const {
    return address + kBarriersAt + 8 + (kind * kStages + i % kStages) * 8;
  }
  __device__ uint32_t keys_full(uint32_t i) const { return barrier(0, i); }
  __device__ uint32_t keys_empty(uint32_t i) const { return barrier(1, i); }
  __device__ uint32_t values_full(uint32_t i) const { return barrier(2, i); }
  __device__ uint32_t values_empty(uint32_t i) const { return barrier(3, i); }
};

__device__ __forceinline__ uint32_t Parity(uint32_t i) { return i / kStages % 2; }

// What a thread block does.
struct Work {
  int piece;
  int head;
  int first;      // token of the piece
  int num_tiles;  // of keys that its last token sees
};

__device__ __forceinline__ Work FindWork(const Launch& p) {
  const int together = kHeadsTogether * p.num_tiles;
  const int first_head = static_cast<int>(blockIdx.x) / together * kHeadsTogether;
  const int heads = min(kHeadsTogether, p.num_heads - first_head);
  const int local = static_cast<int>(blockIdx.x) % together;
  Work work;
  work.head = first_head + local % heads;
  int tile = local / heads;
  work.piece = 0;
  while (tile >= TilesOf(p.pieces[work.piece].num_tokens)) {
    tile -= TilesOf(p.pieces[work.piece].num_tokens);
    ++work.piece;
  }
  const MhaPiece& piece = p.pieces[work.piece];
  work.first = (TilesOf(piece.num_tokens) - 1 - tile) * kTileTokens;
  const int last = min(work.first + kTileTokens, piece.num_tokens) - 1;
  const int seen = min(piece.num_keys, piece.first_position + last + 1);
  work.num_tiles = seen <= 0 ? 0 : (seen + kMhaTileKeys - 1) / kMhaTileKeys;
  return work;
}

__device__ __forceinline__ int RowOf(const Launch& p, const Work& work, uint32_t i) {
  return p.pieces[work.piece].first_key + static_cast<int>(i) * kMhaTileKeys;
}

__device__ __forceinline__ void FeedKeys(const Launch& p, const Work& work, const Shared& s,
                                         uint32_t i) {
  const int row = RowOf(p, work, i);
  const uint32_t full = s.keys_full(i);
  wgmma::BarrierWait(s.keys_empty(i), Parity(i) ^ 1);
  wgmma::BarrierExpect(full, kKeyBytes);
  wgmma::LoadBox(s.keys(i), &p.keys, 0, work.head, row, full);
  wgmma::LoadBox(s.keys(i) + kChunkBytes, &p.keys, 64, work.head, row, full);
  wgmma::LoadBox(s.keys(i) + 2 * kChunkBytes, &p.rope_keys, 0, 0, row, full);
}

__device__ __forceinline__ void FeedValues(const Launch& p, const Work& work, const Shared& s,
                                           uint32_t i) {
  const int row = RowOf(p, work, i);
  const uint32_t full = s.values_full(i);
  wgmma::BarrierWait(s.values_empty(i), Parity(i) ^ 1);
  wgmma::BarrierExpect(full, kValueBytes);
  wgmma::LoadBox(s.values(i), &p.values, 0, work.head, row, full);
  wgmma::LoadBox(s.values(i) + kChunkBytes, &p.values, 64, work.head, row, full);
}

// One thread.
__device__ __forceinline__ void Feed(const Launch& p, const Work& work, const Shared& s) {
  if (work.num_tiles == 0) return;
  const MhaPiece& piece = p.pieces[work.piece];
  const int token = piece.first_token + work.first;
  wgmma::BarrierExpect(s.query_full(), kKeyBytes);
  wgmma::LoadBox(s.query(), &p.q, 0, work.head, token, s.query_full());
  wgmma::LoadBox(s.query() + kChunkBytes, &p.q, 64, work.head, token, s.query_full());
  wgmma::LoadBox(s.query() + 2 * kChunkBytes, &p.q_rope, 0, work.head, token, s.query_full());
  // In the order in which they are waited for, and given back.
  const auto count = static_cast<uint32_t>(work.num_tiles);
  for (uint32_t i = 0; i <= count; ++i) {
    if (i < count) FeedKeys(p, work, s, i);
    if (i > 0) FeedValues(p, work, s, i - 1);
  }
}

#endif  // sm_90a

}  // namespace strait::cuda::mha
