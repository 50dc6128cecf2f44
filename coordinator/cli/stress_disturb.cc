// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_disturb.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/drain_call.h"
#include "coordinator/cli/drive.h"
#include "coordinator/cli/move_call.h"
#include "coordinator/cli/status_json.h"
#include "coordinator/cli/stress_disturber.h"
#include "proto/base/json.h"

namespace strait::cli {
namespace {

constexpr double kMoveTimeoutS = 60;
constexpr double kDrainTimeoutS = 120;
constexpr int kLongestOutMs = 2'000;  // that a worker stays drained
constexpr int kReshapeTimeoutMs = 180'000;
// A scale waits for pipelines that serve, which after a death takes a moment.
constexpr int kReshapeTries = 20;
constexpr int kReshapeAgainMs = 500;
constexpr int kShortestWaitMs = 5;  // the status that is drawn from is no newer than that

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
    const std::string body = absl::StrCat("{\"stages\":", Pick(others), "}");
    for (int tries = kReshapeTries;; --tries) {
      const absl::StatusOr<HttpReply> reply =
          operator_client_.Post("/strait/scale", body, kReshapeTimeoutMs);
      if (absl::IsCancelled(reply.status())) return;
      if (reply.ok() && reply->status == 200) return context_.log->AddFault("reshape");
      const std::string why = reply.ok() ? reply->ErrorCode() : "no answer";
      if (tries == 1 || why != "not_now" || WaitReadable(context_.end_fd, kReshapeAgainMs)) {
        return context_.log->AddFailure("reshape", why);
      }
    }
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

}  // namespace

std::unique_ptr<Disturbance> MakeMover(const DisturbContext& context, Draws draws) {
  return std::make_unique<Mover>(context, draws);
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
