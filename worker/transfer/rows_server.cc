// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/rows_server.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/stream.h"
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
  uint64_t last_request = 0;            // read reactions only
  std::atomic<bool> was_given = false;  // rows: it has shown a secret
  std::atomic<size_t> num_open = 0;     // asks that are not answered
  bool declines = false;                // read reactions only: what it offers cannot be reached

  std::shared_ptr<Stream> Current() {
    std::lock_guard lock(mu);
    return stream;
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
  std::lock_guard lock(incoming->mu);
  last = std::move(incoming->stream);
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
  if (incoming->num_open >= kMaxAsksUnderWay || WaitingBytes() > limits::kTransferBytesUnderWay) {
    Send({incoming, request->request_id()},
         EncodeError(request->request_id(),
                     absl::ResourceExhaustedError("too much is asked for, or waits to be read")));
    return true;
  }
  Asked asked{.from = incoming, .request = request->request_id(), .place = PlaceOf(*request)};
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

void RowsServer::TakeRows(PeerAskId id, size_t bytes, RowsFrame* frame) {
  RegionPtr region;
  SharedPlace place;
  {
    std::lock_guard lock(mu_);
    const auto it = asked_.find(id);
    if (it != asked_.end()) {
      region = it->second.region;
      place = it->second.place;
    }
  }
  if (region != nullptr) {
    absl::StatusOr<LentRows> lent = region->Write(place, bytes);
    // Else the offer was taken back: nobody will read this.
    if (lent.ok()) frame->lent = *std::move(lent);
  }
  if (!frame->lent.any()) frame->rows = buffers_->Take(bytes);
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

void RowsServer::SealOne(Sealing sealing) {
  SealFrame(&sealing.frame);
  const bool is_shared = sealing.frame.lent.any();
  (is_shared || sealing.asked.own ? counts_.shared : counts_.grpc) += sealing.frame.bytes().size();
  std::vector<BlockHeader> pieces = sealing.frame.pieces;
  if (sealing.asked.own) {
    events_->on_served(sealing.id, std::move(pieces));
    return sealing.asked.own(std::move(sealing.frame));
  }
  const IncomingPtr incoming = sealing.asked.from.lock();
  if (incoming == nullptr) return;
  absl::StatusOr<grpc::ByteBuffer> message =
      EncodeFrame(sealing.asked.request, std::move(sealing.frame), buffers_,
                  is_shared ? sealing.asked.place.ticket : 0);
  --incoming->num_open;
  if (!message.ok()) {
    // A bug of ours, and the peer's asks go on.
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
