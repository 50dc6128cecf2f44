// SPDX-License-Identifier: Apache-2.0
//
// `strait scale`: every pipeline gets another number of stages while it serves.
#include <memory>

#include "coordinator/cli/commands.h"
#include "coordinator/cli/scale_call.h"
#include "coordinator/cli/verb_run.h"
#include "proto/base/limits.h"

namespace strait::cli {
namespace {

struct ScaleFlags {
  OperatorFlags operator_flags;
  ScaleAsk ask;
};

int RunScale(const ScaleFlags& flags) {
  const ScaleAsk& ask = flags.ask;
  const auto call = [&](HttpClient& client, const auto& on_report) {
    return CallScale(client, ask, on_report);
  };
  const auto done = [&](const ScaleLine& report) { return DoneText(report, ask); };
  return RunVerb<ScaleLine>(flags.operator_flags, call,
                            {.noun = "scale", .after_error = "", .share = ShareDone, .done = done});
}

}  // namespace

void AddScale(CLI::App& app, Run* run) {
  auto flags = std::make_shared<ScaleFlags>();
  CLI::App* verb =
      app.add_subcommand("scale", "Give every pipeline another number of stages while it serves");
  verb->add_option("--stages", flags->ask.num_stages,
                   "Stages of each pipeline; a worker may have several")
      ->required()
      ->check(CLI::Range(1u, limits::kMaxStagesPerPipeline));
  verb->add_flag(
      "--dry-run", flags->ask.dry_run,
      "Only say which worker would get which layers, and what would be loaded and moved");
  verb->add_option("--timeout", flags->ask.timeout_s,
                   "Seconds to wait for the end; the change goes on")
      ->check(CLI::Range(0.1, 86'400.0))
      ->capture_default_str();
  AddOperatorFlags(*verb, &flags->operator_flags);
  verb->callback([=] { *run = [flags] { return RunScale(*flags); }; });
}

}  // namespace strait::cli
