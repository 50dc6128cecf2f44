// SPDX-License-Identifier: Apache-2.0
//
// Memory that two workers of one host have in common: who asks for rows offers a place in a region of its own, who
// has the rows writes them there, and only headers and checksums go over gRPC.
//
// Owns:    a SharedRegion its memory, and which places of it are in use; a MappedRegion its mapping of another
//          worker's. An Offer, and LentRows, keep the region that they are of.
// Thread:  any, synchronized inside. An Offer, LentRows: one at a time.
// Errors:  Create: ResourceExhausted, Unavailable: the system. Map: FailedPrecondition: what is offered is not there, not of this
//          user, or not what it says it is. Write: FailedPrecondition: the offer was taken back; InvalidArgument:
//          no such place. Then rows go by gRPC. Take: DataLoss: nobody has written there; the rows are asked for again.
// Limits:  kSharedRowsBytes of a region, kMaxSharedPlaces offered or in use; beyond, nothing is offered.
// Why:     a memfd has no name, so nothing is left when both processes are killed; its size is sealed, so no end
//          can pull the memory from under the other one (SIGBUS). It is reached as /proc/PID/fd/N, where the kernel itself
//          asks for the same user; a nonce in it, told over the connection of the rows, says that it is the one that was
//          meant. Another host, container or user finds nothing, or something else, and that is no error. No mount's limit
//          counts (a container's /dev/shm).
//          A region is mapped before the ask's secret is looked at: a stranger can make a worker map such memory of
//          its own user, whose nonce it knows, and nothing else.
//          A place has one writer, by a ticket that is never used again: it says in the region's first page that
//          it writes, if the offer still stands, and that it has left. So an offer that is given up is not
//          another transfer's before its writer is out of it, also where writer and stream no longer know of each
//          other. A writer holds a lock of the kernel's meanwhile, which ends with its process: the place of one
//          that died is free again, that of one that hangs is not.
//          A region is for the worker's life and for all its peers: page-locked memory is not given back while a GPU
//          computes (worker/model/cuda/pinned.h). Peers are trusted not to write what they were not asked for, as
//          they are with the rows themselves; checksums find accidents.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/limits.h"
#include "worker/transfer/row_transfer.h"

namespace strait {

inline constexpr uint64_t kSharedRowsBytes = limits::kTransferBytesUnderWay;
inline constexpr uint64_t kSharedUnitBytes =
    64 << 10;  // a place is some of these, one behind the other
inline constexpr uint32_t kMaxSharedPlaces = 4 * kMaxAsksUnderWay;

// A place that is offered, as an ask tells it: strait.v1.SharedPlace.
struct SharedPlace {
  uint64_t nonce_low = 0;
  uint64_t nonce_high = 0;
  uint32_t process_id = 0;
  uint32_t file = 0;  // the region's descriptor there
  uint32_t index = 0;
  uint64_t ticket = 0;  // 0: nothing is offered
  uint64_t offset = 0;  // among the region's rows
  uint64_t bytes = 0;

  bool any() const { return ticket != 0; }
};

// Makes memory one that a device copies to and from without a detour, until what it answers goes: Backend::LockPages.
using LockPages = std::function<absl::StatusOr<std::shared_ptr<void>>(absl::Span<std::byte>)>;

namespace internal {

// The first page of a region; its rows follow.
struct SharedPage {
  uint64_t magic = 0;
  uint64_t nonce_low = 0;
  uint64_t nonce_high = 0;
  uint64_t rows_bytes = 0;
  std::array<uint64_t, kMaxSharedPlaces> words =
      {};  // ticket << 2 | state; only by std::atomic_ref
};
inline constexpr uint64_t kSharedPageBytes = 4096;
static_assert(sizeof(SharedPage) <= kSharedPageBytes);

// A descriptor and a mapping of it.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  absl::Status Make();
  absl::Status Open(const SharedPlace& place);
  void Lock(const LockPages& lock);

  absl::Span<std::byte> rows() const;
  std::atomic_ref<uint64_t> word(uint32_t index) const;
  int file() const { return file_; }
  uint64_t nonce_low() const { return nonce_low_; }
  uint64_t nonce_high() const { return nonce_high_; }
  bool is_locked() const { return locked_ != nullptr; }

 private:
  absl::Status MapAll();
  SharedPage& page() const { return *static_cast<SharedPage*>(base_); }

  int file_ = -1;
  void* base_ = nullptr;
  uint64_t nonce_low_ = 0;
  uint64_t nonce_high_ = 0;
  std::shared_ptr<void> locked_;
};

}  // namespace internal

// The end that asks.
class SharedRegion : public std::enable_shared_from_this<SharedRegion> {
 public:
  // One ask's. Taken back when it goes, if nothing was taken.
  class Offer {
   public:
    Offer(std::shared_ptr<SharedRegion> region, const SharedPlace& place)
        : region_(std::move(region)), place_(place) {}
    ~Offer();
    Offer(const Offer&) = delete;
    Offer& operator=(const Offer&) = delete;

    const SharedPlace& place() const { return place_; }
    // Who was asked says that it has written so many bytes. REQUIRES: called once.
    absl::StatusOr<LentRows> Take(uint64_t bytes);

   private:
    std::shared_ptr<SharedRegion> region_;  // null: taken
    const SharedPlace place_;
  };

  // `lock` may be empty. What cannot be locked is used all the same.
  static absl::StatusOr<std::shared_ptr<SharedRegion>> Create(const LockPages& lock);

  // Null: there is no room.
  std::unique_ptr<Offer> Make(uint64_t bytes);
  // Where nothing is in use, pages go back to the system, unless they are locked.
  void Trim();
  // Of places that are offered, in use, or given up while their writer may be in them.
  uint64_t used_bytes();

 private:
  struct Place {
    uint64_t ticket = 0;  // 0: free
    size_t first_unit = 0;
    size_t num_units = 0;
    bool is_given_up = false;
  };

  SharedRegion() = default;
  void TakeBack(const SharedPlace& place);
  void Free(uint32_t index);
  void FreeLocked(uint32_t index);  // REQUIRES: mu_
  void Reclaim();                   // REQUIRES: mu_

  internal::SharedMemory memory_;
  std::mutex mu_;
  std::array<Place, kMaxSharedPlaces> places_;  // guarded by mu_
  std::vector<bool> units_ =
      std::vector<bool>(kSharedRowsBytes / kSharedUnitBytes);  // in use; guarded by mu_
  size_t num_units_ = 0;                                       // of these; guarded by mu_
  size_t num_given_up_ = 0;                                    // guarded by mu_
  uint64_t last_ticket_ = 0;                                   // guarded by mu_
  bool is_touched_ = false;                                    // guarded by mu_
};

// The end that is asked.
class MappedRegion : public std::enable_shared_from_this<MappedRegion> {
 public:
  static absl::StatusOr<std::shared_ptr<MappedRegion>> Map(const SharedPlace& place,
                                                           const LockPages& lock);

  // Where rows of so many bytes are to be written. Whoever reads them may, when it goes.
  absl::StatusOr<LentRows> Write(const SharedPlace& place, uint64_t bytes);
  // Whether this is what is offered there.
  bool Is(const SharedPlace& place) const;
  // Whether the process that offers it has it still.
  bool IsOffered() const;
  bool is_locked() const { return memory_.is_locked(); }

 private:
  MappedRegion() = default;

  internal::SharedMemory memory_;
  uint32_t process_id_ = 0;
  uint32_t owners_file_ = 0;
};

}  // namespace strait
