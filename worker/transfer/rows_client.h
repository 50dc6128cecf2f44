// SPDX-License-Identifier: Apache-2.0
//
// RowsClient is the asking side of GrpcRowTransfer: one stream and one connection for each worker that was asked.
//
// Owns:    streams and their channels; those that ended until CheckDeadlines buries them.
// Thread:  Ask, Forget: loop thread. CheckDeadlines: watchdog thread. Never a gRPC thread, and destroyed on none.
//          What comes is looked at on gRPC's threads.
// Errors:  as RowTransfer. However a stream ends, what was asked over it is Unavailable.
// Why:     an offer lives as long as its ask is not answered, forgotten or not: meanwhile the peer may write there. A
//          peer that answers an offer by a message has no use for more over this stream.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "worker/transfer/row_buffers.h"
#include "worker/transfer/row_links.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transfer/shared_rows.h"

namespace strait {

// Bytes of rows that came or went.
struct RowCounts {
  std::atomic<uint64_t> shared = 0;  // by memory that both have
  std::atomic<uint64_t> nccl = 0;    // from device to device
  std::atomic<uint64_t> grpc = 0;
};

class RowsClient {
 public:
  // `answer`: without any answer over a stream that was asked over. `idle`: nothing is asked; it is closed.
  // `region` null: nothing is offered. `links` null: rows come to the host.
  RowsClient(std::chrono::milliseconds answer, std::chrono::milliseconds idle,
             std::shared_ptr<RowBuffers> buffers, std::shared_ptr<SharedRegion> region,
             std::shared_ptr<RowLinks> links, const RowTransferEvents* events);
  ~RowsClient();

  void Ask(AskId id, const std::string& peer_address, const RowsAsk& ask);
  void Forget(AskId id);
  // Whether it has a connection.
  bool CheckDeadlines(uint64_t now_us);
  const std::shared_ptr<RowCounts>& counts() const { return counts_; }

 private:
  struct Peer;

  std::shared_ptr<Peer> Open(const std::string& address);
  // The peer is told the link's communicator, if there is one to be told. REQUIRES: mu_ held.
  static void TellLink(const Peer& peer);

  const std::chrono::milliseconds answer_timeout_;
  const std::chrono::milliseconds idle_timeout_;
  const std::shared_ptr<RowBuffers> buffers_;
  const std::shared_ptr<SharedRegion> region_;
  const std::shared_ptr<RowLinks> links_;
  const RowTransferEvents* const events_;
  const std::shared_ptr<RowCounts> counts_ = std::make_shared<RowCounts>();

  std::mutex mu_;                                       // the watchdog reads what the loop writes
  std::map<std::string, std::shared_ptr<Peer>> peers_;  // guarded by mu_
  std::vector<std::shared_ptr<Peer>> dropped_;          // guarded by mu_
};

}  // namespace strait
