// SPDX-License-Identifier: Apache-2.0
//
// ClientStream and ServerStream carry messages both ways over one gRPC call: the one
// implementation that control and data use, at both ends.
//
// Owns:    its outgoing queue, and on the client the call's context and with it the channel.
// Thread:  Send, Resume, Close, Abort: any. Events come on gRPC's threads, one at a time in each
//          of the two kinds, and must only enqueue: never block, never destroy the stream. A
//          ClientStream is destroyed by its owner, never on a gRPC thread; that cancels the call
//          and waits for the last event.
// Errors:  Send answers ResourceExhausted (queue full, message too big) or Unavailable (ended).
//          on_end comes exactly once, last: the status that Close was given, else the peer's.
// Limits:  StreamOptions.
// Why:     gRPC allows one write in flight and one Finish, and joins its threads when a channel is
//          dropped: three rules that are kept here so that nobody else need know them. No
//          operation is started with the mutex held, because newer gRPC may run its reaction
//          inside.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/alarm.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/support/client_callback.h"
#include "grpcpp/support/server_callback.h"
#include "proto/base/check.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/status.h"

namespace strait::rpc {

struct StreamOptions {
  size_t max_queued_messages = 0;
  size_t max_queued_bytes = 0;
  size_t max_message_bytes = 0;
  // The peer's first message must come within this, or the stream ends DeadlineExceeded. On a
  // client it covers connecting too.
  std::chrono::milliseconds first_message_timeout{0};
};

template <class In>
struct StreamEvents {
  // Answers whether to read on; after `false` nothing is read until Resume.
  std::function<bool(In)> on_message;
  std::function<void(absl::Status)> on_end;
};

inline size_t MessageBytes(const google::protobuf::MessageLite& message) {
  return message.ByteSizeLong();
}
inline size_t MessageBytes(const grpc::ByteBuffer& message) { return message.Length(); }

// What both ends share. `Reactor` is gRPC's class of the end.
template <class Reactor, class In, class Out>
class StreamBase : public Reactor {
 public:
  StreamBase(const StreamBase&) = delete;
  StreamBase& operator=(const StreamBase&) = delete;

  absl::Status Send(Out message) {
    const size_t bytes = MessageBytes(message);
    if (bytes > options_.max_message_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("a message of ", bytes, " bytes exceeds the ", options_.max_message_bytes,
                       " bytes that the peer takes"));
    }
    {
      std::lock_guard lock(mu_);
      if (closing_) return absl::UnavailableError("the stream has ended");
      if (outgoing_.size() >= options_.max_queued_messages ||
          queued_bytes_ + bytes > options_.max_queued_bytes) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the peer does not read: ", outgoing_.size(), " messages of ",
                         queued_bytes_, " bytes wait"));
      }
      queued_bytes_ += bytes;
      outgoing_.push_back({std::move(message), bytes});
      if (writing_) return absl::OkStatus();
      BeginWrite();
    }
    this->StartWrite(&writing_message_.message);
    return absl::OkStatus();
  }

  // Reads on after on_message answered false. May come early or twice.
  void Resume() {
    {
      std::lock_guard lock(mu_);
      if (closing_) return;
      if (!paused_) {
        resume_early_ = true;
        return;
      }
      paused_ = false;
      ++starting_;
    }
    this->StartRead(&incoming_);
    EndStarting();
  }

  // Ends the stream with `why`; queued messages are dropped. A write in flight is waited for by the
  // server's end, so that the peer sees `why`: see Abort. If the peer was the first to end it, its
  // status remains, and a client waits for it no longer.
  void Close(absl::Status why) {
    bool finish = false;
    {
      std::lock_guard lock(mu_);
      if (!closing_) {
        closing_ = true;
        local_status_ = std::move(why);
        outgoing_.clear();
        finish = MaybeFinish();
      }
      ++starting_;
    }
    OnLocalClose();
    if (finish) Finished();
    EndStarting();
  }

  // Ends the stream though the peer reads nothing any more.
  void Abort() {
    Close(absl::CancelledError("aborted"));
    {
      std::lock_guard lock(mu_);
      if (finished_) return;
      ++starting_;
    }
    TryCancel();
    EndStarting();
  }

  size_t queued_bytes() const {
    std::lock_guard lock(mu_);
    return queued_bytes_;
  }

  // How long the write in flight has been so; 0 without one.
  uint64_t WriteAgeMicros(uint64_t now_us) const {
    std::lock_guard lock(mu_);
    return writing_ && now_us > write_began_us_ ? now_us - write_began_us_ : 0;
  }

 protected:
  StreamBase(StreamOptions options, StreamEvents<In> events)
      : options_(options), events_(std::move(events)) {}
  ~StreamBase() = default;

  virtual void TryCancel() = 0;
  virtual void OnLocalClose() = 0;
  // Reads on, for nobody, if that is needed for the call to end. Only in a reaction.
  virtual void Drain() = 0;
  virtual void Finished() = 0;  // called once, when no write is in flight and none will be
  virtual void Released() = 0;  // an outside party (the call, the alarm) lets go

  // REQUIRES: called once.
  void ArmFirstMessage() {
    if (options_.first_message_timeout.count() == 0) return;
    {
      std::lock_guard lock(mu_);
      ++parties_;
    }
    alarm_.Set(
        std::chrono::system_clock::now() + options_.first_message_timeout, [this](bool fired) {
          if (fired && !heard_) {
            Close(absl::DeadlineExceededError(absl::StrCat("no first message from the peer within ",
                                                           options_.first_message_timeout.count(),
                                                           " ms")));
          }
          Released();
        });
  }

  void CancelAlarm() { alarm_.Cancel(); }

  void ReadDone(bool ok) {
    if (!ok) {
      EndedByPeer();
      return;
    }
    if (!heard_.exchange(true)) alarm_.Cancel();
    bool ends;
    {
      std::lock_guard lock(mu_);
      ends = closing_;
    }
    const bool more = !ends && events_.on_message(std::exchange(incoming_, In()));
    {
      std::lock_guard lock(mu_);
      ends = closing_;
      if (!ends) {
        if (!more && !std::exchange(resume_early_, false)) {
          paused_ = true;
          return;
        }
        ++starting_;
      }
    }
    if (ends) return Drain();
    this->StartRead(&incoming_);
    EndStarting();
  }

  void WriteDone(bool ok) {
    bool next = false;
    bool unread = false;
    bool finish;
    {
      std::lock_guard lock(mu_);
      writing_ = false;
      queued_bytes_ -= writing_message_.bytes;
      writing_message_ = {};
      if (!ok) {
        closing_ = true;
        outgoing_.clear();
        unread = std::exchange(paused_, false);
      }
      if (!closing_ && !outgoing_.empty()) {
        BeginWrite();
        next = true;
      }
      finish = MaybeFinish();
    }
    if (next) this->StartWrite(&writing_message_.message);
    if (unread) Drain();
    if (finish) Finished();
  }

  void EndedByPeer() {
    bool finish;
    {
      std::lock_guard lock(mu_);
      closing_ = true;
      outgoing_.clear();
      finish = MaybeFinish();
    }
    if (finish) Finished();
  }

  // The last event. `peer_status`: how the call ended if nobody closed it here.
  void CallEnded(absl::Status peer_status) {
    StreamEvents<In> events;
    absl::Status status;
    {
      std::lock_guard lock(mu_);
      closing_ = true;
      events = std::move(events_);
      events_ = {};
      status = local_status_ ? *local_status_ : std::move(peer_status);
    }
    alarm_.Cancel();
    if (events.on_end) events.on_end(std::move(status));
    // What the events hold may hold this stream: it goes before the stream is let go.
    events = {};
    Released();
  }

  const StreamOptions options_;
  mutable std::mutex mu_;
  int parties_ = 1;  // guarded by mu_: the call, and the alarm while it is set
  std::optional<absl::Status> local_status_;  // guarded by mu_
  In incoming_;                               // gRPC's between StartRead and ReadDone

 private:
  struct Queued {
    Out message;
    size_t bytes = 0;
  };

  // REQUIRES: mu_ held, nothing in flight, outgoing_ not empty.
  void BeginWrite() {
    writing_ = true;
    write_began_us_ = MonotonicMicros();
    writing_message_ = std::move(outgoing_.front());
    outgoing_.pop_front();
  }

  // REQUIRES: mu_ held. The caller calls Finished() outside when this answers true.
  bool MaybeFinish() {
    if (!closing_ || writing_ || starting_ > 0 || finished_) return false;
    finished_ = true;
    return true;
  }

  void EndStarting() {
    bool finish;
    {
      std::lock_guard lock(mu_);
      --starting_;
      finish = MaybeFinish();
    }
    if (finish) Finished();
  }

  StreamEvents<In> events_;
  grpc::Alarm alarm_;
  std::atomic<bool> heard_ = false;  // a first message came
  // Guarded by mu_:
  std::deque<Queued> outgoing_;
  size_t queued_bytes_ = 0;  // with the write in flight
  bool writing_ = false;
  uint64_t write_began_us_ = 0;
  int starting_ = 0;  // operations decided on and being started: no Finish meanwhile
  bool paused_ = false;
  bool resume_early_ = false;
  bool closing_ = false;
  bool finished_ = false;
  // gRPC's between StartWrite and WriteDone.
  Queued writing_message_;
};

template <class In, class Out>
class ClientStream final : public StreamBase<grpc::ClientBidiReactor<Out, In>, In, Out> {
  using Base = StreamBase<grpc::ClientBidiReactor<Out, In>, In, Out>;

 public:
  // `start` makes the call, e.g. stub->async()->Attach(context, reactor).
  using Starter = std::function<void(grpc::ClientContext*, grpc::ClientBidiReactor<Out, In>*)>;

  ClientStream(StreamOptions options, StreamEvents<In> events, const Starter& start)
      : Base(options, std::move(events)) {
    start(&context_, this);
    this->AddHold();
    this->StartRead(&this->incoming_);
    this->StartCall();
    this->ArmFirstMessage();
  }

  ~ClientStream() {
    this->Close(absl::CancelledError("dropped by its owner"));
    this->CancelAlarm();
    std::unique_lock lock(this->mu_);
    released_.wait(lock, [this] { return this->parties_ == 0; });
  }

  void OnReadDone(bool ok) override { this->ReadDone(ok); }
  void OnWriteDone(bool ok) override { this->WriteDone(ok); }
  void OnDone(const grpc::Status& status) override { this->CallEnded(FromGrpc(status)); }

 private:
  void TryCancel() override { context_.TryCancel(); }
  void OnLocalClose() override { context_.TryCancel(); }
  // A call whose peer has ended it ends here when all that the peer sent before has been read.
  void Drain() override { this->StartRead(&this->incoming_); }
  void Finished() override { this->RemoveHold(); }
  void Released() override {
    std::lock_guard lock(this->mu_);
    if (--this->parties_ == 0) released_.notify_all();
  }

  grpc::ClientContext context_;
  std::condition_variable released_;
};

template <class In, class Out>
class ServerStream final : public StreamBase<grpc::ServerBidiReactor<In, Out>, In, Out>,
                           public std::enable_shared_from_this<ServerStream<In, Out>> {
  using Base = StreamBase<grpc::ServerBidiReactor<In, Out>, In, Out>;

 public:
  // REQUIRES: made by std::make_shared, then Start once, from the method's handler, which returns
  // it.
  ServerStream(grpc::CallbackServerContext* context, StreamOptions options, StreamEvents<In> events)
      : Base(options, std::move(events)), context_(context), peer_(context->peer()) {}

  void Start() {
    self_ = this->shared_from_this();
    this->ArmFirstMessage();
    this->StartRead(&this->incoming_);
  }

  const std::string& peer() const { return peer_; }

  void OnReadDone(bool ok) override { this->ReadDone(ok); }
  void OnWriteDone(bool ok) override { this->WriteDone(ok); }
  void OnCancel() override {
    {
      std::lock_guard lock(this->mu_);
      cancelled_ = true;
    }
    this->EndedByPeer();
  }
  void OnDone() override {
    bool cancelled;
    {
      std::lock_guard lock(this->mu_);
      cancelled = cancelled_;
    }
    this->CallEnded(cancelled
                        ? absl::CancelledError("the peer is gone: its connection or its call ended")
                        : absl::OkStatus());
  }

 private:
  void TryCancel() override { context_->TryCancel(); }
  void OnLocalClose() override {}
  void Drain() override {}
  void Finished() override {
    absl::Status status;
    {
      std::lock_guard lock(this->mu_);
      if (this->local_status_) status = *this->local_status_;
    }
    this->Finish(ToGrpc(status));
  }
  void Released() override {
    std::shared_ptr<ServerStream> last;  // let go after the mutex
    std::lock_guard lock(this->mu_);
    if (--this->parties_ == 0) last = std::move(self_);
  }

  grpc::CallbackServerContext* const context_;  // valid until OnDone
  const std::string peer_;
  bool cancelled_ = false;              // guarded by mu_
  std::shared_ptr<ServerStream> self_;  // gRPC's reference
};

}  // namespace strait::rpc
