// SPDX-License-Identifier: Apache-2.0
//
// Owners of memory that CUDA hands out: host pages that the device copies from, and device memory.
//
// Owns:    its bytes.
// Thread:  plain owners.
// Errors:  ResourceExhausted.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

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

using PinnedMemory = CudaMemory<internal::TakePinned, internal::GivePinned>;
using DeviceMemory = CudaMemory<internal::TakeDevice, internal::GiveDevice>;

}  // namespace strait
