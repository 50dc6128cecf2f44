// SPDX-License-Identifier: Apache-2.0
//
// LocalClusterOptions says which daemons a LocalCluster runs; from them come the daemons' command
// lines.
//
// Thread:  pure functions, but for the machine that they look at.
// Errors:  InvalidArgument: options that do not fit each other, with the numbers and the fix.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/cli/child.h"

namespace strait::cli {

struct LocalClusterOptions {
  std::string model;
  // 0: two stages a pipeline; on GPUs a worker each, and one a pipeline at least.
  uint32_t num_workers = 0;
  uint32_t num_pipelines = 1;
  uint32_t num_spares = 0;  // more workers, which take the place of one that dies
  std::string backend = "cpu";
  std::vector<uint32_t> gpus;  // over which workers are dealt in turn; empty: GPU 0
  std::string http;  // host:port; empty: 127.0.0.1:8000, or a free port when that is taken
  std::string grpc;  // the same, 127.0.0.1:7000
  std::string random_weights;         // a seed; empty: weights are read
  uint32_t worker_threads = 0;        // 0: the available cores shared out
  std::string worker_memory;          // as strait-worker --memory; empty: free memory shared out
  std::vector<std::string> api_keys;  // that clients need one of; empty: none is needed
  std::string operator_key_file;      // empty: one is made, and removed at the end
  bool expects_deaths =
      false;  // of workers, once it has served: none is too many, and none delays a restart
  // Daemons reach each other by a LinkRelay, whose links may be parted and slowed; every second worker's rows
  // go by gRPC, so that links carry rows too.
  bool relays_links = false;
  std::string log_dir;                        // empty: a new folder under the temporary one
  std::vector<std::string> coordinator_args;  // more flags, passed on as they are
  std::vector<std::string> worker_args;

  // After CompleteOptions.
  uint32_t num_stages() const { return num_workers / num_pipelines; }
  uint32_t num_processes() const { return num_workers + num_spares; }
};

// Checks options and fills in what was left to us: workers, threads, memory, GPUs.
absl::Status CompleteOptions(LocalClusterOptions* options);

struct Daemons {
  std::string folder;  // of the programs
  std::string http;    // host:port, both
  std::string grpc;
};

// Where a worker of a cluster that relays its links is told to listen, and what it is told of others.
struct WorkerLinks {
  std::string coordinator;  // host:port, all three
  std::string listen;
  std::string advertise;
};

// REQUIRES of all: the options are complete.
std::string WorkerName(uint32_t index);
ChildSpec CoordinatorSpec(const LocalClusterOptions& options, const Daemons& daemons);
// `links`: null where the options relay none.
ChildSpec WorkerSpec(const LocalClusterOptions& options, const Daemons& daemons, uint32_t index,
                     const WorkerLinks* links);

}  // namespace strait::cli
