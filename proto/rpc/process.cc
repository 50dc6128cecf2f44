// SPDX-License-Identifier: Apache-2.0
#include "proto/rpc/process.h"

#include <pthread.h>
#include <unistd.h>

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "proto/base/log.h"

namespace strait {
namespace {

constexpr int kFailedExit = 1;
constexpr int kBadFlagExit = 2;
constexpr int kSecondSignalExit = 130;

}  // namespace

std::string EnvironmentName(const std::string& flag) {
  std::string name = "STRAIT_";
  for (char c : flag.substr(flag.find_first_not_of('-'))) {
    name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return name;
}

void AddLogFlags(CLI::App& app, LogFlags* flags) {
  AddFlag(app, "--log-level", flags->level, "debug, info, warning or error");
  AddSwitch(app, "--log-json", flags->json, "Log JSON lines");
}

int RunDaemon(CLI::App& app, int argc, char** argv, const LogFlags& log, const std::string& name,
              const std::function<absl::Status()>& run) {
  CLI11_PARSE(app, argc, argv);
  LogLevel level;
  if (absl::Status parsed = ParseLogLevel(log.level, &level); !parsed.ok()) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), std::string(parsed.message()).c_str());
    return kBadFlagExit;
  }
  InitLog(name.empty() ? app.get_name() : name, level, log.json);
  if (absl::Status status = run(); !status.ok()) {
    Log(LogLevel::kError, "cannot start", {{"why", status}});
    return kFailedExit;
  }
  return 0;
}

void QuietGrpc() { setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0); }

StopSignals::StopSignals() {
  sigemptyset(&signals_);
  sigaddset(&signals_, SIGINT);
  sigaddset(&signals_, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

void StopSignals::Watch(std::function<void()> stop) {
  state_->stop = std::move(stop);
  thread_ = std::thread([signals = signals_, state = state_] {
    int which = 0;
    sigwait(&signals, &which);
    {
      std::lock_guard lock(state->mu);
      if (state->stop) std::exchange(state->stop, nullptr)();
    }
    sigwait(&signals, &which);
    _exit(kSecondSignalExit);
  });
}

void StopSignals::Forget() {
  std::lock_guard lock(state_->mu);
  state_->stop = nullptr;
}

StopSignals::~StopSignals() {
  // The thread waits in sigwait, which nothing but a signal ends; the process is about to end.
  if (thread_.joinable()) thread_.detach();
}

}  // namespace strait
