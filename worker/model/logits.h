// SPDX-License-Identifier: Apache-2.0
//
// From one row of logits to its LogitsResult: a known token scored, or a token sampled.
//
// Thread:  one call at a time per context.
// Shapes:  logits [vocab_size] fp32.
// Errors:  LogitsResult::status DataLoss: NaN or plus infinity among the logits.
// Why:     noise is keyed by (seed, choice_index, position of the sampled token), so a sequence's
//          sampler has no state that could be lost.
#pragma once

#include "kernels/cpu/context.h"
#include "worker/backend.h"

namespace strait {

// `position`: of the row; the token scored or sampled is that of position + 1.
LogitsResult ReadLogits(cpu::Context& context, const float* logits, uint32_t vocab_size,
                        const BatchSequence& sequence, uint32_t position,
                        const LogitsRequest& request);

}  // namespace strait
