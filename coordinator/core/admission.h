// SPDX-License-Identifier: Apache-2.0
//
// Admission says whether a request can be served at all, before anything is kept of it.
//
// Thread:  pure functions.
// Errors:  InvalidArgument names the field, its value and its bounds.
// Why:     what passes here is trusted by the scheduler and accepted by every stage (worker/stage
//          checks the same bounds again).
#pragma once

#include "absl/status/status.h"
#include "coordinator/core/core.h"

namespace strait {

// Whether every sequence of it is well formed and within the model's context.
absl::Status CheckRequest(const RequestSpec& request, const ModelShape& model);

// Whether every sequence of it, grown to its end, fits in `capacity_rows`: the longest sequence that
// every stage of the roomiest pipeline can hold.
absl::Status CheckFits(const RequestSpec& request, uint64_t capacity_rows);

}  // namespace strait
