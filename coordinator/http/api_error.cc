// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/api_error.h"

#include "coordinator/http/json_writer.h"
#include "coordinator/text/detokenizer.h"
#include "proto/base/text.h"

namespace strait {
namespace {

// Seconds. A full queue moves within one; a pipeline that lost a worker needs to load layers first.
constexpr char kRetryAfterQueueFull[] = "1";
constexpr char kRetryAfterUnavailable[] = "5";

}  // namespace

std::string_view ErrorType(int http_status) {
  if (http_status == 401 || http_status == 403) return "authentication_error";
  if (http_status == 429) return "rate_limit_exceeded";
  if (http_status >= 500) return "server_error";
  return "invalid_request_error";
}

std::string ErrorJson(const ApiError& error) {
  JsonWriter json;
  json.BeginObject().Key("error").BeginObject();
  json.Key("message").String(Utf8Lossy(error.message));
  json.Key("type").String(ErrorType(error.status));
  json.Key("param");
  error.param.empty() ? json.Null() : json.String(Utf8Lossy(error.param));
  json.Key("code");
  error.code.empty() ? json.Null() : json.String(error.code);
  json.EndObject().EndObject();
  return json.Take();
}

HttpResponse ErrorResponse(const ApiError& error) {
  HttpResponse response;
  response.status = error.status;
  response.body = ErrorJson(error);
  if (error.status == 429) response.headers.emplace_back("Retry-After", kRetryAfterQueueFull);
  if (error.status == 503) response.headers.emplace_back("Retry-After", kRetryAfterUnavailable);
  if (error.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

ApiError ToApiError(const absl::Status& status) {
  ApiError error;
  error.message = std::string(ToStd(status.message()));
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      error.status = 400;
      break;
    case absl::StatusCode::kResourceExhausted:
      error.status = 429;
      error.code = "queue_full";
      break;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
      error.status = 503;
      error.code = "unavailable";
      break;
    case absl::StatusCode::kDeadlineExceeded:
      error.status = 504;
      error.code = "deadline_exceeded";
      break;
    default:
      error.status = 500;
      error.code = "internal_error";
  }
  if (error.message.empty()) error.message = absl::StatusCodeToString(status.code());
  return error;
}

}  // namespace strait
