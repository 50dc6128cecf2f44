// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/drain_call.h"

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"

namespace strait::cli {
namespace {

constexpr char kRoute[] = "/strait/drain";

json::Object BodyOf(const DrainRequest& request) {
  json::Object body;
  body["worker"] = request.worker;
  if (request.dry_run) body["dry_run"] = true;
  if (request.undo) body["undo"] = true;
  body["timeout"] = request.timeout_s;
  return body;
}

}  // namespace

absl::StatusOr<DrainLine> ParseDrainLine(std::string_view line) {
  DrainLine report;
  STRAIT_ASSIGN_OR_RETURN(const json::Object object, ReadVerbLine(line, kRoute, &report));
  report.worker_id = Count(object, "worker_id");
  report.worker = Text(object, "worker");
  report.pipeline = Count(object, "pipeline");
  report.way = Text(object, "way");
  report.phase = Text(object, "phase");
  report.sequences_left = Count(object, "sequences_left");
  report.sequences_moved = Count(object, "sequences_moved");
  report.moved_bytes = Count(object, "moved_bytes");
  report.rows_kept = Count(object, "rows_kept");
  report.rows_lost = Count(object, "rows_lost");
  report.pause_ms = Number(object, "pause_ms");
  report.total_ms = Number(object, "total_ms");
  return report;
}

absl::StatusOr<DrainOutcome> CallDrain(HttpClient& client, const DrainRequest& request,
                                       const std::function<void(const DrainLine&)>& on_report) {
  return FollowVerb<DrainLine>(client, kRoute, BodyOf(request), request.timeout_s, ParseDrainLine,
                               on_report);
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
