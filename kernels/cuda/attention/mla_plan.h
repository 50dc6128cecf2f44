// SPDX-License-Identifier: Apache-2.0
//
// Who computes what in a launch of mla.h: tiles of up to 64 (token, head) rows of one sequence, cut
// along the cache, dealt to thread blocks. Made on the host, copied to the device, read there.
//
// Owns:    MlaPlan its vectors.     Borrows: MlaPlanView device memory of the caller.
// Thread:  any; MlaPlan is plain data.
// Shapes:  rows of a sequence are numbered token-major: token * num_heads + head.
// Errors:  PlanMla returns false when a limit is too small; the plan is then empty.
// Limits:  MlaPlanLimits; MaxMlaPlan gives those that no batch of a stated size passes.
// Why:     each thread block gets one contiguous stretch of (tile, cache block) pairs of equal
//          cost, so ragged batches and one long sequence alike fill the device, and at most two
//          partial results a thread block are merged. Deterministic: cuts at multiples of
//          kMlaDeterministicSpan cache blocks and nowhere else, so each span leaves a partial
//          result. Their number grows with batch times length, so such a batch is cut into parts
//          (CutMlaBatch), planned and launched one after the other over the same workspace: a
//          token's result is the same in any part.
#pragma once

#include <cstdint>
#include <vector>

#include "proto/latent_block.h"

namespace strait::cuda {

inline constexpr int32_t kMlaTileRows = 64;
inline constexpr int32_t kMlaBlockRows = limits::kBlockTokens;
inline constexpr int32_t kMlaDeterministicSpan = 16;  // cache blocks: 1,024 rows

// One stretch of one tile: what a thread block does between loading q and writing a result.
struct alignas(16) MlaWork {
  int32_t sequence = 0;         // index into segments
  int32_t first_row = 0;        // row of q and out of the tile's first row
  int32_t num_rows = 0;         // 1..64
  int32_t row_in_sequence = 0;  // number of the tile's first row in its sequence
  int32_t first_position = 0;   // of the sequence's first query token
  int32_t cache_rows = 0;       // rows that the tile's last token may see; 0: none
  int32_t block_begin = 0;      // of the page table
  int32_t block_end = 0;
  int32_t partial = -1;        // slot of the partial result; -1: this is the whole result
  int32_t settled_blocks = 0;  // leading blocks of the page table, of settled rows alone
  int32_t reserved[2] = {};
};

// One split tile: partials [first_partial, first_partial + num_partials) in cache order.
struct alignas(16) MlaMerge {
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t first_partial = 0;
  int32_t num_partials = 0;
  int32_t first_unit = 0;  // units of the merges before it
  int32_t warps = 1;       // that share 128 columns of a row
  int32_t reserved[2] = {};
};

// A thread block of the merge has 16 warps and takes one unit at a time: four rows of few partials,
// one row of more, 128 columns of a row of many. Deterministic: 4 warps at most, so that the order
// of the sum is the same whatever more partials there are that saw nothing.
constexpr int32_t MlaMergeWarps(int32_t num_partials, bool deterministic) {
  return num_partials <= 4 ? 1 : num_partials <= 16 || deterministic ? 4 : 16;
}
constexpr int32_t MlaMergeUnits(int32_t num_rows, int32_t warps) {
  return warps == 1 ? (num_rows + 3) / 4 : warps == 4 ? num_rows : num_rows * 4;
}

// Whether thread blocks 2i and 2i + 1 get the same stretches of the cache, each for another tile of
// 64 heads of the same token: then they may share copies of it.
constexpr bool MlaTilesInPairs(int32_t num_heads, int32_t num_thread_blocks) {
  return num_heads % (2 * kMlaTileRows) == 0 && num_thread_blocks >= 2;
}

struct MlaPlanLimits {
  int32_t num_thread_blocks = 0;  // grid of the attention kernel: the multiprocessors
  int32_t max_work = 0;
  int32_t max_merges = 0;
  int32_t max_partials = 0;
};

// The plan as kernels see it: pointers into one buffer laid out by MlaPlanLayout.
struct MlaPlanView {
  MlaPlanLimits limits;
  const int32_t* counts = nullptr;      // [2] merges, merge units
  const int32_t* work_begin = nullptr;  // [num_thread_blocks + 1] into work
  const MlaWork* work = nullptr;        // [max_work]
  const MlaMerge* merges = nullptr;     // [max_merges]
};

// One sequence of the step.
struct MlaSequence {
  int32_t sequence = 0;        // index into segments
  int32_t first_token = 0;     // of q
  int32_t num_tokens = 0;      // new tokens, their rows already in the cache; 0: skipped
  int32_t first_position = 0;  // of the first new token
  int32_t num_rows = -1;       // rows in its segment, where rows do not follow positions; -1: row
                               // p holds position p, up to the last new token
  int32_t settled_rows = 0;    // leading rows that nothing in flight writes: mla.h, Stream
};

struct MlaPlanOptions {
  int32_t num_heads = 0;
  bool deterministic = false;
  int32_t min_split_blocks = 1;  // a stretch is not cut shorter than this
};

struct MlaPlan {
  MlaPlanLimits limits;
  std::vector<int32_t> work_begin;
  std::vector<MlaWork> work;
  std::vector<MlaMerge> merges;
  int32_t num_partials = 0;
  int32_t num_merge_units = 0;
};

// REQUIRES: block_positions, where a segment has them, ascend, and every row that they name at or
// below a token's position lies in the first num_rows rows.
bool PlanMla(const MlaSequence* sequences, int32_t num_sequences, const MlaPlanOptions& options,
             const MlaPlanLimits& limits, MlaPlan* plan);

// Rows of the plan's largest tile; 0: it has none.
int32_t MlaLargestTile(const MlaPlan& plan);

// Limits that hold for every step of at most max_tokens tokens in max_sequences sequences of at
// most max_rows cache rows.
MlaPlanLimits MaxMlaPlan(int32_t num_thread_blocks, int32_t max_sequences, int32_t max_tokens,
                         int32_t num_heads, int64_t max_rows, bool deterministic);

// What deterministic plans in parts need for every such step.
struct MlaPartLimits {
  MlaPlanLimits plan;  // of one part
  int32_t max_parts = 0;
  int64_t plan_bytes = 0;  // of all parts' plans, each written where the one before ended
};

// `wanted_partials` a part, or what a few tokens of the longest sequence need, if that is more;
// never more than the whole step needs.
MlaPartLimits MaxMlaParts(int32_t num_thread_blocks, int32_t max_sequences, int32_t max_tokens,
                          int32_t num_heads, int64_t max_rows, int32_t wanted_partials);

// A batch in parts, in order of its tokens; a sequence may go on in the next part.
struct MlaParts {
  std::vector<MlaSequence> sequences;
  std::vector<int32_t> begin;  // [parts + 1] into sequences; no sequence: no part
};

// Cuts the batch so that PlanMla succeeds for every part. Not deterministic: one part.
// REQUIRES: the limits are MaxMlaPlan's or MaxMlaParts' of no smaller a batch; no num_rows given
// where deterministic.
void CutMlaBatch(const MlaSequence* sequences, int32_t num_sequences, const MlaPlanOptions& options,
                 const MlaPlanLimits& limits, MlaParts* parts);

// Bytes of the plan's buffer; the same on host and device.
int64_t MlaPlanBytes(const MlaPlanLimits& limits);
// Of these, the leading ones that matter; a multiple of 16.
int64_t MlaPlanUsedBytes(const MlaPlan& plan);
// Writes the plan to `to`, of MlaPlanUsedBytes(plan) bytes, 16-byte aligned; copy it to the device
// as it is. Returns that number.
int64_t WriteMlaPlan(const MlaPlan& plan, void* to);
// The view of such a buffer, which may be on the device: nothing is read.
MlaPlanView ViewMlaPlan(const MlaPlanLimits& limits, const void* buffer);

}  // namespace strait::cuda
