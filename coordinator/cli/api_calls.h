// SPDX-License-Identifier: Apache-2.0
//
// What several verbs ask of an OpenAI-compatible server: which model it serves, and one streamed
// completion with its times.
//
// Thread:  the caller's; a client is used by one thread.
// Errors:  of FirstModel: the client's; Internal (a status other than 200, not the JSON that was
//          to be expected, no model listed), with the address.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/measure.h"

namespace strait::cli {

// A long prompt may be computed for minutes before its first byte.
inline constexpr int kAnswerIdleTimeoutMs = 600'000;

struct ModelInfo {
  std::string id;
  int64_t max_model_len = 0;  // 0: the server does not tell
};

// The first model that GET /v1/models lists.
absl::StatusOr<ModelInfo> FirstModel(HttpClient& client);

// Sends a streaming completion (`request` is its JSON) and times its events. Errors are in the
// result; `output_tokens` is what was asked for.
RequestResult MeasureStream(HttpClient& client, const std::string& request, uint32_t output_tokens);

}  // namespace strait::cli
