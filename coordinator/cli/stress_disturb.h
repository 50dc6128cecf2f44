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
#include "coordinator/cli/local_cluster.h"
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
  LocalCluster* own = nullptr;  // the cluster, where it is this program's own
};

class Disturbance {
 public:
  virtual ~Disturbance() = default;
  virtual void Once() = 0;
};

// ---- Of any cluster ----

// A sequence that runs goes to another pipeline.
std::unique_ptr<Disturbance> MakeMover(const DisturbContext& context, Draws draws);
// All pipelines get another number of stages, 1 to `max_stages`.
std::unique_ptr<Disturbance> MakeReshaper(const DisturbContext& context, Draws draws,
                                          uint32_t max_stages);
// A worker is drained, and a moment later it gets stages again.
std::unique_ptr<Disturbance> MakeDrainer(const DisturbContext& context, Draws draws);

// ---- Of its own cluster. REQUIRES: context.own ----

// A worker process dies by SIGKILL.
std::unique_ptr<Disturbance> MakeKiller(const DisturbContext& context, Draws draws);
// One stands still, by SIGSTOP, for up to kLongestStopMs: some are given up by then, some are not.
inline constexpr int kLongestStopMs = 8'000;
std::unique_ptr<Disturbance> MakeStopper(const DisturbContext& context, Draws draws);
// The coordinator stands still, for kCoordinatorStopMs.
inline constexpr int kCoordinatorStopMs = 20'000;
std::unique_ptr<Disturbance> MakeCoordinatorStopper(const DisturbContext& context, Draws draws);
// A worker that was not there before comes. When it is known, any other one leaves for good: drained
// before, or not, or killed.
std::unique_ptr<Disturbance> MakeJoiner(const DisturbContext& context, Draws draws);
// The link of a worker and the coordinator, or that of a worker and those that dial it, or both, are
// silent or cut for up to kLongestPartitionMs. REQUIRES of this and the next: the cluster relays links.
inline constexpr int kLongestPartitionMs = 10'000;
std::unique_ptr<Disturbance> MakePartitioner(const DisturbContext& context, Draws draws);
// Both links of a worker carry no more than `bytes_per_s` for up to kLongestSlowMs.
inline constexpr int kLongestSlowMs = 10'000;
std::unique_ptr<Disturbance> MakeSlower(const DisturbContext& context, Draws draws,
                                        double bytes_per_s);

// About every `every_s` seconds, until the end.
void DisturbUntil(const DisturbContext& context, Disturbance& disturbance, double every_s,
                  Draws draws);

// Sends a signal to a process if it is a child of this one; whether it was sent.
bool SignalChild(int64_t pid, int signal);

}  // namespace strait::cli
