// SPDX-License-Identifier: Apache-2.0
//
// What every daemon does besides its work: flags that are also environment variables, signals that
// ask it to stop.
//
// Thread:  StopSignals is made on the main thread before any other thread starts.
#pragma once

#include <csignal>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"

namespace strait {

// "--max-step-tokens" is also STRAIT_MAX_STEP_TOKENS.
std::string EnvironmentName(const std::string& flag);

template <class T>
CLI::Option* AddFlag(CLI::App& app, const std::string& flag, T& value, const std::string& help) {
  return app.add_option(flag, value, help)->envname(EnvironmentName(flag))->capture_default_str();
}

inline CLI::Option* AddSwitch(CLI::App& app, const std::string& flag, bool& value,
                              const std::string& help) {
  return app.add_flag(flag, value, help)->envname(EnvironmentName(flag));
}

struct LogFlags {
  std::string level = "info";
  bool json = false;
};

// --log-level, --log-json.
void AddLogFlags(CLI::App& app, LogFlags* flags);

// A daemon's main from its flags on: reads the command line, starts the log under `name` (read
// after the flags; empty: the program's), runs. The exit code: 0, or 1 if `run` failed (logged), 2
// for a flag that makes no sense, and CLI11's own for a command line that cannot be read.
int RunDaemon(CLI::App& app, int argc, char** argv, const LogFlags& log, const std::string& name,
              const std::function<absl::Status()>& run);

// Before gRPC is first used: its own log lines say nothing that ours do not say better.
void QuietGrpc();

// SIGINT and SIGTERM call `stop` once, on a thread of its own; the second signal ends the process
// at once.
class StopSignals {
 public:
  StopSignals();  // blocks both signals for this thread and those that it starts
  ~StopSignals();
  void Watch(std::function<void()> stop);
  // `stop` is not called after this: what it uses may end.
  void Forget();

 private:
  struct State {
    std::mutex mu;
    std::function<void()> stop;  // guarded by mu; empty: called, or forgotten
  };
  sigset_t signals_;
  std::shared_ptr<State> state_ = std::make_shared<State>();
  std::thread thread_;
};

}  // namespace strait
