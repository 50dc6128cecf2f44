// SPDX-License-Identifier: Apache-2.0
//
// What a CPU worker takes besides weights: anonymous mappings, and the budget that its stages and its
// cache share.
//
// Owns:    a Mapping its pages; a MemoryBudget a number.
// Thread:  MemoryBudget any, synchronized inside; a Mapping is a plain owner.
// Errors:  ResourceExhausted names needed and available bytes.
// Why:     a mapping costs nothing until it is touched, so a pool or workspace may be taken whole
//          at load.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace strait {

class Mapping {
 public:
  Mapping() = default;
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  // Zero bytes that are not resident before they are touched. `what` names them in an error.
  static absl::StatusOr<Mapping> Create(uint64_t bytes, std::string_view what);

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

class MemoryBudget {
 public:
  explicit MemoryBudget(uint64_t bytes) : total_(bytes) {}

  // Bytes that are given back when it ends.
  class Share {
   public:
    Share() = default;
    ~Share();
    Share(Share&& other) noexcept = default;
    Share& operator=(Share&& other) noexcept {
      std::swap(budget_, other.budget_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    uint64_t bytes() const { return bytes_; }

   private:
    friend class MemoryBudget;
    Share(std::shared_ptr<MemoryBudget> budget, uint64_t bytes)
        : budget_(std::move(budget)), bytes_(bytes) {}
    std::shared_ptr<MemoryBudget> budget_;
    uint64_t bytes_ = 0;
  };

  static absl::StatusOr<Share> Take(std::shared_ptr<MemoryBudget> budget, uint64_t bytes,
                                    std::string_view what);

  // Makes a share of this budget larger or smaller. On error it is as before.
  static absl::Status Resize(Share* share, uint64_t bytes, std::string_view what);

  uint64_t total() const { return total_; }
  uint64_t used() const { return used_.load(); }

 private:
  const uint64_t total_;
  std::atomic<uint64_t> used_{0};
};

}  // namespace strait
