// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/hidden_receiver.h"

#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/stream.h"
#include "worker/transport/grpc_transport.h"

namespace strait {
namespace {

using Stream = rpc::ServerStream<grpc::ByteBuffer, grpc::ByteBuffer>;
using std::chrono_literals::operator""s;

constexpr auto kOpenTimeout = 10s;
constexpr size_t kReplyQueueMessages = 1024;
constexpr size_t kReplyQueueBytes = 64 << 10;

// The order in which steps come over an edge.
using StepKey = std::pair<PipelineEpoch, uint64_t>;
StepKey KeyOf(const HiddenStep& step) { return {step.epoch, step.step.value}; }

}  // namespace

struct HiddenReceiver::Incoming {
  std::shared_ptr<Stream> stream;  // let go when it ends
  std::string peer;
  // Set once by the open, before `admitted`.
  uint64_t to_stage_id = 0;
  uint64_t from_stage_id = 0;
  uint64_t nonce = 0;
  uint64_t edge_id = 0;
  uint64_t parked_since_us = 0;  // guarded by mu_ of the receiver
  std::atomic<bool> opened = false;
  std::atomic<bool> admitted = false;  // chunks may come

  // Read reactions only:
  HiddenStep partial;
  uint64_t partial_bytes = 0;  // of the whole step; 0: none begun
  StepKey last_step;
  // When the partial step last grew; 0: none. For the watchdog.
  std::atomic<uint64_t> partial_grew_us = 0;

  std::mutex mu;
  std::deque<std::pair<StepKey, uint64_t>> outstanding;  // guarded by mu: delivered, not consumed
  uint64_t outstanding_bytes = 0;                        // guarded by mu

  Edge AsEdge() const {
    return {.id = edge_id,
            .from_stage_id = from_stage_id,
            .to_stage_id = to_stage_id,
            .peer_address = peer};
  }
};

HiddenReceiver::HiddenReceiver(uint32_t hidden_row_bytes, std::chrono::milliseconds accept_timeout,
                               std::chrono::milliseconds stall_timeout, size_t receive_bytes_max,
                               const TransportEvents* events)
    : hidden_row_bytes_(hidden_row_bytes),
      accept_timeout_(accept_timeout),
      stall_timeout_(stall_timeout),
      receive_bytes_max_(receive_bytes_max),
      events_(events) {}

HiddenReceiver::~HiddenReceiver() = default;

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* HiddenReceiver::Accept(
    grpc::CallbackServerContext* context) {
  auto incoming = std::make_shared<Incoming>();
  incoming->peer = context->peer();
  rpc::StreamOptions options;
  options.max_queued_messages = kReplyQueueMessages;
  options.max_queued_bytes = kReplyQueueBytes;
  options.max_message_bytes = kReplyQueueBytes;
  options.first_message_timeout = kOpenTimeout;
  rpc::StreamEvents<grpc::ByteBuffer> events;
  events.on_message = [this, incoming](grpc::ByteBuffer message) {
    return OnMessage(incoming, message);
  };
  events.on_end = [this, incoming](absl::Status status) { OnEnd(incoming, std::move(status)); };
  auto stream = std::make_shared<Stream>(context, options, std::move(events));
  incoming->stream = stream;
  bool room;
  {
    std::lock_guard lock(mu_);
    room = streams_.size() < kMaxIncomingStreams && !stopping_;
    streams_.insert(incoming);
  }
  stream->Start();
  if (!room) stream->Close(absl::ResourceExhaustedError("too many incoming streams"));
  return stream.get();
}

bool HiddenReceiver::OnMessage(const IncomingPtr& incoming, const grpc::ByteBuffer& message) {
  bool complete = false;
  const absl::Status status = [&]() -> absl::Status {
    STRAIT_ASSIGN_OR_RETURN(const HiddenFrame frame, HiddenFrame::Parse(message));
    if (!frame.is_open()) return OnChunk(*incoming, frame, &complete);
    if (incoming->opened) return absl::InvalidArgumentError("a second open");
    if (absl::Status checked = CheckOpen(frame.open()); !checked.ok()) return checked;
    OnOpen(incoming, frame.open());
    return absl::OkStatus();
  }();
  if (!status.ok()) {
    ++(incoming->opened ? frames_refused_ : opens_refused_);
    Log(LogLevel::kWarning, "hidden states refused",
        {{"peer", incoming->peer},
         {"from_stage", incoming->from_stage_id},
         {"to_stage", incoming->to_stage_id},
         {"why", status}});
    incoming->stream->Close(status);
    return true;
  }
  // A sender that is parked is not read from.
  if (!incoming->admitted) return false;
  if (!complete) return true;
  uint64_t waiting;
  {
    std::lock_guard lock(incoming->mu);
    incoming->outstanding.emplace_back(KeyOf(incoming->partial), incoming->partial_bytes);
    incoming->outstanding_bytes += incoming->partial_bytes;
    waiting = incoming->outstanding_bytes;
  }
  incoming->partial_bytes = 0;
  events_->on_hidden(incoming->to_stage_id, std::exchange(incoming->partial, {}));
  return waiting < receive_bytes_max_;
}

absl::Status HiddenReceiver::CheckOpen(const v1::HiddenOpen& open) const {
  if (uint64_t{open.hidden_size()} * open.element_bytes() != hidden_row_bytes_ ||
      open.element_bytes() != sizeof(float)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the sender's rows have ", open.hidden_size(), " elements of ", open.element_bytes(),
        " bytes, this worker's ", hidden_row_bytes_ / sizeof(float), " of ", sizeof(float)));
  }
  if (open.to_stage_id() == 0 || open.from_stage_id() == 0 || open.edge_id() == 0) {
    return absl::InvalidArgumentError("an open names the edge and both of its stages");
  }
  return absl::OkStatus();
}

void HiddenReceiver::OnOpen(const IncomingPtr& incoming, const v1::HiddenOpen& open) {
  incoming->to_stage_id = open.to_stage_id();
  incoming->from_stage_id = open.from_stage_id();
  incoming->nonce = open.edge_nonce();
  incoming->edge_id = open.edge_id();
  incoming->opened = true;
  // Whether it is let in may take a while; that its way here and back is open shows at once.
  Answer(*incoming, false);
  absl::Status admitted;
  Settled replaced;
  {
    std::lock_guard lock(mu_);
    admitted = Admit(incoming, &replaced);
    if (absl::IsUnavailable(admitted)) {
      if (parked_.size() < kMaxParkedOpens) {
        incoming->parked_since_us = MonotonicMicros();
        parked_.push_back(incoming);
        return;
      }
      admitted = absl::ResourceExhaustedError("too many senders wait to be expected");
    }
  }
  Settle(replaced);
  if (admitted.ok()) {
    Answer(*incoming, true);
  } else {
    ++opens_refused_;
    incoming->stream->Close(admitted);
  }
}

absl::Status HiddenReceiver::Admit(const IncomingPtr& incoming, Settled* settled) {
  auto it = expected_.find(incoming->to_stage_id);
  if (it == expected_.end() || it->second.edge_id < incoming->edge_id) {
    return absl::UnavailableError("not expected yet");
  }
  Expectation& expected = it->second;
  if (incoming->edge_id < expected.edge_id) {
    return absl::AbortedError(absl::StrCat("stage ", incoming->to_stage_id, " expects edge ",
                                           expected.edge_id, ", the sender's is ",
                                           incoming->edge_id, ", an older one"));
  }
  // Before anything that the sender could change: a stranger neither takes the edge nor learns more.
  if (incoming->nonce != expected.nonce) {
    return absl::PermissionDeniedError(absl::StrCat(
        "the sender does not know the nonce of the edge to stage ", incoming->to_stage_id,
        ", number ", expected.edge_id, ": its coordinator is another, or it has none"));
  }
  if (expected.from_stage_id != 0 && expected.from_stage_id != incoming->from_stage_id) {
    return absl::FailedPreconditionError(absl::StrCat("stage ", incoming->to_stage_id,
                                                      " expects stage ", expected.from_stage_id,
                                                      ", not ", incoming->from_stage_id));
  }
  // It ended and that was told: this epoch is over, and the next one will expect it again.
  if (expected.opened && !expected.current) return absl::UnavailableError("expected no more");
  // The sender saw its stream end before this side did. It opens another only as it enters an epoch, so
  // nothing of that epoch was lost with the old one. What was delivered counts on.
  if (Incoming* const old = expected.current.get()) {
    std::scoped_lock both(old->mu, incoming->mu);
    incoming->outstanding = std::exchange(old->outstanding, {});
    incoming->outstanding_bytes = std::exchange(old->outstanding_bytes, 0);
    settled->emplace_back(expected.current, absl::AbortedError(absl::StrCat(
                                                "edge ", expected.edge_id, " to stage ",
                                                incoming->to_stage_id, " was opened again")));
  }
  expected.opened = true;
  expected.from_stage_id = incoming->from_stage_id;
  expected.current = incoming;
  incoming->admitted = true;
  return absl::OkStatus();
}

void HiddenReceiver::Answer(Incoming& incoming, bool accepted) {
  v1::HiddenReply reply;
  reply.set_accepted(accepted);
  // Fails only when the stream has ended, which OnEnd tells.
  (void)incoming.stream->Send(EncodeReply(reply));
}

absl::Status HiddenReceiver::OnChunk(Incoming& incoming, const HiddenFrame& frame, bool* complete) {
  const HiddenChunkHeader& chunk = frame.chunk();
  if (!incoming.admitted) return absl::InvalidArgumentError("a chunk before the open");
  if (chunk.payload_bytes == 0) return absl::InvalidArgumentError("an empty chunk");
  HiddenStep& partial = incoming.partial;
  if (incoming.partial_bytes == 0) {
    if (chunk.num_tokens == 0) return absl::InvalidArgumentError("a step without tokens");
    if (StepKey(chunk.epoch, chunk.step_id) <= incoming.last_step) {
      return absl::InvalidArgumentError(
          absl::StrCat("step ", chunk.step_id, " of epoch ", ToString(chunk.epoch), " after step ",
                       incoming.last_step.second, " of ", ToString(incoming.last_step.first),
                       ": they must rise"));
    }
    partial.epoch = chunk.epoch;
    partial.step = StepId{chunk.step_id};
    partial.num_tokens = chunk.num_tokens;
    incoming.partial_bytes = uint64_t{chunk.num_tokens} * hidden_row_bytes_;
  } else if (chunk.epoch != partial.epoch || chunk.step_id != partial.step.value ||
             chunk.num_tokens != partial.num_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a chunk of step ", chunk.step_id, " (", chunk.num_tokens, " tokens) inside step ",
        partial.step.value, " (", partial.num_tokens, " tokens)"));
  }
  const uint64_t have = partial.data.size();
  if (chunk.offset_bytes != have || chunk.payload_bytes > incoming.partial_bytes - have) {
    return absl::InvalidArgumentError(absl::StrCat(
        "bytes ", chunk.offset_bytes, " + ", chunk.payload_bytes, " of step ", chunk.step_id,
        ", where ", have, " of ", incoming.partial_bytes, " bytes have come"));
  }
  // The whole step's memory, but not before a first chunk that fits was seen.
  if (have == 0) partial.data.host().reserve(incoming.partial_bytes);
  STRAIT_RETURN_IF_ERROR(frame.AppendPayload(&partial.data.host()));
  bytes_received_ += chunk.payload_bytes;
  *complete = partial.data.size() == incoming.partial_bytes;
  incoming.partial_grew_us = *complete ? 0 : MonotonicMicros();
  if (*complete) incoming.last_step = KeyOf(partial);
  return absl::OkStatus();
}

void HiddenReceiver::OnEnd(const IncomingPtr& incoming, absl::Status status) {
  bool tell = false;
  {
    std::lock_guard lock(mu_);
    streams_.erase(incoming);
    std::erase(parked_, incoming);
    auto it = expected_.find(incoming->to_stage_id);
    if (it != expected_.end() && it->second.current == incoming) {
      it->second.current = nullptr;
      tell = !stopping_;
    }
  }
  if (tell) {
    const absl::StatusCode code = status.ok() ? absl::StatusCode::kUnavailable : status.code();
    events_->on_edge_down(
        incoming->AsEdge(),
        absl::Status(code, absl::StrCat("edge from stage ", incoming->from_stage_id, " to stage ",
                                        incoming->to_stage_id, ": ",
                                        status.ok() ? "the sender ended it" : status.message())));
  }
}

void HiddenReceiver::Expect(const Edge& edge) {
  const uint64_t to_stage_id = edge.to_stage_id;
  Settled settled;
  {
    std::lock_guard lock(mu_);
    Expectation& expected = expected_[to_stage_id];
    if (expected.current) {
      settled.emplace_back(expected.current,
                           absl::AbortedError(absl::StrCat("stage ", to_stage_id, " expects edge ",
                                                           edge.id, " instead")));
    }
    expected = {.edge_id = edge.id, .from_stage_id = edge.from_stage_id, .nonce = edge.nonce};
    std::erase_if(parked_, [&](const IncomingPtr& incoming) {
      if (incoming->to_stage_id != to_stage_id) return false;
      absl::Status admitted = Admit(incoming, &settled);
      if (absl::IsUnavailable(admitted)) return false;
      settled.emplace_back(incoming, std::move(admitted));
      return true;
    });
  }
  Settle(settled);
}

void HiddenReceiver::Settle(const Settled& settled) {
  for (const auto& [incoming, status] : settled) {
    if (status.ok()) {
      Answer(*incoming, true);
      incoming->stream->Resume();
    } else {
      incoming->stream->Close(status);
    }
  }
}

void HiddenReceiver::Forget(uint64_t to_stage_id) {
  IncomingPtr current;
  {
    std::lock_guard lock(mu_);
    auto it = expected_.find(to_stage_id);
    if (it == expected_.end()) return;
    current = it->second.current;
    expected_.erase(it);
  }
  if (current) {
    current->stream->Close(
        absl::AbortedError(absl::StrCat("stage ", to_stage_id, " is not here any more")));
  }
}

void HiddenReceiver::Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) {
  IncomingPtr incoming;
  {
    std::lock_guard lock(mu_);
    auto it = expected_.find(to_stage_id);
    if (it == expected_.end() || !it->second.current) return;
    incoming = it->second.current;
  }
  bool resume;
  {
    std::lock_guard lock(incoming->mu);
    const bool full = incoming->outstanding_bytes >= receive_bytes_max_;
    while (!incoming->outstanding.empty() &&
           incoming->outstanding.front().first <= StepKey(epoch, step.value)) {
      incoming->outstanding_bytes -= incoming->outstanding.front().second;
      incoming->outstanding.pop_front();
    }
    resume = full && incoming->outstanding_bytes < receive_bytes_max_;
  }
  if (resume) incoming->stream->Resume();
}

void HiddenReceiver::CheckDeadlines(uint64_t now_us) {
  const auto accept_us = static_cast<uint64_t>(accept_timeout_.count()) * 1000;
  const auto stall_us = static_cast<uint64_t>(stall_timeout_.count()) * 1000;
  Settled ended;
  {
    std::lock_guard lock(mu_);
    std::erase_if(parked_, [&](const IncomingPtr& incoming) {
      if (incoming->parked_since_us + accept_us > now_us) return false;
      ended.emplace_back(
          incoming, absl::FailedPreconditionError(absl::StrCat(
                        "stage ", incoming->to_stage_id, " did not expect edge ", incoming->edge_id,
                        " within ", accept_timeout_.count(), " ms")));
      return true;
    });
    opens_refused_ += ended.size();
    for (const IncomingPtr& incoming : streams_) {
      const uint64_t grew_us = incoming->partial_grew_us;
      if (grew_us == 0 || grew_us + stall_us > now_us) continue;
      ++stalls_;
      incoming->partial_grew_us = 0;
      ended.emplace_back(incoming, absl::DeadlineExceededError(
                                       absl::StrCat("a step came in part and then nothing for ",
                                                    stall_timeout_.count(), " ms")));
    }
  }
  Settle(ended);
}

void HiddenReceiver::Stop() {
  std::vector<IncomingPtr> streams;
  {
    std::lock_guard lock(mu_);
    stopping_ = true;
    streams.assign(streams_.begin(), streams_.end());
  }
  for (auto& incoming : streams)
    incoming->stream->Close(absl::UnavailableError("the worker stops"));
}

}  // namespace strait
