// SPDX-License-Identifier: Apache-2.0
//
// GrpcRowTransfer carries rows over gRPC streams, each over a connection of its own: bulk delays neither
// heartbeats nor hidden states.
//
// Owns:    what asks and what answers; a watchdog thread, a thread that makes checksums.
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

#include "worker/transfer/row_transfer.h"

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
};

class GrpcRowTransfer final : public RowTransfer {
 public:
  GrpcRowTransfer(const GrpcRowTransferOptions& options, RowTransferEvents events);
  ~GrpcRowTransfer() override;

  void Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) override;
  void Forget(AskId id) override;
  void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) override;
  uint64_t WaitingBytes() override;
  std::string TakeRows(size_t bytes) override;
  void GiveRows(std::string rows) override;

  // To be registered with a gRPC server.
  grpc::Service* service();
  uint64_t num_stalls() const;  // peers that were cut off because they read nothing
  // No event comes afterwards.
  void Stop();

 private:
  class Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace strait
