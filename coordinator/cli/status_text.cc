// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/status_text.h"

#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/terminal.h"

namespace strait::cli {
namespace {

constexpr size_t kMaxSequencesShown = 20;

// ---- Members as table cells; "-" for what this server does not tell ----

std::string Cell(const json::Object& object, std::string_view key) {
  const json::Value* value = json::Find(object, key);
  if (!value) return "-";
  if (value->is_string()) return std::string(json::View(value->get_string()));
  return boost::json::serialize(*value);
}

std::string BytesCell(const json::Object& object, std::string_view key) {
  return json::Find(object, key) ? FormatBytes(Number(object, key)) : "-";
}

// "3 MiB / 128 MiB (2 %)"
std::string UseCell(const json::Object& object, std::string_view used, std::string_view total) {
  if (!json::Find(object, total)) return "-";
  const double all = Number(object, total);
  return absl::StrCat(BytesCell(object, used), " / ", BytesCell(object, total), " (",
                      all > 0 ? static_cast<int>(100 * Number(object, used) / all) : 0, " %)");
}

std::string Percent(double part, double whole) {
  return absl::StrCat(whole > 0 ? static_cast<int>(100 * part / whole) : 0, " %");
}

std::string Layers(const json::Object& stage) {
  return absl::StrCat(Cell(stage, "layer_begin"), "-",
                      static_cast<int64_t>(Number(stage, "layer_end")) - 1);
}

// "loading 40 %"
std::string StateCell(const json::Object& stage) {
  std::string state = Cell(stage, "state");
  if (state == "loading") {
    absl::StrAppend(&state, " ",
                    Percent(Number(stage, "bytes_loaded"), Number(stage, "bytes_total")));
  }
  return state;
}

using Rows = std::vector<std::vector<std::string>>;

std::string Workers(const json::Object& status) {
  Rows rows = {{"worker", "name", "process", "backend", "threads", "memory", "resident", "pipeline",
                "stage", "layers", "state", "cache"}};
  for (const json::Object* worker : Objects(status, "workers")) {
    std::vector<std::string> common = {Cell(*worker, "id"),
                                       Cell(*worker, "name"),
                                       Cell(*worker, "process_id"),
                                       Cell(*worker, "backend"),
                                       Cell(*worker, "num_threads"),
                                       BytesCell(*worker, "memory_bytes"),
                                       BytesCell(*worker, "resident_bytes")};
    const auto stages = Objects(*worker, "stages");
    const auto warm = Objects(*worker, "warm");
    if (stages.empty() && warm.empty()) {
      auto row = common;
      row.insert(row.end(), {"-", "-", "-", "spare", "-"});
      rows.push_back(std::move(row));
    }
    for (const json::Object* range : warm) {
      auto row = common;
      row.insert(row.end(),
                 {"-", "-", Layers(*range), absl::StrCat("spare, ", StateCell(*range)), "-"});
      rows.push_back(std::move(row));
      for (std::string& cell : common) cell.clear();
    }
    for (const json::Object* stage : stages) {
      auto row = common;
      row.insert(row.end(),
                 {Cell(*stage, "pipeline_id"), Cell(*stage, "stage_index"), Layers(*stage),
                  StateCell(*stage), UseCell(*stage, "cache_bytes_used", "cache_bytes_total")});
      rows.push_back(std::move(row));
      for (std::string& cell : common) cell.clear();  // a worker's own facts once
    }
  }
  return rows.size() > 1 ? FormatTable(rows) : "No workers have joined.\n";
}

std::string Pipelines(const json::Object& status) {
  Rows rows = {{"pipeline", "state", "epoch", "stages", "running"}};
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    std::string epoch = Cell(*pipeline, "epoch");
    if (const json::Value* e = json::Find(*pipeline, "epoch"); e && e->is_object()) {
      epoch = absl::StrCat(Cell(e->get_object(), "term"), ".", Cell(e->get_object(), "counter"));
    }
    rows.push_back({Cell(*pipeline, "id"), Cell(*pipeline, "state"), epoch,
                    Cell(*pipeline, "num_stages"), Cell(*pipeline, "running")});
  }
  return rows.size() > 1 ? FormatTable(rows) : "No pipeline is formed.\n";
}

std::string Edges(const json::Object& status) {
  Rows rows = {{"pipeline", "edge", "transport", "why"}};
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    for (const json::Object* stage : Objects(*pipeline, "stages")) {
      const json::Value* edge = json::Find(*stage, "edge");
      if (edge == nullptr || !edge->is_object()) continue;
      const auto to = static_cast<int64_t>(Number(*stage, "stage_index"));
      rows.push_back({Cell(*pipeline, "id"), absl::StrCat(to - 1, " to ", to),
                      Cell(edge->get_object(), "transport"), Cell(edge->get_object(), "why")});
    }
  }
  return rows.size() > 1 ? "\n" + FormatTable(rows) : "";
}

std::string Plans(const json::Object& status) {
  Rows rows = {{"pipeline", "heaviest stage", "of the best", "plans", "why these layers"}};
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    const json::Value* plan = json::Find(*pipeline, "plan");
    if (plan == nullptr || !plan->is_object()) continue;
    const json::Object& p = plan->get_object();
    rows.push_back({Cell(*pipeline, "id"), BytesCell(p, "bottleneck_bytes"),
                    BytesCell(p, "best_bottleneck_bytes"), Cell(p, "num_plans"), Cell(p, "why")});
  }
  return rows.size() > 1 ? "\n" + FormatTable(rows) : "";
}

std::string ScaleUnderWay(const json::Object& status) {
  const json::Value* scale = json::Find(status, "scale");
  if (scale == nullptr || !scale->is_object()) return "";
  const json::Object& s = scale->get_object();
  return absl::StrCat("\nscale to ", Cell(s, "stages"), " stages: ", Cell(s, "pipelines_done"),
                      " of ", Cell(s, "pipelines_total"), " pipelines done, pipeline ",
                      Cell(s, "pipeline"), " ", Cell(s, "phase"), ", ", Cell(s, "rows"), " of ",
                      Cell(s, "rows_total"), " rows, ", BytesCell(s, "moved_bytes"), " moved, ",
                      Cell(s, "edges_up"), " of ", Cell(s, "edges_total"), " edges, ",
                      FormatNumber(Number(s, "total_ms") / 1000), " s\n");
}

std::string Troubles(const json::Object& status) {
  std::string text;
  if (json::Find(status, "problem")) {
    absl::StrAppend(&text, "\nnot serving: ", Cell(status, "problem"), "\n");
  }
  for (const auto& [list, what] :
       {std::pair("workers", "worker"), std::pair("pipelines", "pipeline")}) {
    for (const json::Object* holder : Objects(status, list)) {
      if (!json::Find(*holder, "last_error")) continue;
      absl::StrAppend(&text, "\n", what, " ", Cell(*holder, "id"),
                      ", last error: ", Cell(*holder, "last_error"), "\n");
    }
  }
  return text;
}

std::string Sequences(const json::Object& status) {
  const auto sequences = Objects(status, "sequences");
  if (sequences.empty()) return "";
  std::map<std::string, int> choices;  // of each request that is listed
  for (const json::Object* sequence : sequences) ++choices[Text(*sequence, "request")];
  Rows rows = {{"sequence", "request", "pipeline", "state", "prompt", "generated", "rows"}};
  for (const json::Object* sequence : sequences) {
    if (rows.size() > kMaxSequencesShown) break;
    std::string request = Cell(*sequence, "request");
    // As strait migrate takes it.
    if (choices[Text(*sequence, "request")] > 1 || Number(*sequence, "choice") > 0) {
      absl::StrAppend(&request, "/", Cell(*sequence, "choice"));
    }
    rows.push_back({Cell(*sequence, "id"), std::move(request), Cell(*sequence, "pipeline_id"),
                    Cell(*sequence, "state"), Cell(*sequence, "prompt_tokens"),
                    Cell(*sequence, "generated_tokens"), Cell(*sequence, "rows")});
  }
  std::string text = absl::StrCat("\n", FormatTable(rows));
  if (sequences.size() > kMaxSequencesShown) {
    absl::StrAppend(&text, "… and ", sequences.size() - kMaxSequencesShown, " more\n");
  }
  return text;
}

std::string Moves(const json::Object& status) {
  Rows rows = {{"move of", "from", "to", "phase", "rows", "moved", "rounds", "seconds"}};
  for (const json::Object* move : Objects(status, "migrations")) {
    rows.push_back({Cell(*move, "sequence"), Cell(*move, "from"), Cell(*move, "to"),
                    Cell(*move, "phase"),
                    absl::StrCat(Cell(*move, "rows"), " / ", Cell(*move, "rows_total")),
                    BytesCell(*move, "moved_bytes"), Cell(*move, "rounds"),
                    FormatNumber(Number(*move, "total_ms") / 1000)});
  }
  return rows.size() > 1 ? "\n" + FormatTable(rows) : "";
}

std::string Stats(const json::Object& status) {
  const json::Value* stats = json::Find(status, "stats");
  if (stats == nullptr || !stats->is_object()) return "";
  const json::Object& s = stats->get_object();
  return absl::StrCat(
      "tokens: ", Cell(s, "prompt_tokens"), " prompt, ", Cell(s, "generated_tokens"),
      " generated, ", Cell(s, "replayed_tokens"), " replayed; steps: ", Cell(s, "steps"),
      "; preemptions: ", Cell(s, "preemptions"), "; workers lost: ", Cell(s, "workers_lost"),
      "; recoveries: ", Cell(s, "recoveries"), "\n");
}

}  // namespace

std::string DescribeStatus(const json::Object& status) {
  return absl::StrCat(Workers(status), "\n", Pipelines(status), Edges(status), Plans(status),
                      Troubles(status), "\nsequences: ", Cell(status, "running"), " running, ",
                      Cell(status, "waiting"), " waiting\n", Sequences(status), Moves(status),
                      ScaleUnderWay(status), Stats(status));
}

}  // namespace strait::cli
