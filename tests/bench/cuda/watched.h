// SPDX-License-Identifier: Apache-2.0
//
// Runs a benchmark of several ways in a process of its own, so that one that fails or hangs takes no
// other with it: it is named, and the rest goes on without it in a new process.
//
// Thread:  one. Call before the first call of the CUDA runtime: its state does not survive a fork.
// Errors:  Watch returns 1 if any way failed, else what the child returned.
// Limits:  kMostFailed ways.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <new>
#include <string>
#include <thread>

namespace strait::cuda {

// Shared with the child, which tells here what it does.
class Watched {
 public:
  static constexpr int kMostFailed = 16;

  // `what` is done now, of the shape whose index is `at`: a sign of life. way: what to leave out if it
  // fails; empty: nothing can be.
  void Doing(int at, const std::string& what, const std::string& way) {
    at_ = at;
    Copy(what, what_);
    Copy(way, way_);
    ++beats_;
  }
  // Shapes before it are done; ways that failed are left out.
  int first() const { return first_; }
  bool Failed(const std::string& way) const {
    return std::any_of(failed_, failed_ + num_failed_, [&](const char* one) { return way == one; });
  }

  // run(watched) in child after child until one ends by itself.
  template <class Run>
  static int Watch(int patience_s, const Run& run) {
    void* const memory =
        mmap(nullptr, sizeof(Watched), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("mmap");
      return 1;
    }
    auto& watched = *new (memory) Watched;
    for (;;) {
      std::fflush(stdout);
      const pid_t child = fork();
      if (child < 0) {
        std::perror("fork");
        return 1;
      }
      if (child == 0) {
        const int result = run(watched);
        watched.ended_ = true;
        std::fflush(stdout);
        _exit(result);
      }
      const std::string end = watched.WaitFor(child, patience_s);
      if (watched.ended_) return watched.num_failed_ > 0 ? 1 : watched.result_;
      std::fprintf(stderr, "FAILED: %s: %s; shapes done: %d\n", watched.what_, end.c_str(),
                   watched.at_);
      if (watched.way_[0] == 0 || watched.num_failed_ == kMostFailed) return 1;
      Copy(watched.way_, watched.failed_[watched.num_failed_++]);
      watched.first_ = watched.at_;
      Copy("", watched.way_);
    }
  }

 private:
  template <size_t kSize>
  static void Copy(const std::string& from, char (&to)[kSize]) {
    std::snprintf(to, kSize, "%s", from.c_str());
  }

  // How the child ended.
  std::string WaitFor(pid_t child, int patience_s) {
    using Clock = std::chrono::steady_clock;
    uint32_t beats = beats_;
    Clock::time_point since = Clock::now();
    bool killed = false;
    for (;;) {
      int status = 0;
      if (waitpid(child, &status, WNOHANG) == child) {
        if (killed) return "no sign of life for " + std::to_string(patience_s) + " s";
        if (WIFSIGNALED(status)) return "signal " + std::to_string(WTERMSIG(status));
        result_ = WEXITSTATUS(status);
        return "ended with " + std::to_string(result_);
      }
      if (beats_ != beats) {
        beats = beats_;
        since = Clock::now();
      } else if (!killed && Clock::now() - since > std::chrono::seconds(patience_s)) {
        kill(child, SIGKILL);
        killed = true;
      } else if (killed && Clock::now() - since > std::chrono::seconds(patience_s + 20)) {
        // Not to be had back from the driver: the device is of no use to another child either.
        std::fprintf(stderr, "FAILED: %s: cannot be stopped\n", what_);
        std::fflush(stdout);
        _exit(1);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }

  std::atomic<uint32_t> beats_{0};
  std::atomic<bool> ended_{false};
  int at_ = 0;
  int first_ = 0;
  int result_ = 0;
  int num_failed_ = 0;
  char what_[128] = "start";
  char way_[64] = "";
  char failed_[kMostFailed][64] = {};
};

}  // namespace strait::cuda
