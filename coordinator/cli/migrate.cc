// SPDX-License-Identifier: Apache-2.0
//
// `strait migrate`: a running sequence goes to another pipeline with its cache.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/move_call.h"

namespace strait::cli {
namespace {

struct MigrateFlags {
  OperatorFlags operator_flags;
  MoveRequest request;
};

int RunMigrate(const MigrateFlags& flags) {
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  absl::StatusOr<std::unique_ptr<HttpClient>> client =
      OperatorClient(flags.operator_flags, signals->fd());
  if (!client.ok()) return Fail(client.status());
  Terminal terminal;
  const auto show = [&](const MoveLine& report) {
    const double share = report.rows_total > 0 ? static_cast<double>(report.rows) /
                                                     static_cast<double>(report.rows_total)
                                               : -1;
    terminal.Progress(ProgressText(report), share);
  };
  const absl::StatusOr<MoveOutcome> outcome = CallMigrate(**client, flags.request, show);
  terminal.EndProgress();
  if (absl::IsCancelled(outcome.status())) {
    std::fprintf(
        stderr, "strait: detached; if the move had begun it goes on, and strait status shows it\n");
    return kExitCancelled;
  }
  if (!outcome.ok()) return Fail(outcome.status(), (*client)->url().Text());
  if (!outcome->done) {
    const MoveLine& last = outcome->last;
    return Fail(absl::InternalError(last.event.empty()
                                        ? outcome->message
                                        : absl::StrCat(outcome->message, " (", ProgressText(last),
                                                       "; it goes on where it was)")));
  }
  std::printf("%s\n", DoneText(outcome->last, flags.request.dry_run).c_str());
  return 0;
}

}  // namespace

void AddMigrate(CLI::App& app, Run* run) {
  auto flags = std::make_shared<MigrateFlags>();
  MoveRequest& request = flags->request;
  CLI::App* verb =
      app.add_subcommand("migrate", "Move a running sequence to another pipeline, with its cache");
  verb->add_option("sequence", request.sequence,
                   "A sequence's id or its request's, as strait status shows them: 12, cmpl-…, or "
                   "cmpl-…/1 where a request has several")
      ->required();
  verb->add_option("--to", request.to, "The pipeline")->required()->check(CLI::PositiveNumber);
  verb->add_flag("--dry-run", request.dry_run, "Only say whether it could be");
  verb->add_option(
          "--timeout", request.timeout_s,
          "Seconds after which the move is given up; the sequence then goes on where it was")
      ->check(CLI::Range(0.001, 86'400.0))
      ->capture_default_str();
  verb->add_flag("--force-numerics", request.force_numerics,
                 "Also to a pipeline that computes otherwise: tokens may change from there on");
  AddOperatorFlags(*verb, &flags->operator_flags);
  verb->callback([=] { *run = [flags] { return RunMigrate(*flags); }; });
}

}  // namespace strait::cli
