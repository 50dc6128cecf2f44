// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/api_calls.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {

namespace {

absl::StatusOr<ModelInfo> ReadFirstModel(const std::string& body) {
  STRAIT_ASSIGN_OR_RETURN(const json::Value parsed, json::Parse(body, "/v1/models"));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(parsed, "/v1/models"));
  STRAIT_ASSIGN_OR_RETURN(const json::Array* data, json::GetArray(*object, "data", "/v1/models"));
  if (data->empty() || !(*data)[0].is_object()) {
    return absl::InternalError("/v1/models lists no model");
  }
  const json::Object& first = (*data)[0].get_object();
  ModelInfo info;
  STRAIT_ASSIGN_OR_RETURN(info.id, json::GetString(first, "id", "/v1/models"));
  STRAIT_ASSIGN_OR_RETURN(info.max_model_len,
                          json::GetIntOr(first, "max_model_len", 0, "/v1/models"));
  return info;
}

}  // namespace

absl::StatusOr<ModelInfo> FirstModel(HttpClient& client) {
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply, client.Get("/v1/models", kConnectTimeoutMs));
  const std::string url = client.url().Text();
  if (reply.status != 200) {
    return absl::InternalError(absl::StrCat(url, ": GET /v1/models: ", reply.ErrorText()));
  }
  absl::StatusOr<ModelInfo> info = ReadFirstModel(reply.body);
  if (info.ok()) return info;
  return absl::InternalError(absl::StrCat(url, ": ", std::string(info.status().message()),
                                          ". Is it an OpenAI-compatible server?"));
}

RequestResult MeasureStream(HttpClient& client, const std::string& request,
                            uint32_t output_tokens) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
  RequestResult result;
  int64_t num_events = 0;
  bool done = false;
  const Clock::time_point start = Clock::now();
  const auto on_event = [&](std::string_view data) {
    const double at = seconds(Clock::now() - start);
    if (data == "[DONE]") {
      done = true;
      return true;
    }
    const absl::StatusOr<json::Value> event = json::Parse(data, "event");
    if (!event.ok() || !event->is_object()) {
      result.error = "an event that is no JSON object";
      return false;
    }
    const json::Object& object = event->get_object();
    if (json::Find(object, "error")) {
      HttpReply reply;
      reply.status = 200;
      reply.body = std::string(data);
      result.error = "in the stream: " + reply.ErrorText();
      return false;
    }
    if (const json::Value* usage = json::Find(object, "usage"); usage && usage->is_object()) {
      const json::Object& u = usage->get_object();
      result.prompt_tokens = json::GetIntOr(u, "prompt_tokens", 0, "usage").value_or(0);
      result.output_tokens = json::GetIntOr(u, "completion_tokens", 0, "usage").value_or(0);
    }
    const json::Value* choices = json::Find(object, "choices");
    if (choices && choices->is_array() && !choices->get_array().empty()) {
      if (num_events == 0) {
        result.first_token_s = at;
      } else {
        result.gaps_s.push_back(at - result.total_s);
      }
      result.total_s = at;
      ++num_events;
    }
    return true;
  };
  const absl::StatusOr<HttpReply> reply =
      client.PostStream("/v1/completions", request, kAnswerIdleTimeoutMs, on_event);
  if (!reply.ok()) {
    result.error = std::string(reply.status().message());
  } else if (reply->status != 200) {
    result.error = reply->ErrorText();
  } else if (result.error.empty() && num_events == 0) {
    result.error = "the stream brought no token";
  } else if (result.error.empty() && !done) {
    result.error = "the stream ended without [DONE]";
  }
  if (result.output_tokens == 0) result.output_tokens = num_events;
  result.is_short = result.output_tokens < output_tokens;
  return result;
}

}  // namespace strait::cli
