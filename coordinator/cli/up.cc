// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"

namespace strait::cli {
namespace {

int RunUp(const LocalClusterOptions& options) {
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  Terminal terminal;
  auto cluster = LocalCluster::Start(options, &terminal, &*signals);
  if (!cluster.ok()) return Fail(cluster.status());

  absl::Status status = (*cluster)->WaitReady();
  if (status.ok()) {
    std::printf("ready: %s (OpenAI API, model %s; workers join at %s; Ctrl-C stops)\n",
                (*cluster)->http_url().c_str(), options.model.c_str(),
                (*cluster)->grpc_address().c_str());
    std::fflush(stdout);
    status = (*cluster)->Supervise(-1);
  }
  // Asked to stop: that is how `up` ends well.
  const bool asked = absl::IsCancelled(status);
  terminal.Say(asked ? absl::StrCat("Stopping (", std::string(status.message()), ").")
                     : std::string("Stopping."));
  (*cluster)->Stop();
  return asked ? 0 : Fail(status);
}

}  // namespace

void AddUp(CLI::App& app, Run* run) {
  auto options = std::make_shared<LocalClusterOptions>();
  CLI::App* verb = app.add_subcommand(
      "up", "Start a coordinator and workers on this machine; stay until Ctrl-C or SIGTERM");
  verb->add_option("--model", options->model, "Hugging Face checkpoint folder")
      ->envname("STRAIT_MODEL")
      ->required();
  verb->add_option(
          "--api-key", options->api_keys,
          "Key that clients must send as bearer token; may be repeated. In the environment "
          "(one a line) it is not seen by who lists processes")
      ->envname("STRAIT_API_KEY")
      ->delimiter('\n')
      ->allow_extra_args(false);
  AddOperatorKeyFlag(*verb, &options->operator_key_file);
  AddClusterFlags(*verb, options.get());
  verb->callback([=] { *run = [options] { return RunUp(*options); }; });
}

}  // namespace strait::cli
