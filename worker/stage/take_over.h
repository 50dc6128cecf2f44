// SPDX-License-Identifier: Apache-2.0
//
// TakeOverRows hands the rows of stages to a stage of the same worker that takes their place, without
// a copy: their blocks change hands, layer by layer.
//
// Thread:  loop thread only.
// Why:     layers may be cut otherwise than before, so a sequence has in its new stage as many rows as
//          the layer with the fewest.
#pragma once

#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "worker/stage/residents.h"

namespace strait {

struct Predecessor {
  LayerRange layers;
  Residents* residents = nullptr;  // all of them left (Residents::Leave)
};

// `to` has these layers afterwards, of each sequence that all of them have rows of; of a sequence that
// some of them have not, the rows go. `needs_tokens`: only as many rows as there are tokens known of, for a
// stage in the middle was not told the ids of granted rows. `most_blocks`: that `to` may hold; sequences
// that do not fit go, the older ones, of lower ids, stay. REQUIRES: `to` is empty; no layer is in two
// predecessors, nor was taken before.
void TakeOverRows(absl::Span<const Predecessor> predecessors, LayerRange layers, bool needs_tokens,
                  uint32_t most_blocks, BlockPool* pool, Residents* to);

}  // namespace strait
