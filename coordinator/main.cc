// SPDX-License-Identifier: Apache-2.0
//
// strait-coordinator: serves the OpenAI API and decides what every worker does.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "coordinator/access/operator_key.h"
#include "coordinator/core/core.h"
#include "coordinator/http/openai.h"
#include "coordinator/http/server.h"
#include "coordinator/service/service.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/tokenizer.h"
#include "coordinator/text/tokenizer_config.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "proto/model/stage_memory.h"
#include "proto/rpc/address.h"
#include "proto/rpc/process.h"
#include "proto/wire/version.h"

namespace strait {
namespace {

namespace fs = std::filesystem;

struct Flags {
  std::string model;
  std::string grpc = "127.0.0.1:7000";
  std::string http = "127.0.0.1:8000";
  std::string served_model_name;
  std::string cache_format = "fp32";
  std::string prefix_cache = "on";
  std::string preempt = "auto";
  std::string ready_file;
  std::vector<std::string> api_keys;
  std::string operator_key_file;
  CoreOptions core;
  uint32_t max_model_len = 0;
  double request_timeout_s = 600;
  double heartbeat_timeout_s = 5;
  double stop_grace_s = 3;
  double no_pipeline_grace_s = 30;
  double load_timeout_s = 30;
  double step_timeout_s = 10;
  double replay_timeout_s = 120;
  double migrate_timeout_s = 300;
  double migrate_stall_s = 10;
  double migrate_pause_s = 2;
  double migrate_gb_per_s = 0;
  double replicate_gb_per_s = 0;
  double restore_timeout_s = 10;
  double spare_wait_s = 20;
  bool insecure = false;
  LogFlags log;
};

constexpr double kMaxSeconds = 1e7;
constexpr double kMaxFaultSeconds = 86'400;

ModelShape MakeShape(const ModelConfig& config, const Flags& flags) {
  ModelShape shape;
  shape.vocab_size = config.vocab_size;
  shape.max_positions = config.max_position_embeddings;
  if (flags.max_model_len > 0) {
    shape.max_positions = std::min(shape.max_positions, flags.max_model_len);
  }
  shape.eos_token_ids = config.eos_token_ids;
  for (LayerIndex layer = 0; layer < config.num_hidden_layers; ++layer) {
    shape.layer_weight_bytes.push_back(LayerWeightBytes(config, layer));
  }
  shape.embedding_bytes = EmbeddingBytes(config);
  shape.head_bytes = HeadBytes(config);
  shape.block_bytes = BlockBytes(RowFormatOf(flags.cache_format).value_or(RowFormat::kFp32),
                                 config.kv_lora_rank, config.qk_rope_head_dim);
  shape.workspace_bytes = WorkspaceSizes(config);
  shape.fingerprint = ModelFingerprint(config);
  return shape;
}

absl::StatusOr<ServedModel> LoadServedModel(const Flags& flags) {
  ServedModel model;
  const fs::path dir = fs::weakly_canonical(flags.model);
  model.name = flags.served_model_name.empty() ? dir.filename().string() : flags.served_model_name;
  model.root = flags.model;
  model.created = std::chrono::duration_cast<std::chrono::seconds>(
                      std::chrono::system_clock::now().time_since_epoch())
                      .count();
  if (!fs::exists(dir / "tokenizer.json")) {
    Log(LogLevel::kWarning, "no tokenizer.json: only prompts of token ids are served",
        {{"model", flags.model}});
    return model;
  }
  std::optional<TokenizerConfig> config;
  if (fs::exists(dir / "tokenizer_config.json")) {
    STRAIT_ASSIGN_OR_RETURN(config, TokenizerConfig::Load(dir / "tokenizer_config.json"));
  }
  STRAIT_ASSIGN_OR_RETURN(model.tokenizer,
                          Tokenizer::Load(dir / "tokenizer.json", config ? &*config : nullptr));
  if (config && !config->chat_templates.empty()) {
    auto chat = ChatTemplate::Load(*config);
    if (chat.ok()) {
      model.chat_template = std::move(*chat);
    } else {
      Log(LogLevel::kWarning, "the chat template cannot be used: completions only",
          {{"why", chat.status()}});
    }
  }
  return model;
}

// One JSON line that says where the servers listen. Written whole or not at all.
absl::Status WriteReadyFile(const std::string& path, const std::string& grpc,
                            const std::string& http) {
  if (path.empty()) return absl::OkStatus();
  const bool device = path.starts_with("/dev/");
  const std::string temporary = device ? path : path + ".tmp";
  {
    std::ofstream file(temporary);
    file << "{\"grpc\":\"" << grpc << "\",\"http\":\"" << http << "\",\"process_id\":" << getpid()
         << "}\n";
    file.flush();
    if (!file)
      return absl::UnavailableError(absl::StrCat("--ready-file ", path, " cannot be written"));
  }
  std::error_code error;
  if (!device) fs::rename(temporary, path, error);
  if (error)
    return absl::UnavailableError(absl::StrCat("--ready-file ", path, ": ", error.message()));
  return absl::OkStatus();
}

// Empty: none is wanted.
absl::StatusOr<std::string> LoadOperatorKey(const Flags& flags) {
  if (flags.operator_key_file.empty()) return "";
  STRAIT_ASSIGN_OR_RETURN(std::string key,
                          ReadOperatorKey(flags.operator_key_file, "--operator-key-file"));
  if (std::find(flags.api_keys.begin(), flags.api_keys.end(), key) != flags.api_keys.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--operator-key-file ", flags.operator_key_file,
                     " has a key that is an --api-key, too: then every client could change the "
                     "cluster. Make another one"));
  }
  return key;
}

absl::Status Run(Flags flags) {
  StopSignals signals;
  STRAIT_ASSIGN_OR_RETURN(rpc::HostPort grpc,
                          rpc::ParseListenAddress(flags.grpc, "--grpc", flags.insecure));
  STRAIT_ASSIGN_OR_RETURN(rpc::HostPort http,
                          rpc::ParseListenAddress(flags.http, "--http", flags.insecure));
  STRAIT_ASSIGN_OR_RETURN(std::string operator_key, LoadOperatorKey(flags));
  STRAIT_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model));
  STRAIT_ASSIGN_OR_RETURN(ServedModel served, LoadServedModel(flags));
  if (served.tokenizer && served.tokenizer->vocab_size() > config.vocab_size) {
    Log(LogLevel::kWarning, "the tokenizer has ids that the model does not have",
        {{"tokenizer", served.tokenizer->vocab_size()}, {"model", config.vocab_size}});
  }

  flags.core.prefix_cache = flags.prefix_cache == "on";
  flags.core.preempt = flags.preempt == "park"     ? PreemptMode::kPark
                       : flags.preempt == "replay" ? PreemptMode::kReplay
                                                   : PreemptMode::kAuto;
  flags.core.request_timeout_us = static_cast<uint64_t>(flags.request_timeout_s * 1e6);
  flags.core.heartbeat_timeout_us = static_cast<uint64_t>(flags.heartbeat_timeout_s * 1e6);
  flags.core.no_pipeline_grace_us = static_cast<uint64_t>(flags.no_pipeline_grace_s * 1e6);
  flags.core.load_timeout_us = static_cast<uint64_t>(flags.load_timeout_s * 1e6);
  flags.core.step_timeout_us = static_cast<uint64_t>(flags.step_timeout_s * 1e6);
  flags.core.replay_timeout_us = static_cast<uint64_t>(flags.replay_timeout_s * 1e6);
  flags.core.migrate_timeout_us = static_cast<uint64_t>(flags.migrate_timeout_s * 1e6);
  flags.core.migrate_stall_us = static_cast<uint64_t>(flags.migrate_stall_s * 1e6);
  flags.core.migrate_pause_us = static_cast<uint64_t>(flags.migrate_pause_s * 1e6);
  flags.core.migrate_bytes_per_s = static_cast<uint64_t>(flags.migrate_gb_per_s * 1e9);
  flags.core.replicate_bytes_per_s = static_cast<uint64_t>(flags.replicate_gb_per_s * 1e9);
  flags.core.restore_timeout_us = static_cast<uint64_t>(flags.restore_timeout_s * 1e6);
  flags.core.spare_wait_us = static_cast<uint64_t>(flags.spare_wait_s * 1e6);
  // A coordinator that takes over must have a higher term: the time serves, until one is stored. In
  // microseconds, so that two starts within a second differ.
  flags.core.term = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                              std::chrono::system_clock::now().time_since_epoch())
                                              .count());
  std::random_device random;
  flags.core.edge_secret = uint64_t{random()} << 32 | random();
  CoordinatorOptions options;
  options.core = flags.core;
  options.model = MakeShape(config, flags);
  options.attach.listen_address = flags.grpc;
  STRAIT_ASSIGN_OR_RETURN(auto service, CoordinatorService::Create(std::move(options)));

  auto handler =
      std::make_shared<OpenAiHandler>(OpenAiOptions{.model = std::move(served),
                                                    .api_keys = flags.api_keys,
                                                    .operator_key = std::move(operator_key)},
                                      service.get());
  HttpServer server(HttpServerOptions(), handler);
  if (absl::Status listening = server.Listen(http.host, http.port); !listening.ok()) {
    return absl::Status(listening.code(), absl::StrCat("--http: ", listening.message()));
  }
  grpc.port = static_cast<uint16_t>(service->grpc_port());
  http.port = server.port();
  Log(LogLevel::kInfo, "coordinator started",
      {{"model", flags.model},
       {"grpc", grpc.ToString()},
       {"http", http.ToString()},
       {"pipelines", flags.core.num_pipelines},
       {"stages", flags.core.num_stages}});
  STRAIT_RETURN_IF_ERROR(WriteReadyFile(flags.ready_file, grpc.ToString(), http.ToString()));

  std::promise<void> stop;
  signals.Watch([&stop] { stop.set_value(); });
  stop.get_future().wait();
  signals.Forget();
  Log(LogLevel::kInfo, "stopping");
  handler->SetDraining(true);
  server.Stop(std::chrono::milliseconds(static_cast<int64_t>(flags.stop_grace_s * 1000)));
  service->Stop();
  Log(LogLevel::kInfo, "coordinator stopped");
  return absl::OkStatus();
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  using namespace strait;
  QuietGrpc();
  Flags flags;
  CLI::App app(
      "strait-coordinator serves the OpenAI API and spreads a model over the workers that attach "
      "to it.\n"
      "Every flag is also an environment variable, as shown in brackets.",
      "strait-coordinator");
  app.set_version_flag("--version", kVersion);
  AddFlag(app, "--model", flags.model, "Model directory: config.json and tokenizer")
      ->required()
      ->check(CLI::ExistingDirectory);
  AddFlag(
      app, "--grpc", flags.grpc,
      "Where workers attach; port 0 takes a free one. Another address than a loopback one needs "
      "--insecure");
  AddFlag(app, "--http", flags.http, "Where clients find the API; as --grpc");
  AddFlag(app, "--pipelines", flags.core.num_pipelines, "Pipelines wanted")
      ->check(CLI::PositiveNumber);
  AddFlag(app, "--stages", flags.core.num_stages, "Stages of each pipeline, one worker each")
      ->check(CLI::PositiveNumber);
  AddFlag(app, "--max-step-tokens", flags.core.max_step_tokens,
          "Rows of one step, all sequences together");
  AddFlag(app, "--prefill-chunk", flags.core.prefill_chunk, "Rows of one sequence in one step");
  AddFlag(app, "--grant-depth", flags.core.grant_depth,
          "Steps in flight that may sample for one sequence; 1: the next is planned when its token "
          "is back");
  AddFlag(app, "--prefix-cache", flags.prefix_cache,
          "on: sequences of the same first tokens, and of the same cache_salt or API key, share "
          "their cache rows; off")
      ->check(CLI::IsMember({"on", "off"}));
  AddFlag(app, "--preempt", flags.preempt,
          "What becomes of cache rows that must make room, where workers have --host-cache-bytes: "
          "park: they go to host memory and come back; replay: they are computed again; auto: what "
          "is faster, as measured")
      ->check(CLI::IsMember({"auto", "park", "replay"}));
  AddFlag(app, "--max-running", flags.core.max_running, "Sequences resident in one pipeline");
  AddFlag(app, "--max-waiting", flags.core.max_waiting,
          "Sequences that may wait; beyond, requests are answered 429");
  AddFlag(app, "--max-model-len", flags.max_model_len,
          "Longest context served; 0: what the model has");
  AddFlag(
      app, "--cache-format", flags.cache_format,
      "Row format of the workers' latent caches, which start with the same: fp32 is CPU workers' "
      "default, bf16 GPU workers'; fp8 GPU workers alone have")
      ->check(CLI::IsMember({"fp32", "bf16", "fp8"}));
  AddFlag(app, "--api-key", flags.api_keys,
          "Key that clients must send as bearer token; may be repeated, in the environment one a "
          "line. Who lists processes sees a command line, not an environment")
      ->delimiter('\n');
  AddFlag(
      app, "--operator-key-file", flags.operator_key_file,
      "File with the key that opens what changes the cluster while it runs (migrate, scale), as "
      "bearer token; nobody but its owner may read it (mode 0600). Without one these are refused");
  AddFlag(app, "--served-model-name", flags.served_model_name,
          "Name of the model in the API; default: the directory's name");
  AddFlag(app, "--request-timeout", flags.request_timeout_s, "Seconds a request may take")
      ->check(CLI::Range(0.001, kMaxSeconds));
  AddFlag(app, "--heartbeat-timeout", flags.heartbeat_timeout_s,
          "Seconds of silence after which a worker is given up")
      ->check(CLI::Range(0.1, kMaxSeconds));
  AddFlag(app, "--no-pipeline-grace", flags.no_pipeline_grace_s,
          "Seconds that requests wait for a lost pipeline to come back; then they are answered 503")
      ->check(CLI::Range(0.0, kMaxSeconds));
  AddFlag(app, "--load-timeout", flags.load_timeout_s,
          "Seconds without a byte more after which a worker that loads is given up")
      ->check(CLI::Range(0.1, kMaxFaultSeconds));
  AddFlag(
      app, "--step-timeout", flags.step_timeout_s,
      "Seconds after which a worker that sits on a step is given up; of a step that should take "
      "long, 20 times as long as it should")
      ->check(CLI::Range(0.1, kMaxFaultSeconds));
  AddFlag(app, "--replay-timeout", flags.replay_timeout_s,
          "Seconds that a sequence goes on without a token while links between workers fail; then "
          "it ends with an error")
      ->check(CLI::Range(0.1, kMaxFaultSeconds));
  AddFlag(app, "--migrate-timeout", flags.migrate_timeout_s,
          "Seconds that a sequence may take to go to another pipeline; then it stays")
      ->check(CLI::Range(0.1, kMaxFaultSeconds));
  AddFlag(app, "--migrate-stall", flags.migrate_stall_s,
          "Seconds that such a move may stand without getting any further")
      ->check(CLI::Range(0.1, kMaxFaultSeconds));
  AddFlag(app, "--migrate-pause", flags.migrate_pause_s,
          "Seconds that a sequence may stand still for it, from its last step in the old pipeline "
          "until the new one is told to go on")
      ->check(CLI::Range(0.01, kMaxFaultSeconds));
  AddFlag(app, "--migrate-rate", flags.migrate_gb_per_s,
          "Gigabytes a second that one move may take at each stage; 0: unbounded")
      ->check(CLI::Range(0.0, 1e6));
  AddFlag(app, "--replicate-rate", flags.replicate_gb_per_s,
          "Gigabytes a second that one worker may fetch as copies of others' cache rows; 0: "
          "unbounded")
      ->check(CLI::Range(0.0, 1e6));
  AddFlag(app, "--restore-timeout", flags.restore_timeout_s,
          "Seconds that a stage fetches copies of rows before it begins; what has not come is "
          "computed")
      ->check(CLI::Range(0.01, 3'600.0));
  AddFlag(app, "--spare-wait", flags.spare_wait_s,
          "Seconds that the place of a lost worker waits for a spare, or for that worker; then "
          "workers that are left take it, if they have room")
      ->check(CLI::Range(0.0, kMaxFaultSeconds));
  AddFlag(app, "--warm-spares", flags.core.warm_spares,
          "Spares, at most, that hold weights of pipelines' layers ready, so that who takes a dead "
          "worker's place reads none")
      ->check(CLI::NonNegativeNumber);
  AddFlag(app, "--stop-grace", flags.stop_grace_s,
          "Seconds that running requests get when the coordinator is told to stop")
      ->check(CLI::Range(0.0, kMaxSeconds));
  AddFlag(app, "--ready-file", flags.ready_file,
          "When listening, write one JSON line with the addresses to this file");
  AddSwitch(
      app, "--insecure", flags.insecure,
      "Let --grpc and --http be reached from other machines, neither encrypted nor authenticated");
  AddLogFlags(app, &flags.log);
  return RunDaemon(app, argc, argv, flags.log, "coordinator", [&flags] { return Run(flags); });
}
