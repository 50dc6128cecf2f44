// SPDX-License-Identifier: Apache-2.0
//
// WorkerProcess is a worker: a WorkerCore, which decides, with the threads, sockets and clock that it
// needs.
//
// Owns:    the core, the transports of hidden states and of rows, the link to the coordinator, a loader thread.
// Borrows: the Backend; it outlives the process.
// Thread:  Run is the loop thread and owns all state; RPC and loader threads only enqueue. Stop:
//          any.
// Errors:  as WorkerCore.
// Limits:  kEventQueue events waiting, then streams are read no further.
// Why:     loads run on a thread of their own, so that the other stages of this worker go on
//          stepping. The loop does not sleep while a step computes: it handles what comes, begins
//          the next step as soon as it may, and tells of an end within microseconds.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/model/stage_memory.h"
#include "worker/backend.h"
#include "worker/core/worker_core.h"
#include "worker/transport/nccl_api.h"

namespace strait {

inline constexpr size_t kEventQueue = 8192;

struct WorkerOptions {
  std::string coordinator_address = "127.0.0.1:7000";
  std::string listen_address = "127.0.0.1:0";  // of the data server
  std::string advertise_address;               // what other workers dial; empty: the bound address
  std::string name = "worker";
  std::string backend_name = "cpu";
  uint64_t memory_bytes = 0;
  uint32_t num_threads = 1;
  uint64_t model_fingerprint = 0;
  uint64_t weights_fingerprint = 0;       // worker/checkpoint/fingerprint.h
  uint32_t cache_row_bytes = 0;           // of one token in one layer
  std::optional<StageCosts> stage_costs;  // absent: as on the CPU
  NcclOffer nccl;
  bool shares_row_memory = true;  // with workers of this host; else rows go by gRPC everywhere
  bool links_rows = false;        // from device to device; REQUIRES: nccl, with a gate
  bool links_one_device = false;  // also with workers of the same device
  uint64_t drain_timeout_us = 0;  // for which it serves on after Leave; 0: it does not ask
  WorkerCoreOptions core;
};

class WorkerProcess {
 public:
  // Unavailable: the data address is taken.
  static absl::StatusOr<std::unique_ptr<WorkerProcess>> Create(WorkerOptions options,
                                                               Backend* backend);
  ~WorkerProcess();

  // Returns when the coordinator says Shutdown, or after Stop or Leave.
  void Run();
  void Stop();
  // Asks the coordinator to drain it, and serves on until Shutdown comes, the coordinator goes or
  // drain_timeout_us is over.
  void Leave();

  // Whether a load is under way that the destructor would wait for.
  bool loading() const;
  const std::string& data_address() const;

 private:
  class Impl;
  explicit WorkerProcess(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace strait
