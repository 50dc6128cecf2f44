// SPDX-License-Identifier: Apache-2.0
//
// DeviceArena is a worker's memory on the GPU: taken once at the start, in slabs of one size, and lent
// to weights, workspaces, page tables and the cache.
//
// Owns:    the slabs. A Lease owns its addresses and has its slabs until it gives them back.
// Thread:  any, synchronized inside; a Lease is a plain owner.
// Stream:  a Lease gives slabs back when it is made smaller or ends: REQUIRES that the device is done
//          with them.
// Errors:  Create: ResourceExhausted, the GPU has not so much, and what to do. Take, Resize:
//          ResourceExhausted names needed and available bytes; nothing is changed.
// Limits:  the budget; slabs are all that is taken of it, but for what is counted there besides.
// Why:     a lease is contiguous in addresses and scattered in memory (kernels/cuda/device/
//          virtual_memory.h). So what a cache gives up serves as weights wherever it lay, and a cache
//          grows in place. Taken at once: what others on the GPU take cannot make a later load fail.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/device/virtual_memory.h"
#include "worker/model/memory.h"

namespace strait {

class DeviceArena : public std::enable_shared_from_this<DeviceArena> {
 public:
  class Lease {
   public:
    Lease() = default;
    ~Lease();
    Lease(Lease&& other) noexcept { *this = std::move(other); }
    Lease& operator=(Lease&& other) noexcept;

    std::byte* data() const { return data_; }
    uint64_t bytes() const { return slabs_.size() * (arena_ ? arena_->slab_bytes_ : 0); }
    // As many slabs as hold `bytes`; what stays keeps its contents, what is new has any. REQUIRES: no
    // more than the most that it was taken for.
    absl::Status Resize(uint64_t bytes, std::string_view what);

   private:
    friend class DeviceArena;
    std::shared_ptr<DeviceArena> arena_;
    std::byte* data_ = nullptr;
    uint64_t reserved_bytes_ = 0;
    std::vector<cuda::Slab> slabs_;  // in the order of their addresses
    MemoryBudget::Share share_;
  };

  // A worker's slabs are of this size: few of them, and little that is rounded up.
  static absl::StatusOr<uint64_t> SlabBytesFor(int device, uint64_t memory_bytes);

  // Takes `at_once` bytes of the budget's memory now, and the rest as it is asked for. Waits `patience` for
  // memory: what a process had that was just killed comes back a little later.
  static absl::StatusOr<std::shared_ptr<DeviceArena>> Create(
      int device, std::shared_ptr<MemoryBudget> budget, uint64_t slab_bytes, uint64_t at_once,
      std::chrono::milliseconds patience = {});
  ~DeviceArena();

  // Addresses for `most` bytes, memory for `bytes`. `what` it is for, in errors.
  absl::StatusOr<Lease> Take(uint64_t bytes, uint64_t most, std::string_view what);
  absl::StatusOr<Lease> Take(uint64_t bytes, std::string_view what) {
    return Take(bytes, bytes, what);
  }

  uint64_t slab_bytes() const { return slab_bytes_; }
  // In slabs.
  uint64_t RoundUp(uint64_t bytes) const {
    return (bytes + slab_bytes_ - 1) / slab_bytes_ * slab_bytes_;
  }
  int device() const { return device_; }

 private:
  DeviceArena(int device, std::shared_ptr<MemoryBudget> budget, uint64_t slab_bytes)
      : device_(device), budget_(std::move(budget)), slab_bytes_(slab_bytes) {}
  absl::StatusOr<cuda::Slab> TakeSlab();
  void GiveSlabs(const std::vector<cuda::Slab>& slabs);

  const int device_;
  const std::shared_ptr<MemoryBudget> budget_;
  const uint64_t slab_bytes_;
  std::mutex mutex_;  // leases are taken on loader threads, and given back on the loop's
  std::vector<cuda::Slab> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace strait
