// SPDX-License-Identifier: Apache-2.0
//
// DriveBeside runs a measurement on a thread of its own while the main thread looks after signals
// and, where there is one, the cluster that the program started.
//
// Thread:  the main thread; EventFd: any.
// Why:     a cluster is supervised by the main thread alone (local_cluster.h), and a measurement
//          blocks.
#pragma once

#include <sys/eventfd.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "coordinator/cli/child.h"
#include "coordinator/cli/local_cluster.h"
#include "proto/base/json.h"

namespace strait::cli {

// A descriptor that is readable once Set was called, and stays so.
class EventFd {
 public:
  EventFd();
  ~EventFd();
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;

  int fd() const { return fd_; }
  void Set();
  bool IsSet() const;

 private:
  const int fd_;
};

struct Driven {
  absl::Status watched;  // the cluster's end, or Cancelled
  absl::Status worked;   // what the measurement returned
};

// Returns when `work` has. `cancel` is set when a signal comes or the cluster ends; `work` must heed
// it. `cluster` may be null.
Driven DriveBeside(LocalCluster* cluster, Signals& signals, EventFd& cancel,
                   const std::function<absl::Status()>& work);

// Waits at most `timeout_ms` for the descriptor; whether it is readable.
bool WaitReadable(int fd, int timeout_ms);

// To a file, or to stdout for "-".
absl::Status WriteJson(const std::string& path, const json::Object& report);

}  // namespace strait::cli
