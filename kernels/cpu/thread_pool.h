// SPDX-License-Identifier: Apache-2.0
//
// ThreadPool runs the pieces of one kernel on a fixed set of threads.
//
// Owns:    num_threads - 1 threads; the caller of ParallelFor is the last one.
// Thread:  ParallelFor by one thread at a time, never from inside a piece.
// Limits:  kMaxThreads; kMaxTasks pieces a call.
// Why:     decoding makes hundreds of calls per token: between calls a thread spins for kSpin,
//          then sleeps. Several workers share the cores of a laptop, so it never spins longer.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace strait::cpu {

inline constexpr int kMaxThreads = 1024;
inline constexpr int64_t kMaxTasks = (int64_t{1} << 32) - 1;
inline constexpr std::chrono::microseconds kSpin{30};

class ThreadPool {
 public:
  // REQUIRES: 1 <= num_threads <= kMaxThreads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls fn(task, thread_index) once for each task in [0, num_tasks), in any order, on any
  // threads, thread_index in [0, num_threads), and returns when all calls have returned.
  template <typename Fn>
  void ParallelFor(int64_t num_tasks, Fn&& fn) {
    using Callable = std::remove_reference_t<Fn>;
    Run(num_tasks, const_cast<void*>(static_cast<const void*>(&fn)),
        [](void* callable, int64_t task, int thread_index) {
          (*static_cast<Callable*>(callable))(task, thread_index);
        });
  }

 private:
  using Invoke = void (*)(void* callable, int64_t task, int thread_index);

  void Run(int64_t num_tasks, void* callable, Invoke invoke);
  void WorkerLoop(int thread_index);
  void Work(uint32_t generation, int thread_index);
  bool WaitForJob(uint32_t seen);

  // The job. A thread that wakes late may read fields of a later job, but it can only take a piece
  // by changing next_, which carries the generation: then the fields that it read were that job's.
  std::atomic<uint64_t> next_{0};  // generation << 32 | next task
  std::atomic<uint32_t> generation_{0};
  std::atomic<int64_t> num_tasks_{0};
  std::atomic<void*> callable_{nullptr};
  std::atomic<Invoke> invoke_{nullptr};
  std::atomic<int64_t> num_unfinished_{0};

  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;  // only for sleeping and waking
  std::condition_variable job_ready_;
  std::condition_variable job_done_;
  std::vector<std::thread> threads_;
};

}  // namespace strait::cpu
