// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/hidden_sender.h"

#include <algorithm>
#include <future>
#include <utility>

#include "absl/strings/str_cat.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "proto/base/limits.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/status.h"
#include "proto/rpc/stream.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "worker/transport/hidden_frame.h"

namespace strait {
namespace {

using Stream = rpc::ClientStream<v1::HiddenReply, grpc::ByteBuffer>;

// What the stream's events may hold: never the stream itself, which must not end on a gRPC thread.
struct EdgeState {
  Edge edge;
  const TransportEvents* events;
  std::atomic<bool> up = false;
  std::atomic<bool> silent = false;  // dropped by us, or its end was told
  std::atomic<bool> probing = false;

  void TellUp() {
    if (!silent && !up.exchange(true)) events->on_edge_up(edge, {});
  }
  void TellAnswered() {
    if (!silent) events->on_edge_up(edge, {});
  }
  void TellDown(absl::Status why) {
    if (!silent.exchange(true)) events->on_edge_down(edge, std::move(why));
  }
};

absl::Status About(const Edge& edge, const absl::Status& status) {
  // The peer may end a stream with OK; for an edge in use that is a loss too.
  const absl::StatusCode code = status.ok() ? absl::StatusCode::kUnavailable : status.code();
  return absl::Status(code, absl::StrCat("edge from stage ", edge.from_stage_id, " to stage ",
                                         edge.to_stage_id, " at ", edge.peer_address, ": ",
                                         status.ok() ? "the peer ended it" : status.message()));
}

}  // namespace

// A question whether the peer is there. The call's events hold it, as long as they last.
struct ProbeCall {
  grpc::ClientContext context;
  v1::ProbeRequest request;
  v1::ProbeReply reply;
  std::promise<void> ended;
};

absl::Status Unanswered(const grpc::Status& status, std::chrono::milliseconds timeout) {
  if (status.error_code() != grpc::StatusCode::DEADLINE_EXCEEDED) return rpc::FromGrpc(status);
  return absl::DeadlineExceededError(
      absl::StrCat("no answer within ", timeout.count(), " ms: nothing passes, there or back"));
}

struct HiddenSender::Outgoing {
  std::shared_ptr<EdgeState> state;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<Stream> stream;
  uint64_t opened_us = 0;
  std::shared_ptr<ProbeCall> probe;  // the last one; loop thread, until it is dropped
  std::future<void> probe_ended;

  ~Outgoing() { EndProbe(); }
  void EndProbe() {
    if (!probe) return;
    probe->context.TryCancel();
    probe_ended.wait();
    probe.reset();
  }
};

HiddenSender::HiddenSender(const char* method, uint32_t hidden_row_bytes, Timeouts timeouts,
                           const TransportEvents* events)
    : method_(method), hidden_row_bytes_(hidden_row_bytes), timeouts_(timeouts), events_(events) {}

HiddenSender::~HiddenSender() {
  for (auto& [id, outgoing] : edges_) outgoing->state->silent = true;
}

void HiddenSender::Connect(const Edge& edge) {
  Disconnect(edge.from_stage_id);
  auto outgoing = std::make_shared<Outgoing>();
  outgoing->state = std::make_shared<EdgeState>();
  outgoing->state->edge = edge;
  outgoing->state->events = events_;

  rpc::StreamOptions options;
  options.max_queued_bytes = limits::kDataQueueBytes;
  options.max_queued_messages = limits::kDataQueueBytes;  // the bytes bound
  options.max_message_bytes = limits::kMaxDataMessageBytes;
  options.first_message_timeout = timeouts_.answer;
  rpc::StreamEvents<v1::HiddenReply> events;
  events.on_message = [state = outgoing->state](v1::HiddenReply reply) {
    if (reply.accepted()) state->TellUp();
    return true;
  };
  events.on_end = [state = outgoing->state](absl::Status status) {
    state->TellDown(About(state->edge, status));
  };
  outgoing->channel = rpc::MakeChannel(edge.peer_address, rpc::Traffic::kData);
  outgoing->opened_us = MonotonicMicros();
  grpc::TemplatedGenericStub<grpc::ByteBuffer, v1::HiddenReply> stub(outgoing->channel);
  outgoing->stream = std::make_unique<Stream>(
      options, std::move(events), [&, this](grpc::ClientContext* context, auto* reactor) {
        stub.PrepareBidiStreamingCall(context, method_, grpc::StubOptions(), reactor);
      });

  v1::HiddenOpen open;
  open.set_to_stage_id(edge.to_stage_id);
  open.set_from_stage_id(edge.from_stage_id);
  open.set_edge_id(edge.id);
  open.set_edge_nonce(edge.nonce);
  open.set_element_bytes(sizeof(float));
  open.set_hidden_size(hidden_row_bytes_ / sizeof(float));
  // Fails only if the stream has ended already, which on_end tells.
  (void)outgoing->stream->Send(EncodeOpen(open));

  std::lock_guard lock(mu_);
  edges_[edge.from_stage_id] = std::move(outgoing);
}

absl::Status HiddenSender::Send(uint64_t from_stage_id, HiddenStep hidden) {
  std::shared_ptr<Outgoing> outgoing;
  {
    std::lock_guard lock(mu_);
    auto it = edges_.find(from_stage_id);
    if (it == edges_.end()) {
      return absl::FailedPreconditionError(absl::StrCat("stage ", from_stage_id, " has no edge"));
    }
    outgoing = it->second;
  }
  const Edge& edge = outgoing->state->edge;
  STRAIT_CHECK(hidden.data.size() == uint64_t{hidden.num_tokens} * hidden_row_bytes_);
  STRAIT_CHECK(!hidden.data.on_device(), "gRPC carries host memory");
  const uint64_t total = hidden.data.size();
  // Whole or not at all: the loop thread is the only sender, so the room cannot shrink meanwhile.
  const uint64_t chunks = (total + limits::kHiddenChunkBytes - 1) / limits::kHiddenChunkBytes;
  constexpr uint64_t kHeadBytes = 96;
  if (outgoing->stream->queued_bytes() + total + chunks * kHeadBytes > limits::kDataQueueBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "stage ", edge.to_stage_id, " does not read: ", outgoing->stream->queued_bytes(),
        " bytes of hidden states wait for it"));
  }
  bytes_sent_ += total;
  auto step = std::make_shared<const HiddenStep>(std::move(hidden));
  for (uint64_t offset = 0; offset < total; offset += limits::kHiddenChunkBytes) {
    const auto bytes =
        static_cast<uint32_t>(std::min<uint64_t>(total - offset, limits::kHiddenChunkBytes));
    if (absl::Status sent = outgoing->stream->Send(EncodeChunk(step, offset, bytes)); !sent.ok()) {
      return About(edge, sent);
    }
  }
  return absl::OkStatus();
}

void HiddenSender::Probe(uint64_t from_stage_id) {
  std::shared_ptr<Outgoing> outgoing;
  {
    std::lock_guard lock(mu_);
    auto it = edges_.find(from_stage_id);
    if (it == edges_.end()) return;
    outgoing = it->second;
  }
  // One that is under way answers for this one, too.
  if (outgoing->state->probing.exchange(true)) return;
  outgoing->EndProbe();
  auto call = std::make_shared<ProbeCall>();
  outgoing->probe = call;
  outgoing->probe_ended = call->ended.get_future();
  call->context.set_deadline(std::chrono::system_clock::now() + timeouts_.answer);
  v1::StageTransport::Stub stub(outgoing->channel);
  stub.async()->Probe(
      &call->context, &call->request, &call->reply,
      [call, state = outgoing->state, timeout = timeouts_.answer](const grpc::Status& status) {
        state->probing = false;
        if (status.ok()) {
          state->TellAnswered();
        } else {
          state->TellDown(About(state->edge, Unanswered(status, timeout)));
        }
        call->ended.set_value();
      });
}

void HiddenSender::Disconnect(uint64_t from_stage_id) {
  std::lock_guard lock(mu_);
  auto it = edges_.find(from_stage_id);
  if (it == edges_.end()) return;
  it->second->state->silent = true;
  it->second->stream->Close(absl::CancelledError("the edge was dropped"));
  // Not destroyed here: that waits for gRPC, and the loop thread should not.
  dropped_.push_back(std::move(it->second));
  edges_.erase(it);
}

void HiddenSender::CheckDeadlines(uint64_t now_us) {
  const auto stall_us = static_cast<uint64_t>(timeouts_.stall.count()) * 1000;
  const auto accept_us = static_cast<uint64_t>(timeouts_.accept.count()) * 1000;
  std::vector<std::shared_ptr<Outgoing>> buried;
  std::vector<std::pair<std::shared_ptr<Outgoing>, absl::Status>> stalled;
  {
    std::lock_guard lock(mu_);
    buried.swap(dropped_);
    for (auto& [id, outgoing] : edges_) {
      // Before acceptance the accept timeout rules: the peer may park us.
      const bool up = outgoing->state->up;
      if (up ? outgoing->stream->WriteAgeMicros(now_us) > stall_us
             : now_us > outgoing->opened_us + accept_us) {
        stalled.emplace_back(
            outgoing,
            absl::DeadlineExceededError(
                up ? absl::StrCat("nothing could be written for ", timeouts_.stall.count(), " ms")
                   : absl::StrCat("not let in for ", timeouts_.accept.count(), " ms")));
      }
    }
  }
  for (auto& [outgoing, why] : stalled) {
    if (outgoing->state->silent) continue;
    ++stalls_;
    outgoing->state->TellDown(About(outgoing->state->edge, why));
    outgoing->stream->Close(why);
  }
}

}  // namespace strait
