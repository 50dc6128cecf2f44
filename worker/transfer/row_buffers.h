// SPDX-License-Identifier: Apache-2.0
//
// RowBuffers keeps the memory of frames between transfers, so that a move of gigabytes does not have each of
// its megabytes mapped and cleared anew: half of what a frame costs beside gRPC.
//
// Thread:  any, synchronized inside.
// Limits:  kTransferBytesUnderWay kept; only what is worth it, from kLeastBytes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "proto/base/limits.h"

namespace strait {

class RowBuffers {
 public:
  static constexpr size_t kLeastBytes = 128 << 10;

  // Of this size, with any contents.
  std::string Take(size_t bytes) {
    std::string buffer = TakeAny(bytes);
    buffer.resize(bytes);
    return buffer;
  }
  // Empty, with room for so much.
  std::string TakeEmpty(size_t bytes) {
    std::string buffer = TakeAny(bytes);
    buffer.clear();
    buffer.reserve(bytes);
    return buffer;
  }
  void Give(std::string buffer) {
    if (buffer.capacity() < kLeastBytes) return;
    std::lock_guard lock(mu_);
    if (bytes_ + buffer.capacity() > limits::kTransferBytesUnderWay) return;
    bytes_ += buffer.capacity();
    free_.push_back(std::move(buffer));
  }
  // Nothing moves: the memory goes.
  void Clear() {
    std::vector<std::string> gone;
    std::lock_guard lock(mu_);
    gone.swap(free_);
    bytes_ = 0;
  }

 private:
  std::string TakeAny(size_t bytes) {
    if (bytes < kLeastBytes) return {};
    std::lock_guard lock(mu_);
    if (free_.empty()) return {};
    std::string buffer = std::move(free_.back());
    free_.pop_back();
    bytes_ -= buffer.capacity();
    return buffer;
  }

  std::mutex mu_;
  std::vector<std::string> free_;  // guarded by mu_; a stack
  uint64_t bytes_ = 0;             // guarded by mu_: of their capacities
};

}  // namespace strait
