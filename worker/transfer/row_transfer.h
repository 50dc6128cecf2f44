// SPDX-License-Identifier: Apache-2.0
//
// RowTransfer carries cache rows from one worker to another: who wants rows asks for them, and gets
// them in frames of a few megabytes. Implementations: gRPC, which on one host, and between devices, only controls it
// (worker/transfer/grpc_row_transfer.h), simulated (tests/sim).
//
// Owns:    its connections, one to each worker that was asked, apart from those of Transport.
// Thread:  all methods: loop thread. Events come on the transfer's own threads and must only
//          enqueue.
// Errors:  each Ask is answered once: Unavailable: the connection broke, or brought no answer for too long;
//          DataLoss: the frame, or its checksums, are wrong; else what the peer said. A dead peer never
//          blocks a caller.
// Limits:  kTransferFrameBytes of rows in a frame. Of asks, kTransferBytesUnderWay and kMaxAsksUnderWay are the
//          caller's to keep; a peer that asks for more gets ResourceExhausted.
// Why:     the receiver asks, so it is never sent what it has no memory for, and what was lost with
//          a connection it asks for again. Checksums are made and checked here, on the transfer's
//          threads, so a worker that moves gigabytes goes on stepping.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/latent_block.h"

namespace strait {

// Of one worker, not answered.
inline constexpr size_t kMaxAsksUnderWay = 64;
// Of one ask.
inline constexpr size_t kMaxAskKeys = 128;

// As RowsRequest of proto/strait/v1/transfer.proto.
struct RowsAsk {
  uint64_t stage_id = 0;
  PipelineEpoch epoch;
  SequenceId sequence;
  PlacementEpoch placement;
  uint64_t secret = 0;
  LayerRange layers;
  uint32_t first_row = 0;
  uint32_t num_rows = 0;
  // Not empty: of the blocks of these rows, which are whole ones. Of replicas (stage_id 0), or of a stage's prefix
  // blocks (sequence 0).
  std::vector<ContentKey> keys;
  uint64_t bytes = 0;      // that these rows have; 0: who asks does not say. Not told to the peer
  bool on_device = false;  // the rows may come in device memory
};

// Memory of a transfer's, which has the rows of a frame until the keeper goes.
struct LentRows {
  absl::Span<std::byte> memory;
  std::shared_ptr<void> keeper;
  bool on_device = false;
  bool any() const { return !memory.empty(); }
};

// Rows of several pieces, each of one block, and what they are.
struct RowsFrame {
  SequenceId sequence;
  PlacementEpoch placement;
  std::vector<BlockHeader> pieces;  // layer by layer, by rising position
  std::string rows;                 // packed in the same order, or
  LentRows lent = {};               // where the transfer has them: another process may write there

  absl::Span<std::byte> bytes() {
    if (lent.any()) return lent.memory;
    return {reinterpret_cast<std::byte*>(rows.data()), rows.size()};
  }
  absl::Span<const std::byte> bytes() const { return const_cast<RowsFrame*>(this)->bytes(); }
  bool on_device() const { return lent.on_device; }
};

// An ask of this worker's, and one of a peer's.
using AskId = Id<struct AskTag>;  // given by the caller, not reused
using PeerAskId = Id<struct PeerAskTag>;

struct RowTransferEvents {
  // Answers Ask. Of a frame that is there every header was decoded and every checksum is right.
  std::function<void(AskId, absl::StatusOr<RowsFrame>)> on_rows;
  // A peer asks. To be answered once.
  std::function<void(PeerAskId, RowsAsk)> on_ask;
  // Answer has filled in the pieces' checksums, and gives them to the peer. Not told where it was an error, or where
  // the peer is gone.
  std::function<void(PeerAskId, std::vector<BlockHeader>)> on_served;
};

class RowTransfer {
 public:
  virtual ~RowTransfer() = default;
  virtual void Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) = 0;
  // Nobody waits for it any more. It may be answered all the same.
  virtual void Forget(AskId id) = 0;
  // The pieces' row_checksum is made here. Of a peer that is gone it does nothing.
  virtual void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) = 0;

  // Of frames that Answer was given, those that peers have not taken yet: their bytes.
  virtual uint64_t WaitingBytes() { return 0; }

  // Gives the frame that is to answer this ask memory for its rows, with any contents: once an ask. The frame may
  // go without an answer. `may_be_device`: who fills it can write to a device, and each piece is longer than
  // kShortPieceBytes; then the memory that the rows should have may be in use: false, to be tried again soon.
  virtual bool TakeRows(PeerAskId, size_t bytes, bool may_be_device, RowsFrame* frame) {
    (void)may_be_device;
    frame->rows.resize(bytes);
    return true;
  }
  // What is not needed any more, to be used again.
  virtual void GiveRows(std::string) {}
};

}  // namespace strait
