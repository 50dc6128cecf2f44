// SPDX-License-Identifier: Apache-2.0
//
// `strait migrate`: a running sequence goes to another pipeline with its cache.
#include <memory>

#include "coordinator/cli/commands.h"
#include "coordinator/cli/move_call.h"
#include "coordinator/cli/verb_run.h"

namespace strait::cli {
namespace {

struct MigrateFlags {
  OperatorFlags operator_flags;
  MoveRequest request;
};

int RunMigrate(const MigrateFlags& flags) {
  const MoveRequest& request = flags.request;
  const auto call = [&](HttpClient& client, const auto& on_report) {
    return CallMigrate(client, request, on_report);
  };
  const auto share = [](const MoveLine& report) {
    return report.rows_total > 0
               ? static_cast<double>(report.rows) / static_cast<double>(report.rows_total)
               : -1;
  };
  const auto done = [&](const MoveLine& report) { return DoneText(report, request.dry_run); };
  return RunVerb<MoveLine>(
      flags.operator_flags, call,
      {.noun = "move", .after_error = "; it goes on where it was", .share = share, .done = done});
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
