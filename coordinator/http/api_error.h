// SPDX-License-Identifier: Apache-2.0
//
// ApiError is an error as an OpenAI client sees it: {"error": {"message", "type", "param",
// "code"}} under the right status.
//
// Thread:  plain data.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "coordinator/http/message.h"

namespace strait {

struct ApiError {
  int status = 400;
  std::string message;
  std::string param;  // the field at fault; empty: null
  std::string code;   // empty: null
};

// "invalid_request_error", "authentication_error", "rate_limit_exceeded" or "server_error".
std::string_view ErrorType(int http_status);

// {"error":{…}}. The message may hold any bytes.
std::string ErrorJson(const ApiError& error);

// With Retry-After where coming back helps (429, 503).
HttpResponse ErrorResponse(const ApiError& error);

// How the engine's refusals and failures look to a client.
ApiError ToApiError(const absl::Status& status);

}  // namespace strait
