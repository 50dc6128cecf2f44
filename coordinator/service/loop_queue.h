// SPDX-License-Identifier: Apache-2.0
//
// LoopQueue brings events to the coordinator's loop, bounded by their number and by their bytes.
//
// Thread:  Push: any. HandleAll: the loop's.
// Limits:  items_max, bytes_max. Push over either takes the item and answers false: its producer
//          then pauses, so the queue never holds more than that and one item a producer.
// Why:     a worker's message may be 16 MiB; so many of them that only their number is bounded
//          would be all of the memory.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <utility>

#include "proto/rpc/queue.h"

namespace strait {

template <class T>
class LoopQueue {
 public:
  LoopQueue(size_t items_max, size_t bytes_max) : bytes_max_(bytes_max), queue_(items_max) {}

  // Whether there is room for more afterwards. `bytes`: of what the item holds.
  bool Push(T item, size_t bytes = 0) {
    bytes_ += bytes;
    const bool room = queue_.Push({std::move(item), bytes});
    return room && bytes_ < bytes_max_;
  }

  // Gives all items, in order, to `handle`; waits for one at most `timeout`.
  template <class Handle>
  void HandleAll(std::chrono::microseconds timeout, const Handle& handle) {
    for (Entry& entry : queue_.PopAll(timeout)) {
      handle(entry.item);
      bytes_ -= entry.bytes;
    }
  }

 private:
  struct Entry {
    T item;
    size_t bytes;
  };
  const size_t bytes_max_;
  std::atomic<size_t> bytes_ = 0;  // of items that wait or are handled
  BoundedQueue<Entry> queue_;
};

}  // namespace strait
