// SPDX-License-Identifier: Apache-2.0
//
// Multi-head latent attention on NVIDIA GPUs, absorbed form, over paged latent blocks; one kernel
// for decoding (1 to 4 tokens a sequence) and for prefill (a chunk against its cached prefix; long
// prompts on Hopper: mha_prefill.h):
//   o_latent[t, h, :] = softmax(scale * (q_latent . latent + q_rope . rope_key)) latent
// A token at position p sees the rows at positions <= p of its sequence.
//
// Borrows: every pointer, until the stream has passed the launch.
// Thread:  any; a launch reads no state of the process but the device's attributes.
// Shapes:  rows and blocks as proto/latent_block.h has them, bf16 or fp8; rank is a multiple of 16.
// Stream:  launches on the one given, allocates nothing, synchronizes nothing: may be captured.
//          Kernels begin early and wait for the one before them (programmatic launch), so the
//          launches of a stream stay in order. Before they wait they read the plan, segments, page
//          tables and settled rows: what a copy in the stream, or anything that kernels do not
//          begin before the end of, left there.
//          A captured launch may be replayed with another plan of the same limits in its buffer.
// Errors:  cudaErrorInvalidValue: a shape that no path takes; else what the launch returned.
// Limits:  rank <= 512, rope <= 64 (portable path); Hopper path: 512 and 64 exactly.
// Why:     the plan is made on the host, which knows all lengths before the step, so no device
//          time goes into scheduling, and one plan serves all layers of equal lengths.
//          Deterministic plans cut at multiples of 1,024 rows whatever the batch (the CPU kernel's
//          spans): a token's result is then a function of its sequence alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/attention/mla_plan.h"
#include "proto/latent_block.h"

namespace strait::cuda {

enum class MlaPath : int32_t { kAuto, kPortable, kHopper };

inline constexpr int32_t kMlaFewRows = 16;
inline constexpr int32_t kMlaHalfTileRows = 32;

// What one sequence has in one layer. One segment a sequence today, at full rank; segments of
// lower rank or another format become more entries a sequence.
struct MlaSegment {
  const uint32_t* page_table = nullptr;      // [blocks] device; entries not needed may be anything
  const int32_t* block_positions = nullptr;  // [blocks] device: position of a block's first row;
                                             // null: block i starts at position 64 * i
  int32_t num_rows = 0;  // rows present; may be INT32_MAX when positions alone limit what is seen
  int32_t rank = 0;      // latent columns stored
  RowFormat format = RowFormat::kBf16;
  // Not 0: the new rows are in the cache already, and LatentAppend writes none (latent.h).
  int32_t is_cached = 0;
};

// A unit is 64 rows of 64 bf16 columns, contiguous; a block of 512 + 64 columns is a list of nine
// units, which may lie anywhere in the pool, the rope columns' last. Bf16 on the Hopper path alone,
// to measure what such a pool costs: nothing in the model uses it yet.
inline constexpr int32_t kMlaBlockUnits = 9;
inline constexpr int64_t kMlaUnitBytes = kMlaBlockRows * 64 * 2;

// A tensor map over the pool, opaque; made once, for bf16 pools of 512/64 rows.
struct MlaPoolMap {
  alignas(64) unsigned char bytes[128] = {};
};

struct MlaParams {
  const void* q_latent = nullptr;  // [num_tokens * num_heads, rank] bf16, rows 16-byte aligned
  int64_t q_latent_stride = 0;     // elements between rows (heads); a multiple of 8
  const void* q_rope = nullptr;    // [num_tokens * num_heads, rope] bf16, 16-byte aligned
  int64_t q_rope_stride = 0;       // concatenated q: q_latent + 512, both strides 576
  const MlaSegment* segments = nullptr;  // [num_sequences] device, this layer's
  const std::byte* blocks = nullptr;     // device: block id begins at blocks + id * block_bytes
  int64_t block_bytes = 0;               // a multiple of 16, at least 64 rows
  MlaPoolMap pool_map;                   // of MakeMlaPoolMap; not read for fp8 nor portable
  MlaPlanView plan;                      // device pointers, see mla_plan.h
  float* partial_out = nullptr;          // [plan limits.max_partials, 64, rank] fp32 workspace
  float* partial_lse = nullptr;          // [plan limits.max_partials, 64] fp32 workspace
  void* out = nullptr;         // [num_tokens * num_heads, rank] bf16 or fp32, dense, every row
                               // of the plan is written; no visible row: zeros
  float* lse = nullptr;        // [num_tokens * num_heads] natural log; may be null; none: -inf
  float* block_lse = nullptr;  // [num_tokens * num_heads, block_lse_stride]; may be null: for each
  int64_t block_lse_stride = 0;  // block of the tile, its own log-sum-exp, -inf where none is seen
  float softmax_scale = 1.0f;
  int32_t num_heads = 0;
  int32_t rank = 0;                     // kv_lora_rank
  int32_t rope = 0;                     // qk_rope_head_dim
  RowFormat format = RowFormat::kBf16;  // of all segments
  // Rows of the plan's tiles, at most: MlaLargestTile. Up to kMlaFewRows, and up to kMlaHalfTileRows,
  // over fp8 rows and without block_lse, the Hopper path takes kernels that read faster. Their bits
  // are others, and those of a token also depend on other rows of its tile: for no deterministic plan
  // of several tokens a sequence, nor of more rows than kMlaFewRows. More rows than stated are right
  // too, and slow.
  int32_t tile_rows = kMlaTileRows;
  bool out_fp32 = false;
  bool units = false;  // page tables: [blocks, kMlaBlockUnits] ids of units; unit id begins at
                       // blocks + id * kMlaUnitBytes; pool_map of MakeMlaUnitMap
  MlaPath path = MlaPath::kAuto;
};

// Describes a pool of num_blocks blocks of 64 bf16 rows of 512 + 64 columns. Host only.
cudaError_t MakeMlaPoolMap(const void* blocks, int64_t num_blocks, int64_t block_bytes,
                           MlaPoolMap* map);
// The same of a pool of units. wide: of 128 bytes read, L2 is brought the 256 around them.
cudaError_t MakeMlaUnitMap(const void* units, int64_t num_units, bool wide, MlaPoolMap* map);

// Once a device, before the first launch or capture: raises shared memory limits.
cudaError_t PrepareMla();

// The path that kAuto takes on the current device.
MlaPath MlaAutoPath(RowFormat format, int32_t rank, int32_t rope);

// Shared memory that the portable path takes of a thread block; the Hopper path's fits wherever it
// runs.
int64_t MlaPortableSharedBytes(int32_t rank, int32_t rope);

// Attention of every tile of the plan, then the merge of those that were split.
cudaError_t LaunchMla(const MlaParams& params, cudaStream_t stream);

}  // namespace strait::cuda
