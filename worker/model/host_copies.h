// SPDX-License-Identifier: Apache-2.0
//
// HostCopies copies cache rows of a pool in host memory, on a thread of its own.
//
// Owns:    the thread, from the first copy on.     Borrows: the cache, which outlives it.
// Thread:  as BlockCopies; the copies' thread touches only rows and buffers of copies under way.
// Errors:  Read, Write: InvalidArgument also for memory of a device.
// Why:     a step has computed when its Begin returns, so what a copy waits for is done when it is
//          asked for. A thread, since migrating gigabytes must not stop the loop between steps.
#pragma once

#include <optional>
#include <thread>
#include <vector>

#include "proto/rpc/queue.h"
#include "worker/backend.h"
#include "worker/cache/copy_list.h"
#include "worker/model/host_cache.h"

namespace strait {

class HostCopies final : public BlockCopies {
 public:
  HostCopies(uint32_t num_layers, const HostCache* cache, uint32_t row_bytes);
  ~HostCopies() override;

  using BlockCopies::Read;
  using BlockCopies::Write;
  absl::StatusOr<CopyId> Read(absl::Span<const BlockRows> list, RowsOut to,
                              CopyAfter after) override;
  absl::StatusOr<CopyId> Write(absl::Span<const BlockRows> list, RowsIn from,
                               CopyAfter after) override;
  std::vector<CopyEnd> Poll() override;
  size_t num_under_way() const override { return num_under_way_; }
  uint32_t row_bytes() const override { return row_bytes_; }
  absl::StatusOr<CopyMemory> Take(size_t bytes) override;

 private:
  struct Copy {
    CopyId id;
    std::vector<CopyPiece> pieces;
    std::byte* read_to = nullptr;           // of a Read
    const std::byte* write_from = nullptr;  // of a Write; both null: the thread ends
  };

  absl::StatusOr<CopyId> Start(absl::Span<const BlockRows> list, CopyWay way, bool on_device,
                               size_t bytes, Copy copy);
  void Run();

  const uint32_t num_layers_;
  const HostCache* const cache_;
  const uint32_t row_bytes_;

  // Loop thread.
  CopyId last_id_;
  size_t num_under_way_ = 0;
  std::thread thread_;

  BoundedQueue<Copy> asked_;
  BoundedQueue<CopyId> ended_;
};

}  // namespace strait
