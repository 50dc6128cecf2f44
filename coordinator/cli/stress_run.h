// SPDX-License-Identifier: Apache-2.0
//
// Stress runs a load twice: undisturbed, which gives each request's reference, and again and again
// while the cluster is disturbed.
//
// Owns:    its threads: one a client, one a disturbance.
// Borrows: the terminal, the cluster.
// Thread:  Drive: one, which watches over the streams; Report after it.
// Errors:  Drive: those that leave nothing to judge: no server, no operator key, a reference that
//          cannot be made. A stream that differs is a violation, in the report.
// Limits:  a stream that is silent for kSilenceS is given up, and a violation.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/http_client.h"
#include "coordinator/cli/stress_disturb.h"
#include "coordinator/cli/stress_load.h"
#include "coordinator/cli/stress_log.h"
#include "coordinator/cli/terminal.h"
#include "proto/base/json.h"

namespace strait::cli {

inline constexpr double kSilenceS = 60;

struct StressOptions {
  LoadOptions load;  // max_rows 0: 2,048, or the model's context; vocabulary 0: the model's
  uint32_t clients = 4;
  double seconds = 0;       // 0: no end by time
  uint64_t migrations = 0;  // that end it; 0: no end by them
  uint32_t movers = 2;
  double move_every_s = 0.2;  // of each mover
  double kill_every_s = 0;    // 0, here and below: never
  double stop_every_s = 0;
  double reshape_every_s = 0;
  double drain_every_s = 0;
  double partition_every_s = 0;
  double slow_every_s = 0;
  double slow_bytes_per_s = 1e6;  // of a slow link
  double join_every_s = 0;
  double coordinator_stop_every_s = 0;
};

class Stress {
 public:
  // `own`: the cluster, where it is this program's; may be null, then what needs it is not done.
  Stress(StressOptions options, Url url, std::string api_key, std::string operator_key,
         LocalCluster* own, Terminal* terminal, int cancel_fd);

  absl::Status Drive();

  json::Object Report() const;
  const StressLog& log() const { return log_; }

 private:
  // A stream under way, as the watching thread sees it.
  struct Watched {
    EventFd give_up;
    std::atomic<int64_t> last_sign_us = 0;
    std::atomic<bool> silent = false;
  };

  absl::Status Prepare();
  absl::Status CheckKey();
  absl::Status MakeReferences();
  absl::Status Disturb();
  // The disturbances that were asked for, each run by a thread.
  void StartDisturbances(const DisturbContext& context);
  void RunClient(uint32_t client);

  absl::StatusOr<json::Object> FetchStatus();
  StreamOutcome Run(const std::string& body, uint32_t choices);
  // Gives silent streams up; false: all is cancelled, and they all are.
  bool Watch();
  // Watches over the streams until none of these runs any more.
  void WatchWhile(const std::atomic<uint32_t>& running, const std::function<void()>& show);
  int64_t NowUs() const;
  bool Cancelled() const { return WaitReadable(cancel_fd_, 0); }

  // Constant after Prepare.
  StressOptions options_;
  const Url url_;
  const std::string api_key_;
  const std::string operator_key_;
  LocalCluster* const own_;
  Terminal* const terminal_;
  const int cancel_fd_;
  const StressClock::time_point start_ = StressClock::now();
  std::vector<StressRequest> requests_;
  uint32_t max_stages_ = 0;
  std::vector<StreamOutcome> references_;  // after MakeReferences

  StressLog log_{start_};
  std::atomic<bool> ending_ = false;  // clients begin nothing more
  std::vector<std::thread> disturbers_;
  double disturbed_s_ = 0;
  json::Object stats_before_, stats_after_;

  std::mutex mu_;  // guards the list: clients add and remove, Drive's thread looks
  std::list<Watched> watched_;
};

}  // namespace strait::cli
