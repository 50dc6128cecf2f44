// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/local_cluster.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/json.h"
#include "proto/base/machine.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr int kPollMs = 150;  // between looks at a cluster that does not serve yet
constexpr int kStatusTimeoutMs = 2'000;
constexpr int kStopGraceMs = 5'000;
constexpr int kFirstBackoffMs = 250;  // doubles with every rapid death
constexpr size_t kTailLines = 15;
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

// `given`, or the default port of loopback, or a free one when that is taken.
absl::StatusOr<std::string> ChooseAddress(const std::string& given, uint16_t default_port,
                                          std::string_view what, uint16_t not_this,
                                          Terminal* terminal) {
  const std::string host = "127.0.0.1";
  if (!given.empty()) {
    STRAIT_ASSIGN_OR_RETURN(const Url url, ParseUrl(given));
    if (!PortIsFree(url.host, url.port)) {
      return absl::UnavailableError(absl::StrCat(
          given, " cannot be listened on (another program has the port, or the address is not ",
          "this machine's). Leave the flag out to get a free port"));
    }
    return given;
  }
  if (PortIsFree(host, default_port)) return absl::StrCat(host, ":", default_port);
  uint16_t port = not_this;
  while (port == not_this) {
    STRAIT_ASSIGN_OR_RETURN(port, FreePort(host));
  }
  terminal->Say(absl::StrCat("Port ", default_port, " is taken: ", std::string(what), " moves to ",
                             port, "."));
  return absl::StrCat(host, ":", port);
}

}  // namespace

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(LocalClusterOptions options,
                                                                  Terminal* terminal,
                                                                  Signals* signals) {
  if (options.backend != "cpu" && options.backend != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("--backend ", options.backend, " is unknown: use cpu or cuda"));
  }
  const bool on_gpu = options.backend == "cuda";
  STRAIT_RETURN_IF_ERROR(on_gpu ? CheckGpus(options.gpus) : CheckNeedsNoGpu(options));
  if (on_gpu && options.gpus.empty()) options.gpus = {0};
  if (options.num_pipelines == 0)
    return absl::InvalidArgumentError("--pipelines must be at least 1");
  const auto num_gpus = static_cast<uint32_t>(options.gpus.size());
  if (options.num_workers == 0) {
    options.num_workers = std::max((on_gpu ? 1 : 2) * options.num_pipelines, num_gpus);
  }
  if (options.num_workers < num_gpus) {
    return absl::InvalidArgumentError(
        absl::StrCat("--gpu names ", num_gpus, " GPUs, --workers is ", options.num_workers,
                     ": a worker has one GPU. Name fewer GPUs or start more workers"));
  }
  if (options.num_workers % options.num_pipelines != 0) {
    const uint32_t below = options.num_workers / options.num_pipelines * options.num_pipelines;
    return absl::InvalidArgumentError(absl::StrCat(
        "--workers ", options.num_workers, " cannot be shared out over --pipelines ",
        options.num_pipelines,
        ": every pipeline has the same number of stages and a stage needs a worker. Use --workers ",
        below > 0 ? absl::StrCat(below, " or ") : std::string(), below + options.num_pipelines));
  }
  std::error_code error;
  if (!std::filesystem::exists(options.model + "/config.json", error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model ", options.model,
                     ": no config.json in there. A Hugging Face checkpoint folder is wanted ",
                     "(config.json, *.safetensors, tokenizer.json)"));
  }
  std::unique_ptr<LocalCluster> cluster(new LocalCluster(std::move(options), terminal, signals));
  absl::Status status = cluster->Launch();
  if (!status.ok()) {
    cluster->failed_ = true;
    return status;
  }
  return cluster;
}

absl::Status LocalCluster::Launch() {
  STRAIT_ASSIGN_OR_RETURN(const std::string folder, ProgramFolder());
  STRAIT_ASSIGN_OR_RETURN(http_,
                          ChooseAddress(options_.http, kDefaultHttpPort, "HTTP", 0, terminal_));
  STRAIT_ASSIGN_OR_RETURN(const Url http_url, ParseUrl(http_));
  STRAIT_ASSIGN_OR_RETURN(
      grpc_, ChooseAddress(options_.grpc, kDefaultGrpcPort, "gRPC", http_url.port, terminal_));
  if (options_.log_dir.empty()) {
    std::string pattern = (std::filesystem::temp_directory_path() / "strait-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) {
      return absl::UnavailableError(absl::StrCat("cannot make ", pattern, ": ", strerror(errno)));
    }
    options_.log_dir = pattern;
    made_log_dir_ = true;
  } else {
    std::error_code error;
    std::filesystem::create_directories(options_.log_dir, error);
    if (error) {
      return absl::UnavailableError(
          absl::StrCat("--log-dir ", options_.log_dir, ": ", error.message()));
    }
  }

  coordinator_.name = "coordinator";
  coordinator_.spec.log_path = options_.log_dir + "/coordinator.log";
  coordinator_.spec.argv = {folder + "/strait-coordinator",
                            "--model",
                            options_.model,
                            "--http",
                            http_,
                            "--grpc",
                            grpc_,
                            "--pipelines",
                            std::to_string(options_.num_pipelines),
                            "--stages",
                            std::to_string(num_stages())};
  auto append = [](std::vector<std::string>& to, const std::vector<std::string>& more) {
    to.insert(to.end(), more.begin(), more.end());
  };
  if (!options_.api_keys.empty()) {
    coordinator_.spec.environment = {
        absl::StrCat("STRAIT_API_KEY=", absl::StrJoin(options_.api_keys, "\n"))};
  }
  append(coordinator_.spec.argv, options_.coordinator_args);

  uint32_t threads = options_.worker_threads;
  if (threads == 0) {
    threads = std::max(1u, AvailableCores() / options_.num_workers);
  }
  std::string memory = options_.worker_memory;
  const bool on_gpu = options_.backend == "cuda";
  if (on_gpu && CacheFormat(options_).empty()) {
    append(coordinator_.spec.argv, {"--cache-format", "bf16"});
  }
  std::string step_tokens =
      CoordinatorFlag(options_, "--max-step-tokens", "STRAIT_MAX_STEP_TOKENS");
  if (on_gpu && step_tokens.empty()) {
    step_tokens = std::to_string(limits::kGpuStepTokens);
    append(coordinator_.spec.argv, {"--max-step-tokens", step_tokens});
  }
  if (on_gpu && CoordinatorFlag(options_, "--prefill-chunk", "STRAIT_PREFILL_CHUNK").empty()) {
    append(coordinator_.spec.argv, {"--prefill-chunk", step_tokens});
  }
  if (memory.empty() && !on_gpu) {
    const uint64_t share = static_cast<uint64_t>(static_cast<double>(AvailableMemoryBytes()) *
                                                 kMemoryShare / options_.num_workers);
    if (share > 0) memory = std::to_string(share);
  }
  const auto num_gpus = static_cast<uint32_t>(options_.gpus.size());
  for (uint32_t i = 0; i < options_.num_workers; ++i) {
    Process worker;
    worker.name = absl::StrCat("worker-", i + 1);
    worker.spec.log_path = absl::StrCat(options_.log_dir, "/", worker.name, ".log");
    worker.spec.argv = {folder + "/strait-worker",
                        "--coordinator",
                        grpc_,
                        "--model",
                        options_.model,
                        "--name",
                        worker.name,
                        "--threads",
                        std::to_string(threads)};
    if (!memory.empty()) append(worker.spec.argv, {"--memory", memory});
    if (on_gpu) {
      const uint32_t slot = i % num_gpus;
      const uint32_t sharers = (options_.num_workers - slot + num_gpus - 1) / num_gpus;
      append(worker.spec.argv, {"--backend", "cuda", "--gpu", std::to_string(options_.gpus[slot]),
                                "--gpu-memory-share", absl::StrCat(kGpuMemoryShare / sharers)});
      // Where any share one, all go by the network: NCCL takes two such for two hosts.
      const bool any_share = options_.num_workers > num_gpus;
      if (any_share) worker.spec.environment = SharedGpuEnvironment(worker.name);
    }
    if (!options_.random_weights.empty()) {
      append(worker.spec.argv, {"--random-weights", options_.random_weights});
    }
    append(worker.spec.argv, options_.worker_args);
    workers_.push_back(std::move(worker));
  }

  // A listener on every address is reached through loopback.
  Url probe = http_url;
  if (probe.host == "0.0.0.0") probe.host = "127.0.0.1";
  if (probe.host == "::") probe.host = "::1";
  const std::string key = options_.api_keys.empty() ? "" : options_.api_keys.front();
  client_ = std::make_unique<HttpClient>(probe, key, signals_->fd());

  terminal_->Say(absl::StrCat("Starting a coordinator and ", options_.num_workers, " worker",
                              options_.num_workers == 1 ? "" : "s", " (", options_.num_pipelines,
                              " pipeline", options_.num_pipelines == 1 ? "" : "s", " of ",
                              num_stages(), " stage", num_stages() == 1 ? "" : "s", ", ", threads,
                              " thread", threads == 1 ? "" : "s", " a worker); logs in ",
                              options_.log_dir));
  STRAIT_RETURN_IF_ERROR(StartProcess(coordinator_));
  for (Process& worker : workers_) STRAIT_RETURN_IF_ERROR(StartProcess(worker));
  return absl::OkStatus();
}

LocalCluster::~LocalCluster() {
  Stop();
  std::error_code ignored;
  if (made_log_dir_ && !failed_) std::filesystem::remove_all(options_.log_dir, ignored);
}

absl::Status LocalCluster::StartProcess(Process& process) {
  STRAIT_ASSIGN_OR_RETURN(process.pid, Spawn(process.spec));
  process.started = Clock::now();
  process.restart_wanted = false;
  return absl::OkStatus();
}

absl::Status LocalCluster::Death(const Process& process, const std::string& how) const {
  const std::string tail = TailOf(process.spec.log_path, kTailLines);
  return absl::UnavailableError(absl::StrCat(process.name, " ended with ", how,
                                             ". The end of its log, ", process.spec.log_path, ":\n",
                                             tail.empty() ? "(nothing)" : tail));
}

absl::Status LocalCluster::OnExit(Process& process, int wait_status) {
  process.pid = 0;
  const std::string how = DescribeExit(wait_status);
  if (&process == &coordinator_) {
    failed_ = true;
    return Death(process, how);
  }
  const auto lived =
      std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - process.started);
  process.rapid_deaths = lived.count() < kHealthyAfterMs ? process.rapid_deaths + 1 : 1;
  if (process.rapid_deaths >= kMaxRapidDeaths && !was_ready_) {
    failed_ = true;
    return Death(process, absl::StrCat(how, ", ", process.rapid_deaths, " times in a row"));
  }
  // A cluster that has served keeps trying longer: other pipelines may be serving.
  if (process.rapid_deaths >= 3 * kMaxRapidDeaths) {
    failed_ = true;
    return Death(process, absl::StrCat(how, ", ", process.rapid_deaths, " times in a row"));
  }
  const int backoff_ms = kFirstBackoffMs << (process.rapid_deaths - 1);
  process.restart_wanted = true;
  process.restart_at = Clock::now() + std::chrono::milliseconds(backoff_ms);
  terminal_->Say(
      absl::StrCat(process.name, " ended (", how, "); restarting it in ", backoff_ms, " ms"));
  recovering_ = true;
  return absl::OkStatus();
}

absl::Status LocalCluster::Reap() {
  int wait_status = 0;
  // The coordinator last: when it goes, its workers may have been what brought it down, and are
  // told first.
  for (Process& worker : workers_) {
    if (worker.pid > 0 && waitpid(worker.pid, &wait_status, WNOHANG) == worker.pid) {
      STRAIT_RETURN_IF_ERROR(OnExit(worker, wait_status));
    }
  }
  if (coordinator_.pid > 0 &&
      waitpid(coordinator_.pid, &wait_status, WNOHANG) == coordinator_.pid) {
    return OnExit(coordinator_, wait_status);
  }
  return absl::OkStatus();
}

absl::Status LocalCluster::RestartDue() {
  for (Process& worker : workers_) {
    if (!worker.restart_wanted || Clock::now() < worker.restart_at) continue;
    STRAIT_RETURN_IF_ERROR(StartProcess(worker));
    terminal_->Say(absl::StrCat(worker.name, " restarted, process ", worker.pid));
  }
  return absl::OkStatus();
}

absl::StatusOr<LocalCluster::Wake> LocalCluster::Step(int max_ms, int done_fd) {
  auto until = Clock::time_point::max();
  if (max_ms >= 0) until = Clock::now() + std::chrono::milliseconds(max_ms);
  for (;;) {
    auto next = until;
    for (const Process& worker : workers_) {
      if (worker.restart_wanted) next = std::min(next, worker.restart_at);
    }
    int wait_ms = -1;
    if (next != Clock::time_point::max()) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(next - Clock::now()).count();
      wait_ms = static_cast<int>(std::clamp<int64_t>(left, 0, 60'000));
    }
    pollfd fds[2] = {{signals_->fd(), POLLIN, 0}, {done_fd, POLLIN, 0}};
    if (poll(fds, 2, wait_ms) < 0 && errno != EINTR) {
      return absl::UnavailableError(absl::StrCat("poll: ", strerror(errno)));
    }
    while (const std::optional<int> signal = signals_->Take()) {
      if (*signal == SIGHUP || *signal == SIGINT || *signal == SIGTERM) {
        return absl::CancelledError(strsignal(*signal));
      }
    }
    STRAIT_RETURN_IF_ERROR(Reap());
    STRAIT_RETURN_IF_ERROR(RestartDue());
    if (done_fd >= 0 && fds[1].revents != 0) return Wake::kDone;
    // Who waits without end wants to know that there is something to wait for.
    if (Clock::now() >= until || (recovering_ && max_ms < 0)) return Wake::kTimeout;
  }
}

bool LocalCluster::Healthy() {
  const absl::StatusOr<HttpReply> health = client_->Get("/health", kStatusTimeoutMs);
  if (!health.ok() || health->status != 200) return false;
  // One pipeline makes a server healthy; here all of them were asked for.
  const absl::StatusOr<json::Value> status = FetchStatus();
  if (!status.ok() || !status->is_object()) return false;
  uint32_t num_active = 0;
  for (const json::Object* pipeline : Objects(status->get_object(), "pipelines")) {
    if (Text(*pipeline, "state") == "active") ++num_active;
  }
  return num_active >= options_.num_pipelines;
}

absl::StatusOr<json::Value> LocalCluster::FetchStatus() {
  STRAIT_ASSIGN_OR_RETURN(const HttpReply reply, client_->Get("/strait/status", kStatusTimeoutMs));
  if (reply.status != 200) return absl::InternalError(reply.ErrorText());
  return json::Parse(reply.body, "/strait/status");
}

void LocalCluster::ShowLoading() {
  const absl::StatusOr<json::Value> parsed = FetchStatus();
  if (!parsed.ok() || !parsed->is_object())
    return terminal_->Progress("Waiting for the coordinator", -1);
  const json::Object& status = parsed->get_object();
  double loaded = 0, total = 0;
  std::string error;
  const auto workers = Objects(status, "workers");
  for (const json::Object* worker : workers) {
    for (const json::Object* stage : Objects(*worker, "stages")) {
      const double stage_total = Number(*stage, "bytes_total");
      total += stage_total;
      loaded += Text(*stage, "state") == "loading" ? Number(*stage, "bytes_loaded") : stage_total;
    }
  }
  for (const char* list : {"workers", "pipelines"}) {
    for (const json::Object* holder : Objects(status, list)) {
      if (error.empty()) error = Text(*holder, "last_error");
    }
  }
  if (!error.empty() && error != shown_error_) {
    terminal_->Say(absl::StrCat("Not serving yet: ", error));
    shown_error_ = error;
  }
  if (workers.size() < options_.num_workers) {
    terminal_->Progress(absl::StrCat("Waiting for workers, ", workers.size(), " of ",
                                     options_.num_workers, " registered"),
                        -1);
  } else if (total > 0) {
    terminal_->Progress(
        absl::StrCat("Loading weights, ", FormatBytes(loaded), " of ", FormatBytes(total)),
        loaded / total);
  } else {
    const std::string problem = Text(status, "problem");
    terminal_->Progress(problem.empty() ? "Waiting for a pipeline" : problem, -1);
  }
}

absl::Status LocalCluster::WaitReady() {
  while (!Healthy()) {
    const absl::StatusOr<Wake> wake = Step(kPollMs, -1);
    if (!wake.ok()) {
      terminal_->EndProgress();
      failed_ = failed_ || !absl::IsCancelled(wake.status());
      return wake.status();
    }
    ShowLoading();
  }
  terminal_->EndProgress();
  was_ready_ = true;
  recovering_ = false;
  return absl::OkStatus();
}

absl::Status LocalCluster::Supervise(int done_fd) {
  for (;;) {
    const absl::StatusOr<Wake> wake = Step(recovering_ ? kPollMs : -1, done_fd);
    if (!wake.ok()) {
      failed_ = failed_ || !absl::IsCancelled(wake.status());
      return wake.status();
    }
    if (*wake == Wake::kDone) return absl::OkStatus();
    const bool all_run = std::all_of(workers_.begin(), workers_.end(),
                                     [](const Process& worker) { return worker.pid > 0; });
    if (recovering_ && all_run && Healthy()) {
      recovering_ = false;
      terminal_->Say("Serving again.");
    }
  }
}

void LocalCluster::Stop() {
  std::vector<Process*> running;
  for (Process& worker : workers_) {
    worker.restart_wanted = false;
    if (worker.pid > 0) running.push_back(&worker);
  }
  if (coordinator_.pid > 0) running.push_back(&coordinator_);
  for (const Process* process : running) kill(process->pid, SIGTERM);
  auto deadline = Clock::now() + std::chrono::milliseconds(kStopGraceMs);
  bool killed = false;
  while (!running.empty()) {
    std::erase_if(running, [](Process* process) {
      if (waitpid(process->pid, nullptr, WNOHANG) != process->pid) return false;
      process->pid = 0;
      return true;
    });
    if (running.empty()) break;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0 && !killed) {
      killed = true;
      for (const Process* process : running) {
        terminal_->Say(
            absl::StrCat(process->name, " did not stop within ", kStopGraceMs, " ms: killed"));
        kill(process->pid, SIGKILL);
      }
    }
    // SIGCHLD wakes this; the bound covers a signal that was merged with one taken before.
    pollfd fd = {signals_->fd(), POLLIN, 0};
    poll(&fd, 1, static_cast<int>(std::clamp<int64_t>(left, 1, 200)));
    while (signals_->Take()) {
    }
  }
}

}  // namespace strait::cli
