// SPDX-License-Identifier: Apache-2.0
//
// The bodies of the elastic verbs' routes: POST /strait/migrate, /strait/drain and /strait/scale.
//
// Thread:  pure functions.
// Errors:  ApiError, naming the field, the value and the bound. A field that no verb has is refused:
//          who moves sequences should know what was understood.
// Limits:  kMaxSequenceNameBytes, kMaxWorkerNameBytes, kMaxVerbSeconds; proto/base/limits.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <variant>

#include "coordinator/engine.h"
#include "coordinator/http/api_error.h"

namespace strait {

inline constexpr size_t kMaxSequenceNameBytes = 256;  // "chatcmpl-", an x-request-id, "/127"
inline constexpr size_t kMaxWorkerNameBytes = 256;
inline constexpr double kMaxVerbSeconds = 86'400;

// {"sequence": "12" | 12 | "cmpl-…" | "cmpl-…/1", "to": 2, "dry_run": false, "timeout": 300,
//  "force_numerics": false}; all but the first two may be left out.
std::variant<MigrateSpec, ApiError> ParseMigrate(std::string_view body);

// {"worker": "worker-1" | "2" | 2, "dry_run": false, "undo": false, "timeout": 300}; all but the first may be left
// out.
std::variant<DrainSpec, ApiError> ParseDrain(std::string_view body);

struct ScaleRequest {
  ScaleSpec spec;
  bool progress = false;  // the answer is a line for each report; else one object at the end
};
// {"stages": 3, "dry_run": false, "progress": false}; all but the first may be left out.
std::variant<ScaleRequest, ApiError> ParseScale(std::string_view body);

// How the end of a verb looks to who asked for it. Unlike a request's (ToApiError): no room is 507, which no client
// repeats by itself, and what cannot be just now is 409.
ApiError ToVerbError(const absl::Status& status);

}  // namespace strait
