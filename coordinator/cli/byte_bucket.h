// SPDX-License-Identifier: Apache-2.0
//
// ByteBucket says how many bytes may go now so that a rate is kept: it fills with time, up to kBurstBytes.
//
// Thread:  one; no clock of its own.
// Limits:  what is taken beyond what may go → check failure.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "proto/base/check.h"

namespace strait::cli {

class ByteBucket {
 public:
  static constexpr size_t kBurstBytes = 16 << 10;

  // 0: no bound. The bucket is full then.
  void SetRate(double bytes_per_s) {
    bytes_per_s_ = bytes_per_s;
    bytes_ = kBurstBytes;
    seen_us_ = 0;
  }

  size_t Allowed(uint64_t now_us) {
    if (bytes_per_s_ <= 0) return std::numeric_limits<size_t>::max();
    const uint64_t passed_us = seen_us_ == 0 || now_us < seen_us_ ? 0 : now_us - seen_us_;
    seen_us_ = now_us;
    bytes_ =
        std::min<double>(kBurstBytes, bytes_ + bytes_per_s_ * static_cast<double>(passed_us) / 1e6);
    return static_cast<size_t>(bytes_);
  }

  // REQUIRES: `bytes` were allowed by the last call of Allowed.
  void Take(size_t bytes) {
    if (bytes_per_s_ <= 0) return;
    STRAIT_CHECK(static_cast<double>(bytes) <= bytes_, "more than may go");
    bytes_ -= static_cast<double>(bytes);
  }

  // Until so many, or a full bucket, may go.
  uint64_t WaitUs(size_t bytes) const {
    const double missing = static_cast<double>(std::min(bytes, kBurstBytes)) - bytes_;
    if (bytes_per_s_ <= 0 || missing <= 0) return 0;
    return static_cast<uint64_t>(std::min(missing / bytes_per_s_ * 1e6, 1e15)) + 1;
  }

 private:
  double bytes_per_s_ = 0;
  double bytes_ = kBurstBytes;
  uint64_t seen_us_ = 0;  // 0: not yet
};

}  // namespace strait::cli
