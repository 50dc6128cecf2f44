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

// Whether every sequence of it, grown to its end, fits in `capacity_columns` 64-token columns of
// latent blocks: what the roomiest pipeline holds.
absl::Status CheckFits(const RequestSpec& request, uint32_t capacity_columns);

}  // namespace strait
