// SPDX-License-Identifier: Apache-2.0
//
// StageLoader loads stages one after the other on a thread of its own.
//
// Borrows: the Backend.
// Thread:  Enqueue, CancelUpTo: loop thread. `done` and `progress` are called on the loader's
//          thread (progress on any) and must only enqueue. The destructor waits for the load under
//          way.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "absl/status/statusor.h"
#include "proto/rpc/queue.h"
#include "worker/core/worker_core.h"

namespace strait {

class StageLoader {
 public:
  using Progress = std::function<void(const LoadOrder&, uint64_t done, uint64_t total)>;
  using Done = std::function<void(const LoadOrder&, absl::StatusOr<std::unique_ptr<StageModel>>)>;

  StageLoader(Backend* backend, Progress progress, Done done);
  ~StageLoader();

  void Enqueue(LoadOrder order);
  // Orders up to this serial that wait are answered Cancelled instead of loaded.
  void CancelUpTo(uint64_t serial) { cancelled_ = serial; }
  bool busy() const { return busy_; }

 private:
  void Run();

  Backend* const backend_;
  const Progress progress_;
  const Done done_;
  std::atomic<uint64_t> cancelled_ = 0;
  std::atomic<bool> busy_ = false;
  std::atomic<bool> stop_ = false;
  BoundedQueue<LoadOrder> orders_;
  std::thread thread_;
};

}  // namespace strait
