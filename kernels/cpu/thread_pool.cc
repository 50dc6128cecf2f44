// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "proto/base/check.h"

namespace strait::cpu {
namespace {

constexpr int kPausesPerClockRead = 32;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Spins until done() or kSpin has passed; true if done().
template <typename Done>
bool SpinUntil(Done done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (done()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return done();
}

constexpr uint64_t kTaskMask = 0xffffffffu;

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  STRAIT_CHECK(num_threads >= 1 && num_threads <= kMaxThreads);
  threads_.reserve(static_cast<size_t>(num_threads) - 1);
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { WorkerLoop(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  job_ready_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::Run(int64_t num_tasks, void* callable, Invoke invoke) {
  STRAIT_CHECK(num_tasks <= kMaxTasks);
  if (num_tasks <= 0) return;
  if (num_tasks == 1 || threads_.empty()) {
    for (int64_t task = 0; task < num_tasks; ++task) invoke(callable, task, 0);
    return;
  }
  const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  num_tasks_.store(num_tasks, std::memory_order_relaxed);
  callable_.store(callable, std::memory_order_relaxed);
  invoke_.store(invoke, std::memory_order_relaxed);
  num_unfinished_.store(num_tasks, std::memory_order_relaxed);
  next_.store(static_cast<uint64_t>(generation) << 32, std::memory_order_relaxed);
  // Sequentially consistent against num_sleeping_: either this thread sees a sleeper, or the one
  // about to sleep sees the generation.
  generation_.store(generation);
  if (num_sleeping_.load() > 0) {
    { std::lock_guard lock(mutex_); }
    job_ready_.notify_all();
  }
  Work(generation, 0);

  const auto done = [this] { return num_unfinished_.load(std::memory_order_acquire) == 0; };
  if (SpinUntil(done)) return;
  std::unique_lock lock(mutex_);
  caller_sleeps_.store(true);
  job_done_.wait(lock, [this] { return num_unfinished_.load() == 0; });
  caller_sleeps_.store(false);
}

void ThreadPool::Work(uint32_t generation, int thread_index) {
  uint64_t next = next_.load(std::memory_order_acquire);
  while (true) {
    const int64_t num_tasks = num_tasks_.load(std::memory_order_relaxed);
    void* const callable = callable_.load(std::memory_order_relaxed);
    const Invoke invoke = invoke_.load(std::memory_order_relaxed);
    if (next >> 32 != generation) return;
    const int64_t task = static_cast<int64_t>(next & kTaskMask);
    if (task >= num_tasks) return;
    if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
    invoke(callable, task, thread_index);
    if (num_unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
      { std::lock_guard lock(mutex_); }
      job_done_.notify_one();
    }
    next = next_.load(std::memory_order_acquire);
  }
}

bool ThreadPool::WaitForJob(uint32_t seen) {
  const auto ready = [this, seen] { return generation_.load() != seen || stopping_.load(); };
  if (!SpinUntil(ready)) {
    std::unique_lock lock(mutex_);
    ++num_sleeping_;
    job_ready_.wait(lock, ready);
    --num_sleeping_;
  }
  return !stopping_.load();
}

void ThreadPool::WorkerLoop(int thread_index) {
  uint32_t seen = 0;
  while (WaitForJob(seen)) {
    seen = generation_.load();
    Work(seen, thread_index);
  }
}

}  // namespace strait::cpu
