// SPDX-License-Identifier: Apache-2.0
//
// Disturbances that only a cluster of its own can have: of its processes and of their links.
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/drain_call.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/stress_disturb.h"
#include "coordinator/cli/stress_disturber.h"

namespace strait::cli {
namespace {

constexpr int kShortestStopMs = 50;
constexpr int kShortestTroubleMs = 500;  // of a link
constexpr double kLeaveDrainTimeoutS = 60;
constexpr int kJoinTimeoutMs = 60'000;
constexpr int kJoinLookMs = 200;

class Killer : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    if (SignalChild(PickProcess(), SIGKILL)) context_.log->AddFault("death");
  }
};

class Stopper : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    const int64_t process = PickProcess();
    if (!SignalChild(process, SIGSTOP)) return;
    context_.log->AddFault("stop");
    WaitReadable(context_.end_fd, Between(kShortestStopMs, kLongestStopMs));
    SignalChild(process, SIGCONT);
  }
};

class CoordinatorStopper : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    const pid_t process = context_.own->coordinator_pid();
    if (!SignalChild(process, SIGSTOP)) return;
    // Also near the end: a stop counts only whole.
    const bool cut_short = WaitReadable(context_.cancel_fd, kCoordinatorStopMs);
    SignalChild(process, SIGCONT);
    if (!cut_short) context_.log->AddFault("coordinator stop");
  }
};

class Joiner : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    const std::string name = context_.own->Join();
    if (!WaitUntilKnown(name)) return context_.log->AddFailure("join", "not known in time");
    context_.log->AddFault("join");
    const json::Object status = Status();
    std::vector<const json::Object*> others;
    for (const json::Object* worker : Objects(status, "workers")) {
      if (Text(*worker, "name") != name) others.push_back(worker);
    }
    if (others.empty()) return;
    const json::Object& leaver = *Pick(others);
    const uint64_t way = draws_.Below(3);
    if (way == 0) Drain(static_cast<uint64_t>(Number(leaver, "id")));
    context_.own->Leave(Text(leaver, "name"), way == 2 ? SIGKILL : SIGTERM);
    context_.log->AddFault("leave");
  }

 private:
  bool WaitUntilKnown(const std::string& name) {
    for (int left = kJoinTimeoutMs / kJoinLookMs; left > 0; --left) {
      const json::Object status = Status();
      for (const json::Object* worker : Objects(status, "workers")) {
        if (Text(*worker, "name") == name) return true;
      }
      if (WaitReadable(context_.cancel_fd, kJoinLookMs)) return false;
    }
    return false;
  }
  // It leaves in any case: what cannot be drained is then lost, as by a death.
  void Drain(uint64_t worker) {
    DrainRequest request;
    request.worker = absl::StrCat(worker);
    request.timeout_s = kLeaveDrainTimeoutS;
    (void)CallDrain(operator_client_, request, [](const DrainLine&) {});
  }
};

class Partitioner : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    const std::string worker = PickName();
    if (worker.empty()) return;
    std::vector<std::string> links;
    const uint64_t which = draws_.Below(3);
    if (which != 0) links.push_back(LocalCluster::ControlLink(worker));
    if (which != 1) links.push_back(LocalCluster::DataLink(worker));
    const LinkFlow flow = draws_.Below(2) == 0 ? LinkFlow::kSilent : LinkFlow::kCut;
    bool parted = false;
    for (const std::string& link : links) parted |= context_.own->links()->SetFlow(link, flow);
    if (!parted) return;
    context_.log->AddFault("partition");
    WaitReadable(context_.end_fd, Between(kShortestTroubleMs, kLongestPartitionMs));
    for (const std::string& link : links) context_.own->links()->SetFlow(link, LinkFlow::kOpen);
  }
};

class Slower : public Disturber {
 public:
  Slower(const DisturbContext& context, Draws draws, double bytes_per_s)
      : Disturber(context, draws), bytes_per_s_(bytes_per_s) {}

  void Once() override {
    const std::string worker = PickName();
    if (worker.empty() || !SetRate(worker, bytes_per_s_)) return;
    context_.log->AddFault("bandwidth limit");
    WaitReadable(context_.end_fd, Between(kShortestTroubleMs, kLongestSlowMs));
    SetRate(worker, 0);
  }

 private:
  // Whether there was such a worker.
  bool SetRate(const std::string& worker, double bytes_per_s) {
    LinkRelay& links = *context_.own->links();
    const bool control = links.SetRate(LocalCluster::ControlLink(worker), bytes_per_s);
    return links.SetRate(LocalCluster::DataLink(worker), bytes_per_s) && control;
  }
  const double bytes_per_s_;
};

// The second field after the name, which is in brackets and may hold any: the parent's process id.
bool IsChild(int64_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string text;
  std::getline(file, text);
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos || name_end + 4 > text.size()) return false;
  return std::atoll(text.c_str() + name_end + 4) == getpid();
}

}  // namespace

bool SignalChild(int64_t pid, int signal) {
  if (pid <= 1) return false;
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
  if (fd < 0) return false;
  // What was opened is what was looked at: a process that had taken its number since is no child, or one
  // of ours as well.
  const bool sent = IsChild(pid) && syscall(SYS_pidfd_send_signal, fd, signal, nullptr, 0) == 0;
  close(fd);
  return sent;
}

std::unique_ptr<Disturbance> MakeKiller(const DisturbContext& context, Draws draws) {
  return std::make_unique<Killer>(context, draws);
}
std::unique_ptr<Disturbance> MakeStopper(const DisturbContext& context, Draws draws) {
  return std::make_unique<Stopper>(context, draws);
}
std::unique_ptr<Disturbance> MakeCoordinatorStopper(const DisturbContext& context, Draws draws) {
  return std::make_unique<CoordinatorStopper>(context, draws);
}
std::unique_ptr<Disturbance> MakeJoiner(const DisturbContext& context, Draws draws) {
  return std::make_unique<Joiner>(context, draws);
}
std::unique_ptr<Disturbance> MakePartitioner(const DisturbContext& context, Draws draws) {
  return std::make_unique<Partitioner>(context, draws);
}
std::unique_ptr<Disturbance> MakeSlower(const DisturbContext& context, Draws draws,
                                        double bytes_per_s) {
  return std::make_unique<Slower>(context, draws, bytes_per_s);
}

}  // namespace strait::cli
