// SPDX-License-Identifier: Apache-2.0
//
// `strait drain`: a worker's sequences go elsewhere with their caches; then it has no stage and gets none.
#include <memory>

#include "coordinator/cli/commands.h"
#include "coordinator/cli/drain_call.h"
#include "coordinator/cli/verb_run.h"

namespace strait::cli {
namespace {

struct DrainFlags {
  OperatorFlags operator_flags;
  DrainRequest request;
};

int RunDrain(const DrainFlags& flags) {
  const DrainRequest& request = flags.request;
  const auto call = [&](HttpClient& client, const auto& on_report) {
    return CallDrain(client, request, on_report);
  };
  const auto share = [](const DrainLine& report) {
    const auto all = static_cast<double>(report.sequences_moved + report.sequences_left);
    return report.way == "move" && all > 0 ? static_cast<double>(report.sequences_moved) / all : -1;
  };
  const auto done = [&](const DrainLine& report) { return DoneText(report, request); };
  return RunVerb<DrainLine>(flags.operator_flags, call,
                            {.noun = "drain", .after_error = "", .share = share, .done = done});
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
