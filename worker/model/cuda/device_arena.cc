// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/device_arena.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"
#include "worker/model/cuda/status.h"

namespace strait {
namespace {

constexpr uint64_t kSlabsWanted = 4096;
constexpr uint64_t kMaxSlabBytes = 32 << 20;

}  // namespace

absl::StatusOr<uint64_t> DeviceArena::SlabBytesFor(int device, uint64_t memory_bytes) {
  size_t granularity = 0;
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::SlabGranularity(device, &granularity));
  uint64_t bytes = granularity;
  while (bytes < kMaxSlabBytes && bytes * kSlabsWanted < memory_bytes) bytes *= 2;
  return bytes;
}

absl::StatusOr<std::shared_ptr<DeviceArena>> DeviceArena::Create(
    int device, std::shared_ptr<MemoryBudget> budget, uint64_t slab_bytes, uint64_t at_once,
    std::chrono::milliseconds patience) {
  std::shared_ptr<DeviceArena> arena(new DeviceArena(device, std::move(budget), slab_bytes));
  const uint64_t count = std::min(at_once, arena->budget_->total()) / slab_bytes;
  const auto until = std::chrono::steady_clock::now() + patience;
  const std::lock_guard lock(arena->mutex_);
  for (uint64_t i = 0; i < count; ++i) {
    cuda::Slab slab = 0;
    cudaError_t error = cuda::CreateSlab(device, slab_bytes, &slab);
    while (error == cudaErrorMemoryAllocation && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      error = cuda::CreateSlab(device, slab_bytes, &slab);
    }
    if (error == cudaErrorMemoryAllocation) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the GPU has ", i * slab_bytes,
                       " bytes of memory left, this worker was to take ", count * slab_bytes,
                       ": stop what else uses the GPU, or give this worker less (--memory, "
                       "--gpu-memory-share)"));
    }
    STRAIT_CUDA_RETURN_IF_ERROR(error);
    arena->free_.push_back(slab);
  }
  return arena;
}

DeviceArena::~DeviceArena() {
  for (const cuda::Slab slab : free_) (void)cuda::ReleaseSlab(slab);
}

absl::StatusOr<cuda::Slab> DeviceArena::TakeSlab() {
  cuda::Slab slab = 0;
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      slab = free_.back();
      free_.pop_back();
      return slab;
    }
  }
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::CreateSlab(device_, slab_bytes_, &slab));
  return slab;
}

void DeviceArena::GiveSlabs(const std::vector<cuda::Slab>& slabs) {
  const std::lock_guard lock(mutex_);
  free_.insert(free_.end(), slabs.begin(), slabs.end());
}

absl::StatusOr<DeviceArena::Lease> DeviceArena::Take(uint64_t bytes, uint64_t most,
                                                     std::string_view what) {
  Lease lease;
  lease.arena_ = shared_from_this();
  STRAIT_ASSIGN_OR_RETURN(lease.share_, MemoryBudget::Take(budget_, 0, what));
  lease.reserved_bytes_ = std::max(RoundUp(most), slab_bytes_);
  STRAIT_CUDA_RETURN_IF_ERROR(cuda::ReserveAddresses(lease.reserved_bytes_, &lease.data_));
  STRAIT_RETURN_IF_ERROR(lease.Resize(bytes, what));
  return lease;
}

absl::Status DeviceArena::Lease::Resize(uint64_t bytes, std::string_view what) {
  const uint64_t slab_bytes = arena_->slab_bytes_;
  const size_t count = (bytes + slab_bytes - 1) / slab_bytes;
  const size_t before = slabs_.size();
  STRAIT_RETURN_IF_ERROR(MemoryBudget::Resize(&share_, count * slab_bytes, what));
  STRAIT_CHECK(count * slab_bytes <= reserved_bytes_, "a lease has no addresses for so much");
  const auto give_back = [&](size_t from) -> absl::Status {
    if (from == slabs_.size()) return absl::OkStatus();
    STRAIT_CUDA_RETURN_IF_ERROR(
        cuda::UnmapSlabs(data_ + from * slab_bytes, (slabs_.size() - from) * slab_bytes));
    arena_->GiveSlabs({slabs_.begin() + static_cast<ptrdiff_t>(from), slabs_.end()});
    slabs_.resize(from);
    return absl::OkStatus();
  };
  if (count < before) return give_back(count);
  while (slabs_.size() < count) {
    absl::StatusOr<cuda::Slab> slab = arena_->TakeSlab();
    absl::Status status = slab.status();
    if (status.ok()) {
      status = CudaStatus(
          cuda::MapSlab(data_ + slabs_.size() * slab_bytes, slab_bytes, *slab, arena_->device_),
          "mapping device memory");
      if (!status.ok()) arena_->GiveSlabs({*slab});
    }
    if (!status.ok()) {
      STRAIT_CHECK(give_back(before).ok() &&
                   MemoryBudget::Resize(&share_, before * slab_bytes, what).ok());
      return absl::Status(status.code(), absl::StrCat(ToAbsl(what), ": ", status.message()));
    }
    slabs_.push_back(*slab);
  }
  return absl::OkStatus();
}

DeviceArena::Lease::~Lease() {
  if (data_ == nullptr) return;
  (void)Resize(0, "");
  (void)cuda::FreeAddresses(data_, reserved_bytes_);
}

DeviceArena::Lease& DeviceArena::Lease::operator=(Lease&& other) noexcept {
  std::swap(arena_, other.arena_);
  std::swap(data_, other.data_);
  std::swap(reserved_bytes_, other.reserved_bytes_);
  std::swap(slabs_, other.slabs_);
  std::swap(share_, other.share_);
  return *this;
}

}  // namespace strait
