// SPDX-License-Identifier: Apache-2.0
//
// TransferShare is what the importers and exporters of one worker share: the way to other workers, and
// how much may be under way on it.
//
// Borrows: RowTransfer; it outlives this.
// Thread:  loop thread only.
// Limits:  kTransferBytesUnderWay of rows asked for, and as many being made for others; kMaxAsksUnderWay.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "absl/status/statusor.h"
#include "proto/base/ids.h"
#include "proto/base/limits.h"
#include "worker/transfer/row_transfer.h"

namespace strait {

class Exporter;

// Who asks for rows, and is given the answers.
class RowsTaker {
 public:
  virtual void OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us) = 0;

 protected:
  ~RowsTaker() = default;
};

// Of what bulk asks for: the rest is for sequences that stand still, which must not wait behind it.
inline constexpr uint64_t kBulkBytesUnderWay = limits::kTransferBytesUnderWay / 2;
static_assert(kBulkBytesUnderWay >= limits::kTransferFrameBytes);
// Of a frame of blocks by their keys: loop threads look at its bytes and copy them, where it goes to replicas or comes
// from them, and steps wait for that.
inline constexpr uint64_t kReplicaFrameBytes = limits::kTransferFrameBytes / 4;
inline constexpr size_t kBulkAsksUnderWay = kMaxAsksUnderWay / 4 * 3;

struct TransferShare {
  RowTransfer* transfer = nullptr;  // null: the worker neither gives nor takes rows
  uint64_t frame_bytes =
      limits::kTransferFrameBytes;  // that are asked for at once; of a block at least
  uint64_t asked_bytes = 0;         // of rows asked for, until they are in the cache
  uint64_t made_bytes = 0;          // of frames for peers, until they are answered
  size_t num_made = 0;              // such frames
  bool holds_copies = false;        // none begins: the cache is about to become smaller
  AskId last_ask;
  std::map<AskId, RowsTaker*> asks;            // not answered
  std::map<PeerAskId, Exporter*> unconfirmed;  // answered, and OnServed has not come
};

}  // namespace strait
