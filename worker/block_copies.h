// SPDX-License-Identifier: Apache-2.0
//
// BlockCopies reads and writes cache rows of a StageModel while it steps: how rows leave a stage's
// pool and come into it, for migration, replication and parking. A part of the Backend seam.
//
// Borrows: a copy's buffer, until Poll has told its end or the model is destroyed, which waits.
// Thread:  loop thread only; Take any.
// Shapes:  a buffer has the rows of the list's entries, packed in the list's order, row_bytes() each
//          (proto/latent_block.h); in host memory, or on the model's device.
// Stream:  copies are made one after the other in the order of their calls, each behind all steps
//          begun before its call, or behind those that were finished, as CopyAfter says. So Read sees what
//          these steps wrote, and both may cover rows that these steps use. No step waits for a copy. A
//          step begun after Poll has told a Write sees its rows.
// Errors:  Read, Write: InvalidArgument: the list or the buffer, and what is wrong with it;
//          ResourceExhausted: kMaxCopiesUnderWay, come back after a Poll. Nothing was copied then.
//          Read, Write and, of a copy that had begun, Poll: Internal: the device. The buffer is the
//          caller's again; what the copy was to write is void.
// Limits:  kMaxCopiesUnderWay, kMaxCopyEntries.
// Why:     blocks are pinned by whoever owns them, not here: the cache's books know which sequence
//          holds a block, and must know of copies anyway, to free it late. A copy knows nothing of
//          sequences, lengths, epochs or checksums: rows of a void step are void in the buffer,
//          too, and what Write is given becomes the sequence's rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "worker/hidden_buffer.h"

namespace strait {

// Of one model.
inline constexpr size_t kMaxCopiesUnderWay = 32;
// Of one list; V3's bf16 blocks: 302 MB.
inline constexpr size_t kMaxCopyEntries = 4096;

// Rows first_row … first_row + num_rows - 1 of a block.
struct BlockRows {
  uint32_t layer = 0;  // of the stage, whose block it is
  BlockId block = 0;
  uint32_t first_row = 0;
  uint32_t num_rows = 0;  // at least 1; within the block
};

// The rows of a list on their way, in host memory or on the device: worker/hidden_buffer.h.
using RowsIn = HiddenIn;
using RowsOut = HiddenOut;

using CopyId = Id<struct CopyTag>;  // of one model; rises by one from 1 with each copy

// Behind which steps a copy is made.
enum class CopyAfter {
  kBegunSteps,
  // REQUIRES: no step that is begun and not finished writes a row that a Read copies, or uses a row that a Write does.
  // Whoever waits for the copy then does not wait for others' steps.
  kFinishedSteps,
};

struct CopyEnd {
  CopyId id;
  absl::Status status;
};

// Host memory that copies reach without a detour.
struct CopyMemory {
  std::unique_ptr<std::byte[], std::function<void(std::byte*)>> data;  // 64-byte aligned
  size_t bytes = 0;
};

class BlockCopies {
 public:
  virtual ~BlockCopies() = default;

  // Begins a copy of the list's rows to `to`. The list is lent for the call, and may have a row
  // twice. REQUIRES: what others did with the buffer is done, on a device, too. Until Poll has told
  // the copy: no step begun after this call writes a row of the list; nobody touches the buffer.
  virtual absl::StatusOr<CopyId> Read(absl::Span<const BlockRows> list, RowsOut to,
                                      CopyAfter after) = 0;
  absl::StatusOr<CopyId> Read(absl::Span<const BlockRows> list, RowsOut to) {
    return Read(list, to, CopyAfter::kBegunSteps);
  }
  // Begins a copy of `from` to the list's rows. The list is lent for the call, and has no row twice.
  // REQUIRES: `from` is filled, on a device, too. Until Poll has told the copy: no step begun after
  // this call reads or writes a row of the list, others of the same blocks it may; nobody changes
  // the buffer.
  virtual absl::StatusOr<CopyId> Write(absl::Span<const BlockRows> list, RowsIn from,
                                       CopyAfter after) = 0;
  absl::StatusOr<CopyId> Write(absl::Span<const BlockRows> list, RowsIn from) {
    return Write(list, from, CopyAfter::kBegunSteps);
  }

  // The copies that have ended since the last call, in the order of their ids, each told once: one
  // place of a process calls it and hands on. Never waits.
  virtual std::vector<CopyEnd> Poll() = 0;
  // Copies that Poll has not told.
  virtual size_t num_under_way() const = 0;

  virtual uint32_t row_bytes() const = 0;  // a multiple of kRowAlign

  // Memory that a device copies to and from at its own rate; other host memory takes the way
  // through a buffer of the model's. May take milliseconds, so take it once and use it often. It
  // may outlive the model, and is given back on any thread. Errors: ResourceExhausted.
  virtual absl::StatusOr<CopyMemory> Take(size_t bytes) = 0;
};

}  // namespace strait
