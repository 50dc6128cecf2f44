// SPDX-License-Identifier: Apache-2.0
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/status_text.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr int kTimeoutMs = 5'000;

struct StatusFlags {
  ServerFlags server;
  bool watch = false;
  double interval_s = 1;
  bool json = false;
};

absl::StatusOr<std::string> Fetch(HttpClient& client, bool as_json) {
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply, client.Get("/strait/status", kTimeoutMs));
  if (reply.status == 404) {
    return absl::NotFoundError(
        absl::StrCat(client.url().Text(), " has no /strait/status: is it a Strait coordinator?"));
  }
  if (reply.status != 200) return absl::InternalError(reply.ErrorText());
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(reply.body, "/strait/status"));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* status, json::AsObject(value, "/strait/status"));
  if (!as_json) return DescribeStatus(*status);
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
