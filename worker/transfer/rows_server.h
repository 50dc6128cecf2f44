// SPDX-License-Identifier: Apache-2.0
//
// RowsServer is the giving side of GrpcRowTransfer: it takes other workers' asks, and seals and sends what
// they are answered.
//
// Owns:    incoming streams; one thread that makes checksums.
// Thread:  Accept: gRPC's. Answer: loop thread. CheckDeadlines: watchdog thread. Stop: any but gRPC's, before the
//          gRPC server is shut down; the destructor after it.
// Errors:  a peer that contradicts itself is ended with InvalidArgument; one that reads nothing for too long is cut off.
// Limits:  kMaxRowStreams, beyond which one that was never given rows makes room; kMaxAsksUnderWay unanswered of a stream; while kTransferBytesUnderWay wait to be
//          written to all peers together, asks are answered ResourceExhausted.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "grpcpp/grpcpp.h"
#include "proto/rpc/queue.h"
#include "worker/transfer/row_buffers.h"
#include "worker/transfer/row_transfer.h"

namespace strait {

inline constexpr size_t kMaxRowStreams = 256;

class RowsServer {
 public:
  RowsServer(std::chrono::milliseconds stall, std::shared_ptr<RowBuffers> buffers,
             const RowTransferEvents* events);
  ~RowsServer();

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Accept(
      grpc::CallbackServerContext* context);
  void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame);
  // To be sealed, or written to peers.
  uint64_t WaitingBytes();
  // Whether it has a connection.
  bool CheckDeadlines(uint64_t now_us);
  void Stop();
  uint64_t num_stalls() const { return num_stalls_; }  // peers cut off

 private:
  struct Incoming;
  using IncomingPtr = std::shared_ptr<Incoming>;
  struct Asked {
    std::weak_ptr<Incoming> from;
    uint64_t request = 0;
  };
  struct Sealing {
    PeerAskId id;
    Asked asked;
    RowsFrame frame;
    bool is_end = false;
  };

  bool OnMessage(const IncomingPtr& incoming, const grpc::ByteBuffer& message);
  void OnEnd(const IncomingPtr& incoming);
  void Seal();
  void SealOne(Sealing sealing);
  static void Send(const Asked& asked, grpc::ByteBuffer message);

  const std::chrono::milliseconds stall_timeout_;
  const std::shared_ptr<RowBuffers> buffers_;
  const RowTransferEvents* const events_;

  std::atomic<uint64_t> num_stalls_ = 0;
  std::mutex mu_;          // gRPC's threads, the loop's and the watchdog share what is asked
  bool stopping_ = false;  // guarded by mu_
  std::set<IncomingPtr> streams_;     // guarded by mu_
  std::map<PeerAskId, Asked> asked_;  // guarded by mu_: given to the loop, not answered
  PeerAskId last_ask_;                // guarded by mu_
  BoundedQueue<Sealing> sealing_;
  std::atomic<uint64_t> sealing_bytes_ = 0;
  std::thread sealer_;
};

}  // namespace strait
