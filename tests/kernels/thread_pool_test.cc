// SPDX-License-Identifier: Apache-2.0
//
// Defends: every task runs exactly once before ParallelFor returns, with any number of threads,
// whether the threads spin, sleep or are late.
#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace strait::cpu {
namespace {

TEST(ThreadPoolTest, RunsEveryTaskOnce) {
  for (int num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (int64_t num_tasks : {0, 1, 2, 3, 7, 100, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(num_tasks));
      std::atomic<bool> bad_thread = false;
      pool.ParallelFor(num_tasks, [&](int64_t task, int thread) {
        ++runs[static_cast<size_t>(task)];
        if (thread < 0 || thread >= num_threads) bad_thread = true;
      });
      for (auto& count : runs) EXPECT_EQ(count.load(), 1);
      EXPECT_FALSE(bad_thread);
    }
  }
}

// Jobs back to back: a thread that wakes during a later job must neither run a task of the old one
// nor take one twice.
TEST(ThreadPoolTest, JobsBackToBack) {
  ThreadPool pool(4);
  for (int64_t job = 0; job < 20000; ++job) {
    int64_t results[5] = {};  // plain memory: ParallelFor's return must order it
    pool.ParallelFor(5, [&](int64_t task, int) { results[task] = job + task; });
    for (int64_t task = 0; task < 5; ++task) ASSERT_EQ(results[task], job + task);
  }
}

TEST(ThreadPoolTest, WakesSleepers) {
  ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(20 * kSpin);  // long enough for the threads to sleep
    std::atomic<int> sum = 0;
    pool.ParallelFor(3, [&](int64_t task, int) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      sum += static_cast<int>(task) + 1;
    });
    EXPECT_EQ(sum.load(), 6);
  }
}

// Two slow tasks on two threads overlap: each waits for the other.
TEST(ThreadPoolTest, TasksRunAtTheSameTime) {
  ThreadPool pool(2);
  std::atomic<int> arrived = 0;
  pool.ParallelFor(2, [&](int64_t, int) {
    ++arrived;
    while (arrived.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived.load(), 2);
}

}  // namespace
}  // namespace strait::cpu
