// SPDX-License-Identifier: Apache-2.0
//
// PromptPlan says which sequences of a tile attend in the expanded form (kernels/cuda/attention/mha_prefill.h)
// and in which launches; the others attend in the absorbed form.
//
// Thread:  a pure function of its arguments.
// Limits:  a launch: kMhaMaxPieces pieces, as many rows of keys as there is room for. A sequence
//          with more keys than that goes through several launches, a span of its keys each.
// Why:     expanding a key costs 2 * 512 * 256 flops a head and saves 2 * (1,088 - 320) for each of
//          the chunk's tokens: even at 171 tokens, and the two more launches want something, too.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/cuda/attention/mla_plan.h"

namespace strait {

inline constexpr int32_t kMinExpandedTokens = 256;

// Rows of a tile that lie side by side.
struct RowRange {
  int32_t begin = 0;
  int32_t count = 0;
};

struct PromptPlan {
  std::vector<cuda::MlaSequence> absorbed;
  std::vector<RowRange> absorbed_rows;  // theirs
  std::vector<cuda::MhaPiece> pieces;   // of the others, by launches
  std::vector<int32_t> launch_begin;    // [number of launches + 1] into pieces

  int32_t num_launches() const { return static_cast<int32_t>(launch_begin.size()) - 1; }
  absl::Span<const cuda::MhaPiece> launch(int32_t index) const;
};

// `sequences`: of the tile, in the order of their rows, which leave out none. `key_rows`: room for
// expanded keys, a multiple of kMhaTileKeys; 0: none, so all are absorbed. Overwrites `plan`.
void PlanPrompts(absl::Span<const cuda::MlaSequence> sequences, int32_t key_rows, PromptPlan* plan);

}  // namespace strait
