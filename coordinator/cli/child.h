// SPDX-License-Identifier: Apache-2.0
//
// Spawn starts a program as a child that cannot outlive us, with its output in a log file; Signals
// turns SIGINT, SIGTERM, SIGHUP and SIGCHLD into a descriptor to poll.
//
// Thread:  Spawn: a thread that lives as long as the process (the kernel ties the child to that
//          thread). Signals: create in main before any other thread starts.
// Errors:  Unavailable (fork, exec), with what failed and the path.
// Why:     a child has a process group of its own, so that Ctrl-C reaches us alone and we stop
//          children in order; and it asks the kernel to kill it when we die, so that nothing is
//          left behind even then.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait::cli {

struct ChildSpec {
  std::vector<std::string> argv;  // argv[0]: path of the program
  std::string log_path;           // appended to
  // NAME=value, besides what this process has: for what a command line would show to everyone.
  std::vector<std::string> environment;
};

absl::StatusOr<pid_t> Spawn(const ChildSpec& spec);

// "exit code 1", "signal 9 (Killed)".
std::string DescribeExit(int wait_status);

// The last lines of a file, at most 16 KiB of them; empty when it cannot be read.
std::string TailOf(const std::string& path, size_t num_lines);

// The folder of the running program, where its sister programs lie.
absl::StatusOr<std::string> ProgramFolder();

// Whether host:port could be listened on now.
bool PortIsFree(const std::string& host, uint16_t port);
// A port that nobody listens on now, of those that no process gets without asking for it by number:
// the cluster's own workers listen on any port, and may start before its user has taken it.
absl::StatusOr<uint16_t> FreePort(const std::string& host);

class Signals {
 public:
  // Blocks the signals in this thread and in those it starts later.
  static absl::StatusOr<Signals> Create();
  ~Signals();
  Signals(Signals&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Signals& operator=(Signals&&) = delete;

  int fd() const { return fd_; }
  // The next pending signal, if any; does not block.
  std::optional<int> Take();

 private:
  explicit Signals(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace strait::cli
