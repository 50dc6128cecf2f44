// SPDX-License-Identifier: Apache-2.0
#include "worker/model/memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/text.h"

namespace strait {

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

absl::StatusOr<Mapping> Mapping::Create(uint64_t bytes, std::string_view what) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat(ToAbsl(what), ": the system refuses ", bytes,
                                                     " bytes of memory: ", std::strerror(errno)));
  }
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.bytes_ = bytes;
  return mapping;
}

MemoryBudget::Share::~Share() {
  if (budget_ != nullptr) budget_->used_ -= bytes_;
}

absl::StatusOr<MemoryBudget::Share> MemoryBudget::Take(std::shared_ptr<MemoryBudget> budget,
                                                       uint64_t bytes, std::string_view what) {
  uint64_t used = budget->used_.load();
  do {
    if (bytes > budget->total_ - used) {
      return absl::ResourceExhaustedError(absl::StrCat(
          ToAbsl(what), " needs ", bytes, " bytes, available are ", budget->total_ - used, " of ",
          budget->total_, "; give this worker more memory, fewer layers or a smaller cache"));
    }
  } while (!budget->used_.compare_exchange_weak(used, used + bytes));
  return Share(std::move(budget), bytes);
}

absl::Status MemoryBudget::Resize(Share* share, uint64_t bytes, std::string_view what) {
  if (bytes > share->bytes_) {
    auto more = Take(share->budget_, bytes - share->bytes_, what);
    if (!more.ok()) return more.status();
    more->bytes_ = 0;  // it is the share's now
  } else {
    share->budget_->used_ -= share->bytes_ - bytes;
  }
  share->bytes_ = bytes;
  return absl::OkStatus();
}

}  // namespace strait
