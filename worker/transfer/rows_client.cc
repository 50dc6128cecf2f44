// SPDX-License-Identifier: Apache-2.0
#include "worker/transfer/rows_client.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "proto/base/limits.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/stream.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "worker/transfer/linked_rows.h"
#include "worker/transfer/rows_message.h"

namespace strait {
namespace {

using Stream = rpc::ClientStream<grpc::ByteBuffer, v1::RowsRequest>;

constexpr char kRowsMethod[] = "/strait.v1.RowTransfer/Rows";
constexpr size_t kRequestBytes = 4096;

using OfferPtr = std::unique_ptr<SharedRegion::Offer>;

struct Asked {
  AskId id;
  uint64_t asked_us = 0;
  OfferPtr offer;  // or null
  bool on_device = false;
};

// What the stream's events may hold: never the stream itself, which must not end on a gRPC thread.
struct PeerState {
  std::string address;
  std::shared_ptr<RowBuffers> buffers;
  std::shared_ptr<SharedRegion> region;  // or null
  std::shared_ptr<LinkedRows> linked;    // or null
  const RowTransferEvents* events;
  std::shared_ptr<RowCounts> counts;
  std::mutex mu;
  std::map<uint64_t, Asked> asked;         // guarded by mu; by the request's id
  std::map<uint64_t, OfferPtr> forgotten;  // guarded by mu; not answered, and nobody waits
  uint64_t last_request = 0;               // guarded by mu
  uint64_t heard_us = 0;                   // guarded by mu
  bool declines = false;                   // guarded by mu: offers
  bool has_ended = false;                  // guarded by mu

  // The id of the request; 0: the stream has ended.
  uint64_t Add(AskId id, const RowsAsk& ask, SharedPlace* place) {
    const bool is_linked = ask.on_device && linked != nullptr && linked->is_used();
    std::lock_guard lock(mu);
    if (has_ended) return 0;
    const bool offers = region != nullptr && !declines && !is_linked;
    OfferPtr offer = offers ? region->Make(ask.bytes) : nullptr;
    if (offer != nullptr) *place = offer->place();
    asked[++last_request] = {id, MonotonicMicros(), std::move(offer), ask.on_device};
    return last_request;
  }
  // Of a request that nothing answers.
  uint64_t AddSilent() {
    std::lock_guard lock(mu);
    return ++last_request;
  }
  // Whether somebody waits for it.
  bool Take(uint64_t request, Asked* taken) {
    std::lock_guard lock(mu);
    heard_us = MonotonicMicros();
    const auto it = asked.find(request);
    if (it == asked.end()) {
      forgotten.erase(request);
      return false;
    }
    *taken = std::move(it->second);
    asked.erase(it);
    return true;
  }
  void Forget(AskId id) {
    std::lock_guard lock(mu);
    const auto it = std::find_if(asked.begin(), asked.end(),
                                 [id](const auto& entry) { return entry.second.id == id; });
    if (it == asked.end()) return;
    if (it->second.offer != nullptr) forgotten.emplace(it->first, std::move(it->second.offer));
    asked.erase(it);
  }
  void Count(const RowsFrame& frame, bool was_offered) {
    (frame.lent.any() ? counts->shared : counts->grpc) += frame.bytes().size();
    if (frame.lent.any() || !was_offered) return;
    std::lock_guard lock(mu);
    declines = true;
  }
  // Nothing more comes over this stream.
  void End(const absl::Status& why) {
    std::map<uint64_t, Asked> lost;
    {
      std::lock_guard lock(mu);
      has_ended = true;
      lost.swap(asked);
      forgotten.clear();
    }
    for (auto& [request, ask] : lost) {
      ask.offer.reset();
      events->on_rows(ask.id, Lost(why));
    }
    if (linked != nullptr) linked->End(Lost(why));
  }
  absl::Status Lost(const absl::Status& why) const {
    return absl::UnavailableError(
        absl::StrCat("rows from ", address, ": ", why.ok() ? "the peer ended it" : why.message()));
  }
};

// Whether to read on.
bool OnReply(PeerState* state, const grpc::ByteBuffer& message) {
  const absl::StatusOr<RowsReply> reply = RowsReply::Parse(message);
  if (!reply.ok()) {
    state->End(reply.status());
    return false;
  }
  Asked asked;
  const bool is_awaited = state->Take(reply->request_id(), &asked);
  if (state->linked != nullptr) {
    if (reply->wants_link()) state->linked->Begin();
    if (reply->link_number() != 0) {
      // Who asked for rows in host memory is not given others.
      const bool is_wanted = is_awaited && asked.on_device;
      state->linked->Expect(*reply, is_wanted ? std::optional(asked.id) : std::nullopt);
      if (is_awaited && !is_wanted) {
        asked.offer.reset();
        state->events->on_rows(asked.id, absl::DataLossError("rows came to the device unasked"));
      }
      return true;
    }
  }
  if (!is_awaited) return true;
  absl::StatusOr<RowsFrame> frame = reply->Open(state->buffers.get(), asked.offer.get());
  if (frame.ok()) state->Count(*frame, asked.offer != nullptr);
  asked.offer.reset();  // whoever is told may ask again
  state->events->on_rows(asked.id, std::move(frame));
  return true;
}

}  // namespace

struct RowsClient::Peer {
  std::shared_ptr<PeerState> state;
  std::unique_ptr<Stream> stream;
  uint64_t used_us = 0;  // guarded by mu_ of the client
};

RowsClient::RowsClient(std::chrono::milliseconds answer, std::chrono::milliseconds idle,
                       std::shared_ptr<RowBuffers> buffers, std::shared_ptr<SharedRegion> region,
                       std::shared_ptr<RowLinks> links, const RowTransferEvents* events)
    : answer_timeout_(answer),
      idle_timeout_(idle),
      buffers_(std::move(buffers)),
      region_(std::move(region)),
      links_(std::move(links)),
      events_(events) {}

RowsClient::~RowsClient() = default;

std::shared_ptr<RowsClient::Peer> RowsClient::Open(const std::string& address) {
  auto peer = std::make_shared<Peer>();
  peer->state = std::make_shared<PeerState>();
  peer->state->address = address;
  peer->state->buffers = buffers_;
  peer->state->region = region_;
  peer->state->events = events_;
  peer->state->counts = counts_;
  if (links_ != nullptr) {
    peer->state->linked = std::make_shared<LinkedRows>(
        links_, events_, [counts = counts_](uint64_t bytes) { counts->nccl += bytes; });
  }
  rpc::StreamOptions options;
  options.max_queued_messages = 2 * kMaxAsksUnderWay;
  options.max_queued_bytes = options.max_queued_messages * kRequestBytes;
  options.max_message_bytes = kRequestBytes;
  rpc::StreamEvents<grpc::ByteBuffer> events;
  events.on_message = [state = peer->state](grpc::ByteBuffer message) {
    return OnReply(state.get(), message);
  };
  events.on_end = [state = peer->state](const absl::Status& status) { state->End(status); };
  const std::shared_ptr<grpc::Channel> channel = rpc::MakeChannel(address, rpc::Traffic::kTransfer);
  grpc::TemplatedGenericStub<v1::RowsRequest, grpc::ByteBuffer> stub(channel);
  peer->stream = std::make_unique<Stream>(
      options, std::move(events), [&](grpc::ClientContext* context, auto* reactor) {
        stub.PrepareBidiStreamingCall(context, kRowsMethod, grpc::StubOptions(), reactor);
      });
  return peer;
}

void RowsClient::Ask(AskId id, const std::string& peer_address, const RowsAsk& ask) {
  std::shared_ptr<PeerState> state;
  uint64_t request = 0;
  absl::Status sent = absl::UnavailableError("it ended at once");
  {
    // Also while it is sent: requests' ids rise.
    std::lock_guard lock(mu_);
    SharedPlace place;
    std::shared_ptr<Peer>& known = peers_[peer_address];
    if (known != nullptr) request = known->state->Add(id, ask, &place);
    if (request == 0) {
      // Not destroyed here: that waits for gRPC, and the loop thread should not.
      if (known != nullptr) dropped_.push_back(std::move(known));
      known = Open(peer_address);
      request = known->state->Add(id, ask, &place);
    }
    known->used_us = MonotonicMicros();
    state = known->state;
    if (request != 0) {
      v1::RowsRequest message = ToWire(request, ask, place);
      if (ask.on_device && state->linked != nullptr) {
        message.set_link_hello(state->linked->TakeHello());
      }
      sent = known->stream->Send(std::move(message));
      TellLink(*known);
    }
  }
  Asked asked;
  if (request == 0 || (!sent.ok() && state->Take(request, &asked))) {
    events_->on_rows(id, state->Lost(sent));
  }
}

void RowsClient::TellLink(const Peer& peer) {
  if (peer.state->linked == nullptr) return;
  const std::string id = peer.state->linked->TakeId();
  if (!id.empty()) (void)peer.stream->Send(LinkRequest(peer.state->AddSilent(), id));
}

void RowsClient::Forget(AskId id) {
  std::lock_guard lock(mu_);
  for (const auto& [address, peer] : peers_) peer->state->Forget(id);
}

bool RowsClient::CheckDeadlines(uint64_t now_us) {
  const auto answer_us = static_cast<uint64_t>(answer_timeout_.count()) * 1000;
  const auto idle_us = static_cast<uint64_t>(idle_timeout_.count()) * 1000;
  const auto linked_idle_us = static_cast<uint64_t>(kLinkIdle.count()) * 1000;
  std::vector<std::shared_ptr<Peer>> buried;
  std::vector<std::shared_ptr<Peer>> silent;
  bool is_connected = false;
  {
    std::lock_guard lock(mu_);
    for (auto it = peers_.begin(); it != peers_.end();) {
      PeerState& state = *it->second->state;
      bool is_idle = false;
      {
        std::lock_guard state_lock(state.mu);
        const bool is_linked = state.linked != nullptr && state.linked->has_link();
        is_idle = state.has_ended ||
                  (state.asked.empty() &&
                   now_us > it->second->used_us + (is_linked ? linked_idle_us : idle_us));
        if (!state.asked.empty() &&
            now_us > std::max(state.asked.begin()->second.asked_us, state.heard_us) + answer_us) {
          silent.push_back(it->second);
        }
      }
      if (!is_idle) TellLink(*it->second);
      if (is_idle) dropped_.push_back(std::move(it->second));
      it = is_idle ? peers_.erase(it) : std::next(it);
    }
    buried.swap(dropped_);
    is_connected = !peers_.empty();
  }
  for (const std::shared_ptr<Peer>& peer : silent) {
    const absl::Status why =
        absl::DeadlineExceededError(absl::StrCat("no answer for ", answer_timeout_.count(), " ms"));
    peer->state->End(why);
    peer->stream->Close(why);
  }
  return is_connected;
}

}  // namespace strait
