// SPDX-License-Identifier: Apache-2.0
//
// The monotonic clock of the servers. State machines read none: they are told `now_us`.
//
// Thread:  any.
#pragma once

#include <chrono>
#include <cstdint>

namespace strait {

inline uint64_t MonotonicMicros() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

}  // namespace strait
