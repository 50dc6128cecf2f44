// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/nccl_device.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status CudaError(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  const auto text = absl::StrCat(call, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::UnavailableError(text);
}

cudaStream_t Stream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t Event(void* event) { return static_cast<cudaEvent_t>(event); }

class CudaEdgeDevice final : public EdgeDevice {
 public:
  CudaEdgeDevice(int index, EdgeMemory memory) : index_(index), memory_(std::move(memory)) {}

  absl::Status Use() override { return CudaError(cudaSetDevice(index_), "cudaSetDevice"); }

  absl::StatusOr<std::byte*> Take(size_t bytes) override {
    STRAIT_ASSIGN_OR_RETURN(std::shared_ptr<std::byte> memory,
                            memory_ ? memory_(bytes) : FromCuda(bytes));
    std::byte* const data = memory.get();
    const std::lock_guard lock(mu_);
    taken_.emplace(data, std::move(memory));
    return data;
  }
  // On whichever thread dropped the last place.
  void Give(std::byte* memory) override {
    (void)cudaSetDevice(index_);
    std::shared_ptr<std::byte> given;
    const std::lock_guard lock(mu_);
    const auto it = taken_.find(memory);
    given = std::move(it->second);
    taken_.erase(it);
  }

  bool GiveWaits() const override { return !memory_; }

  absl::StatusOr<void*> MakeStream() override {
    // Above the layers' stream: an edge's few blocks should not queue behind a step's many.
    int least = 0;
    int greatest = 0;
    STRAIT_RETURN_IF_ERROR(CudaError(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                                     "cudaDeviceGetStreamPriorityRange"));
    cudaStream_t stream = nullptr;
    STRAIT_RETURN_IF_ERROR(
        CudaError(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
                  "cudaStreamCreateWithPriority"));
    return static_cast<void*>(stream);
  }
  void FreeStream(void* stream) override {
    (void)cudaStreamSynchronize(Stream(stream));
    (void)cudaStreamDestroy(Stream(stream));
  }

  absl::StatusOr<void*> MakeEvent() override {
    cudaEvent_t event = nullptr;
    STRAIT_RETURN_IF_ERROR(CudaError(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
                                     "cudaEventCreateWithFlags"));
    return static_cast<void*>(event);
  }
  void FreeEvent(void* event) override { (void)cudaEventDestroy(Event(event)); }
  absl::Status Record(void* event, void* stream) override {
    return CudaError(cudaEventRecord(Event(event), Stream(stream)), "cudaEventRecord");
  }
  absl::StatusOr<bool> Done(void* event) override {
    const cudaError_t asked = cudaEventQuery(Event(event));
    if (asked == cudaErrorNotReady) return false;
    STRAIT_RETURN_IF_ERROR(CudaError(asked, "cudaEventQuery"));
    return true;
  }

  absl::Status Upload(std::byte* to, const std::byte* from, size_t bytes, void* stream) override {
    return CudaError(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, Stream(stream)),
                     "cudaMemcpyAsync");
  }

 private:
  static absl::StatusOr<std::shared_ptr<std::byte>> FromCuda(size_t bytes) {
    void* memory = nullptr;
    STRAIT_RETURN_IF_ERROR(CudaError(cudaMalloc(&memory, bytes), "cudaMalloc"));
    return std::shared_ptr<std::byte>(static_cast<std::byte*>(memory),
                                      [](std::byte* gone) { (void)cudaFree(gone); });
  }

  const int index_;
  const EdgeMemory memory_;
  std::mutex mu_;
  std::map<std::byte*, std::shared_ptr<std::byte>> taken_;  // guarded by mu_
};

}  // namespace

std::shared_ptr<EdgeDevice> MakeCudaEdgeDevice(int index, EdgeMemory memory) {
  return std::make_shared<CudaEdgeDevice>(index, std::move(memory));
}

}  // namespace strait
