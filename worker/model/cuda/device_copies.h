// SPDX-License-Identifier: Apache-2.0
//
// DeviceCopies copies cache rows of a pool on the GPU, on a stream of its own.
//
// Owns:    its stream, its events, pinned staging.     Borrows: the pool, staging on the device; they
//          outlive it.
// Thread:  as BlockCopies.
// Stream:  a copy waits on the device for the event of the newest step that is begun, unless it goes behind
//          finished ones; both wait for the copies before them. Nothing waits for a copy but Poll and the destructor: steps' stream never knows of them.
// Errors:  Read, Write: InvalidArgument also for a buffer that is not where it says, or on the device
//          and not at a multiple of 16 bytes. If the GPU context is lost, the process ends (status.h).
// Limits:  kCudaCopyStagingBytes at a time go through staging.
// Why:     a 64-row block of one layer is 42 to 74 kB, a microsecond or two of a host link, which is
//          what it costs to begin a copy. So runs of the pool of kDirectBytes and more are copies of
//          their own, and shorter ones are gathered by one kernel (block_pieces.h) and go as one
//          copy; to and from buffers on the device that kernel is all. By count nine tenths of the
//          link's rate; not measured yet. A kernel and not batched
//          copies (cudaMemcpyBatchAsync): these need CUDA 12.8, and begin each piece all the same.
//          CUDA copies pageable memory while the caller waits, for the steps before, too. So other
//          host memory than Take's goes through pinned staging, and a host function of the stream
//          takes it from there: asynchronous, at the rate of one thread's memcpy.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/backend.h"
#include "worker/cache/copy_list.h"
#include "worker/model/cuda/pinned.h"

namespace strait {

inline constexpr uint64_t kCudaCopyStagingBytes = 4 << 20;  // on the device, and pinned

class DeviceCopies final : public BlockCopies {
 public:
  struct Place {
    int device = 0;
    std::byte* pool = nullptr;
    const CacheMemory* cache = nullptr;  // whose blocks these are
    uint32_t row_bytes = 0;
    std::byte* staging = nullptr;  // [kCudaCopyStagingBytes] on the device
    PinnedPool* pinned = nullptr;  // for Create
    // The event behind the newest step that is begun; null: all are finished.
    std::function<cudaEvent_t()> newest_step;
  };
  // A run of so many bytes is a copy of its own.
  static constexpr uint64_t kDirectBytes = 1 << 20;

  static absl::StatusOr<std::unique_ptr<DeviceCopies>> Create(uint32_t num_layers, Place place);
  ~DeviceCopies() override;

  using BlockCopies::Read;
  using BlockCopies::Write;
  absl::StatusOr<CopyId> Read(absl::Span<const BlockRows> list, RowsOut to,
                              CopyAfter after) override;
  absl::StatusOr<CopyId> Write(absl::Span<const BlockRows> list, RowsIn from,
                               CopyAfter after) override;
  std::vector<CopyEnd> Poll() override;
  size_t num_under_way() const override { return under_way_.size(); }
  uint32_t row_bytes() const override { return place_.row_bytes; }
  absl::StatusOr<CopyMemory> Take(size_t bytes) override;

 private:
  enum class Memory { kDevice, kPinned, kPlain };
  struct Buffer {
    std::byte* data = nullptr;  // a Write only reads it
    size_t bytes = 0;
    bool on_device = false;
    Memory memory = Memory::kPlain;
  };
  // What a host function of the stream does.
  struct HostMove {
    std::byte* to = nullptr;
    const std::byte* from = nullptr;
    size_t bytes = 0;
  };
  struct Copy {
    CopyId id;
    cudaEvent_t done = nullptr;  // of events_
    std::deque<HostMove> moves;  // what host functions point to stays where it is
  };

  DeviceCopies(uint32_t num_layers, Place place)
      : num_layers_(num_layers), place_(std::move(place)) {}

  absl::StatusOr<CopyId> Start(absl::Span<const BlockRows> list, CopyWay way, CopyAfter after,
                               Buffer buffer);
  // Finds out where the buffer is.
  absl::Status Look(Buffer* buffer) const;
  // All of a copy behind the stream's last. Asynchronous.
  absl::Status Enqueue(absl::Span<const CopyPiece> pieces, CopyWay way, CopyAfter after,
                       const Buffer& buffer, Copy* copy);
  // Pieces that go together: one of any size where it may go alone, else within staging.
  absl::Status EnqueueTogether(absl::Span<const CopyPiece> pieces, CopyWay way,
                               const Buffer& buffer, Copy* copy);
  absl::Status EnqueueHostMove(HostMove move, Copy* copy);

  const uint32_t num_layers_;
  const Place place_;
  cudaStream_t stream_ = nullptr;
  PinnedMemory staging_;                                  // [kCudaCopyStagingBytes]
  std::array<cudaEvent_t, kMaxCopiesUnderWay> events_{};  // used in turn
  std::deque<Copy> under_way_;
  CopyId last_id_;
};

}  // namespace strait
