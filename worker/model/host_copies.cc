// SPDX-License-Identifier: Apache-2.0
#include "worker/model/host_copies.h"

#include <chrono>
#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

constexpr std::align_val_t kMemoryAlign{64};

}  // namespace

HostCopies::HostCopies(uint32_t num_layers, const HostCache* cache, uint32_t row_bytes)
    : num_layers_(num_layers),
      cache_(cache),
      row_bytes_(row_bytes),
      asked_(kMaxCopiesUnderWay + 1),
      ended_(kMaxCopiesUnderWay) {}

HostCopies::~HostCopies() {
  if (!thread_.joinable()) return;
  asked_.Push({});
  thread_.join();
}

absl::StatusOr<CopyId> HostCopies::Read(absl::Span<const BlockRows> list, RowsOut to, CopyAfter) {
  Copy copy;
  copy.read_to = to.bytes.data();
  return Start(list, CopyWay::kRead, to.on_device, to.bytes.size(), std::move(copy));
}

absl::StatusOr<CopyId> HostCopies::Write(absl::Span<const BlockRows> list, RowsIn from, CopyAfter) {
  Copy copy;
  copy.write_from = from.bytes.data();
  return Start(list, CopyWay::kWrite, from.on_device, from.bytes.size(), std::move(copy));
}

absl::StatusOr<CopyId> HostCopies::Start(absl::Span<const BlockRows> list, CopyWay way,
                                         bool on_device, size_t bytes, Copy copy) {
  if (on_device) {
    return absl::InvalidArgumentError("a buffer on a device, and the rows are the CPU's");
  }
  STRAIT_ASSIGN_OR_RETURN(copy.pieces,
                          CutCopy(list, way, num_layers_, cache_->num_blocks(), row_bytes_, bytes));
  STRAIT_RETURN_IF_ERROR(CheckCopiesUnderWay(num_under_way_));
  if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
  ++num_under_way_;
  copy.id = CopyId{++last_id_.value};
  asked_.Push(std::move(copy));
  return last_id_;
}

void HostCopies::Run() {
  for (;;) {
    for (const Copy& copy : asked_.PopAll(std::chrono::hours(1))) {
      if (copy.read_to == nullptr && copy.write_from == nullptr) return;
      for (const CopyPiece& piece : copy.pieces) {
        std::byte* const rows = cache_->blocks() + piece.pool_offset;
        if (copy.read_to != nullptr) {
          std::memcpy(copy.read_to + piece.buffer_offset, rows, piece.bytes);
        } else {
          std::memcpy(rows, copy.write_from + piece.buffer_offset, piece.bytes);
        }
      }
      ended_.Push(copy.id);
    }
  }
}

std::vector<CopyEnd> HostCopies::Poll() {
  std::vector<CopyEnd> ends;
  if (num_under_way_ == 0) return ends;
  for (const CopyId id : ended_.PopAll(std::chrono::microseconds(0))) {
    ends.push_back({id, absl::OkStatus()});
  }
  num_under_way_ -= ends.size();
  return ends;
}

absl::StatusOr<CopyMemory> HostCopies::Take(size_t bytes) {
  void* const data = ::operator new(bytes, kMemoryAlign, std::nothrow);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no ", bytes, " bytes of host memory"));
  }
  CopyMemory memory;
  memory.data = {static_cast<std::byte*>(data),
                 [](std::byte* gone) { ::operator delete(gone, kMemoryAlign); }};
  memory.bytes = bytes;
  return memory;
}

}  // namespace strait
