// SPDX-License-Identifier: Apache-2.0
//
// LinkedRows is what the asking end of a stream knows of its link: which answers' rows come over it, and in which order.
//
// Owns:    its end of the link.
// Thread:  any, synchronized inside. Begin, Expect: as replies are read, one at a time. on_rows comes on the link's
//          own thread, which also makes the checksums; of End on the caller's.
// Errors:  a link that breaks: what was to come over it is ResourceExhausted, to be asked for again soon, and comes another
//          way; this stream gets no other link. Rows with other checksums than their headers': DataLoss.
// Limits:  kMaxComing announced and not come; beyond, the link breaks.
// Why:     what nobody waits for any more is received all the same: NCCL takes nothing back.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "worker/transfer/row_links.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transfer/rows_message.h"

namespace strait {

// What is asked, and as much that nobody waits for any more.
inline constexpr size_t kMaxComing = 2 * kMaxAsksUnderWay;

class LinkedRows : public std::enable_shared_from_this<LinkedRows> {
 public:
  // Bytes of each message that was taken.
  using Count = std::function<void(uint64_t bytes)>;
  LinkedRows(std::shared_ptr<RowLinks> links, const RowTransferEvents* events, Count count)
      : links_(std::move(links)), events_(events), count_(std::move(count)) {}

  // The peer is told that this worker would have a link, if it would. Empty: not.
  std::string TakeHello();
  // The peer wants one. Unless it was told, nothing.
  void Begin();
  // By what the peer joins it, once; empty: not now.
  std::string TakeId();
  // Rows have come over it, so requests need offer no other place.
  bool is_used();
  bool has_link();
  // The reply's rows come over it; nullopt: nobody waits for them. REQUIRES: reply.link_number() is not 0.
  void Expect(const RowsReply& reply, std::optional<AskId> id);
  // The stream has ended: what was to come is told as `why`.
  void End(const absl::Status& why);

 private:
  struct Coming {
    std::optional<AskId> id;
    RowsFrame head;
  };

  // What is left of the link when it ends: let go of when mu_ is not held.
  struct Left {
    std::shared_ptr<RowLink> link;
    std::map<uint64_t, Coming> coming;
  };

  void OnMessage(uint64_t number, HiddenBuffer data);
  Left TakeAll();
  void TellLost(const Left& left, const absl::Status& why) const;
  // No link any more.
  void Break(const absl::Status& why);

  const std::shared_ptr<RowLinks> links_;
  const RowTransferEvents* const events_;
  const Count count_;
  std::mutex mu_;
  std::shared_ptr<RowLink> link_;      // guarded by mu_
  bool is_told_ = false;               // guarded by mu_: that there could be one
  bool has_begun_ = false;             // guarded by mu_: there was one
  bool is_used_ = false;               // guarded by mu_
  std::string nccl_id_;                // guarded by mu_: to be told
  uint64_t last_number_ = 0;           // guarded by mu_
  std::map<uint64_t, Coming> coming_;  // guarded by mu_, by the message's number
};

// XXH3-64 of each piece's rows, which lie on the device one behind the other.
absl::Status SumOnDevice(EdgeDevice* device, absl::Span<const BlockHeader> pieces,
                         absl::Span<const std::byte> rows, std::vector<uint64_t>* sums);

}  // namespace strait
