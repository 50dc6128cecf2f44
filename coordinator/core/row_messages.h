// SPDX-License-Identifier: Apache-2.0
//
// What both ends of a transfer of one sequence's rows are told (proto/strait/v1/rows.proto): who fetches them, who
// serves them, and the secret that the one shows to the other.
//
// Thread:  pure functions.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "coordinator/core/pipeline.h"
#include "coordinator/core/sequence.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

// No edge, whose nonce its two workers know, has such an id; and what one use tells opens nothing of the other.
enum class RowsUse : uint64_t {
  kMoves = uint64_t{1} << 63,
  kAhead = uint64_t{1} << 62,
};

// Of rows that go to one placement, or for its sake. `edge_secret`: CoreOptions.
struct RowsPass {
  uint64_t edge_secret = 0;
  RowsUse use = RowsUse::kMoves;
  SequenceId sequence;
  PlacementEpoch placement;

  // Of what this stage serves.
  uint64_t SecretOf(uint64_t stage_id) const;
};

// Its rows [begin_row, end_row), of `layers`, come from the stages of `from` that have these. `address`: a worker's data
// address. Who is to fetch them, and how, is the caller's to say.
v1::FetchRows FetchFrom(const Pipeline& from, const Sequence& sequence, const RowsPass& pass,
                        LayerRange layers, uint32_t begin_row, uint32_t end_row,
                        const std::function<std::string(WorkerId)>& address);
// To one stage of the pipeline of this epoch.
v1::ServeRows ServeOf(PipelineEpoch epoch, uint64_t stage_id, const RowsPass& pass);

}  // namespace strait
