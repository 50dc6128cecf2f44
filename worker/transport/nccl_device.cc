// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/nccl_device.h"

#include <cuda_runtime_api.h>

#define XXH_INLINE_ALL  // for XXH3_kSecret
#include <xxhash.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/rowwise/checksum.h"
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

static_assert(kShortPieceBytes == cuda::kChecksumBytesMin);

// What a call of Checksums needs: host memory that the device reads and writes, and a stream.
class Checksummer {
 public:
  static absl::StatusOr<std::unique_ptr<Checksummer>> Create(cudaStream_t stream) {
    void* memory = nullptr;
    STRAIT_RETURN_IF_ERROR(
        CudaError(cudaHostAlloc(&memory, kBytes, cudaHostAllocMapped), "cudaHostAlloc"));
    auto made = std::unique_ptr<Checksummer>(new Checksummer(stream, memory));
    STRAIT_RETURN_IF_ERROR(CudaError(
        cudaEventCreateWithFlags(&made->event_, cudaEventDisableTiming), "cudaEventCreate"));
    // The kernel is loaded now: that may wait for all that runs.
    const uint32_t bytes = cuda::kChecksumBytesMin + 8;
    uint64_t sum = 0;
    STRAIT_RETURN_IF_ERROR(
        made->Run(static_cast<const std::byte*>(memory), {&bytes, 1}, {&sum, 1}));
    return made;
  }
  ~Checksummer() {
    if (event_ != nullptr) (void)cudaEventDestroy(event_);
    (void)cudaStreamDestroy(stream_);
    (void)cudaFreeHost(pieces_);
  }

  absl::Status Run(const std::byte* data, absl::Span<const uint32_t> piece_bytes,
                   absl::Span<uint64_t> sums) {
    int64_t offset = 0;
    for (size_t i = 0; i < piece_bytes.size(); ++i) {
      pieces_[i] = {offset, piece_bytes[i]};
      offset += piece_bytes[i];
    }
    params_.data = reinterpret_cast<const unsigned char*>(data);
    params_.num_pieces = static_cast<int32_t>(piece_bytes.size());
    STRAIT_RETURN_IF_ERROR(CudaError(cuda::Checksum(params_, stream_), "the checksum kernel"));
    STRAIT_RETURN_IF_ERROR(CudaError(cudaEventRecord(event_, stream_), "cudaEventRecord"));
    for (;;) {
      const cudaError_t asked = cudaEventQuery(event_);
      if (asked == cudaSuccess) break;
      if (asked != cudaErrorNotReady) return CudaError(asked, "cudaEventQuery");
      std::this_thread::yield();
    }
    std::copy_n(params_.sums, sums.size(), sums.data());
    return absl::OkStatus();
  }

 private:
  static constexpr size_t kBytes =
      kMaxChecksumPieces * (sizeof(cuda::ChecksumPiece) + sizeof(uint64_t));

  Checksummer(cudaStream_t stream, void* memory)
      : stream_(stream), pieces_(static_cast<cuda::ChecksumPiece*>(memory)) {
    params_.pieces = pieces_;
    params_.sums = reinterpret_cast<uint64_t*>(pieces_ + kMaxChecksumPieces);
    params_.secret = cuda::MakeChecksumSecret(XXH3_kSecret);
  }

  const cudaStream_t stream_;
  cuda::ChecksumPiece* const pieces_;
  cuda::ChecksumParams params_;
  cudaEvent_t event_ = nullptr;
};

class CudaEdgeDevice final : public EdgeDevice {
 public:
  CudaEdgeDevice(int index, EdgeMemory memory) : index_(index), memory_(std::move(memory)) {}

  std::string name() const override {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index_) != cudaSuccess) return {};
    return absl::BytesToHexString({properties.uuid.bytes, sizeof(properties.uuid.bytes)});
  }
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

  absl::Status Checksums(const std::byte* data, absl::Span<const uint32_t> piece_bytes,
                         absl::Span<uint64_t> sums) override {
    if (piece_bytes.size() > kMaxChecksumPieces) {
      return absl::InvalidArgumentError(absl::StrCat(piece_bytes.size(), " pieces at once"));
    }
    for (const uint32_t bytes : piece_bytes) {
      if (bytes % 8 == 0 && bytes > kShortPieceBytes) continue;
      return absl::InvalidArgumentError(absl::StrCat("a piece of ", bytes, " bytes"));
    }
    const std::lock_guard lock(checksums_mu_);
    STRAIT_RETURN_IF_ERROR(Use());
    if (checksummer_ == nullptr) {
      STRAIT_ASSIGN_OR_RETURN(void* stream, MakeStream());
      STRAIT_ASSIGN_OR_RETURN(checksummer_, Checksummer::Create(Stream(stream)));
    }
    return piece_bytes.empty() ? absl::OkStatus() : checksummer_->Run(data, piece_bytes, sums);
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
  std::mutex checksums_mu_;                                 // one call at a time
  std::unique_ptr<Checksummer> checksummer_;                // guarded by checksums_mu_
};

}  // namespace

std::shared_ptr<EdgeDevice> MakeCudaEdgeDevice(int index, EdgeMemory memory) {
  return std::make_shared<CudaEdgeDevice>(index, std::move(memory));
}

}  // namespace strait
