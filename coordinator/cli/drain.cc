// SPDX-License-Identifier: Apache-2.0
//
// `strait drain`: a worker's sequences go elsewhere with their caches; then it has no stage and gets none.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/drain_call.h"

namespace strait::cli {
namespace {

struct DrainFlags {
  OperatorFlags operator_flags;
  DrainRequest request;
};

int RunDrain(const DrainFlags& flags) {
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  absl::StatusOr<std::unique_ptr<HttpClient>> client =
      OperatorClient(flags.operator_flags, signals->fd());
  if (!client.ok()) return Fail(client.status());
  Terminal terminal;
  const auto show = [&](const DrainLine& report) {
    const auto all = static_cast<double>(report.sequences_moved + report.sequences_left);
    terminal.Progress(ProgressText(report), report.way == "move" && all > 0
                                                ? static_cast<double>(report.sequences_moved) / all
                                                : -1);
  };
  const absl::StatusOr<DrainOutcome> outcome = CallDrain(**client, flags.request, show);
  terminal.EndProgress();
  if (absl::IsCancelled(outcome.status())) {
    std::fprintf(
        stderr,
        "strait: detached; if the drain had begun it goes on, and strait status shows it\n");
    return kExitCancelled;
  }
  if (!outcome.ok()) return Fail(outcome.status(), (*client)->url().Text());
  if (!outcome->done) {
    const DrainLine& last = outcome->last;
    return Fail(absl::InternalError(
        last.event.empty() ? outcome->message
                           : absl::StrCat(outcome->message, " (", ProgressText(last), ")")));
  }
  std::printf("%s\n", DoneText(outcome->last, flags.request).c_str());
  return 0;
}

}  // namespace

void AddDrain(CLI::App& app, Run* run) {
  auto flags = std::make_shared<DrainFlags>();
  DrainRequest& request = flags->request;
  CLI::App* verb = app.add_subcommand(
      "drain", "Free a worker of its stages while its sequences go on elsewhere");
  verb->add_option("worker", request.worker, "A worker's id or name, as strait status shows them")
      ->required();
  CLI::Option* undo = verb->add_flag("--undo", request.undo,
                                     "Instead: a worker that is drained, or drains, may have "
                                     "stages again");
  verb->add_flag("--dry-run", request.dry_run, "Only say which way it would be done")
      ->excludes(undo);
  verb->add_option("--timeout", request.timeout_s,
                   "Seconds after which the drain is given up; the worker then serves on")
      ->check(CLI::Range(0.001, 86'400.0))
      ->capture_default_str();
  AddOperatorFlags(*verb, &flags->operator_flags);
  verb->callback([=] { *run = [flags] { return RunDrain(*flags); }; });
}

}  // namespace strait::cli
