// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/rows_server.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/stream.h"
#include "worker/transfer/linked_rows.h"
#include "worker/transfer/rows_message.h"

namespace strait {
namespace {

using Stream = rpc::ServerStream<grpc::ByteBuffer, grpc::ByteBuffer>;
using std::chrono_literals::operator""s;

// A client asks as soon as it opens a stream.
constexpr auto kFirstAskTimeout = 10s;
constexpr size_t kSealingFrames = 1024;  // what may be asked bounds it

}  // namespace

struct RowsServer::Incoming {
  std::mutex mu;
  std::shared_ptr<Stream> stream;  // guarded by mu; let go when it ends
  const uint64_t arrived_us = MonotonicMicros();
  uint64_t last_request = 0;             // read reactions only
  std::atomic<bool> was_given = false;   // rows: it has shown a secret
  std::atomic<size_t> num_open = 0;      // asks that are not answered
  bool declines = false;                 // read reactions only: what it offers cannot be reached
  std::atomic<bool> wants_link = false;  // that it was told to offer; once
  bool has_joined = false;               // read reactions only
  std::shared_ptr<RowLink> link;         // guarded by mu; over which its device gets rows; or null
  uint64_t last_number = 0;              // of the link; the sealing thread only

  std::shared_ptr<Stream> Current() {
    std::lock_guard lock(mu);
    return stream;
  }
  std::shared_ptr<RowLink> Link() {
    std::lock_guard lock(mu);
    return link;
  }
  std::shared_ptr<RowLink> TakeLink() {
    std::lock_guard lock(mu);
    return std::move(link);
  }
};

RowsServer::RowsServer(RowsServerOptions options, std::shared_ptr<RowBuffers> buffers,
                       const RowTransferEvents* events)
    : options_(std::move(options)),
      buffers_(std::move(buffers)),
      events_(events),
      sealing_(kSealingFrames) {
  sealer_ = std::thread([this] { Seal(); });
}

RowsServer::~RowsServer() { Stop(); }

void RowsServer::Stop() {
  std::set<IncomingPtr> streams;
  {
    std::lock_guard lock(mu_);
    stopping_ = true;
    streams = streams_;
    asked_.clear();
  }
  if (sealer_.joinable()) {
    sealing_.Push({.is_end = true});
    sealer_.join();
  }
  for (const IncomingPtr& incoming : streams) {
    if (auto stream = incoming->Current()) {
      stream->Close(absl::UnavailableError("the worker stops"));
    }
  }
}

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* RowsServer::Accept(
    grpc::CallbackServerContext* context) {
  auto incoming = std::make_shared<Incoming>();
  rpc::StreamOptions options;
  options.max_message_bytes = limits::kMaxTransferMessageBytes;
  // Besides frames, as many refusals.
  options.max_queued_messages = 4 * kMaxAsksUnderWay;
  options.max_queued_bytes = 2 * limits::kTransferBytesUnderWay;
  options.first_message_timeout = kFirstAskTimeout;
  rpc::StreamEvents<grpc::ByteBuffer> events;
  events.on_message = [this, incoming](grpc::ByteBuffer message) {
    return OnMessage(incoming, message);
  };
  events.on_end = [this, incoming](const absl::Status&) { OnEnd(incoming); };
  auto stream = std::make_shared<Stream>(context, options, std::move(events));
  incoming->stream = stream;
  bool room;
  IncomingPtr stranger;
  {
    std::lock_guard lock(mu_);
    if (streams_.size() >= kMaxRowStreams) {
      for (const IncomingPtr& each : streams_) {
        if (each->was_given) continue;
        if (stranger == nullptr || each->arrived_us < stranger->arrived_us) stranger = each;
      }
      if (stranger != nullptr) streams_.erase(stranger);
    }
    room = streams_.size() < kMaxRowStreams && !stopping_;
    streams_.insert(incoming);
  }
  if (stranger != nullptr) {
    // It may not read, so its end is not waited for.
    if (const auto last = stranger->Current()) last->Abort();
  }
  stream->Start();
  if (!room) stream->Close(absl::ResourceExhaustedError("too many streams that ask for rows"));
  return stream.get();
}

void RowsServer::OnEnd(const IncomingPtr& incoming) {
  {
    std::lock_guard lock(mu_);
    streams_.erase(incoming);
  }
  std::shared_ptr<Stream> last;  // let go after the mutex
  std::shared_ptr<RowLink> link;
  std::lock_guard lock(incoming->mu);
  last = std::move(incoming->stream);
  link = std::move(incoming->link);
}

uint64_t RowsServer::WaitingBytes() {
  std::vector<IncomingPtr> streams;
  {
    std::lock_guard lock(mu_);
    streams.assign(streams_.begin(), streams_.end());
  }
  uint64_t bytes = sealing_bytes_;
  for (const IncomingPtr& incoming : streams) {
    if (const auto stream = incoming->Current()) bytes += stream->queued_bytes();
  }
  return bytes;
}

bool RowsServer::OnMessage(const IncomingPtr& incoming, const grpc::ByteBuffer& message) {
  const std::shared_ptr<Stream> stream = incoming->Current();
  if (stream == nullptr) return false;
  const absl::StatusOr<v1::RowsRequest> request = ParseRequest(message);
  if (!request.ok() || request->request_id() <= incoming->last_request) {
    stream->Close(request.ok() ? absl::InvalidArgumentError(
                                     absl::StrCat("request ", request->request_id(), " after ",
                                                  incoming->last_request, ": they rise"))
                               : request.status());
    return false;
  }
  incoming->last_request = request->request_id();
  if (!request->nccl_id().empty()) {
    JoinLink(incoming, *request);
    return true;
  }
  if (incoming->num_open >= kMaxAsksUnderWay || WaitingBytes() > limits::kTransferBytesUnderWay) {
    Send({incoming, request->request_id()},
         EncodeError(request->request_id(),
                     absl::ResourceExhaustedError("too much is asked for, or waits to be read")));
    return true;
  }
  if (options_.links != nullptr && !incoming->has_joined && !request->link_hello().empty()) {
    incoming->wants_link = options_.links->Wants(request->link_hello());
  }
  Asked asked{.from = incoming, .request = request->request_id(), .place = PlaceOf(*request)};
  asked.on_device = request->on_device();
  if (asked.place.any() && !incoming->declines) {
    asked.region = RegionOf(asked.place);
    incoming->declines = asked.region == nullptr;
  }
  PeerAskId id;
  {
    std::lock_guard lock(mu_);
    if (stopping_) return false;
    id = PeerAskId{++last_ask_.value};
    asked_.emplace(id, std::move(asked));
  }
  ++incoming->num_open;
  events_->on_ask(id, FromWire(*request));
  return true;
}

void RowsServer::AskSelf(const RowsAsk& ask, const SharedPlace& place, OwnAnswer answer) {
  Asked asked{.from = {}, .request = 0, .place = place};
  if (place.any()) asked.region = RegionOf(place);
  asked.own = std::move(answer);
  PeerAskId id;
  {
    std::lock_guard lock(mu_);
    if (stopping_) return;
    id = PeerAskId{++last_ask_.value};
    asked_.emplace(id, std::move(asked));
  }
  events_->on_ask(id, ask);
}

void RowsServer::JoinLink(const IncomingPtr& incoming, const v1::RowsRequest& request) {
  // A stranger, which has shown no secret, makes nobody dial.
  if (options_.links == nullptr || incoming->has_joined || !incoming->was_given ||
      !incoming->wants_link || request.nccl_id().size() != limits::kNcclIdBytes) {
    return;
  }
  incoming->has_joined = true;
  incoming->wants_link = false;
  const std::weak_ptr<Incoming> weak = incoming;
  RowLinkEvents events;
  events.on_down = [weak](const absl::Status& why) {
    const IncomingPtr from = weak.lock();
    if (from == nullptr) return;
    Log(LogLevel::kInfo, "a link for rows broke, they go another way", {{"why", why}});
    from->TakeLink();
  };
  std::shared_ptr<RowLink> link = options_.links->Join(request.nccl_id(), std::move(events));
  std::lock_guard lock(incoming->mu);
  // A stream that has ended keeps none, and none keeps one that broke meanwhile.
  if (incoming->stream != nullptr && link != nullptr && !link->is_down()) {
    incoming->link.swap(link);
  }
}

// ---------------------------------------------------------------- memory that peers offer

RowsServer::RegionPtr RowsServer::RegionOf(const SharedPlace& place) {
  if (!options_.takes_offers) return nullptr;
  const auto find = [&]() -> RegionPtr {
    const auto it = std::find_if(regions_.begin(), regions_.end(),
                                 [&](const RegionPtr& region) { return region->Is(place); });
    return it == regions_.end() ? nullptr : *it;
  };
  {
    std::lock_guard lock(mu_);
    if (RegionPtr region = find()) return region;
  }
  // Two streams of a worker's may begin at once. Mapped twice, one mapping would have to be given back.
  std::lock_guard mapping(mapping_mu_);
  {
    std::lock_guard lock(mu_);
    if (RegionPtr region = find()) return region;
    if (regions_.size() >= kMaxPeerRegions) return nullptr;
  }
  absl::StatusOr<RegionPtr> mapped = MappedRegion::Map(place, options_.lock_pages);
  if (!mapped.ok()) {
    Log(LogLevel::kInfo, "rows for a worker go by gRPC", {{"why", mapped.status()}});
    return nullptr;
  }
  Log(LogLevel::kInfo, "rows for a worker go by shared memory", {{"process", place.process_id}});
  std::lock_guard lock(mu_);
  regions_.push_back(*mapped);
  return *mapped;
}

void RowsServer::DropRegions() {
  std::vector<RegionPtr> gone;  // unmapped after the mutex
  std::lock_guard lock(mu_);
  size_t num_kept = 0;
  for (auto it = regions_.end(); it != regions_.begin();) {
    --it;
    if ((*it)->IsOffered()) continue;
    if ((*it)->is_locked() && ++num_kept <= kMaxKeptRegions) continue;
    gone.push_back(std::move(*it));
    it = regions_.erase(it);
  }
}

bool RowsServer::TakeRows(PeerAskId id, size_t bytes, bool may_be_device, RowsFrame* frame) {
  RegionPtr region;
  SharedPlace place;
  std::shared_ptr<RowLink> link;
  {
    std::lock_guard lock(mu_);
    const auto it = asked_.find(id);
    if (it != asked_.end()) {
      region = it->second.region;
      place = it->second.place;
      const IncomingPtr from = it->second.from.lock();
      if (may_be_device && it->second.on_device && from != nullptr) link = from->Link();
    }
  }
  if (link != nullptr && link->is_up() && !link->is_down()) {
    std::optional<HiddenBuffer> room = link->Place(bytes);
    if (!room) return false;
    auto keeper = std::make_shared<HiddenBuffer>(*std::move(room));
    frame->lent = {.memory = {keeper->data(), keeper->size()}, .keeper = keeper, .on_device = true};
    return true;
  }
  if (region != nullptr) {
    absl::StatusOr<LentRows> lent = region->Write(place, bytes);
    // Else the offer was taken back: nobody will read this.
    if (lent.ok()) frame->lent = *std::move(lent);
  }
  if (!frame->lent.any()) frame->rows = buffers_->Take(bytes);
  return true;
}

// ---------------------------------------------------------------- answers

void RowsServer::Answer(PeerAskId id, absl::StatusOr<RowsFrame> frame) {
  Asked asked;
  {
    std::lock_guard lock(mu_);
    const auto it = asked_.find(id);
    if (it == asked_.end()) return;
    asked = std::move(it->second);
    asked_.erase(it);
  }
  const IncomingPtr incoming = asked.from.lock();
  if (!asked.own && (incoming == nullptr || incoming->Current() == nullptr)) return;
  if (frame.ok()) {
    sealing_bytes_ += frame->bytes().size();
    sealing_.Push({.id = id, .asked = std::move(asked), .frame = *std::move(frame)});
    return;
  }
  if (asked.own) return asked.own(frame.status());
  --incoming->num_open;
  Send(asked, EncodeError(asked.request, frame.status()));
}

void RowsServer::Seal() {
  for (;;) {
    for (Sealing& sealing : sealing_.PopAll(1s)) {
      if (sealing.is_end) return;
      const uint64_t bytes = sealing.frame.bytes().size();
      SealOne(std::move(sealing));
      sealing_bytes_ -= bytes;
    }
  }
}

absl::Status RowsServer::SendOverLink(Incoming* incoming, RowsFrame* frame, ReplyWay* way) {
  const std::shared_ptr<RowLink> link = incoming->Link();
  if (link == nullptr) return absl::ResourceExhaustedError("the link broke: ask again");
  std::vector<uint64_t> sums;
  STRAIT_RETURN_IF_ERROR(
      SumOnDevice(&link->links().device(), frame->pieces, frame->bytes(), &sums));
  for (size_t i = 0; i < sums.size(); ++i) frame->pieces[i].row_checksum = sums[i];
  // It was made by TakeRows.
  HiddenBuffer rows = std::move(*std::static_pointer_cast<HiddenBuffer>(frame->lent.keeper));
  frame->lent = {};
  const absl::Status sent = link->Send(incoming->last_number + 1, std::move(rows));
  if (!sent.ok()) return absl::ResourceExhaustedError(absl::StrCat("ask again: ", sent.message()));
  way->link_number = ++incoming->last_number;
  return absl::OkStatus();
}

void RowsServer::SealOne(Sealing sealing) {
  const IncomingPtr incoming = sealing.asked.from.lock();
  const uint64_t bytes = sealing.frame.bytes().size();
  ReplyWay way;
  if (sealing.frame.on_device()) {
    if (incoming == nullptr) return;
    if (absl::Status sent = SendOverLink(incoming.get(), &sealing.frame, &way); !sent.ok()) {
      --incoming->num_open;
      return Send(sealing.asked, EncodeError(sealing.asked.request, sent));
    }
    counts_.nccl += bytes;
  } else {
    SealFrame(&sealing.frame);
    const bool is_shared = sealing.frame.lent.any();
    if (is_shared) way.place_ticket = sealing.asked.place.ticket;
    (is_shared || sealing.asked.own ? counts_.shared : counts_.grpc) += bytes;
  }
  std::vector<BlockHeader> pieces = sealing.frame.pieces;
  if (sealing.asked.own) {
    events_->on_served(sealing.id, std::move(pieces));
    return sealing.asked.own(std::move(sealing.frame));
  }
  if (incoming == nullptr) return;
  way.wants_link = incoming->wants_link;
  absl::StatusOr<grpc::ByteBuffer> message =
      EncodeFrame(sealing.asked.request, std::move(sealing.frame), buffers_, way);
  --incoming->num_open;
  if (!message.ok()) {
    // A bug of ours, and the peer's asks go on; but not by a link one of whose messages nobody will be told.
    if (way.link_number != 0) incoming->TakeLink();
    Log(LogLevel::kError, "rows that cannot be sent", {{"why", message.status()}});
    return Send(sealing.asked, EncodeError(sealing.asked.request, message.status()));
  }
  incoming->was_given = true;
  // First, so that the last rows are confirmed when they arrive.
  events_->on_served(sealing.id, std::move(pieces));
  Send(sealing.asked, *std::move(message));
}

void RowsServer::Send(const Asked& asked, grpc::ByteBuffer message) {
  const IncomingPtr incoming = asked.from.lock();
  if (incoming == nullptr) return;
  const std::shared_ptr<Stream> stream = incoming->Current();
  if (stream == nullptr) return;
  const absl::Status sent = stream->Send(std::move(message));
  if (!sent.ok() && !absl::IsUnavailable(sent)) stream->Close(sent);
}

bool RowsServer::CheckDeadlines(uint64_t now_us) {
  DropRegions();
  const auto stall_us = static_cast<uint64_t>(options_.stall_timeout.count()) * 1000;
  std::vector<IncomingPtr> streams;
  {
    std::lock_guard lock(mu_);
    streams.assign(streams_.begin(), streams_.end());
    // Of streams that have ended: what they asked is answered to nobody.
    std::erase_if(asked_, [](const auto& entry) {
      const IncomingPtr from = entry.second.from.lock();
      return !entry.second.own && (from == nullptr || from->Current() == nullptr);
    });
  }
  for (const IncomingPtr& incoming : streams) {
    const std::shared_ptr<Stream> stream = incoming->Current();
    if (stream == nullptr || stream->WriteAgeMicros(now_us) <= stall_us) continue;
    ++num_stalls_;
    stream->Abort();
  }
  return !streams.empty();
}

}  // namespace strait
