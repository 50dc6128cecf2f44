// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/verb_lines.h"

#include <cstdio>

#include "coordinator/http/json_writer.h"
#include "coordinator/text/detokenizer.h"

namespace strait {
namespace {

// Microseconds as milliseconds, all digits.
std::string Milliseconds(uint64_t us) {
  char text[32];
  std::snprintf(text, sizeof(text), "%llu.%03u", static_cast<unsigned long long>(us / 1000),
                static_cast<unsigned>(us % 1000));
  return text;
}

void WriteReason(const PlanReason& why, JsonWriter* json) {
  json->BeginObject().Key("num_plans").Int(why.num_plans);
  json->Key("bottleneck_bytes").Int(why.bottleneck_bytes);
  json->Key("best_bottleneck_bytes").Int(why.best_bottleneck_bytes);
  json->Key("moved_bytes").Int(why.moved_bytes);
  json->Key("best_moved_bytes").Int(why.best_moved_bytes);
  json->Key("why").String(Utf8Lossy(why.text)).EndObject();
}

void WritePlans(const ScaleReport& report, JsonWriter* json) {
  json->Key("dry_run").Bool(true).Key("plans").BeginArray();
  for (const PlannedPipeline& planned : report.plans) {
    json->BeginObject().Key("pipeline").Int(planned.pipeline.value);
    json->Key("tokens_max").Int(planned.capacity_rows).Key("stages").BeginArray();
    for (const PlannedStage& stage : planned.stages) {
      json->BeginObject().Key("worker_id").Int(stage.worker.value);
      json->Key("worker").String(Utf8Lossy(stage.name));
      json->Key("layer_begin").Int(stage.layer_begin).Key("layer_end").Int(stage.layer_end);
      json->Key("cache_bytes").Int(stage.cache_bytes).Key("load_bytes").Int(stage.load_bytes);
      json->Key("rows_bytes").Int(stage.rows_bytes).EndObject();
    }
    json->EndArray().Key("plan");
    WriteReason(planned.why, json);
    json->EndObject();
  }
  json->EndArray();
}

void WriteOutcome(const ScaleOutcome& outcome, JsonWriter* json) {
  json->Key("pipelines").Int(outcome.pipelines);
  json->Key("pause_ms").Raw(Milliseconds(outcome.pause_us));
  json->Key("rows_kept").Int(outcome.rows_kept).Key("rows_lost").Int(outcome.rows_lost);
  json->Key("moved_bytes").Int(outcome.moved_bytes);
  const ResidentPauses& pauses = outcome.pauses;
  json->Key("residents").BeginObject().Key("count").Int(pauses.residents);
  json->Key("pause_min_ms").Raw(Milliseconds(pauses.min_us));
  json->Key("pause_p50_ms").Raw(Milliseconds(pauses.p50_us));
  json->Key("pause_max_ms").Raw(Milliseconds(pauses.max_us)).EndObject();
}

}  // namespace

std::string LineOf(const MoveReport& report, std::string_view event) {
  JsonWriter json;
  json.BeginObject().Key("event").String(event);
  json.Key("sequence").Int(report.sequence.value);
  json.Key("from").Int(report.from.value).Key("to").Int(report.to.value);
  json.Key("phase").String(Utf8Lossy(report.phase)).Key("rounds").Int(report.rounds);
  json.Key("rows").Int(report.rows).Key("rows_total").Int(report.rows_total);
  json.Key("moved_bytes").Int(report.moved_bytes);
  json.Key("shared_bytes").Int(report.shared_bytes);
  json.Key("nccl_bytes").Int(report.nccl_bytes);
  json.Key("recomputed_rows").Int(report.recomputed_rows);
  json.Key("pause_ms").Raw(Milliseconds(report.pause_us));
  json.Key("total_ms").Raw(Milliseconds(report.total_us)).EndObject();
  return json.Take() + "\n";
}

std::string LineOf(const DrainReport& report, std::string_view event) {
  JsonWriter json;
  json.BeginObject().Key("event").String(event);
  json.Key("worker_id").Int(report.worker.value).Key("worker").String(Utf8Lossy(report.name));
  json.Key("pipeline").Int(report.pipeline.value);
  json.Key("way").String(report.way).Key("phase").String(report.phase);
  json.Key("sequences_left").Int(report.sequences_left);
  json.Key("sequences_moved").Int(report.sequences_moved);
  json.Key("moved_bytes").Int(report.moved_bytes);
  json.Key("rows_kept").Int(report.rows_kept).Key("rows_lost").Int(report.rows_lost);
  json.Key("pause_ms").Raw(Milliseconds(report.pause_us));
  json.Key("total_ms").Raw(Milliseconds(report.total_us)).EndObject();
  return json.Take() + "\n";
}

std::string LineOf(const ScaleReport& report, std::string_view event) {
  JsonWriter json;
  json.BeginObject().Key("event").String(event).Key("stages").Int(report.num_stages);
  json.Key("pipelines_done").Int(report.pipelines_done);
  json.Key("pipelines_total").Int(report.pipelines_total);
  json.Key("pipeline").Int(report.pipeline.value).Key("phase").String(report.phase);
  json.Key("bytes_loaded").Int(report.bytes_loaded);
  json.Key("bytes_to_load").Int(report.bytes_to_load);
  json.Key("rows").Int(report.rows).Key("rows_total").Int(report.rows_total);
  json.Key("moved_bytes").Int(report.moved_bytes);
  json.Key("edges_up").Int(report.edges_up).Key("edges_total").Int(report.edges_total);
  json.Key("total_ms").Raw(Milliseconds(report.total_us)).EndObject();
  return json.Take() + "\n";
}

std::string OutcomeJson(const ScaleOutcome& outcome) {
  JsonWriter json;
  WriteOutcome(outcome, &json.BeginObject());
  json.EndObject();
  return json.Take();
}

std::string PlansJson(const ScaleReport& report) {
  JsonWriter json;
  WritePlans(report, &json.BeginObject());
  json.EndObject();
  return json.Take();
}

std::string ScaleEndLine(const std::optional<ScaleOutcome>& outcome, const ScaleReport& last) {
  JsonWriter json;
  json.BeginObject().Key("event").String("done").Key("stages").Int(last.num_stages);
  if (outcome) {
    WriteOutcome(*outcome, &json);
  } else {
    WritePlans(last, &json);
  }
  json.Key("total_ms").Raw(Milliseconds(last.total_us)).EndObject();
  return json.Take() + "\n";
}

}  // namespace strait
