// SPDX-License-Identifier: Apache-2.0
//
// Disturbances are what `strait stress` does to a cluster while clients read: each kind is one class
// that does it once, at random; DisturbUntil does it again and again.
//
// Thread:  each disturbance is used by one thread.
// Errors:  into the log, by kind and reason: that something could not be is no violation.
// Why:     signals go by pidfd, and to children of this process alone: a process id that a status told
//          may by now be somebody else's.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "coordinator/cli/http_client.h"
#include "coordinator/cli/mix.h"
#include "coordinator/cli/stress_log.h"

namespace strait::cli {

struct DisturbContext {
  Url url;
  std::string api_key;
  std::string operator_key;
  int cancel_fd = -1;  // readable: all ends at once
  int end_fd = -1;     // readable: nothing more begins
  StressLog* log = nullptr;
};

class Disturbance {
 public:
  virtual ~Disturbance() = default;
  virtual void Once() = 0;
};

// A sequence that runs goes to another pipeline.
std::unique_ptr<Disturbance> MakeMover(const DisturbContext& context, Draws draws);
// A worker process, child of this one, dies by SIGKILL.
std::unique_ptr<Disturbance> MakeKiller(const DisturbContext& context, Draws draws);
// One stands still, by SIGSTOP, for up to kLongestStopMs: some are given up by then, some are not.
inline constexpr int kLongestStopMs = 8'000;
std::unique_ptr<Disturbance> MakeStopper(const DisturbContext& context, Draws draws);
// All pipelines get another number of stages, 1 to `max_stages`.
std::unique_ptr<Disturbance> MakeReshaper(const DisturbContext& context, Draws draws,
                                          uint32_t max_stages);

// A worker is drained, and a moment later it gets stages again.
std::unique_ptr<Disturbance> MakeDrainer(const DisturbContext& context, Draws draws);

// About every `every_s` seconds, until the end.
void DisturbUntil(const DisturbContext& context, Disturbance& disturbance, double every_s,
                  Draws draws);

// Sends a signal to a process if it is a child of this one; whether it was sent.
bool SignalChild(int64_t pid, int signal);

}  // namespace strait::cli
