// SPDX-License-Identifier: Apache-2.0
//
// RecomputeCost says what it takes to compute a block's rows again, so that what gives way is what is cheapest to have
// again.
//
// Thread:  pure.
// Why:     a row goes through the same products with weights wherever it stands, and attends to every row before it. So
//          a block costs more the deeper it lies, and the last blocks of long sequences cost most. One layer's
//          products take about as many operations as attention to 4,300 (V3) or 4,900 (V2-Lite) rows.
//          It is the cost of the block alone: who recomputes it has the rows before it. A block whose successors are
//          there is worth all of theirs besides, for without it they are of no use; therefore ends go first, and no
//          sum over successors is kept.
//          Per byte of a copy it does not depend on how many layers the copy has.
#pragma once

#include <cstdint>

#include "proto/base/limits.h"

namespace strait {

// Of a row's products with weights, in rows that it could attend to for that.
inline constexpr uint64_t kRowCost = 4096;

// Of block number `block` of a sequence.
constexpr uint64_t RecomputeCost(uint32_t block) {
  constexpr uint64_t kRows = limits::kBlockTokens;
  return kRows * (kRowCost + block * kRows) + kRows * (kRows + 1) / 2;
}

}  // namespace strait
