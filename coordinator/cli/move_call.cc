// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/move_call.h"

#include <cstdio>
#include <optional>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

// How much longer than the move itself its answer may take.
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

std::string BodyOf(const MoveRequest& request) {
  json::Object body;
  body["sequence"] = request.sequence;
  body["to"] = request.to;
  if (request.dry_run) body["dry_run"] = true;
  if (request.force_numerics) body["force_numerics"] = true;
  body["timeout"] = request.timeout_s;
  return boost::json::serialize(body);
}

}  // namespace

absl::StatusOr<MoveLine> ParseMoveLine(std::string_view line) {
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(line, "/strait/migrate"));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(value, "/strait/migrate"));
  MoveLine report;
  STRAIT_ASSIGN_OR_RETURN(report.event, json::GetString(*object, "event", "/strait/migrate"));
  report.sequence = Count(*object, "sequence");
  report.from = Count(*object, "from");
  report.to = Count(*object, "to");
  report.phase = Text(*object, "phase");
  report.rounds = Count(*object, "rounds");
  report.rows = Count(*object, "rows");
  report.rows_total = Count(*object, "rows_total");
  report.moved_bytes = Count(*object, "moved_bytes");
  report.recomputed_rows = Count(*object, "recomputed_rows");
  report.pause_ms = Number(*object, "pause_ms");
  report.total_ms = Number(*object, "total_ms");
  if (const json::Value* error = json::Find(*object, "error"); error && error->is_object()) {
    report.error_code = Text(error->get_object(), "code");
    report.error_message = Text(error->get_object(), "message");
  }
  return report;
}

absl::StatusOr<MoveOutcome> CallMigrate(HttpClient& client, const MoveRequest& request,
                                        const std::function<void(const MoveLine&)>& on_report) {
  MoveOutcome outcome;
  absl::Status unreadable;
  std::optional<MoveLine> end;
  const auto on_line = [&](std::string_view text) {
    absl::StatusOr<MoveLine> line = ParseMoveLine(text);
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
  STRAIT_ASSIGN_OR_RETURN(
      const HttpReply reply,
      client.PostLines("/strait/migrate", BodyOf(request), timeout_ms, on_line));
  outcome.http_status = reply.status;
  if (reply.status != 200) {
    outcome.code = reply.ErrorCode();
    outcome.message = reply.ErrorText();
    return outcome;
  }
  if (!unreadable.ok()) return absl::InternalError(std::string(unreadable.message()));
  if (!end) return absl::InternalError("/strait/migrate: the answer has no end");
  outcome.done = end->event == "done";
  outcome.code = end->error_code;
  outcome.message = end->error_message;
  return outcome;
}

std::string ProgressText(const MoveLine& report) {
  std::string text = absl::StrCat("sequence ", report.sequence, " from pipeline ", report.from,
                                  " to ", report.to, ": ", report.phase);
  if (report.rounds > 0) absl::StrAppend(&text, ", round ", report.rounds);
  absl::StrAppend(&text, ", ", report.rows, " of ", report.rows_total, " rows, ",
                  FormatBytes(static_cast<double>(report.moved_bytes)));
  return text;
}

std::string DoneText(const MoveLine& report, bool dry_run) {
  const std::string way =
      absl::StrCat("sequence ", report.sequence, " from pipeline ", report.from, " to ", report.to);
  if (dry_run) return absl::StrCat(way, " could move: ", report.rows_total, " rows");
  const double seconds = report.total_ms / 1000;
  const double bytes = static_cast<double>(report.moved_bytes);
  std::string text = absl::StrCat(
      way, ": ", report.rows, " rows, ", FormatBytes(bytes), " in ", report.rounds, " round",
      report.rounds == 1 ? "" : "s", ", pause ", Fixed(report.pause_ms, 1), " ms, total ",
      Fixed(seconds, 3), " s, ", Fixed(seconds > 0 ? bytes / seconds / 1e9 : 0, 3), " GB/s");
  if (report.recomputed_rows > 0) {
    absl::StrAppend(&text, "; ", report.recomputed_rows, " rows were computed again");
  }
  return text;
}

}  // namespace strait::cli
