// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/shared_rows.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

using internal::kSharedPageBytes;
using internal::SharedPage;

constexpr uint64_t kRegionBytes = kSharedPageBytes + kSharedRowsBytes;
constexpr uint64_t kMagic = 0x31'53'57'4F'52'54'53'53;  // "SSTROWS1" in memory
constexpr char kName[] = "strait-rows";
constexpr std::string_view kLink = "/memfd:strait-rows";
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// What a place's word says beside the ticket. 0 with no ticket: the place is free.
enum State : uint64_t { kOffered = 1, kWriting = 2, kLeft = 3 };
constexpr uint64_t Word(uint64_t ticket, State state) { return ticket << 2 | state; }

absl::Status FromErrno(std::string_view what) {
  const std::string text = absl::StrCat(std::string(what), ": ", std::strerror(errno));
  return errno == ENOMEM || errno == EMFILE || errno == ENFILE ? absl::ResourceExhaustedError(text)
                                                               : absl::UnavailableError(text);
}

std::string PathOf(uint32_t process_id, uint32_t file) {
  return absl::StrCat("/proc/", process_id, "/fd/", file);
}

// A place's writer locks the place's byte of the file, by its own description of it: that ends with its process.
struct flock ByteOf(uint32_t index, short type) {
  struct flock byte = {};
  byte.l_type = type;
  byte.l_whence = SEEK_SET;
  byte.l_start = index;
  byte.l_len = 1;
  return byte;
}
bool LockByte(int file, uint32_t index) {
  struct flock byte = ByteOf(index, F_WRLCK);
  return fcntl(file, F_OFD_SETLK, &byte) == 0;
}
void UnlockByte(int file, uint32_t index) {
  struct flock byte = ByteOf(index, F_UNLCK);
  (void)fcntl(file, F_OFD_SETLK, &byte);
}
// Also where it cannot be known.
bool IsByteLocked(int file, uint32_t index) {
  struct flock byte = ByteOf(index, F_WRLCK);
  return fcntl(file, F_OFD_GETLK, &byte) != 0 || byte.l_type != F_UNLCK;
}

}  // namespace

namespace internal {

SharedMemory::~SharedMemory() {
  locked_.reset();
  if (base_ != nullptr) munmap(base_, kRegionBytes);
  if (file_ >= 0) close(file_);
}

absl::Span<std::byte> SharedMemory::rows() const {
  return {static_cast<std::byte*>(base_) + kSharedPageBytes, kSharedRowsBytes};
}

std::atomic_ref<uint64_t> SharedMemory::word(uint32_t index) const {
  return std::atomic_ref<uint64_t>(page().words[index]);
}

absl::Status SharedMemory::MapAll() {
  void* const base = mmap(nullptr, kRegionBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
  if (base == MAP_FAILED) return FromErrno("memory for rows cannot be mapped");
  base_ = base;
  return absl::OkStatus();
}

absl::Status SharedMemory::Make() {
  file_ = memfd_create(kName, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (file_ < 0) return FromErrno("memfd_create");
  if (ftruncate(file_, kRegionBytes) != 0) return FromErrno("memory for rows");
  if (fcntl(file_, F_ADD_SEALS, kSeals) != 0) return FromErrno("memory for rows cannot be sealed");
  STRAIT_RETURN_IF_ERROR(MapAll());
  new (base_) SharedPage();
  std::random_device random;
  page().nonce_low = nonce_low_ = uint64_t{random()} << 32 | random();
  page().nonce_high = nonce_high_ = uint64_t{random()} << 32 | random();
  page().rows_bytes = kSharedRowsBytes;
  page().magic = kMagic;
  return absl::OkStatus();
}

absl::Status SharedMemory::Open(const SharedPlace& place) {
  const std::string path = PathOf(place.process_id, place.file);
  const auto refuse = [&](std::string_view why) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", std::string(why)));
  };
  // Looked at before it is opened: to open a pipe or a device has consequences.
  char link[PATH_MAX];
  const ssize_t length = readlink(path.c_str(), link, sizeof(link));
  if (length < 0) return refuse(std::strerror(errno));
  if (!std::string_view(link, static_cast<size_t>(length)).starts_with(kLink)) {
    return refuse("it is no memory for rows");
  }
  file_ = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file_ < 0) return refuse(std::strerror(errno));
  struct stat found = {};
  if (fstat(file_, &found) != 0) return refuse(std::strerror(errno));
  if (!S_ISREG(found.st_mode)) return refuse("it is no file");
  if (found.st_uid != geteuid()) return refuse("it is another user's");
  // Before its size: that cannot change any more.
  const int seals = fcntl(file_, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals) return refuse("its size is not sealed");
  if (found.st_size != static_cast<off_t>(kRegionBytes)) return refuse("it has another size");
  if (!MapAll().ok()) return refuse("it cannot be mapped");
  if (page().magic != kMagic || page().rows_bytes != kSharedRowsBytes ||
      page().nonce_low != place.nonce_low || page().nonce_high != place.nonce_high) {
    return refuse("it is not the one that was told of");
  }
  nonce_low_ = place.nonce_low;
  nonce_high_ = place.nonce_high;
  return absl::OkStatus();
}

void SharedMemory::Lock(const LockPages& lock) {
  if (!lock) return;
  absl::StatusOr<std::shared_ptr<void>> locked = lock(rows());
  if (!locked.ok()) {
    Log(LogLevel::kWarning, "memory for rows is not page-locked, the GPU copies by a detour",
        {{"why", locked.status()}});
    return;
  }
  locked_ = *std::move(locked);
}

}  // namespace internal

// ---------------------------------------------------------------- the end that asks

absl::StatusOr<std::shared_ptr<SharedRegion>> SharedRegion::Create(const LockPages& lock) {
  std::shared_ptr<SharedRegion> region(new SharedRegion());
  STRAIT_RETURN_IF_ERROR(region->memory_.Make());
  region->memory_.Lock(lock);
  return region;
}

std::unique_ptr<SharedRegion::Offer> SharedRegion::Make(uint64_t bytes) {
  if (bytes == 0 || bytes > limits::kTransferFrameBytes) return nullptr;
  const size_t num_units = (bytes + kSharedUnitBytes - 1) / kSharedUnitBytes;
  std::lock_guard lock(mu_);
  if (num_given_up_ > 0) Reclaim();
  const auto place = std::find_if(places_.begin(), places_.end(),
                                  [](const Place& each) { return each.ticket == 0; });
  // The lowest ones, which were used before: their pages are there, and may be in a cache.
  const auto units = std::search_n(units_.begin(), units_.end(), num_units, false);
  if (place == places_.end() || units == units_.end()) return nullptr;
  std::fill_n(units, num_units, true);
  num_units_ += num_units;
  is_touched_ = true;
  *place = {.ticket = ++last_ticket_,
            .first_unit = static_cast<size_t>(units - units_.begin()),
            .num_units = num_units};
  const auto index = static_cast<uint32_t>(place - places_.begin());
  memory_.word(index).store(Word(place->ticket, kOffered), std::memory_order_release);
  return std::make_unique<Offer>(shared_from_this(),
                                 SharedPlace{.nonce_low = memory_.nonce_low(),
                                             .nonce_high = memory_.nonce_high(),
                                             .process_id = static_cast<uint32_t>(getpid()),
                                             .file = static_cast<uint32_t>(memory_.file()),
                                             .index = index,
                                             .ticket = place->ticket,
                                             .offset = place->first_unit * kSharedUnitBytes,
                                             .bytes = bytes});
}

SharedRegion::Offer::~Offer() {
  if (region_ != nullptr) region_->TakeBack(place_);
}

absl::StatusOr<LentRows> SharedRegion::Offer::Take(uint64_t bytes) {
  STRAIT_CHECK(region_ != nullptr, "an offer is taken once");
  const uint64_t word = region_->memory_.word(place_.index).load(std::memory_order_acquire);
  if (bytes > place_.bytes || word != Word(place_.ticket, kLeft)) {
    return absl::DataLossError(absl::StrCat(bytes, " bytes of rows are said to be in memory for ",
                                            place_.bytes, ", where nobody has written them"));
  }
  LentRows rows;
  rows.memory = region_->memory_.rows().subspan(place_.offset, bytes);
  rows.keeper =
      std::shared_ptr<void>(nullptr, [region = std::exchange(region_, nullptr),
                                      index = place_.index](void*) { region->Free(index); });
  return rows;
}

void SharedRegion::TakeBack(const SharedPlace& place) {
  std::lock_guard lock(mu_);
  uint64_t word = Word(place.ticket, kOffered);
  const bool is_unused = memory_.word(place.index).compare_exchange_strong(word, 0);
  if (is_unused || word == Word(place.ticket, kLeft)) return FreeLocked(place.index);
  places_[place.index].is_given_up = true;
  ++num_given_up_;
}

void SharedRegion::Free(uint32_t index) {
  std::lock_guard lock(mu_);
  FreeLocked(index);
}

void SharedRegion::FreeLocked(uint32_t index) {
  Place& place = places_[index];
  std::fill_n(units_.begin() + static_cast<ptrdiff_t>(place.first_unit), place.num_units, false);
  num_units_ -= place.num_units;
  num_given_up_ -= place.is_given_up;
  memory_.word(index).store(0, std::memory_order_release);
  place = {};
}

void SharedRegion::Reclaim() {
  for (uint32_t index = 0; index < places_.size(); ++index) {
    if (!places_[index].is_given_up) continue;
    const uint64_t word = memory_.word(index).load(std::memory_order_acquire);
    // A writer has the lock before the word says that it writes. So one that says so, and has none, is dead, or
    // about to say that it has left.
    if (word != Word(places_[index].ticket, kLeft) && IsByteLocked(memory_.file(), index)) continue;
    FreeLocked(index);
  }
}

void SharedRegion::Trim() {
  std::lock_guard lock(mu_);
  if (num_given_up_ > 0) Reclaim();
  if (!is_touched_ || num_units_ > 0 || memory_.is_locked()) return;
  is_touched_ = false;
  (void)fallocate(memory_.file(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(kSharedPageBytes), static_cast<off_t>(kSharedRowsBytes));
}

uint64_t SharedRegion::used_bytes() {
  std::lock_guard lock(mu_);
  if (num_given_up_ > 0) Reclaim();
  return num_units_ * kSharedUnitBytes;
}

// ---------------------------------------------------------------- the end that is asked

absl::StatusOr<std::shared_ptr<MappedRegion>> MappedRegion::Map(const SharedPlace& place,
                                                                const LockPages& lock) {
  std::shared_ptr<MappedRegion> region(new MappedRegion());
  STRAIT_RETURN_IF_ERROR(region->memory_.Open(place));
  region->memory_.Lock(lock);
  region->process_id_ = place.process_id;
  region->owners_file_ = place.file;
  return region;
}

absl::StatusOr<LentRows> MappedRegion::Write(const SharedPlace& place, uint64_t bytes) {
  if (place.index >= kMaxSharedPlaces || bytes > place.bytes || place.bytes > kSharedRowsBytes ||
      place.offset > kSharedRowsBytes - place.bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "no place of ", bytes, " bytes at ", place.offset, ", which is number ", place.index));
  }
  const absl::Status gone = absl::FailedPreconditionError("the offer was taken back");
  if (!LockByte(memory_.file(), place.index)) return gone;
  uint64_t word = Word(place.ticket, kOffered);
  if (!memory_.word(place.index).compare_exchange_strong(word, Word(place.ticket, kWriting))) {
    UnlockByte(memory_.file(), place.index);
    return gone;
  }
  LentRows rows;
  rows.memory = memory_.rows().subspan(place.offset, bytes);
  rows.keeper = std::shared_ptr<void>(
      nullptr, [region = shared_from_this(), index = place.index, ticket = place.ticket](void*) {
        // Unlocked first: once the word says that it has left, the place is another's to lock. And if it was
        // given up and found unlocked just now, the word is no longer this writer's.
        UnlockByte(region->memory_.file(), index);
        uint64_t writing = Word(ticket, kWriting);
        region->memory_.word(index).compare_exchange_strong(writing, Word(ticket, kLeft));
      });
  return rows;
}

bool MappedRegion::Is(const SharedPlace& place) const {
  return memory_.nonce_low() == place.nonce_low && memory_.nonce_high() == place.nonce_high;
}

bool MappedRegion::IsOffered() const {
  struct stat theirs = {};
  struct stat ours = {};
  return stat(PathOf(process_id_, owners_file_).c_str(), &theirs) == 0 &&
         fstat(memory_.file(), &ours) == 0 && theirs.st_dev == ours.st_dev &&
         theirs.st_ino == ours.st_ino;
}

}  // namespace strait
