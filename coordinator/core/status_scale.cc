// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/status_scale.h"

#include <string>
#include <utility>

namespace strait {

json::Object ReasonJson(const PlanReason& why) {
  json::Object out;
  out["num_plans"] = why.num_plans;
  out["bottleneck_bytes"] = why.bottleneck_bytes;
  out["best_bottleneck_bytes"] = why.best_bottleneck_bytes;
  out["moved_bytes"] = why.moved_bytes;
  out["best_moved_bytes"] = why.best_moved_bytes;
  out["why"] = why.text;
  return out;
}

json::Object ScaleJson(const ScaleReport& report) {
  json::Object out;
  out["stages"] = report.num_stages;
  out["pipelines_done"] = report.pipelines_done;
  out["pipelines_total"] = report.pipelines_total;
  out["pipeline"] = report.pipeline.value;
  out["phase"] = report.phase;
  out["bytes_loaded"] = report.bytes_loaded;
  out["bytes_to_load"] = report.bytes_to_load;
  out["rows"] = report.rows;
  out["rows_total"] = report.rows_total;
  out["moved_bytes"] = report.moved_bytes;
  out["edges_up"] = report.edges_up;
  out["edges_total"] = report.edges_total;
  out["total_ms"] = report.total_us / 1000;
  return out;
}

json::Object LastScaleJson(const ScaleEnded& ended) {
  json::Object out;
  out["stages"] = ended.num_stages;
  out["of_drain"] = ended.drains;
  if (!ended.status.ok()) out["error"] = std::string(ended.status.message());
  out["pipelines_done"] = ended.reply.pipelines();
  out["pause_us"] = ended.reply.pause_us();
  out["rows_kept"] = ended.reply.rows_kept();
  out["rows_lost"] = ended.reply.rows_lost();
  out["moved_bytes"] = ended.reply.moved_bytes();
  json::Object residents;
  residents["count"] = ended.reply.residents();
  residents["pause_min_us"] = ended.reply.resident_pause_min_us();
  residents["pause_p50_us"] = ended.reply.resident_pause_p50_us();
  residents["pause_max_us"] = ended.reply.resident_pause_max_us();
  json::Array longest;
  for (const auto& [id, pause_us] : ended.pauses_us) {
    json::Object one;
    one["sequence"] = id.value;
    one["pause_us"] = pause_us;
    longest.push_back(std::move(one));
  }
  residents["longest"] = std::move(longest);
  out["residents"] = std::move(residents);
  return out;
}

}  // namespace strait
