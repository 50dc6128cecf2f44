// SPDX-License-Identifier: Apache-2.0
//
// strait-worker: a process with one device that serves the layers that a coordinator gives it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/simd_level.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/machine.h"
#include "proto/base/status_macros.h"
#include "proto/model/model_config.h"
#include "proto/rpc/address.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/process.h"
#include "proto/wire/version.h"
#include "worker/checkpoint/bus_error.h"
#include "worker/checkpoint/fingerprint.h"
#include "worker/checkpoint/weights.h"
#include "worker/model/cpu_backend.h"
#include "worker/model/gpu_backend.h"
#include "worker/service/service.h"
#include "worker/transfer/row_links.h"
#include "worker/transport/nccl_library.h"
#include "worker/transport/teardown_gate.h"

namespace strait {
namespace {

struct Flags {
  std::string coordinator = "127.0.0.1:7000";
  std::string model;
  std::string listen = "127.0.0.1:0";
  std::string advertise;
  std::string name = "worker";
  std::string simd;
  std::string backend = "cpu";
  uint32_t max_step_tokens = limits::kGpuStepTokens;
  std::string cache_format;  // empty: fp32 on the CPU, bf16 on a GPU
  std::string transport = "auto";
  std::string row_transport = "auto";
  std::string nccl_library;
  std::optional<uint64_t> random_weights;
  uint64_t memory_bytes = 0;
  uint64_t host_cache_bytes = 0;
  uint64_t replica_bytes = 0;
  std::string host_id;
  double gpu_memory_share = 0.9;
  std::optional<uint32_t> gpu;  // none: 0
  uint32_t threads = 0;
  uint32_t orphan_timeout_s = 60;
  double drain_timeout_s = 30;
  LogFlags log;
  bool insecure = false;
  bool deterministic = false;
  bool fp8_activations = false;
};

// Of what the machine can give, this much: the rest is for workspaces, buffers and the page cache.
constexpr double kDefaultMemoryShare = 0.8;

absl::StatusOr<std::optional<cpu::SimdLevel>> ParseSimd(const std::string& text) {
  if (text.empty()) return std::nullopt;
  for (auto level : {cpu::SimdLevel::kPortable, cpu::SimdLevel::kAvx2, cpu::SimdLevel::kAvx512}) {
    if (text == cpu::SimdLevelName(level)) return level;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--simd ", text, " is unknown: use portable, avx2 or avx512"));
}

absl::Status CheckAddresses(const Flags& flags) {
  if (auto parsed = rpc::ParseHostPort(flags.coordinator); !parsed.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--coordinator: ", parsed.status().message()));
  }
  STRAIT_ASSIGN_OR_RETURN(const rpc::HostPort listen,
                          rpc::ParseListenAddress(flags.listen, "--listen", flags.insecure));
  if (flags.advertise.empty() && (listen.host == "0.0.0.0" || listen.host == "::")) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--listen ", flags.listen,
        " is every address of this machine: say with --advertise host:port which one others dial"));
  }
  if (!flags.advertise.empty()) {
    auto parsed = rpc::ParseHostPort(flags.advertise);
    if (!parsed.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--advertise: ", parsed.status().message()));
    }
    if (parsed->port == 0)
      return absl::InvalidArgumentError("--advertise needs a port other than 0");
  }
  return absl::OkStatus();
}

// Of a GPU worker the cache is elsewhere; of a CPU worker all are in the same memory.
absl::Status CheckHostMemory(const Flags& flags) {
  const uint64_t beside = flags.backend == "cpu" ? flags.memory_bytes : 0;
  const uint64_t available = AvailableMemoryBytes();
  uint64_t left = available - std::min(available, beside);
  for (const uint64_t bytes : {flags.host_cache_bytes, flags.replica_bytes}) {
    if (bytes == 0) continue;
    if (bytes >= left) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--host-cache-bytes is ", flags.host_cache_bytes, ", --replica-memory is ",
          flags.replica_bytes, beside > 0 ? absl::StrCat(" beside --memory of ", beside) : "",
          ", this machine has ", available, " bytes of memory left"));
    }
    left -= bytes;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<WeightSource>> OpenWeights(const Flags& flags, uint32_t threads) {
  if (!flags.random_weights) return OpenCheckpointWeights(flags.model);
  STRAIT_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model));
  return MakeRandomWeights(config, *flags.random_weights, threads);
}

// `memory_bytes` becomes what stages may take, `costs` how they are counted where not as on the CPU, `edges`
// what edges need of a GPU.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const Flags& flags, uint32_t threads,
                                                     uint64_t* memory_bytes,
                                                     std::optional<StageCosts>* costs,
                                                     std::shared_ptr<EdgeDevice>* edges) {
  if (flags.backend == "cuda") {
    GpuBackendOptions options;
    options.device = static_cast<int>(flags.gpu.value_or(0));
    options.memory_bytes = flags.memory_bytes;
    options.memory_share = flags.gpu_memory_share;
    options.deterministic = flags.deterministic;
    options.row_format = RowFormatOf(flags.cache_format).value_or(RowFormat::kBf16);
    options.fp8_activations = flags.fp8_activations;
    options.max_step_tokens = flags.max_step_tokens;
    STRAIT_ASSIGN_OR_RETURN(GpuBackend made,
                            MakeGpuBackend(options, [&] { return OpenWeights(flags, threads); }));
    *memory_bytes = made.memory_bytes;
    *costs = std::move(made.stage_costs);
    *edges = std::move(made.edges);
    return std::move(made.backend);
  }
  if (flags.gpu) {
    return absl::InvalidArgumentError("--gpu (STRAIT_GPU) needs --backend cuda");
  }
  if (flags.fp8_activations) {
    return absl::InvalidArgumentError(
        "--fp8-activations needs --backend cuda: the CPU computes with fp32 activations");
  }
  CpuBackendOptions options;
  options.num_threads = threads;
  *memory_bytes = flags.memory_bytes > 0
                      ? flags.memory_bytes
                      : static_cast<uint64_t>(static_cast<double>(AvailableMemoryBytes() -
                                                                  flags.host_cache_bytes -
                                                                  flags.replica_bytes) *
                                              kDefaultMemoryShare);
  options.memory_bytes = *memory_bytes;
  STRAIT_ASSIGN_OR_RETURN(options.simd, ParseSimd(flags.simd));
  options.row_format = RowFormatOf(flags.cache_format).value_or(RowFormat::kFp32);
  STRAIT_ASSIGN_OR_RETURN(auto weights, OpenWeights(flags, threads));
  return CpuBackend::Create(options, std::move(weights));
}

// What this worker offers for its edges, but for the device. Errors: only if --transport nccl insists.
absl::StatusOr<NcclOffer> MakeNcclOffer(const Flags& flags) {
  NcclOffer offer;
  if (flags.transport == "grpc") {
    offer.problem = "--transport grpc";
    return offer;
  }
  if (flags.backend != "cuda") {
    if (flags.transport == "nccl") {
      return absl::InvalidArgumentError(absl::StrCat(
          "--transport nccl needs --backend cuda: NCCL joins GPUs, this is ", flags.backend));
    }
    offer.problem = absl::StrCat("backend ", flags.backend);
    return offer;
  }
  auto nccl = LoadNccl(flags.nccl_library);
  if (!nccl.ok()) {
    if (flags.transport == "nccl") return nccl.status();
    offer.problem = std::string(nccl.status().message());
    Log(LogLevel::kWarning, "no NCCL, hidden states go by gRPC", {{"why", offer.problem}});
    return offer;
  }
  offer.nccl = *std::move(nccl);
  offer.gate = std::make_shared<TeardownGate>();
  Log(LogLevel::kInfo, "NCCL", {{"version", NcclVersionText(offer.nccl->version())}});
  return offer;
}

// Whether cache rows go from device to device, and then what stages may take of the memory.
absl::StatusOr<bool> LinksRows(const Flags& flags, const NcclOffer& nccl, uint64_t* memory_bytes) {
  const bool insists = flags.row_transport == "nccl";
  if (flags.row_transport == "grpc" || (nccl.nccl == nullptr && !insists)) return false;
  if (nccl.nccl == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--row-transport nccl needs NCCL, which this worker has not: ", nccl.problem));
  }
  // Where it is a large part of the memory, it is of more use to stages.
  constexpr uint64_t kLeastBytes = 8 * kRowLinksBytes;
  if (*memory_bytes < kLeastBytes) {
    if (!insists) return false;
    return absl::InvalidArgumentError(absl::StrCat("--row-transport nccl needs --memory of ",
                                                   kLeastBytes, " bytes or more, it is ",
                                                   *memory_bytes));
  }
  *memory_bytes -= kRowLinksBytes;
  return true;
}

// Of the weights that this worker would load, as told in Hello. Reads a few kilobytes of each tensor.
absl::StatusOr<uint64_t> FingerprintOf(const Flags& flags) {
  if (flags.random_weights) return RandomWeightsFingerprint(*flags.random_weights);
  const uint64_t begin_us = MonotonicMicros();
  STRAIT_ASSIGN_OR_RETURN(const uint64_t fingerprint, WeightsFingerprint(flags.model));
  Log(LogLevel::kInfo, "weights sampled",
      {{"fingerprint", fingerprint}, {"took_ms", (MonotonicMicros() - begin_us) / 1000}});
  return fingerprint;
}

absl::Status Run(const Flags& flags) {
  StopSignals signals;
  InstallBusErrorHandler();
  STRAIT_RETURN_IF_ERROR(CheckAddresses(flags));
  STRAIT_RETURN_IF_ERROR(CheckHostMemory(flags));
  const uint32_t threads = flags.threads > 0 ? flags.threads : AvailableCores();
  // What cannot run here says so before anything is read.
  uint64_t memory_bytes = 0;
  WorkerOptions options;
  STRAIT_ASSIGN_OR_RETURN(NcclOffer nccl, MakeNcclOffer(flags));
  std::shared_ptr<EdgeDevice> edges;
  STRAIT_ASSIGN_OR_RETURN(auto backend,
                          MakeBackend(flags, threads, &memory_bytes, &options.stage_costs, &edges));
  if (nccl.nccl) nccl.device = std::move(edges);
  STRAIT_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(flags.model));

  options.coordinator_address = flags.coordinator;
  options.listen_address = flags.listen;
  options.advertise_address = flags.advertise;
  options.name = flags.name;
  STRAIT_ASSIGN_OR_RETURN(options.links_rows, LinksRows(flags, nccl, &memory_bytes));
  options.links_one_device = flags.row_transport == "nccl";
  options.memory_bytes = memory_bytes;
  options.num_threads = threads;
  options.backend_name = flags.backend;
  options.nccl = std::move(nccl);
  options.model_fingerprint = ModelFingerprint(config);
  STRAIT_ASSIGN_OR_RETURN(options.weights_fingerprint, FingerprintOf(flags));
  options.core.orphan_timeout_us = uint64_t{flags.orphan_timeout_s} * 1'000'000;
  options.drain_timeout_us = static_cast<uint64_t>(flags.drain_timeout_s * 1e6);
  options.core.host_cache_bytes = flags.host_cache_bytes;
  options.shares_row_memory = flags.row_transport != "grpc";
  options.core.replica_bytes = flags.replica_bytes;
  options.core.host_id = flags.host_id.empty() ? HostIdentity() : flags.host_id;
  options.cache_row_bytes = static_cast<uint32_t>(backend->block_bytes() / limits::kBlockTokens);
  STRAIT_ASSIGN_OR_RETURN(auto worker, WorkerProcess::Create(options, backend.get()));
  Log(LogLevel::kInfo, "worker started",
      {{"model", flags.model},
       {"data_address", worker->data_address()},
       {"memory_bytes", memory_bytes},
       {"backend", flags.backend},
       {"threads", threads},
       {"numerics", backend->numerics_id()},
       {"coordinator", flags.coordinator}});
  signals.Watch([&worker] { worker->Leave(); });
  worker->Run();
  signals.Forget();
  // A load cannot be interrupted; nothing of it outlives the process.
  const bool loading = worker->loading();
  Log(LogLevel::kInfo, "worker stopped");
  std::fflush(nullptr);
  if (loading) std::_Exit(0);
  return absl::OkStatus();
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  using namespace strait;
  QuietGrpc();
  Flags flags;
  CLI::App app(
      "strait-worker serves layers of a DeepSeek-architecture model.\n"
      "It attaches to a coordinator, which tells it what to load and what to compute. Every flag "
      "is also "
      "an environment variable, as shown in brackets.",
      "strait-worker");
  app.set_version_flag("--version", kVersion);
  AddFlag(app, "--coordinator", flags.coordinator,
          "Where the coordinator listens for workers, host:port");
  AddFlag(app, "--model", flags.model, "Model directory: config.json and safetensors")
      ->required()
      ->check(CLI::ExistingDirectory);
  AddFlag(app, "--listen", flags.listen,
          "Where other workers send hidden states; port 0 takes a free one. Another address than a "
          "loopback one needs --insecure");
  AddFlag(
      app, "--advertise", flags.advertise,
      "host:port under which other workers reach --listen; default: the address it is bound to");
  AddFlag(app, "--backend", flags.backend, "Where to compute: cpu, or cuda on an NVIDIA GPU")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  AddFlag(app, "--gpu", flags.gpu,
          "With --backend cuda: which GPU, one number, of those that CUDA_VISIBLE_DEVICES leaves; "
          "default: 0");
  AddFlag(app, "--gpu-memory-share", flags.gpu_memory_share,
          "Without --memory: part of the GPU's memory for weights, cache, workspace and NCCL edges")
      ->check(CLI::Range(0.0, 1.0));
  AddFlag(app, "--memory", flags.memory_bytes,
          "Bytes for weights, cache, workspace and NCCL edges, e.g. 8GiB; default: 80 % of the "
          "available memory, on a GPU see --gpu-memory-share")
      ->transform(CLI::AsSizeValue(false));
  AddFlag(
      app, "--host-cache-bytes", flags.host_cache_bytes,
      "Host memory for cache rows that make room for others, e.g. 8GiB; taken when it is needed")
      ->transform(CLI::AsSizeValue(false));
  AddFlag(
      app, "--replica-memory", flags.replica_bytes,
      "Host memory for copies of other workers' cache rows, from which sequences go on when such "
      "a worker dies, e.g. 8GiB; taken when it is needed")
      ->transform(CLI::AsSizeValue(false));
  AddFlag(
      app, "--host-id", flags.host_id,
      "Where this worker runs, any word: workers with the same one would go together, so copies "
      "of rows are kept where it differs. Default: made from the kernel's boot id")
      ->check(CLI::Validator(
          [](const std::string& id) {
            return id.size() <= limits::kMaxHostIdBytes
                       ? std::string()
                       : absl::StrCat("is longer than ", limits::kMaxHostIdBytes, " bytes");
          },
          ""));
  AddFlag(
      app, "--max-step-tokens", flags.max_step_tokens,
      "On a GPU: rows that go through the layers at once, for which workspace is set apart; the "
      "coordinator's larger steps go in parts")
      ->check(CLI::Range(1u, limits::kMaxStepTokens));
  AddFlag(app, "--threads", flags.threads, "Threads that compute; 0: one for each available core");
  AddFlag(app, "--simd", flags.simd,
          "portable, avx2 or avx512; default: the widest that there is. All give the same bits");
  AddFlag(app, "--random-weights", flags.random_weights,
          "Fill weights from this seed instead of reading them");
  AddFlag(
      app, "--cache-format", flags.cache_format,
      "Row format of the latent cache: fp32 or bf16; on a GPU bf16 or fp8 (e4m3 with a scale for "
      "each 128, the rotated key in bf16). The coordinator needs the same; default: fp32, on a "
      "GPU bf16")
      ->check(CLI::IsMember({"fp32", "bf16", "fp8"}));
  AddFlag(
      app, "--transport", flags.transport,
      "How hidden states travel: auto is NCCL between GPU workers with the same NCCL, else gRPC; "
      "grpc: always; nccl: refuse to start without NCCL. NCCL neither encrypts nor authenticates")
      ->check(CLI::IsMember({"auto", "grpc", "nccl"}));
  AddFlag(
      app, "--row-transport", flags.row_transport,
      "How cache rows travel between workers: auto is NCCL between GPUs with the same NCCL, else "
      "memory that both share where they run on one host as one user, else gRPC; grpc: always; "
      "nccl: also between workers of one GPU, and refuse to start without NCCL")
      ->check(CLI::IsMember({"auto", "grpc", "nccl"}));
  AddFlag(app, "--nccl-library", flags.nccl_library,
          "The NCCL library; default: libnccl.so.2 where the system finds it");
  AddFlag(app, "--orphan-timeout", flags.orphan_timeout_s,
          "Seconds for which stages and their cache are kept while there is no coordinator")
      ->check(CLI::Range(0u, 86'400u));
  AddFlag(app, "--drain-timeout", flags.drain_timeout_s,
          "After SIGTERM or SIGINT: seconds for which it serves on while its sequences go "
          "elsewhere with "
          "their cache; 0: it stops at once, as it does by a second signal")
      ->check(CLI::Range(0.0, 86'400.0));
  AddFlag(app, "--name", flags.name, "Name for people, in status and logs");
  AddSwitch(app, "--deterministic", flags.deterministic,
            "A sequence's tokens depend on the sequence alone, not on what is computed beside it. "
            "On a GPU it costs speed; on the CPU it is always so");
  AddSwitch(app, "--fp8-activations", flags.fp8_activations,
            "On a GPU, with fp8 weights: quantize activations to fp8 for products of many rows, "
            "with --deterministic for all. Faster prompts, less exact; default: bf16 activations");
  AddSwitch(app, "--insecure", flags.insecure,
            "Let --listen be reached from other machines, neither encrypted nor authenticated");
  AddLogFlags(app, &flags.log);
  return RunDaemon(app, argc, argv, flags.log, flags.name, [&flags] { return Run(flags); });
}
