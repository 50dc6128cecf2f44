// SPDX-License-Identifier: Apache-2.0
//
// RowLinks carries the rows of frames from device to device: a link is one direction between two workers, a
// communicator of NCCL's of two ranks, made when rows are first asked for and ended with the stream of its asks.
//
//   asking end: Expect ─▶ on_id, told over the stream ─▶ Due for each answer ─▶ on_message
//   giving end: Join(id) ─▶ is_up ─▶ Place, Send, in the order of the answers
//
// Owns:    an NcclTransport of its own, with a thread a link, until Stop. A RowLink its end; it keeps the RowLinks.
// Borrows: the offer's NCCL, device and gate: hidden states' edges leave the device by the same one.
// Thread:  any, synchronized inside; a link's events come on its own thread, one at a time, and on_down once.
// Errors:  a link that breaks is told by on_down. Send: Unavailable. Nothing is sent twice: who asked asks again,
//          and gets the rows another way.
// Limits:  kMaxRowLinks ends in a worker. kTransferFrameBytes of a message; kLinkPlaces of these in device memory at
//          either end. kLinkTimeout of a message that the other end does not take, or send.
// Why:     the giving end posts a send when the rows are gathered and summed, and then answers; the asking end posts its receive
//          when the answer is here. So a receive never waits for a worker that computes, and every receive that is posted
//          has its send: no order of the workers' transfers can make a circle, and nobody has to pair them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "proto/base/limits.h"
#include "worker/hidden_buffer.h"
#include "worker/transport/nccl_api.h"
#include "worker/transport/nccl_transport.h"

namespace strait {

inline constexpr size_t kMaxRowLinks = 4;
inline constexpr std::chrono::milliseconds kLinkTimeout{
    8'000};  // above NcclTransportOptions::leave_timeout
// A stream with a link is kept so long after its last ask. NCCL before 2.28.9 takes half a second to end a communicator, in which
// no edge of hidden states may post anything.
inline constexpr std::chrono::milliseconds kLinkIdle{1'800'000};
// A copy out of the cache or into it waits for the steps that were begun, so there is a step's worth of frames at either end.
inline constexpr size_t kLinkPlaces = limits::kTransferBytesUnderWay / limits::kTransferFrameBytes;
// What the links of a worker take of its device besides stages, at most.
inline constexpr uint64_t kRowLinksBytes =
    kMaxRowLinks * (kNcclEdgeBytes + kLinkPlaces * limits::kTransferFrameBytes);

struct RowLinksOptions {
  bool on_one_device =
      false;  // links also between workers of one device, which share host memory instead
  std::chrono::milliseconds timeout = kLinkTimeout;
  std::chrono::milliseconds call_timeout{15'000};  // of a call of NCCL's, and of a link's making
};

struct RowLinkEvents {
  // The asking end: what the giving end joins by.
  std::function<void(std::string nccl_id)> on_id;
  // The asking end: the message that Due told, in device memory.
  std::function<void(uint64_t number, HiddenBuffer data)> on_message;
  std::function<void(const absl::Status& why)> on_down;
};

class RowLink;

class RowLinks : public std::enable_shared_from_this<RowLinks> {
 public:
  // Gets the device's checksums ready, which may take a while. Errors: the device's.
  static absl::StatusOr<std::shared_ptr<RowLinks>> Create(RowLinksOptions options,
                                                          const NcclOffer& offer);
  // Links break, and none is made any more. Waits until every communicator is gone, so not on a link's own thread.
  void Stop();

  // One end. Null: there are kMaxRowLinks, or it has stopped.
  std::shared_ptr<RowLink> Expect(RowLinkEvents events);
  std::shared_ptr<RowLink> Join(std::string nccl_id, RowLinkEvents events);

  // As the giving end is told: NCCL's version and the device's name. Whether it has room for a link to such a worker, and use.
  const std::string& hello() const { return hello_; }
  bool Wants(const std::string& peers_hello);

  EdgeDevice& device() const { return *offer_.device; }

 private:
  friend class RowLink;
  RowLinks(RowLinksOptions options, const NcclOffer& offer);
  std::shared_ptr<RowLink> Open(RowLinkEvents events, std::string nccl_id, bool gives);
  std::shared_ptr<RowLink> Find(uint64_t id);
  void Close(uint64_t id, bool gives);

  const RowLinksOptions options_;
  const NcclOffer offer_;
  const std::string hello_;

  std::mutex mu_;                                     // also: one call of transport_ at a time
  uint64_t last_id_ = 0;                              // guarded by mu_
  std::map<uint64_t, std::weak_ptr<RowLink>> links_;  // guarded by mu_
  std::unique_ptr<NcclTransport> transport_;          // guarded by mu_; null once stopped
};

// One end of a link, closed when it goes. Its last owner may let go of it on any thread.
class RowLink {
 public:
  RowLink(std::shared_ptr<RowLinks> links, uint64_t id, bool gives, RowLinkEvents events)
      : links_(std::move(links)), id_(id), gives_(gives), events_(std::move(events)) {}
  ~RowLink();
  RowLink(const RowLink&) = delete;
  RowLink& operator=(const RowLink&) = delete;

  // The giving end: both are there. It may break at any time.
  bool is_up() const { return is_up_; }
  bool is_down() const { return is_down_; }
  // The giving end: device memory for a message; none while there is none. REQUIRES: is_up was true.
  std::optional<HiddenBuffer> Place(size_t bytes);
  // Numbers rise by one from 1. The buffer goes when it was sent. REQUIRES: of Memory.
  absl::Status Send(uint64_t number, HiddenBuffer data);
  // The asking end, in the order of numbers: the giving end has posted it. InvalidArgument: no such size.
  absl::Status Due(uint64_t number, size_t bytes);

  RowLinks& links() const { return *links_; }

 private:
  friend class RowLinks;

  const std::shared_ptr<RowLinks> links_;
  const uint64_t id_;
  const bool gives_;
  const RowLinkEvents events_;
  std::atomic<bool> is_up_ = false;
  std::atomic<bool> is_down_ = false;
};

}  // namespace strait
