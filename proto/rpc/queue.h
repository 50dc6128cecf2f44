// SPDX-License-Identifier: Apache-2.0
//
// BoundedQueue brings events from many threads to one loop thread.
//
// Thread:  any, synchronized inside; one consumer.
// Limits:  capacity. Push over it takes the item and answers false: its producer then pauses, so
//          the queue never holds more than capacity plus one item a producer. TryPush over it
//          refuses.
// Why:     an event that must not be lost (a stream ended) has no caller to whom "full" could be
//          told.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

namespace strait {

template <class T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) {}

  // Whether there is room for more afterwards.
  bool Push(T item) {
    std::unique_lock lock(mu_);
    items_.push_back(std::move(item));
    const bool room = items_.size() < capacity_;
    const bool wake = waiting_;
    lock.unlock();
    if (wake) changed_.notify_one();
    return room;
  }

  // Whether the item was taken; it is untouched otherwise.
  bool TryPush(T& item) {
    std::unique_lock lock(mu_);
    if (items_.size() >= capacity_) return false;
    items_.push_back(std::move(item));
    const bool wake = waiting_;
    lock.unlock();
    if (wake) changed_.notify_one();
    return true;
  }

  // All items, in order; waits for one at most `timeout`. Before it sleeps, the thread looks again and
  // again for `eager`, at most `timeout`: a sleeping one takes some 50 us to wake.
  std::deque<T> PopAll(std::chrono::microseconds timeout,
                       std::chrono::microseconds eager = std::chrono::microseconds(0)) {
    std::unique_lock lock(mu_);
    if (items_.empty() && eager.count() > 0 && timeout.count() > 0) {
      const auto until = std::chrono::steady_clock::now() + std::min(timeout, eager);
      do {
        lock.unlock();
        std::this_thread::yield();
        lock.lock();
      } while (items_.empty() && std::chrono::steady_clock::now() < until);
    }
    if (items_.empty() && timeout.count() > 0) {
      waiting_ = true;
      changed_.wait_for(lock, timeout, [this] { return !items_.empty(); });
      waiting_ = false;
    }
    return std::exchange(items_, {});
  }

 private:
  const size_t capacity_;
  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<T> items_;   // guarded by mu_
  bool waiting_ = false;  // guarded by mu_
};

}  // namespace strait
