// SPDX-License-Identifier: Apache-2.0
//
// CacheTiers is what a policy with tiers keeps of a sequence, and what that costs: young rows whole, old
// ones at a rank and in a format of their layer, or not at all.
//
// Thread:  immutable after Create.
// Shapes:  rows [0, sink_rows) and the newest are young in every layer. Rows become old at policy points,
//          the multiples of interval_rows: at point P the rows [sink_rows, P - young_rows), by whole blocks.
//          What becomes old is chosen at P - 64, when all of it is sealed, and is old from the step on that
//          brings row P: so at lengths above P. Blocks lie in units (proto/model/block_units.h).
// Errors:  InvalidArgument names the field, its value and what it may be.
// Limits:  all rows are multiples of 64; young_rows at least 64; positions below kMaxPositionEmbeddings.
// Why:     which rows are old follows from the length alone, so cost is a function of length and layers in
//          closed form. Steps of 64 rows make it one of the number of blocks: lengths with as many blocks
//          cost the same. A step that makes old blocks of another format out of young ones holds both for
//          a moment. That is not in HeldBytes: who does it block by block needs one old block to spare.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/base/check.h"
#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "proto/model/block_units.h"

namespace strait {

class CacheTiers {
 public:
  struct Spec {
    uint32_t rope = 0;            // qk_rope_head_dim; HasUnits
    BlockShape young;             // not kInt4
    std::vector<BlockShape> old;  // [num_hidden_layers]; rank 0: dropped, else at most young's
    uint32_t sink_rows = 0;
    uint32_t young_rows = 0;
    uint32_t interval_rows = 0;
  };
  static absl::StatusOr<CacheTiers> Create(Spec spec);

  const Spec& spec() const { return spec_; }

  // The newest policy point that is in effect; 0: none.
  uint32_t PointOf(uint32_t length) const {
    return length == 0 ? 0 : (length - 1) / spec_.interval_rows * spec_.interval_rows;
  }
  // Blocks of a layer that are old: so many from block sink_rows / 64 on.
  uint32_t NumOldBlocks(uint32_t length) const {
    const uint32_t kept = spec_.sink_rows + spec_.young_rows;
    const uint32_t point = PointOf(length);
    return point <= kept ? 0 : (point - kept) / limits::kBlockTokens;
  }

  // As those of proto/model/reservation.h. REQUIRES: the model has these layers.
  uint64_t HeldBytes(uint32_t length, LayerRange layers) const {
    STRAIT_CHECK(layers.begin <= layers.end && layers.end < old_bytes_before_.size());
    const uint32_t num_blocks = (length + limits::kBlockTokens - 1) / limits::kBlockTokens;
    const uint32_t num_old = NumOldBlocks(length);
    return uint64_t{num_blocks - num_old} * layers.size() * young_bytes_ +
           num_old * (old_bytes_before_[layers.end] - old_bytes_before_[layers.begin]);
  }
  // Between two points a sequence only grows, and just past one it may hold less. At each point it holds no
  // less than at the one before: it has had interval_rows more, of which no more became old. So the most is
  // held now or at the last point.
  uint64_t ReservedBytes(uint32_t length, LayerRange layers) const {
    const uint32_t last = length / spec_.interval_rows * spec_.interval_rows;
    return std::max(HeldBytes(length, layers), HeldBytes(last, layers));
  }
  // Whole blocks, and not above limits::kMaxPositionEmbeddings.
  uint64_t RowsThatFit(uint64_t bytes, LayerRange layers) const;

 private:
  explicit CacheTiers(Spec spec);

  Spec spec_;
  uint64_t young_bytes_ = 0;  // of a block
  std::vector<uint64_t>
      old_bytes_before_;  // [num_hidden_layers + 1]: of a block in each layer before
};

}  // namespace strait
