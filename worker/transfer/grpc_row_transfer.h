// SPDX-License-Identifier: Apache-2.0
//
// GrpcRowTransfer carries rows over gRPC streams, each over a connection of its own: bulk delays neither
// heartbeats nor hidden states. Between devices rows go by NCCL, between workers of one host through memory that both have, and
// streams only control that. Rows of this same worker take no stream at all.
//
// Owns:    what asks and what answers; memory for rows that are asked for; a watchdog thread, a thread that makes
//          checksums; RowLinks, which it stops.
// Thread:  as RowTransfer. Stop before the gRPC server is shut down that has its service, the destructor after.
//          Neither on a gRPC thread.
// Errors:  as RowTransfer; RowsClient and RowsServer say more.
// Limits:  GrpcRowTransferOptions; kMaxTransferMessageBytes of a message. Memory of frames that is kept while there are
//          connections: RowBuffers.
// Why:     it is served by the worker's data server, whose owner registers service(): one port for all that
//          workers say to each other.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "worker/transfer/row_links.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transfer/shared_rows.h"

namespace grpc {
class Service;
}

namespace strait {

struct GrpcRowTransferOptions {
  // A stream over which something was asked brings nothing for this long. Long, because a worker answers between
  // two steps.
  std::chrono::milliseconds answer_timeout{10'000};
  std::chrono::milliseconds idle_timeout{30'000};   // then a connection is closed
  std::chrono::milliseconds stall_timeout{10'000};  // of a write to a peer that does not read
  bool shares_memory = true;                        // else rows go by message everywhere
  LockPages lock_pages = {};                        // of memory that is shared; or empty
  std::shared_ptr<RowLinks> links = nullptr;        // null: rows come to and from the host
};

// Bytes of rows, since it began.
struct RowTransferBytes {
  uint64_t came_shared = 0;  // through memory that both ends have, or within this worker
  uint64_t came_by_nccl = 0;
  uint64_t came_by_grpc = 0;
  uint64_t went_shared = 0;
  uint64_t went_by_nccl = 0;
  uint64_t went_by_grpc = 0;
};

class GrpcRowTransfer final : public RowTransfer {
 public:
  GrpcRowTransfer(const GrpcRowTransferOptions& options, RowTransferEvents events);
  ~GrpcRowTransfer() override;

  void Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) override;
  void Forget(AskId id) override;
  void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) override;
  uint64_t WaitingBytes() override;
  bool TakeRows(PeerAskId id, size_t bytes, bool may_be_device, RowsFrame* frame) override;
  void GiveRows(std::string rows) override;

  // What other workers dial to ask this one: asks for it stay here. Before the first Ask.
  void SetAddress(std::string address);
  // To be registered with a gRPC server.
  grpc::Service* service();
  uint64_t num_stalls() const;  // peers that were cut off because they read nothing
  RowTransferBytes bytes() const;
  // Of its memory for rows that is offered or in use.
  uint64_t shared_bytes_used();
  // No event comes afterwards.
  void Stop();

 private:
  class Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace strait
