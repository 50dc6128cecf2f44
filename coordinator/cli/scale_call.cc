// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/scale_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"

namespace strait::cli {
namespace {

constexpr char kRoute[] = "/strait/scale";

const json::Object* Member(const json::Object& object, std::string_view key) {
  const json::Value* value = json::Find(object, key);
  return value != nullptr && value->is_object() ? &value->get_object() : nullptr;
}

PlannedLine ReadPlan(const json::Object& object) {
  PlannedLine planned;
  planned.pipeline = Count(object, "pipeline");
  planned.tokens_max = Count(object, "tokens_max");
  if (const json::Object* plan = Member(object, "plan")) planned.why = Text(*plan, "why");
  for (const json::Object* stage : Objects(object, "stages")) {
    planned.stages.push_back({Text(*stage, "worker"), Count(*stage, "layer_begin"),
                              Count(*stage, "layer_end"), Number(*stage, "cache_bytes"),
                              Number(*stage, "load_bytes"), Number(*stage, "rows_bytes")});
  }
  return planned;
}

std::string PlanText(const PlannedLine& planned, uint32_t num_stages) {
  if (planned.stages.empty()) {
    return absl::StrCat("pipeline ", planned.pipeline, " has ", Counted(num_stages, "stage"),
                        " already");
  }
  std::vector<std::vector<std::string>> rows = {
      {"stage", "worker", "layers", "cache", "weights to load", "rows to move"}};
  for (const PlannedStageLine& stage : planned.stages) {
    rows.push_back({absl::StrCat(rows.size() - 1), stage.worker,
                    absl::StrCat(stage.layer_begin, " to ", stage.layer_end),
                    FormatBytes(stage.cache_bytes), FormatBytes(stage.load_bytes),
                    FormatBytes(stage.rows_bytes)});
  }
  return absl::StrCat("pipeline ", planned.pipeline, " could get ", Counted(num_stages, "stage"),
                      ", for sequences of up to ", planned.tokens_max, " tokens: ", planned.why,
                      "\n", FormatTable(rows));
}

}  // namespace

absl::StatusOr<ScaleLine> ParseScaleLine(std::string_view line) {
  ScaleLine report;
  STRAIT_ASSIGN_OR_RETURN(const json::Object object, ReadVerbLine(line, kRoute, &report));
  report.stages = Count(object, "stages");
  report.pipelines_done = Count(object, "pipelines_done");
  report.pipelines_total = Count(object, "pipelines_total");
  report.pipeline = Count(object, "pipeline");
  report.phase = Text(object, "phase");
  report.bytes_loaded = Number(object, "bytes_loaded");
  report.bytes_to_load = Number(object, "bytes_to_load");
  report.rows = Count(object, "rows");
  report.rows_total = Count(object, "rows_total");
  report.moved_bytes = Number(object, "moved_bytes");
  report.edges_up = Count(object, "edges_up");
  report.edges_total = Count(object, "edges_total");
  report.total_ms = Number(object, "total_ms");
  report.pipelines = Count(object, "pipelines");
  report.pause_ms = Number(object, "pause_ms");
  report.rows_kept = Count(object, "rows_kept");
  report.rows_lost = Count(object, "rows_lost");
  if (const json::Object* residents = Member(object, "residents")) {
    report.residents = Count(*residents, "count");
    report.pause_min_ms = Number(*residents, "pause_min_ms");
    report.pause_p50_ms = Number(*residents, "pause_p50_ms");
    report.pause_max_ms = Number(*residents, "pause_max_ms");
  }
  for (const json::Object* plan : Objects(object, "plans")) report.plans.push_back(ReadPlan(*plan));
  return report;
}

absl::StatusOr<ScaleOutcomeLine> CallScale(HttpClient& client, const ScaleAsk& ask,
                                           const std::function<void(const ScaleLine&)>& on_report) {
  json::Object body;
  body["stages"] = ask.num_stages;
  if (ask.dry_run) body["dry_run"] = true;
  body["progress"] = true;
  return FollowVerb<ScaleLine>(client, kRoute, body, ask.timeout_s, ParseScaleLine, on_report);
}

std::string ProgressText(const ScaleLine& report) {
  if (report.pipeline == 0) {
    return absl::StrCat(report.pipelines_done, " of ", Counted(report.pipelines_total, "pipeline"),
                        ": ", report.phase);
  }
  std::string text = absl::StrCat("pipeline ", report.pipeline);
  if (report.pipelines_total > 1) {
    absl::StrAppend(&text, " (", report.pipelines_done + 1, " of ", report.pipelines_total, ")");
  }
  absl::StrAppend(&text, ": ", report.phase);
  if (report.phase == "loading") {
    absl::StrAppend(&text, ", ", FormatBytes(report.bytes_loaded), " of ",
                    FormatBytes(report.bytes_to_load));
  }
  if (report.rows_total > 0) {
    absl::StrAppend(&text, ", ", report.rows, " of ", report.rows_total, " rows, ",
                    FormatBytes(report.moved_bytes));
  }
  if (report.edges_total > 0 && report.phase == "copying") {
    absl::StrAppend(&text, ", ", report.edges_up, " of ", Counted(report.edges_total, "edge"));
  }
  return text;
}

double ShareDone(const ScaleLine& report) {
  if (report.phase == "loading" && report.bytes_to_load > 0) {
    return std::min(1.0, report.bytes_loaded / report.bytes_to_load);
  }
  if (report.phase == "copying" && report.rows_total > 0) {
    return std::min(1.0, static_cast<double>(report.rows) / static_cast<double>(report.rows_total));
  }
  return -1;
}

std::string DoneText(const ScaleLine& report, const ScaleAsk& ask) {
  if (ask.dry_run) {
    std::string text;
    for (const PlannedLine& planned : report.plans) {
      absl::StrAppend(&text, text.empty() ? "" : "\n", PlanText(planned, ask.num_stages));
    }
    return text;
  }
  std::string text = absl::StrCat(
      Counted(report.pipelines, "pipeline"), " with ", Counted(ask.num_stages, "stage"),
      "; longest pause ", Fixed(report.pause_ms, 1), " ms; rows kept in caches ", report.rows_kept,
      ", computed again ", report.rows_lost, ", moved ", FormatBytes(report.moved_bytes));
  if (report.residents > 0) {
    absl::StrAppend(&text, "; ", Counted(report.residents, "sequence"), " stood still for ",
                    Fixed(report.pause_min_ms, 1), " to ", Fixed(report.pause_max_ms, 1),
                    " ms, half of them at most ", Fixed(report.pause_p50_ms, 1), " ms");
  }
  return text;
}

}  // namespace strait::cli
