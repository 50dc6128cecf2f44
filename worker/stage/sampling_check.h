// SPDX-License-Identifier: Apache-2.0
//
// CheckSampling turns the wire's SamplingParams into the worker's, or says which field is wrong.
//
// Thread:  pure function.
// Errors:  InvalidArgument names the field, its value and its range; ResourceExhausted: a list too
//          long.
// Limits:  limits::kMaxLogitBias, kMaxChoices; kMaxBannedTokens.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "proto/base/limits.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"

namespace strait {

// A request's own stop tokens, and as many again of the model's.
inline constexpr uint32_t kMaxBannedTokens = 2 * limits::kMaxStopTokens;

absl::StatusOr<SamplingParams> CheckSampling(const v1::SamplingParams& wire, uint32_t vocab_size);

}  // namespace strait
