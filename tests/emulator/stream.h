// SPDX-License-Identifier: Apache-2.0
//
// The emulator's streams, events and graphs. What is enqueued on a stream is done when somebody
// waits for it, the null stream's at once; a poll for an event does one piece of work.
//
// Thread:  any, synchronized inside; work is done in the thread that waits.
// Why:     as late as it may: host memory that is changed or read before the device has done with
//          it shows every time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace strait::emulator {

class StreamQueue {
 public:
  void Add(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    ++added_;
  }
  uint64_t added() const {
    const std::lock_guard lock(mutex_);
    return added_;
  }
  // Does at most `pieces` of the first `until` pieces that were ever added; whether these are done.
  bool Do(uint64_t until, uint64_t pieces) {
    const std::lock_guard lock(mutex_);
    for (; done_ < until && pieces > 0; --pieces, ++done_) {
      const std::function<void()> work = std::move(work_.front());
      work_.pop_front();
      work();
    }
    return done_ >= until;
  }
  void DoAll() { Do(added(), UINT64_MAX); }

 private:
  mutable std::mutex mutex_;
  std::deque<std::function<void()>> work_;
  uint64_t added_ = 0;
  uint64_t done_ = 0;
};

}  // namespace strait::emulator

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  CUgraph_st* capturing = nullptr;
  const std::shared_ptr<strait::emulator::StreamQueue> queue =
      std::make_shared<strait::emulator::StreamQueue>();
};
struct CUevent_st {
  std::shared_ptr<strait::emulator::StreamQueue> queue;  // null: not recorded
  uint64_t until = 0;
};
