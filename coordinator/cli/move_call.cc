// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/move_call.h"

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"

namespace strait::cli {
namespace {

constexpr char kRoute[] = "/strait/migrate";

json::Object BodyOf(const MoveRequest& request) {
  json::Object body;
  body["sequence"] = request.sequence;
  body["to"] = request.to;
  if (request.dry_run) body["dry_run"] = true;
  if (request.force_numerics) body["force_numerics"] = true;
  body["timeout"] = request.timeout_s;
  return body;
}

}  // namespace

absl::StatusOr<MoveLine> ParseMoveLine(std::string_view line) {
  MoveLine report;
  STRAIT_ASSIGN_OR_RETURN(const json::Object object, ReadVerbLine(line, kRoute, &report));
  report.sequence = Count(object, "sequence");
  report.from = Count(object, "from");
  report.to = Count(object, "to");
  report.phase = Text(object, "phase");
  report.rounds = Count(object, "rounds");
  report.rows = Count(object, "rows");
  report.rows_total = Count(object, "rows_total");
  report.moved_bytes = Count(object, "moved_bytes");
  report.recomputed_rows = Count(object, "recomputed_rows");
  report.pause_ms = Number(object, "pause_ms");
  report.total_ms = Number(object, "total_ms");
  return report;
}

absl::StatusOr<MoveOutcome> CallMigrate(HttpClient& client, const MoveRequest& request,
                                        const std::function<void(const MoveLine&)>& on_report) {
  return FollowVerb<MoveLine>(client, kRoute, BodyOf(request), request.timeout_s, ParseMoveLine,
                              on_report);
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
      way, ": ", report.rows, " rows, ", FormatBytes(bytes), " in ",
      Counted(report.rounds, "round"), ", pause ", Fixed(report.pause_ms, 1), " ms, total ",
      Fixed(seconds, 3), " s, ", Fixed(seconds > 0 ? bytes / seconds / 1e9 : 0, 3), " GB/s");
  if (report.recomputed_rows > 0) {
    absl::StrAppend(&text, "; ", report.recomputed_rows, " rows were computed again");
  }
  return text;
}

}  // namespace strait::cli
