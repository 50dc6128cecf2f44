// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/local_cluster.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/access/operator_key.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/json.h"
#include "proto/base/status_macros.h"

namespace strait::cli {
namespace {

constexpr int kPollMs = 150;  // between looks at a cluster that does not serve yet
constexpr int kStatusTimeoutMs = 2'000;
constexpr int kStopGraceMs = 5'000;
constexpr int kFirstBackoffMs = 250;  // doubles with every rapid death
constexpr size_t kTailLines = 15;

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

LocalCluster::LocalCluster(LocalClusterOptions options, Terminal* terminal, Signals* signals)
    : options_(std::move(options)),
      terminal_(terminal),
      signals_(signals),
      members_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

absl::StatusOr<std::unique_ptr<LocalCluster>> LocalCluster::Start(LocalClusterOptions options,
                                                                  Terminal* terminal,
                                                                  Signals* signals) {
  STRAIT_RETURN_IF_ERROR(CompleteOptions(&options));
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

  if (options_.operator_key_file.empty()) MakeKeyFile(http_url.port);
  daemons_ = {folder, http_, grpc_};
  coordinator_.name = "coordinator";
  coordinator_.spec = CoordinatorSpec(options_, daemons_);
  if (options_.relays_links) {
    STRAIT_ASSIGN_OR_RETURN(relay_, LinkRelay::Create());
  }
  while (num_named_ < options_.num_processes()) {
    STRAIT_ASSIGN_OR_RETURN(Process worker, MakeWorker(num_named_++));
    workers_.push_back(std::move(worker));
  }

  // A listener on every address is reached through loopback.
  Url probe = http_url;
  if (probe.host == "0.0.0.0") probe.host = "127.0.0.1";
  if (probe.host == "::") probe.host = "::1";
  const std::string key = options_.api_keys.empty() ? "" : options_.api_keys.front();
  client_ = std::make_unique<HttpClient>(probe, key, signals_->fd());

  terminal_->Say(absl::StrCat(
      "Starting a coordinator and ", options_.num_processes(), " worker",
      options_.num_processes() == 1 ? "" : "s", " (", options_.num_pipelines, " pipeline",
      options_.num_pipelines == 1 ? "" : "s", " of ", num_stages(), " stage",
      num_stages() == 1 ? "" : "s", ", ", options_.worker_threads, " thread",
      options_.worker_threads == 1 ? "" : "s", " a worker); logs in ", options_.log_dir));
  STRAIT_RETURN_IF_ERROR(StartProcess(coordinator_));
  coordinator_pid_ = coordinator_.pid;
  for (Process& worker : workers_) STRAIT_RETURN_IF_ERROR(StartProcess(worker));
  return absl::OkStatus();
}

// Without a place for it the cluster serves all the same.
void LocalCluster::MakeKeyFile(uint16_t http_port) {
  const std::vector<std::string> paths = OperatorKeyPaths(http_port);
  const absl::Status made =
      paths.empty() ? absl::NotFoundError("none of XDG_RUNTIME_DIR, XDG_STATE_HOME and HOME is set")
                    : MakeOperatorKey(paths.front());
  if (!made.ok()) {
    terminal_->Say(absl::StrCat("No operator key: ", std::string(made.message()),
                                ". What changes the cluster will be refused; --operator-key-file "
                                "names a file of your own."));
    return;
  }
  options_.operator_key_file = paths.front();
  made_key_file_ = true;
}

LocalCluster::~LocalCluster() {
  Stop();
  close(members_fd_);
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
  if (process.leaves) {
    terminal_->Say(absl::StrCat(process.name, " left (", how, ")"));
    recovering_ = true;
    return absl::OkStatus();
  }
  const auto lived =
      std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - process.started);
  const bool rapid = lived.count() < kHealthyAfterMs && !(was_ready_ && options_.expects_deaths);
  process.rapid_deaths = rapid ? process.rapid_deaths + 1 : 1;
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
    pollfd fds[3] = {{signals_->fd(), POLLIN, 0}, {done_fd, POLLIN, 0}, {members_fd_, POLLIN, 0}};
    if (poll(fds, 3, wait_ms) < 0 && errno != EINTR) {
      return absl::UnavailableError(absl::StrCat("poll: ", strerror(errno)));
    }
    while (const std::optional<int> signal = signals_->Take()) {
      if (*signal == SIGHUP || *signal == SIGINT || *signal == SIGTERM) {
        return absl::CancelledError(strsignal(*signal));
      }
    }
    STRAIT_RETURN_IF_ERROR(Reap());
    STRAIT_RETURN_IF_ERROR(ChangeMembers());
    ForgetLeft();
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
  if (workers.size() < options_.num_processes()) {
    terminal_->Progress(absl::StrCat("Waiting for workers, ", workers.size(), " of ",
                                     options_.num_processes(), " registered"),
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
  std::error_code ignored;
  if (std::exchange(made_key_file_, false)) {
    std::filesystem::remove(options_.operator_key_file, ignored);
  }
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
