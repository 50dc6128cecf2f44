// SPDX-License-Identifier: Apache-2.0
//
// FollowVerb asks a coordinator for an elastic verb whose answer is a line for each report, and follows
// the reports to the end.
//
// Thread:  the caller's; a client is used by one thread.
// Errors:  the client's (Cancelled: the cancel descriptor; the verb goes on), Internal (an answer that
//          is none). What the coordinator says against the verb is in VerbOutcome.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/http_client.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {

// How much longer than the verb itself its answer may take.
inline constexpr double kVerbAnswerGraceS = 30;

// What all verbs' lines have.
struct VerbLine {
  std::string event;       // "progress", "done", "error"
  std::string error_code;  // of an error
  std::string error_message;
};

// Reads that much of a line; what the verb's own members are is in the object.
absl::StatusOr<json::Object> ReadVerbLine(std::string_view text, std::string_view route,
                                          VerbLine* line);

template <class Line>
struct VerbOutcome {
  bool done = false;
  Line last;            // the last report; of a refused verb: nothing
  int http_status = 0;  // 200 also of a verb that failed under way
  // Why it is not done: "no_room", "aborted" …, or "HTTP 400"; and in words.
  std::string code;
  std::string message;
};

// REQUIRES: Line is a VerbLine. `timeout_s` is the verb's own.
template <class Line>
absl::StatusOr<VerbOutcome<Line>> FollowVerb(
    HttpClient& client, std::string_view route, const json::Object& body, double timeout_s,
    const std::function<absl::StatusOr<Line>(std::string_view)>& parse,
    const std::function<void(const Line&)>& on_report) {
  VerbOutcome<Line> outcome;
  absl::Status unreadable;
  std::optional<Line> end;
  const auto on_line = [&](std::string_view text) {
    absl::StatusOr<Line> line = parse(text);
    if (!line.ok()) {
      unreadable = line.status();
      return false;
    }
    if (line->event != "error") outcome.last = *line;
    if (line->event == "progress") {
      on_report(*line);
    } else {
      end = *std::move(line);
    }
    return true;
  };
  const int timeout_ms = static_cast<int>((timeout_s + kVerbAnswerGraceS) * 1000);
  STRAIT_ASSIGN_OR_RETURN(
      const HttpReply reply,
      client.PostLines(route, boost::json::serialize(body), timeout_ms, on_line));
  outcome.http_status = reply.status;
  if (reply.status != 200) {
    outcome.code = reply.ErrorCode();
    outcome.message = reply.ErrorText();
    return outcome;
  }
  if (!unreadable.ok()) return absl::InternalError(std::string(unreadable.message()));
  if (!end) return absl::InternalError(std::string(route) + ": the answer has no end");
  outcome.done = end->event == "done";
  outcome.code = end->error_code;
  outcome.message = end->error_message;
  return outcome;
}

}  // namespace strait::cli
