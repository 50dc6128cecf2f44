// SPDX-License-Identifier: Apache-2.0
//
// What travels between two stages: the hidden states of a step, and the ids that it sampled.
//
// Owns:    its data.
// Thread:  plain values.
#pragma once

#include <cstdint>
#include <vector>

#include "proto/base/ids.h"
#include "worker/hidden_buffer.h"

namespace strait {

// Hidden states of one step, as they arrive from or leave for another stage.
struct HiddenStep {
  PipelineEpoch epoch;
  StepId step;
  uint32_t num_tokens = 0;
  HiddenBuffer data;  // [num_tokens, hidden_row_bytes]
};

// What a step sampled, on its way from the last stage to the first.
struct SampledStep {
  PipelineEpoch epoch;
  StepId step;
  std::vector<TokenId> tokens;  // of the sequences that wanted a sample, in plan order
};

}  // namespace strait
