// SPDX-License-Identifier: Apache-2.0
//
// LocalCluster runs a coordinator and its workers as processes on this machine, and restarts
// workers that die. `strait up` is this and nothing else; `strait bench --model DIR` measures one.
//
// Owns:    the child processes, their log files' folder (kept when something failed), the file of the
//          operator key that it made.
// Thread:  the main thread only: see Spawn; but Join, Leave, coordinator_pid and links: any, while Supervise
//          runs.
// Errors:  InvalidArgument (options that do not fit each other, with the numbers and the fix),
//          Unavailable (a daemon that ends; the text carries the last lines of its log), Cancelled
//          (SIGINT, SIGTERM).
// Limits:  kMaxRapidDeaths deaths of one worker, each within kHealthyAfterMs of its start → error.
// Why:     one poll over a signal descriptor and deadlines: no thread, no busy loop.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/child.h"
#include "coordinator/cli/cluster_options.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/link_relay.h"
#include "coordinator/cli/terminal.h"
#include "proto/base/json.h"

namespace strait::cli {

inline constexpr int kMaxRapidDeaths = 3;
inline constexpr int kHealthyAfterMs = 30'000;
inline constexpr uint16_t kDefaultHttpPort = 8000;
inline constexpr uint16_t kDefaultGrpcPort = 7000;

class LocalCluster {
 public:
  // Checks options, chooses ports, starts the daemons. `terminal` and `signals` must outlive the
  // cluster.
  static absl::StatusOr<std::unique_ptr<LocalCluster>> Start(LocalClusterOptions options,
                                                             Terminal* terminal, Signals* signals);
  // Stops what runs.
  ~LocalCluster();

  // Returns when the cluster serves, showing progress until then.
  absl::Status WaitReady();
  // Restarts workers that die, until `done_fd` (may be -1) is readable: OK; a signal: Cancelled.
  absl::Status Supervise(int done_fd);
  // Another worker process, which is started a moment later; its name.
  std::string Join();
  // The worker of this name ends by this signal a moment later, and is not started again.
  void Leave(std::string name, int signal);
  // SIGTERM to all, SIGKILL to those that stay; returns when none runs.
  void Stop();

  std::string http_url() const { return "http://" + http_; }
  const std::string& grpc_address() const { return grpc_; }
  const std::string& log_dir() const { return options_.log_dir; }
  uint32_t num_workers() const { return options_.num_workers; }
  uint32_t num_stages() const { return options_.num_stages(); }
  pid_t coordinator_pid() const { return coordinator_pid_; }
  // Null unless the options relay links. Of each worker there are two: ControlLink and DataLink of its name.
  LinkRelay* links() { return relay_.get(); }
  static std::string ControlLink(const std::string& worker);  // it and the coordinator
  static std::string DataLink(const std::string& worker);     // it and workers that dial it
  // Empty: none could be made, and the elastic verbs are refused.
  const std::string& operator_key_file() const { return options_.operator_key_file; }

 private:
  using Clock = std::chrono::steady_clock;
  enum class Wake { kTimeout, kDone };

  struct Process {
    std::string name;
    ChildSpec spec;
    pid_t pid = 0;  // 0: not running
    Clock::time_point started;
    Clock::time_point restart_at;
    bool restart_wanted = false;
    bool leaves = false;  // for good
    int rapid_deaths = 0;
  };

  LocalCluster(LocalClusterOptions options, Terminal* terminal, Signals* signals);

  absl::Status Launch();
  void MakeKeyFile(uint16_t http_port);
  absl::Status StartProcess(Process& process);
  absl::StatusOr<Process> MakeWorker(uint32_t index);
  void WakeMembers();
  // What Join and Leave asked for.
  absl::Status ChangeMembers();
  void ForgetLeft();
  // Sleeps at most `max_ms`; handles signals, deaths and due restarts.
  absl::StatusOr<Wake> Step(int max_ms, int done_fd);
  absl::Status Reap();
  absl::Status OnExit(Process& process, int wait_status);
  absl::Status RestartDue();
  bool Healthy();  // all pipelines serve
  absl::StatusOr<json::Value> FetchStatus();
  void ShowLoading();
  absl::Status Death(const Process& process, const std::string& how) const;

  LocalClusterOptions options_;
  Terminal* const terminal_;
  Signals* const signals_;
  std::string http_;
  std::string grpc_;
  bool made_log_dir_ = false;
  bool made_key_file_ = false;
  bool failed_ = false;
  bool was_ready_ = false;
  bool recovering_ = false;  // a worker was restarted and the cluster does not serve yet
  std::string shown_error_;  // the last one told while loading
  std::unique_ptr<HttpClient> client_;
  Daemons daemons_;
  Process coordinator_;
  std::vector<Process> workers_;
  pid_t coordinator_pid_ = 0;         // constant after Start, as relay_ is
  std::unique_ptr<LinkRelay> relay_;  // may be null

  const int members_fd_;  // readable: there is something to do for Join or Leave
  std::mutex members_mu_;
  uint32_t num_named_ = 0;         // guarded by members_mu_, as the two below
  std::vector<uint32_t> joining_;  // indices of their names
  std::vector<std::pair<std::string, int>> leaving_;
};

}  // namespace strait::cli
