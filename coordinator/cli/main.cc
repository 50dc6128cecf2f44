// SPDX-License-Identifier: Apache-2.0
//
// `strait`: starts a cluster on this machine, and talks to one that runs.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/operator_access.h"
#include "proto/base/status_macros.h"
#include "proto/wire/version.h"

namespace strait::cli {

void AddServerFlags(CLI::App& verb, ServerFlags* flags) {
  verb.add_option(
          "--url,--coordinator", flags->url,
          "HTTP address of the coordinator (not its gRPC port, which STRAIT_COORDINATOR names for "
          "workers), or of any OpenAI-compatible server")
      ->envname("STRAIT_URL")
      ->capture_default_str();
  verb.add_option("--api-key", flags->api_key, "Sent as a bearer token")->envname("STRAIT_API_KEY");
}

void AddOperatorKeyFlag(CLI::App& verb, std::string* key_file) {
  verb.add_option(
          "--operator-key-file", *key_file,
          "File with the operator key, which opens what changes a cluster (default: that of "
          "strait up on this machine)")
      ->envname("STRAIT_OPERATOR_KEY_FILE");
}

void AddOperatorFlags(CLI::App& verb, OperatorFlags* flags) {
  AddServerFlags(verb, &flags->server);
  AddOperatorKeyFlag(verb, &flags->key_file);
}

absl::StatusOr<std::unique_ptr<HttpClient>> OperatorClient(const OperatorFlags& flags,
                                                           int cancel_fd) {
  STRAIT_ASSIGN_OR_RETURN(Url url, ParseUrl(flags.server.url));
  STRAIT_ASSIGN_OR_RETURN(std::string key, FindOperatorKey(url, flags.key_file));
  if (key.empty()) key = flags.server.api_key;
  return std::make_unique<HttpClient>(std::move(url), std::move(key), cancel_fd);
}

void AddClusterFlags(CLI::App& verb, LocalClusterOptions* options) {
  const std::string group = "Cluster";
  verb.add_option("--workers", options->num_workers,
                  "Worker processes: pipelines times stages (default: 2 a pipeline; with --backend "
                  "cuda one a GPU, and at least one a pipeline)")
      ->envname("STRAIT_WORKERS")
      ->check(CLI::Range(1u, 1024u))
      ->group(group);
  verb.add_option("--pipelines", options->num_pipelines, "Pipelines, each serving the whole model")
      ->envname("STRAIT_PIPELINES")
      ->check(CLI::Range(1u, 1024u))
      ->capture_default_str()
      ->group(group);
  verb.add_option("--spares", options->num_spares,
                  "More workers, without a stage until one dies or pipelines are scaled")
      ->envname("STRAIT_SPARES")
      ->check(CLI::Range(0u, 1024u))
      ->group(group);
  verb.add_option("--backend", options->backend, "Where workers compute: cpu, or cuda")
      ->envname("STRAIT_BACKEND")
      ->capture_default_str()
      ->group(group);
  verb.add_option("--gpu", options->gpus,
                  "With --backend cuda: the GPUs, as 0,1,2,3; workers are dealt over them in turn "
                  "(default: 0), and those on one GPU share its memory")
      ->envname("STRAIT_GPU")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->group(group);
  verb.add_option("--http", options->http,
                  "HOST:PORT of the HTTP API (default: 127.0.0.1:8000, or a free port)")
      ->envname("STRAIT_HTTP")
      ->group(group);
  verb.add_option("--grpc", options->grpc,
                  "HOST:PORT for the workers (default: 127.0.0.1:7000, or a free port)")
      ->envname("STRAIT_GRPC")
      ->group(group);
  verb.add_option("--random-weights", options->random_weights,
                  "Seed: fill weights at load instead of reading them")
      ->envname("STRAIT_RANDOM_WEIGHTS")
      ->group(group);
  verb.add_option("--threads", options->worker_threads,
                  "Threads of each worker (default: available cores shared out)")
      ->envname("STRAIT_THREADS")
      ->group(group);
  verb.add_option("--memory", options->worker_memory,
                  "Weights and cache of each worker, as 8GiB (default: free memory shared out)")
      ->envname("STRAIT_MEMORY")
      ->group(group);
  verb.add_option("--log-dir", options->log_dir,
                  "Folder for the daemons' logs (default: a new one under the temporary folder)")
      ->envname("STRAIT_LOG_DIR")
      ->group(group);
  // Known to the daemons alone, and handed on as they are.
  struct Passed {
    const char* name;
    bool to_coordinator, to_workers;
    const char* what;
  };
  static constexpr Passed kPassed[] = {
      {"--max-model-len", true, false, "Longest context served"},
      {"--max-step-tokens", true, true, "Rows of one step, all sequences together"},
      {"--prefill-chunk", true, false, "Rows of one sequence in one step"},
      {"--grant-depth", true, false, "Steps in flight that may sample for one sequence"},
      {"--max-running", true, false, "Sequences resident in one pipeline"},
      {"--max-waiting", true, false, "Sequences that may wait; beyond, requests are answered 429"},
      {"--request-timeout", true, false, "Seconds a request may take"},
      {"--heartbeat-timeout", true, false, "Seconds of silence after which a worker is given up"},
      {"--load-timeout", true, false,
       "Seconds without a byte more after which a worker that loads is given up"},
      {"--step-timeout", true, false,
       "Seconds after which a worker that sits on a step is given up"},
      {"--replay-timeout", true, false,
       "Seconds that a sequence goes on without a token while links fail"},
      {"--served-model-name", true, false, "Name of the model in the API (default: the folder's)"},
      {"--cache-format", true, true,
       "Row format of the latent cache: fp32, bf16; fp8 with --backend cuda"},
      {"--prefix-cache", true, false,
       "on, or off: sequences of the same first tokens share no cache rows"},
      {"--preempt", true, false, "auto, park or replay: what becomes of rows that make room"},
      {"--host-cache-bytes", false, true,
       "Host memory of each worker for rows that make room, as 8GiB (default: none)"},
      {"--replica-memory", false, true,
       "Host memory of each worker for copies of others' rows, as 8GiB (default: none)"},
      {"--warm-spares", true, false,
       "Spares, at most, that hold weights ready for the place of one that dies (default: none)"},
      {"--spare-wait", true, false,
       "Seconds that the place of a lost worker waits for one; then those left take it, with room"},
      {"--replicate-rate", true, false,
       "Gigabytes a second that one worker may fetch as copies of others' rows; 0: unbounded"},
      {"--restore-timeout", true, false,
       "Seconds that a stage fetches copies of rows before it begins"},
      {"--transport", false, true,
       "How hidden states travel: auto (NCCL between GPU workers, else gRPC), grpc or nccl"},
      {"--simd", false, true,
       "portable, avx2 or avx512 (default: the widest); all give the same bits"},
      {"--log-level", true, true, "Of the daemons' logs: debug, info, warning, error"},
  };
  for (const Passed& flag : kPassed) {
    const auto pass = [options, flag](const std::string& value) {
      for (auto* args : {flag.to_coordinator ? &options->coordinator_args : nullptr,
                         flag.to_workers ? &options->worker_args : nullptr}) {
        if (args != nullptr) args->insert(args->end(), {flag.name, value});
      }
    };
    verb.add_option_function<std::string>(flag.name, pass, flag.what)
        ->group("Passed on to the daemons");
  }
  verb.add_flag_function(
          "--deterministic",
          [options](int64_t) { options->worker_args.push_back("--deterministic"); },
          "A sequence's tokens depend on it alone, whatever is computed beside it (on the CPU "
          "always so)")
      ->group("Passed on to the daemons");
  verb.add_flag_function(
          "--fp8-activations",
          [options](int64_t) { options->worker_args.push_back("--fp8-activations"); },
          "Quantize activations to fp8 for products with fp8 weights, with --backend cuda")
      ->group("Passed on to the daemons");
  verb.add_flag_function(
          "--insecure",
          [options](int64_t) {
            options->coordinator_args.push_back("--insecure");
            options->worker_args.push_back("--insecure");
          },
          "Let --http and --grpc be reached from other machines, neither encrypted nor "
          "authenticated")
      ->group("Passed on to the daemons");
}

int Fail(const absl::Status& status, const std::string& url) {
  if (absl::IsCancelled(status)) {
    std::fprintf(stderr, "strait: cancelled\n");
    return kExitCancelled;
  }
  std::fprintf(stderr, "strait: %s\n", std::string(status.message()).c_str());
  if (absl::IsUnavailable(status) && !url.empty()) {
    std::fprintf(stderr,
                 "No server at %s? Start one with: strait up --model DIR\n"
                 "or name another with --url http://HOST:PORT (or STRAIT_URL).\n",
                 url.c_str());
  }
  return kExitFailed;
}

}  // namespace strait::cli

int main(int argc, char** argv) {
  CLI::App app("Strait: an inference cluster for DeepSeek-V2/V3 models", "strait");
  app.set_version_flag("--version", strait::kVersion);
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default(false);
  strait::cli::Run run;
  strait::cli::AddUp(app, &run);
  strait::cli::AddGenerate(app, &run);
  strait::cli::AddStatus(app, &run);
  strait::cli::AddMigrate(app, &run);
  strait::cli::AddDrain(app, &run);
  strait::cli::AddScale(app, &run);
  strait::cli::AddBench(app, &run);
  strait::cli::AddEval(app, &run);
  strait::cli::AddStress(app, &run);
  CLI11_PARSE(app, argc, argv);
  return run();
}
