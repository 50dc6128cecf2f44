// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_disturb.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/drain_call.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/move_call.h"
#include "coordinator/cli/status_json.h"
#include "proto/base/json.h"

namespace strait::cli {
namespace {

constexpr int kStatusTimeoutMs = 30'000;
constexpr double kMoveTimeoutS = 60;
constexpr double kDrainTimeoutS = 120;
constexpr int kLongestOutMs = 2'000;  // that a worker stays drained
constexpr int kReshapeTimeoutMs = 180'000;
constexpr int kShortestWaitMs = 5;  // the status that is drawn from is no newer than that
constexpr int kShortestStopMs = 50;

// What all of them need: a client of each kind, the status, chance.
class Disturber : public Disturbance {
 public:
  Disturber(const DisturbContext& context, Draws draws)
      : context_(context),
        draws_(draws),
        client_(context.url, context.api_key, context.cancel_fd),
        operator_client_(context.url, context.operator_key, context.cancel_fd) {}

 protected:
  // Empty: there is no answer, and so nothing to do now.
  json::Object Status() {
    const absl::StatusOr<HttpReply> reply = client_.Get("/strait/status", kStatusTimeoutMs);
    if (!reply.ok() || reply->status != 200) return {};
    absl::StatusOr<json::Value> status = json::Parse(reply->body, "/strait/status");
    return status.ok() && status->is_object() ? std::move(status->get_object()) : json::Object();
  }
  template <class T>
  const T& Pick(const std::vector<T>& from) {
    return from[draws_.Below(from.size())];
  }
  // A worker's process; 0: none.
  int64_t PickProcess() {
    const json::Object status = Status();
    const auto workers = Objects(status, "workers");
    return workers.empty() ? 0 : static_cast<int64_t>(Number(*Pick(workers), "process_id"));
  }

  const DisturbContext context_;
  Draws draws_;
  HttpClient client_;
  HttpClient operator_client_;
};

class Mover : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    const json::Object status = Status();
    std::vector<const json::Object*> running;
    for (const json::Object* sequence : Objects(status, "sequences")) {
      if (Number(*sequence, "pipeline_id") > 0) running.push_back(sequence);
    }
    if (running.empty()) return;
    const json::Object& sequence = *Pick(running);
    std::vector<uint64_t> others;
    for (const json::Object* pipeline : Objects(status, "pipelines")) {
      const double id = Number(*pipeline, "id");
      if (Text(*pipeline, "state") == "active" && id != Number(sequence, "pipeline_id")) {
        others.push_back(static_cast<uint64_t>(id));
      }
    }
    if (others.empty()) return;
    MoveRequest request;
    request.sequence = absl::StrCat(static_cast<uint64_t>(Number(sequence, "id")));
    request.to = Pick(others);
    request.timeout_s = kMoveTimeoutS;
    const absl::StatusOr<MoveOutcome> outcome =
        CallMigrate(operator_client_, request, [](const MoveLine&) {});
    if (outcome.ok()) {
      context_.log->AddMove(Text(sequence, "request"),
                            static_cast<uint32_t>(Number(sequence, "choice")), *outcome);
    } else if (!absl::IsCancelled(outcome.status())) {
      context_.log->AddFailure("migration", "no answer");
    }
  }
};

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
    const int range = kLongestStopMs - kShortestStopMs;
    WaitReadable(context_.end_fd, kShortestStopMs + static_cast<int>(draws_.Below(range)));
    SignalChild(process, SIGCONT);
  }
};

class Reshaper : public Disturber {
 public:
  Reshaper(const DisturbContext& context, Draws draws, uint32_t max_stages)
      : Disturber(context, draws), max_stages_(max_stages) {}

  void Once() override {
    const json::Object status = Status();
    const json::Value* wanted = json::Find(status, "wanted");
    if (wanted == nullptr || !wanted->is_object() || max_stages_ < 2) return;
    const auto now = static_cast<uint32_t>(Number(wanted->get_object(), "stages"));
    std::vector<uint32_t> others;
    for (uint32_t n = 1; n <= max_stages_; ++n) {
      if (n != now) others.push_back(n);
    }
    const absl::StatusOr<HttpReply> reply = operator_client_.Post(
        "/strait/scale", absl::StrCat("{\"stages\":", Pick(others), "}"), kReshapeTimeoutMs);
    if (absl::IsCancelled(reply.status())) return;
    if (reply.ok() && reply->status == 200) return context_.log->AddFault("reshape");
    context_.log->AddFailure("reshape", reply.ok() ? reply->ErrorCode() : "no answer");
  }

 private:
  const uint32_t max_stages_;
};

class Drainer : public Disturber {
 public:
  using Disturber::Disturber;

  void Once() override {
    const json::Object status = Status();
    const auto workers = Objects(status, "workers");
    if (workers.empty()) return;
    DrainRequest request;
    request.worker = absl::StrCat(static_cast<uint64_t>(Number(*Pick(workers), "id")));
    request.timeout_s = kDrainTimeoutS;
    const auto nothing = [](const DrainLine&) {};
    const absl::StatusOr<DrainOutcome> outcome = CallDrain(operator_client_, request, nothing);
    if (absl::IsCancelled(outcome.status())) return;
    if (!outcome.ok()) return context_.log->AddFailure("drain", "no answer");
    if (!outcome->done) return context_.log->AddFailure("drain", outcome->code);
    context_.log->AddFault("drain");
    WaitReadable(context_.end_fd, static_cast<int>(draws_.Below(kLongestOutMs)));
    // One that died meanwhile comes back as another.
    request.undo = true;
    (void)CallDrain(operator_client_, request, nothing);
  }
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

std::unique_ptr<Disturbance> MakeMover(const DisturbContext& context, Draws draws) {
  return std::make_unique<Mover>(context, draws);
}
std::unique_ptr<Disturbance> MakeKiller(const DisturbContext& context, Draws draws) {
  return std::make_unique<Killer>(context, draws);
}
std::unique_ptr<Disturbance> MakeStopper(const DisturbContext& context, Draws draws) {
  return std::make_unique<Stopper>(context, draws);
}
std::unique_ptr<Disturbance> MakeDrainer(const DisturbContext& context, Draws draws) {
  return std::make_unique<Drainer>(context, draws);
}
std::unique_ptr<Disturbance> MakeReshaper(const DisturbContext& context, Draws draws,
                                          uint32_t max_stages) {
  return std::make_unique<Reshaper>(context, draws, max_stages);
}

void DisturbUntil(const DisturbContext& context, Disturbance& disturbance, double every_s,
                  Draws draws) {
  for (;;) {
    // From half to one and a half of it, so that kinds do not march in step.
    const double share = 0.5 + static_cast<double>(draws.Below(1001)) / 1000;
    const int wait_ms = std::max(kShortestWaitMs, static_cast<int>(every_s * share * 1000));
    if (WaitReadable(context.end_fd, wait_ms) || WaitReadable(context.cancel_fd, 0)) return;
    disturbance.Once();
  }
}

}  // namespace strait::cli
