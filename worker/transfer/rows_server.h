// SPDX-License-Identifier: Apache-2.0
//
// RowsServer is the giving side of GrpcRowTransfer: it takes asks of other workers, and of this one, and seals and sends
// what they are answered.
//
// Owns:    incoming streams; mappings of memory that peers offer; one thread that makes checksums.
// Thread:  Accept: gRPC's. Answer: loop thread. CheckDeadlines: watchdog thread. Stop: any but gRPC's, before the
//          gRPC server is shut down; the destructor after it.
// Errors:  a peer that contradicts itself is ended with InvalidArgument; one that reads nothing for too long is cut off.
// Limits:  kMaxRowStreams, beyond which one that was never given rows makes room; kMaxAsksUnderWay unanswered of a stream; while kTransferBytesUnderWay wait to be
//          written to all peers together, asks are answered ResourceExhausted. kMaxPeerRegions, beyond which rows go by
//          message; kMaxKeptRegions of dead peers.
// Why:     page-locked memory is kept for a while though its owner is dead, since giving it back may wait for what a
//          GPU computes (worker/model/cuda/pinned.h).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "proto/rpc/queue.h"
#include "worker/transfer/row_buffers.h"
#include "worker/transfer/row_links.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transfer/rows_client.h"
#include "worker/transfer/rows_message.h"
#include "worker/transfer/shared_rows.h"

namespace strait {

inline constexpr size_t kMaxRowStreams = 256;
inline constexpr size_t kMaxPeerRegions = 64;
inline constexpr size_t kMaxKeptRegions = 4;

struct RowsServerOptions {
  std::chrono::milliseconds stall_timeout{0};
  bool takes_offers = true;
  LockPages lock_pages;             // of memory that is offered; or empty
  std::shared_ptr<RowLinks> links;  // or null
};

class RowsServer {
 public:
  RowsServer(RowsServerOptions options, std::shared_ptr<RowBuffers> buffers,
             const RowTransferEvents* events);
  ~RowsServer();

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Accept(
      grpc::CallbackServerContext* context);
  // An ask of this worker's own. `answer` comes once, on any thread, unless Stop does before.
  using OwnAnswer = std::function<void(absl::StatusOr<RowsFrame>)>;
  void AskSelf(const RowsAsk& ask, const SharedPlace& place, OwnAnswer answer);
  bool TakeRows(PeerAskId id, size_t bytes, bool may_be_device, RowsFrame* frame);
  void Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame);
  // To be sealed, or written to peers.
  uint64_t WaitingBytes();
  // Whether it has a connection.
  bool CheckDeadlines(uint64_t now_us);
  void Stop();
  uint64_t num_stalls() const { return num_stalls_; }  // peers cut off
  const RowCounts& counts() const { return counts_; }

 private:
  struct Incoming;
  using IncomingPtr = std::shared_ptr<Incoming>;
  using RegionPtr = std::shared_ptr<MappedRegion>;
  struct Asked {
    std::weak_ptr<Incoming> from;
    uint64_t request = 0;
    SharedPlace place;
    RegionPtr region;  // that has it, mapped; or null
    bool on_device = false;
    OwnAnswer own = {};  // set: of this worker
  };
  struct Sealing {
    PeerAskId id;
    Asked asked;
    RowsFrame frame;
    bool is_end = false;
  };

  bool OnMessage(const IncomingPtr& incoming, const grpc::ByteBuffer& message);
  void OnEnd(const IncomingPtr& incoming);
  // Null: rows go by message. Maps it, if it is new.
  RegionPtr RegionOf(const SharedPlace& place);
  void DropRegions();
  void JoinLink(const IncomingPtr& incoming, const v1::RowsRequest& request);
  void Seal();
  void SealOne(Sealing sealing);
  // Rows on the device are on their way then. Errors: what the peer is told.
  absl::Status SendOverLink(Incoming* incoming, RowsFrame* frame, ReplyWay* way);
  static void Send(const Asked& asked, grpc::ByteBuffer message);

  const RowsServerOptions options_;
  const std::shared_ptr<RowBuffers> buffers_;
  const RowTransferEvents* const events_;

  std::atomic<uint64_t> num_stalls_ = 0;
  RowCounts counts_;
  std::mutex mapping_mu_;  // regions are mapped one at a time; before mu_
  std::mutex mu_;          // gRPC's threads, the loop's and the watchdog share what is asked
  bool stopping_ = false;  // guarded by mu_
  std::set<IncomingPtr> streams_;     // guarded by mu_
  std::map<PeerAskId, Asked> asked_;  // guarded by mu_: given to the loop, not answered
  PeerAskId last_ask_;                // guarded by mu_
  std::vector<RegionPtr> regions_;    // guarded by mu_: mapped
  BoundedQueue<Sealing> sealing_;
  std::atomic<uint64_t> sealing_bytes_ = 0;
  std::thread sealer_;
};

}  // namespace strait
