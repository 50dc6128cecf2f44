// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/nccl_device.h"

#include <cuda_runtime_api.h>

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
  explicit CudaEdgeDevice(int index) : index_(index) {}

  absl::Status Use() override { return CudaError(cudaSetDevice(index_), "cudaSetDevice"); }

  absl::StatusOr<std::byte*> Take(size_t bytes) override {
    void* memory = nullptr;
    STRAIT_RETURN_IF_ERROR(CudaError(cudaMalloc(&memory, bytes), "cudaMalloc"));
    return static_cast<std::byte*>(memory);
  }
  // On whichever thread dropped the last place.
  void Give(std::byte* memory) override {
    (void)cudaSetDevice(index_);
    (void)cudaFree(memory);
  }

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
  const int index_;
};

}  // namespace

std::shared_ptr<EdgeDevice> MakeCudaEdgeDevice(int index) {
  return std::make_shared<CudaEdgeDevice>(index);
}

}  // namespace strait
