// SPDX-License-Identifier: Apache-2.0
//
// Owners of memory that CUDA hands out: host pages that the device copies from, and device memory.
//
// Owns:    its bytes; a PinnedPool what came back to it.
// Thread:  plain owners; PinnedPool any, synchronized inside.
// Errors:  ResourceExhausted.
// Why:     giving pinned memory, or device memory, back to CUDA waits for every kernel of the process, and keeps
//          other threads from launching one (measured on an H200, cuda_device_arena_gpu_test). A kernel may wait
//          for a peer. So what stages are done with is kept for the next one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "worker/model/cuda/status.h"

namespace strait {

template <cudaError_t (*kTake)(void**, size_t), cudaError_t (*kGive)(void*)>
class CudaMemory {
 public:
  CudaMemory() = default;
  ~CudaMemory() {
    if (data_ != nullptr) (void)kGive(data_);
  }
  CudaMemory(CudaMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  CudaMemory& operator=(CudaMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  static absl::StatusOr<CudaMemory> Create(uint64_t bytes) {
    CudaMemory memory;
    void* data = nullptr;
    STRAIT_CUDA_RETURN_IF_ERROR(kTake(&data, bytes));
    memory.data_ = static_cast<std::byte*>(data);
    memory.bytes_ = bytes;
    return memory;
  }

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

namespace internal {
inline cudaError_t TakePinned(void** data, size_t bytes) {
  return cudaHostAlloc(data, bytes, cudaHostAllocDefault);
}
inline cudaError_t GivePinned(void* data) { return cudaFreeHost(data); }
inline cudaError_t TakeDevice(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
inline cudaError_t GiveDevice(void* data) { return cudaFree(data); }
}  // namespace internal

class PinnedPool;

// Comes back to its pool.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  ~PinnedMemory();
  PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  std::byte* data() const { return memory_.data(); }
  uint64_t bytes() const { return bytes_; }  // that were asked for

 private:
  friend class PinnedPool;
  using Owner = CudaMemory<internal::TakePinned, internal::GivePinned>;
  std::shared_ptr<PinnedPool> pool_;
  Owner memory_;
  uint64_t bytes_ = 0;
};

class PinnedPool : public std::enable_shared_from_this<PinnedPool> {
 public:
  absl::StatusOr<PinnedMemory> Take(uint64_t bytes);

 private:
  friend class PinnedMemory;
  void PutBack(PinnedMemory::Owner memory);

  std::mutex mutex_;
  std::multimap<uint64_t, PinnedMemory::Owner> idle_ ABSL_GUARDED_BY(mutex_);  // by size
};

using DeviceMemory = CudaMemory<internal::TakeDevice, internal::GiveDevice>;

}  // namespace strait
