// SPDX-License-Identifier: Apache-2.0
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr int kTimeoutMs = 5'000;
constexpr size_t kMaxSequencesShown = 20;

struct StatusFlags {
  ServerFlags server;
  bool watch = false;
  double interval_s = 1;
  bool json = false;
};

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

std::string Describe(const json::Object& status) {
  std::vector<std::vector<std::string>> rows = {{"worker", "name", "process", "backend", "threads",
                                                 "memory", "resident", "pipeline", "stage",
                                                 "layers", "state", "cache"}};
  for (const json::Object* worker : Objects(status, "workers")) {
    std::vector<std::string> common = {Cell(*worker, "id"),
                                       Cell(*worker, "name"),
                                       Cell(*worker, "process_id"),
                                       Cell(*worker, "backend"),
                                       Cell(*worker, "num_threads"),
                                       BytesCell(*worker, "memory_bytes"),
                                       BytesCell(*worker, "resident_bytes")};
    const auto stages = Objects(*worker, "stages");
    if (stages.empty()) {
      auto row = common;
      row.insert(row.end(), {"-", "-", "-", "spare", "-"});
      rows.push_back(std::move(row));
    }
    for (const json::Object* stage : stages) {
      auto row = common;
      std::string state = Cell(*stage, "state");
      if (state == "loading") {
        absl::StrAppend(&state, " ",
                        Percent(Number(*stage, "bytes_loaded"), Number(*stage, "bytes_total")));
      }
      row.insert(row.end(), {Cell(*stage, "pipeline_id"), Cell(*stage, "stage_index"),
                             absl::StrCat(Cell(*stage, "layer_begin"), "-",
                                          static_cast<int64_t>(Number(*stage, "layer_end")) - 1),
                             state, UseCell(*stage, "cache_bytes_used", "cache_bytes_total")});
      rows.push_back(std::move(row));
      for (std::string& cell : common) cell.clear();  // a worker's own facts once
    }
  }
  std::string text = rows.size() > 1 ? FormatTable(rows) : "No workers have joined.\n";

  rows = {{"pipeline", "state", "epoch", "stages", "running"}};
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    std::string epoch = Cell(*pipeline, "epoch");
    if (const json::Value* e = json::Find(*pipeline, "epoch"); e && e->is_object()) {
      epoch = absl::StrCat(Cell(e->get_object(), "term"), ".", Cell(e->get_object(), "counter"));
    }
    rows.push_back({Cell(*pipeline, "id"), Cell(*pipeline, "state"), epoch,
                    Cell(*pipeline, "num_stages"), Cell(*pipeline, "running")});
  }
  absl::StrAppend(&text, "\n", rows.size() > 1 ? FormatTable(rows) : "No pipeline is formed.\n");
  rows = {{"pipeline", "edge", "transport", "why"}};
  for (const json::Object* pipeline : Objects(status, "pipelines")) {
    for (const json::Object* stage : Objects(*pipeline, "stages")) {
      const json::Value* edge = json::Find(*stage, "edge");
      if (edge == nullptr || !edge->is_object()) continue;
      const auto to = static_cast<int64_t>(Number(*stage, "stage_index"));
      rows.push_back({Cell(*pipeline, "id"), absl::StrCat(to - 1, " to ", to),
                      Cell(edge->get_object(), "transport"), Cell(edge->get_object(), "why")});
    }
  }
  if (rows.size() > 1) absl::StrAppend(&text, "\n", FormatTable(rows));
  if (json::Find(status, "problem"))
    absl::StrAppend(&text, "\nnot serving: ", Cell(status, "problem"), "\n");
  for (const auto& [list, what] :
       {std::pair("workers", "worker"), std::pair("pipelines", "pipeline")}) {
    for (const json::Object* holder : Objects(status, list)) {
      if (!json::Find(*holder, "last_error")) continue;
      absl::StrAppend(&text, "\n", what, " ", Cell(*holder, "id"),
                      ", last error: ", Cell(*holder, "last_error"), "\n");
    }
  }
  absl::StrAppend(&text, "\nsequences: ", Cell(status, "running"), " running, ",
                  Cell(status, "waiting"), " waiting\n");

  const auto sequences = Objects(status, "sequences");
  if (!sequences.empty()) {
    rows = {{"sequence", "pipeline", "state", "prompt", "generated", "rows"}};
    for (const json::Object* sequence : sequences) {
      if (rows.size() > kMaxSequencesShown) break;
      rows.push_back({Cell(*sequence, "id"), Cell(*sequence, "pipeline_id"),
                      Cell(*sequence, "state"), Cell(*sequence, "prompt_tokens"),
                      Cell(*sequence, "generated_tokens"), Cell(*sequence, "rows")});
    }
    absl::StrAppend(&text, "\n", FormatTable(rows));
    if (sequences.size() > kMaxSequencesShown) {
      absl::StrAppend(&text, "… and ", sequences.size() - kMaxSequencesShown, " more\n");
    }
  }
  if (const json::Value* stats = json::Find(status, "stats"); stats && stats->is_object()) {
    const json::Object& s = stats->get_object();
    absl::StrAppend(
        &text, "tokens: ", Cell(s, "prompt_tokens"), " prompt, ", Cell(s, "generated_tokens"),
        " generated, ", Cell(s, "replayed_tokens"), " replayed; steps: ", Cell(s, "steps"),
        "; preemptions: ", Cell(s, "preemptions"), "; workers lost: ", Cell(s, "workers_lost"),
        "; recoveries: ", Cell(s, "recoveries"), "\n");
  }
  return text;
}

absl::StatusOr<std::string> Fetch(HttpClient& client, bool as_json) {
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply, client.Get("/strait/status", kTimeoutMs));
  if (reply.status == 404) {
    return absl::NotFoundError(
        absl::StrCat(client.url().Text(), " has no /strait/status: is it a Strait coordinator?"));
  }
  if (reply.status != 200) return absl::InternalError(reply.ErrorText());
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(reply.body, "/strait/status"));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* status, json::AsObject(value, "/strait/status"));
  if (!as_json) return Describe(*status);
  return reply.body.ends_with('\n') ? reply.body : reply.body + "\n";
}

int RunStatus(const StatusFlags& flags) {
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  const absl::StatusOr<Url> url = ParseUrl(flags.server.url);
  if (!url.ok()) return Fail(url.status());
  HttpClient client(*url, flags.server.api_key, signals->fd());
  const bool redraw = flags.watch && !flags.json && isatty(STDOUT_FILENO) == 1;
  for (;;) {
    absl::StatusOr<std::string> text = Fetch(client, flags.json);
    if (!text.ok()) {
      // A watch outlives a coordinator's restart.
      if (!flags.watch || !absl::IsUnavailable(text.status()))
        return Fail(text.status(), url->Text());
      text = absl::StrCat(std::string(text.status().message()), "\n");
    }
    if (redraw) std::printf("\033[H\033[2J");
    std::fputs(text->c_str(), stdout);
    std::fflush(stdout);
    if (!flags.watch) return 0;
    pollfd fd = {signals->fd(), POLLIN, 0};
    poll(&fd, 1, static_cast<int>(flags.interval_s * 1000));
    if (signals->Take()) return 0;
    if (!redraw && !flags.json) std::printf("\n");
  }
}

}  // namespace

void AddStatus(CLI::App& app, Run* run) {
  auto flags = std::make_shared<StatusFlags>();
  CLI::App* verb =
      app.add_subcommand("status", "Show workers, layer ranges, pipelines, cache, sequences");
  AddServerFlags(*verb, &flags->server);
  verb->add_flag("--watch", flags->watch, "Again and again, until Ctrl-C");
  verb->add_option("--interval", flags->interval_s, "Seconds between two looks")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  verb->add_flag("--json", flags->json, "The JSON of GET /strait/status as it is");
  verb->callback([=] { *run = [flags] { return RunStatus(*flags); }; });
}

}  // namespace strait::cli
