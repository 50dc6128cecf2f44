// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/drive.h"

#include <poll.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"

namespace strait::cli {
namespace {

// Waits for the end of the measurement when there is no own cluster to look after.
absl::Status WaitForEnd(Signals& signals, int done_fd) {
  for (;;) {
    pollfd fds[2] = {{signals.fd(), POLLIN, 0}, {done_fd, POLLIN, 0}};
    poll(fds, 2, -1);
    while (signals.Take()) return absl::CancelledError("cancelled");
    if (fds[1].revents != 0) return absl::OkStatus();
  }
}

}  // namespace

EventFd::EventFd() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
EventFd::~EventFd() { close(fd_); }

void EventFd::Set() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(fd_, &one, sizeof(one));
}

bool EventFd::IsSet() const { return WaitReadable(fd_, 0); }

bool WaitReadable(int fd, int timeout_ms) {
  pollfd entry = {fd, POLLIN, 0};
  return poll(&entry, 1, timeout_ms) > 0;
}

Driven DriveBeside(LocalCluster* cluster, Signals& signals, EventFd& cancel,
                   const std::function<absl::Status()>& work) {
  EventFd done;
  Driven driven;
  std::thread driver([&] {
    driven.worked = work();
    done.Set();
  });
  driven.watched = cluster ? cluster->Supervise(done.fd()) : WaitForEnd(signals, done.fd());
  if (!driven.watched.ok()) cancel.Set();
  driver.join();
  return driven;
}

absl::Status WriteJson(const std::string& path, const json::Object& report) {
  const std::string text = boost::json::serialize(report) + "\n";
  if (path == "-") {
    std::fputs(text.c_str(), stdout);
    return absl::OkStatus();
  }
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) return absl::UnavailableError(absl::StrCat("cannot write ", path));
  return absl::OkStatus();
}

}  // namespace strait::cli
