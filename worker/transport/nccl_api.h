// SPDX-License-Identifier: Apache-2.0
//
// NcclApi is what an edge needs of NCCL, EdgeDevice what it needs of the GPU: the two seams behind
// which NcclTransport knows neither library. Implementations: libnccl.so.2, loaded at run time
// (nccl_library.h), and CUDA (nccl_device.h); fakes with faults for tests.
//
// Thread:  any. Two threads never use one communicator, stream or event at a time.
// Errors:  NcclApi answers NCCL's own codes.
// Why:     communicators are non-blocking: a call that cannot end at once answers
//          kNcclInProgress, and until AsyncError says otherwise the communicator may only be asked
//          again, revoked or aborted. So a dead peer costs a deadline, not a thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace strait {

class TeardownGate;

struct NcclComm;  // a communicator of two ranks: 0 sends, 1 receives
using NcclCode = int;
inline constexpr NcclCode kNcclSuccess = 0;
inline constexpr NcclCode kNcclInvalidUsage = 5;
inline constexpr NcclCode kNcclRemoteError = 6;
inline constexpr NcclCode kNcclInProgress = 7;

class NcclApi {
 public:
  virtual ~NcclApi() = default;

  virtual uint32_t version() const = 0;  // 22809: 2.28.9
  // A new communicator's id, kNcclIdBytes long.
  virtual NcclCode MakeId(std::string* id) = 0;
  // Begins to make `rank` of the communicator `id`, on the device current in this thread. `*comm`
  // may be set whatever the answer, and must then be destroyed or aborted.
  virtual NcclCode Init(NcclComm** comm, const std::string& id, int rank) = 0;
  virtual NcclCode AsyncError(NcclComm* comm, NcclCode* state) = 0;
  // Device memory, ordered by `stream`, to and from the other rank.
  virtual NcclCode Send(NcclComm* comm, const std::byte* data, size_t bytes, void* stream) = 0;
  virtual NcclCode Receive(NcclComm* comm, std::byte* data, size_t bytes, void* stream) = 0;
  // Of one on which nothing is under way: once AsyncError says success, Destroy is safe.
  virtual NcclCode Finalize(NcclComm* comm) = 0;
  // Revoke (2.28.9) stops what is under way without freeing; once AsyncError says success, Destroy
  // is safe. May block like Abort, which stops and frees at once.
  virtual bool can_revoke() const = 0;
  virtual NcclCode Revoke(NcclComm* comm) = 0;
  virtual NcclCode Destroy(NcclComm* comm) = 0;
  virtual NcclCode Abort(NcclComm* comm) = 0;
  virtual std::string Text(NcclCode code) const = 0;
};

class EdgeDevice {
 public:
  virtual ~EdgeDevice() = default;

  // Of the device, the same in every process that has it; empty: not known.
  virtual std::string name() const = 0;
  // Makes it the calling thread's device.
  virtual absl::Status Use() = 0;
  virtual absl::StatusOr<std::byte*> Take(size_t bytes) = 0;
  virtual void Give(std::byte* memory) = 0;
  // Whether Give may wait for what runs on the device: then who takes often keeps what it has.
  virtual bool GiveWaits() const { return true; }
  virtual absl::StatusOr<void*> MakeStream() = 0;
  virtual void FreeStream(void* stream) = 0;
  virtual absl::StatusOr<void*> MakeEvent() = 0;
  virtual void FreeEvent(void* event) = 0;
  virtual absl::Status Record(void* event, void* stream) = 0;
  // Whether all that came before Record is done.
  virtual absl::StatusOr<bool> Done(void* event) = 0;
  // Host memory onto the device; `from` must last until the stream has passed it.
  virtual absl::Status Upload(std::byte* to, const std::byte* from, size_t bytes, void* stream) = 0;
  // XXH3-64 of pieces of device memory, one behind the other from `data` on; nobody writes there. Waits for
  // them. No piece: gets ready, which may wait for what runs on the device. Errors: the device's; InvalidArgument: too many pieces, or one
  // that is no multiple of 8 bytes or not longer than kShortPieceBytes.
  virtual absl::Status Checksums(const std::byte* data, absl::Span<const uint32_t> piece_bytes,
                                 absl::Span<uint64_t> sums) = 0;
};
// Pieces up to here are summed on the host alone: XXH3 has another rule for them.
inline constexpr uint32_t kShortPieceBytes = 240;
inline constexpr size_t kMaxChecksumPieces = 8192;

// What a worker offers for its edges: both, or neither and why.
struct NcclOffer {
  std::shared_ptr<NcclApi> nccl;
  std::shared_ptr<EdgeDevice> device;
  std::string problem;                           // when there is none: for people
  std::shared_ptr<TeardownGate> gate = nullptr;  // of the process; null: each transport has its own
};

// "2.28.9" of 22809.
std::string NcclVersionText(uint32_t version);

}  // namespace strait
