// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cuda/device_copies.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/block_pieces.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "worker/model/cuda/status.h"

namespace strait {
namespace {

// No piece is longer than fits into staging, or goes alone there.
std::vector<CopyPiece> CutToStaging(absl::Span<const CopyPiece> pieces) {
  std::vector<CopyPiece> cut;
  for (CopyPiece piece : pieces) {
    while (piece.bytes > 0) {
      const uint64_t bytes = std::min(piece.bytes, kCudaCopyStagingBytes);
      cut.push_back({piece.pool_offset, piece.buffer_offset, bytes});
      piece = {piece.pool_offset + bytes, piece.buffer_offset + bytes, piece.bytes - bytes};
    }
  }
  return cut;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceCopies>> DeviceCopies::Create(uint32_t num_layers,
                                                                   Place place) {
  std::unique_ptr<DeviceCopies> copies(new DeviceCopies(num_layers, std::move(place)));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(copies->place_.device));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamCreateWithFlags(&copies->stream_, cudaStreamNonBlocking));
  for (cudaEvent_t& event : copies->events_) {
    STRAIT_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  STRAIT_ASSIGN_OR_RETURN(copies->staging_, copies->place_.pinned->Take(kCudaCopyStagingBytes));
  return copies;
}

DeviceCopies::~DeviceCopies() {
  (void)cudaSetDevice(place_.device);
  if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_);
  for (const cudaEvent_t event : events_) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::StatusOr<CopyId> DeviceCopies::Read(absl::Span<const BlockRows> list, RowsOut to,
                                          CopyAfter after) {
  return Start(list, CopyWay::kRead, after, {to.bytes.data(), to.bytes.size(), to.on_device});
}

absl::StatusOr<CopyId> DeviceCopies::Write(absl::Span<const BlockRows> list, RowsIn from,
                                           CopyAfter after) {
  return Start(list, CopyWay::kWrite, after,
               {const_cast<std::byte*>(from.bytes.data()), from.bytes.size(), from.on_device});
}

absl::StatusOr<CopyId> DeviceCopies::Start(absl::Span<const BlockRows> list, CopyWay way,
                                           CopyAfter after, Buffer buffer) {
  STRAIT_ASSIGN_OR_RETURN(
      const std::vector<CopyPiece> pieces,
      CutCopy(list, way, num_layers_, place_.cache->num_blocks(), place_.row_bytes, buffer.bytes));
  STRAIT_RETURN_IF_ERROR(CheckCopiesUnderWay(under_way_.size()));
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(place_.device));
  STRAIT_RETURN_IF_ERROR(Look(&buffer));
  Copy& copy = under_way_.emplace_back();
  copy.id = CopyId{last_id_.value + 1};
  copy.done = events_[copy.id.value % events_.size()];  // ids under way follow each other
  const absl::Status status = Enqueue(pieces, way, after, buffer, &copy);
  if (!status.ok()) {
    ExitIfContextLost(status);  // it waits for the device: the buffer is free
    under_way_.pop_back();
    return status;
  }
  last_id_ = copy.id;
  return last_id_;
}

absl::Status DeviceCopies::Look(Buffer* buffer) const {
  buffer->memory = buffer->on_device ? Memory::kDevice : Memory::kPinned;
  for (const std::byte* const at : {buffer->data, buffer->data + buffer->bytes - 1}) {
    cudaPointerAttributes found = {};
    STRAIT_CUDA_RETURN_IF_ERROR(cudaPointerGetAttributes(&found, at));
    const bool on_host =
        found.type == cudaMemoryTypeHost || found.type == cudaMemoryTypeUnregistered;
    const bool on_device = found.type == cudaMemoryTypeDevice && found.device == place_.device;
    if (buffer->on_device && !on_device) {
      return absl::InvalidArgumentError("the buffer is not on the device that has the rows");
    }
    if (!buffer->on_device && !on_host) {
      return absl::InvalidArgumentError("the buffer is on a device, and was given as host memory");
    }
    if (found.type == cudaMemoryTypeUnregistered) buffer->memory = Memory::kPlain;
  }
  if (buffer->on_device && reinterpret_cast<uintptr_t>(buffer->data) % limits::kRowAlign != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the buffer is not at a multiple of ", limits::kRowAlign, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status DeviceCopies::Enqueue(absl::Span<const CopyPiece> pieces, CopyWay way, CopyAfter after,
                                   const Buffer& buffer, Copy* copy) {
  const cudaEvent_t step = after == CopyAfter::kBegunSteps ? place_.newest_step() : nullptr;
  if (step != nullptr) {
    STRAIT_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(stream_, step, 0));
  }
  std::vector<CopyPiece> cut;
  if (buffer.memory == Memory::kPlain) {
    cut = CutToStaging(pieces);
    pieces = cut;
  }
  while (!pieces.empty()) {
    size_t count = 0;
    uint64_t bytes = 0;
    for (; count < std::min<size_t>(pieces.size(), cuda::kMaxBlockPieces); ++count) {
      const uint64_t more = pieces[count].bytes;
      if (count > 0 && (more >= kDirectBytes || bytes + more > kCudaCopyStagingBytes)) break;
      bytes += more;
      if (more >= kDirectBytes) {
        ++count;
        break;
      }
    }
    STRAIT_RETURN_IF_ERROR(EnqueueTogether(pieces.subspan(0, count), way, buffer, copy));
    pieces.remove_prefix(count);
  }
  STRAIT_CUDA_RETURN_IF_ERROR(cudaEventRecord(copy->done, stream_));
  return absl::OkStatus();
}

absl::Status DeviceCopies::EnqueueTogether(absl::Span<const CopyPiece> pieces, CopyWay way,
                                           const Buffer& buffer, Copy* copy) {
  const bool reads = way == CopyWay::kRead;
  const uint64_t begin = pieces.front().buffer_offset;
  const uint64_t bytes = pieces.back().buffer_offset + pieces.back().bytes - begin;
  std::byte* const in_buffer = buffer.data + begin;
  // Where the rows are one run on the device, and where the link's other end has them.
  std::byte* packed = place_.staging;
  if (buffer.memory == Memory::kDevice) packed = in_buffer;
  if (pieces.size() == 1) packed = place_.pool + pieces.front().pool_offset;
  std::byte* const far = buffer.memory == Memory::kPlain ? staging_.data() : in_buffer;

  const auto move_pieces = [&]() -> cudaError_t {
    if (pieces.size() == 1) return cudaSuccess;
    cuda::BlockPiecesParams params;
    params.num_pieces = static_cast<int32_t>(pieces.size());
    params.blocks = place_.pool;
    params.packed = packed;
    for (size_t i = 0; i < pieces.size(); ++i) {
      params.pieces[i] = {static_cast<int64_t>(pieces[i].pool_offset),
                          static_cast<int64_t>(pieces[i].buffer_offset - begin),
                          static_cast<int64_t>(pieces[i].bytes)};
    }
    return reads ? cuda::GatherBlockPieces(params, stream_)
                 : cuda::ScatterBlockPieces(params, stream_);
  };
  const auto move_far = [&]() -> cudaError_t {
    if (packed == far) return cudaSuccess;
    const bool local = buffer.memory == Memory::kDevice;
    return reads
               ? cudaMemcpyAsync(far, packed, bytes,
                                 local ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost, stream_)
               : cudaMemcpyAsync(packed, far, bytes,
                                 local ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice,
                                 stream_);
  };
  const bool plain = buffer.memory == Memory::kPlain;
  if (reads) {
    STRAIT_CUDA_RETURN_IF_ERROR(move_pieces());
    STRAIT_CUDA_RETURN_IF_ERROR(move_far());
    return plain ? EnqueueHostMove({in_buffer, far, bytes}, copy) : absl::OkStatus();
  }
  if (plain) STRAIT_RETURN_IF_ERROR(EnqueueHostMove({far, in_buffer, bytes}, copy));
  STRAIT_CUDA_RETURN_IF_ERROR(move_far());
  STRAIT_CUDA_RETURN_IF_ERROR(move_pieces());
  return absl::OkStatus();
}

absl::Status DeviceCopies::EnqueueHostMove(HostMove move, Copy* copy) {
  copy->moves.push_back(move);
  STRAIT_CUDA_RETURN_IF_ERROR(cudaLaunchHostFunc(
      stream_,
      [](void* data) {
        const HostMove& m = *static_cast<const HostMove*>(data);
        std::memcpy(m.to, m.from, m.bytes);
      },
      &copy->moves.back()));
  return absl::OkStatus();
}

std::vector<CopyEnd> DeviceCopies::Poll() {
  std::vector<CopyEnd> ends;
  while (!under_way_.empty()) {
    const cudaError_t error = cudaEventQuery(under_way_.front().done);
    if (error == cudaErrorNotReady) {
      (void)cudaGetLastError();  // nobody else is to find that
      break;
    }
    const absl::Status status = CudaStatus(error, "a copy of cache rows");
    if (!status.ok()) ExitIfContextLost(status);
    ends.push_back({under_way_.front().id, status});
    under_way_.pop_front();
  }
  return ends;
}

absl::StatusOr<CopyMemory> DeviceCopies::Take(size_t bytes) {
  STRAIT_CUDA_RETURN_IF_ERROR(cudaSetDevice(place_.device));
  void* data = nullptr;
  STRAIT_CUDA_RETURN_IF_ERROR(cudaHostAlloc(&data, bytes, cudaHostAllocPortable));
  CopyMemory memory;
  memory.data = {static_cast<std::byte*>(data), [](std::byte* gone) { (void)cudaFreeHost(gone); }};
  memory.bytes = bytes;
  return memory;
}

}  // namespace strait
