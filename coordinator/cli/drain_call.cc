// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/drain_call.h"

#include <cstdio>
#include <optional>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr char kRoute[] = "/strait/drain";
// How much longer than the drain itself its answer may take.
constexpr double kAnswerGraceS = 30;

uint64_t Count(const json::Object& object, std::string_view key) {
  const double value = Number(object, key);
  return value > 0 ? static_cast<uint64_t>(value) : 0;
}

std::string Fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

std::string Counted(uint64_t count, const char* what) {
  return absl::StrCat(count, " ", what, count == 1 ? "" : "s");
}

std::string BodyOf(const DrainRequest& request) {
  json::Object body;
  body["worker"] = request.worker;
  if (request.dry_run) body["dry_run"] = true;
  if (request.undo) body["undo"] = true;
  body["timeout"] = request.timeout_s;
  return boost::json::serialize(body);
}

}  // namespace

absl::StatusOr<DrainLine> ParseDrainLine(std::string_view line) {
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(line, kRoute));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(value, kRoute));
  DrainLine report;
  STRAIT_ASSIGN_OR_RETURN(report.event, json::GetString(*object, "event", kRoute));
  report.worker_id = Count(*object, "worker_id");
  report.worker = Text(*object, "worker");
  report.pipeline = Count(*object, "pipeline");
  report.way = Text(*object, "way");
  report.phase = Text(*object, "phase");
  report.sequences_left = Count(*object, "sequences_left");
  report.sequences_moved = Count(*object, "sequences_moved");
  report.moved_bytes = Count(*object, "moved_bytes");
  report.rows_kept = Count(*object, "rows_kept");
  report.rows_lost = Count(*object, "rows_lost");
  report.pause_ms = Number(*object, "pause_ms");
  report.total_ms = Number(*object, "total_ms");
  if (const json::Value* error = json::Find(*object, "error"); error && error->is_object()) {
    report.error_code = Text(error->get_object(), "code");
    report.error_message = Text(error->get_object(), "message");
  }
  return report;
}

absl::StatusOr<DrainOutcome> CallDrain(HttpClient& client, const DrainRequest& request,
                                       const std::function<void(const DrainLine&)>& on_report) {
  DrainOutcome outcome;
  absl::Status unreadable;
  std::optional<DrainLine> end;
  const auto on_line = [&](std::string_view text) {
    absl::StatusOr<DrainLine> line = ParseDrainLine(text);
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
  const int timeout_ms = static_cast<int>((request.timeout_s + kAnswerGraceS) * 1000);
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply,
                          client.PostLines(kRoute, BodyOf(request), timeout_ms, on_line));
  if (reply.status != 200) {
    outcome.code = reply.ErrorCode();
    outcome.message = reply.ErrorText();
    return outcome;
  }
  if (!unreadable.ok()) return absl::InternalError(std::string(unreadable.message()));
  if (!end) return absl::InternalError(absl::StrCat(kRoute, ": the answer has no end"));
  outcome.done = end->event == "done";
  outcome.code = end->error_code;
  outcome.message = end->error_message;
  return outcome;
}

std::string ProgressText(const DrainLine& report) {
  std::string text = absl::StrCat("worker ", report.worker);
  if (report.pipeline > 0) absl::StrAppend(&text, " in pipeline ", report.pipeline);
  absl::StrAppend(&text, ": ", report.phase);
  if (report.way == "move") {
    absl::StrAppend(&text, ", ", Counted(report.sequences_left, "sequence"), " left, ",
                    report.sequences_moved, " moved, ",
                    FormatBytes(static_cast<double>(report.moved_bytes)));
  }
  return text;
}

std::string DoneText(const DrainLine& report, const DrainRequest& request) {
  const std::string who = absl::StrCat("worker ", report.worker);
  if (request.undo) return absl::StrCat(who, " may get stages again");
  if (request.dry_run) {
    if (report.way == "move") {
      return absl::StrCat(who, " could be drained: ", Counted(report.sequences_left, "sequence"),
                          " of pipeline ", report.pipeline,
                          " would move, and that pipeline be dissolved");
    }
    if (report.way == "replace") {
      return absl::StrCat(who, " could be drained: pipeline ", report.pipeline,
                          " would get as many stages on other workers");
    }
    return absl::StrCat(who, " could be drained: it has no stage");
  }
  std::string text = absl::StrCat(who, " is drained");
  if (report.way == "move") {
    absl::StrAppend(&text, ": ", Counted(report.sequences_moved, "sequence"), " moved, ",
                    FormatBytes(static_cast<double>(report.moved_bytes)), ", longest pause ",
                    Fixed(report.pause_ms, 1), " ms");
  } else if (report.way == "replace") {
    absl::StrAppend(&text, ": pipeline ", report.pipeline, " has other stages; rows kept ",
                    report.rows_kept, ", computed again ", report.rows_lost, ", pause ",
                    Fixed(report.pause_ms, 1), " ms");
  }
  return absl::StrCat(text, ", total ", Fixed(report.total_ms / 1000, 3), " s");
}

}  // namespace strait::cli
