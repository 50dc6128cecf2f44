// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/cluster_options.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/limits.h"
#include "proto/base/machine.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr double kMemoryShare = 0.8;     // of what is available, for all workers together
constexpr double kGpuMemoryShare = 0.9;  // the rest is for CUDA itself

// NCCL joins two processes on one GPU only if they seem to be on two hosts, and then by a network:
// here the loopback one will do. What the user has set stays.
std::vector<std::string> SharedGpuEnvironment(const std::string& worker) {
  std::vector<std::string> environment;
  for (const auto& [name, value] :
       {std::pair("NCCL_HOSTID", absl::StrCat("strait-", getpid(), "-", worker)),
        std::pair("NCCL_SOCKET_IFNAME", std::string("lo")),
        std::pair("NCCL_IB_DISABLE", std::string("1"))}) {
    if (getenv(name) == nullptr) environment.push_back(absl::StrCat(name, "=", value));
  }
  return environment;
}

// A flag of the coordinator: given, or of the environment, which it reads too; empty: none.
std::string CoordinatorFlag(const LocalClusterOptions& options, const char* name,
                            const char* variable) {
  const auto& args = options.coordinator_args;
  const auto flag = std::find(args.rbegin(), args.rend(), name);
  if (flag != args.rend() && flag != args.rbegin()) return *std::prev(flag);
  const char* const environment = getenv(variable);
  return environment != nullptr ? environment : "";
}

std::string CacheFormat(const LocalClusterOptions& options) {
  return CoordinatorFlag(options, "--cache-format", "STRAIT_CACHE_FORMAT");
}

absl::Status CheckGpus(std::vector<uint32_t> gpus) {
  std::sort(gpus.begin(), gpus.end());
  const auto twice = std::adjacent_find(gpus.begin(), gpus.end());
  if (twice == gpus.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--gpu names GPU ", *twice, " twice: name each once, workers share them"));
}

absl::Status CheckNeedsNoGpu(const LocalClusterOptions& options) {
  if (!options.gpus.empty())
    return absl::InvalidArgumentError("--gpu (STRAIT_GPU) needs --backend cuda");
  const auto& args = options.worker_args;
  if (std::find(args.begin(), args.end(), "--fp8-activations") != args.end()) {
    return absl::InvalidArgumentError(
        "--fp8-activations needs --backend cuda: the CPU computes with fp32 activations");
  }
  if (CacheFormat(options) == "fp8") {
    return absl::InvalidArgumentError(
        "--cache-format fp8 needs --backend cuda: CPU workers keep fp32 or bf16 cache rows");
  }
  return absl::OkStatus();
}

void Append(std::vector<std::string>& to, const std::vector<std::string>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

}  // namespace

absl::Status CompleteOptions(LocalClusterOptions* options) {
  if (options->backend != "cpu" && options->backend != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("--backend ", options->backend, " is unknown: use cpu or cuda"));
  }
  const bool on_gpu = options->backend == "cuda";
  STRAIT_RETURN_IF_ERROR(on_gpu ? CheckGpus(options->gpus) : CheckNeedsNoGpu(*options));
  if (on_gpu && options->gpus.empty()) options->gpus = {0};
  if (options->num_pipelines == 0)
    return absl::InvalidArgumentError("--pipelines must be at least 1");
  const auto num_gpus = static_cast<uint32_t>(options->gpus.size());
  if (options->num_workers == 0) {
    options->num_workers = std::max((on_gpu ? 1 : 2) * options->num_pipelines, num_gpus);
  }
  if (options->num_workers < num_gpus) {
    return absl::InvalidArgumentError(
        absl::StrCat("--gpu names ", num_gpus, " GPUs, --workers is ", options->num_workers,
                     ": a worker has one GPU. Name fewer GPUs or start more workers"));
  }
  if (options->num_workers % options->num_pipelines != 0) {
    const uint32_t below = options->num_workers / options->num_pipelines * options->num_pipelines;
    return absl::InvalidArgumentError(absl::StrCat(
        "--workers ", options->num_workers, " cannot be shared out over --pipelines ",
        options->num_pipelines,
        ": every pipeline has the same number of stages and a stage needs a worker. Use --workers ",
        below > 0 ? absl::StrCat(below, " or ") : std::string(), below + options->num_pipelines));
  }
  std::error_code error;
  if (!std::filesystem::exists(options->model + "/config.json", error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model ", options->model,
                     ": no config.json in there. A Hugging Face checkpoint folder is wanted ",
                     "(config.json, *.safetensors, tokenizer.json)"));
  }
  if (options->worker_threads == 0) {
    options->worker_threads = std::max(1u, AvailableCores() / options->num_processes());
  }
  if (options->worker_memory.empty() && !on_gpu) {
    const uint64_t share = static_cast<uint64_t>(static_cast<double>(AvailableMemoryBytes()) *
                                                 kMemoryShare / options->num_processes());
    if (share > 0) options->worker_memory = std::to_string(share);
  }
  return absl::OkStatus();
}

std::string WorkerName(uint32_t index) { return absl::StrCat("worker-", index + 1); }

ChildSpec CoordinatorSpec(const LocalClusterOptions& options, const Daemons& daemons) {
  ChildSpec spec;
  spec.log_path = options.log_dir + "/coordinator.log";
  spec.argv = {daemons.folder + "/strait-coordinator",
               "--model",
               options.model,
               "--http",
               daemons.http,
               "--grpc",
               daemons.grpc,
               "--pipelines",
               std::to_string(options.num_pipelines),
               "--stages",
               std::to_string(options.num_stages())};
  if (!options.operator_key_file.empty()) {
    Append(spec.argv, {"--operator-key-file", options.operator_key_file});
  }
  if (!options.api_keys.empty()) {
    spec.environment = {absl::StrCat("STRAIT_API_KEY=", absl::StrJoin(options.api_keys, "\n"))};
  }
  Append(spec.argv, options.coordinator_args);
  if (options.backend != "cuda") return spec;

  if (CacheFormat(options).empty()) Append(spec.argv, {"--cache-format", "bf16"});
  std::string step_tokens = CoordinatorFlag(options, "--max-step-tokens", "STRAIT_MAX_STEP_TOKENS");
  if (step_tokens.empty()) {
    step_tokens = std::to_string(limits::kGpuStepTokens);
    Append(spec.argv, {"--max-step-tokens", step_tokens});
  }
  if (CoordinatorFlag(options, "--prefill-chunk", "STRAIT_PREFILL_CHUNK").empty()) {
    Append(spec.argv, {"--prefill-chunk", step_tokens});
  }
  return spec;
}

ChildSpec WorkerSpec(const LocalClusterOptions& options, const Daemons& daemons, uint32_t index,
                     const WorkerLinks* links) {
  const std::string name = WorkerName(index);
  ChildSpec spec;
  spec.log_path = absl::StrCat(options.log_dir, "/", name, ".log");
  spec.argv = {daemons.folder + "/strait-worker", "--coordinator",
               links != nullptr ? links->coordinator : daemons.grpc, "--model", options.model,
               "--name", name, "--threads", std::to_string(options.worker_threads),
               // All of them stop together, or one that others restart.
               "--drain-timeout", "0"};
  if (!options.worker_memory.empty()) Append(spec.argv, {"--memory", options.worker_memory});
  if (options.backend == "cuda") {
    const auto num_gpus = static_cast<uint32_t>(options.gpus.size());
    const uint32_t slot = index % num_gpus;
    const uint32_t sharers = (options.num_processes() - slot + num_gpus - 1) / num_gpus;
    Append(spec.argv, {"--backend", "cuda", "--gpu", std::to_string(options.gpus[slot]),
                       "--gpu-memory-share", absl::StrCat(kGpuMemoryShare / sharers)});
    // Where any share one, all go by the network: NCCL takes two such for two hosts.
    const bool any_share = options.num_processes() > num_gpus;
    if (any_share) spec.environment = SharedGpuEnvironment(name);
  }
  if (!options.random_weights.empty()) {
    Append(spec.argv, {"--random-weights", options.random_weights});
  }
  if (links != nullptr) {
    Append(spec.argv, {"--listen", links->listen, "--advertise", links->advertise});
    if (index % 2 == 1) Append(spec.argv, {"--row-transport", "grpc"});
  }
  Append(spec.argv, options.worker_args);
  return spec;
}

}  // namespace strait::cli
