// SPDX-License-Identifier: Apache-2.0
#include "worker/service/link.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/clock.h"
#include "strait/v1/cluster.grpc.pb.h"

namespace strait {
namespace {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;

constexpr auto kAttachTimeout = 5s;  // from dialling to Welcome
constexpr auto kFirstBackoff = 100ms;
constexpr std::chrono::milliseconds kMaxBackoff = 2s;
constexpr uint32_t kMinBeatMs = 10;
constexpr uint32_t kMaxBeatMs = 60'000;
constexpr size_t kQueueBytes = 4 * size_t{limits::kMaxControlMessageBytes};
// The same failure is logged again only after this long.
constexpr uint64_t kRepeatLogUs = 30'000'000;

}  // namespace

uint64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  uint64_t total = 0, resident = 0;
  if (!(statm >> total >> resident)) return 0;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

ControlLink::ControlLink(std::string coordinator_address, Events events)
    : coordinator_address_(std::move(coordinator_address)), events_(std::move(events)) {}

ControlLink::~ControlLink() { Stop(); }

void ControlLink::Dial(v1::Hello hello) {
  {
    std::lock_guard lock(mu_);
    hello_ = std::move(hello);
    may_dial_ = true;
  }
  changed_.notify_all();
  if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
}

void ControlLink::Stop() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<ControlLink::Stream> ControlLink::Current() {
  std::lock_guard lock(mu_);
  return stream_;
}

absl::Status ControlLink::Send(LinkSession session, v1::FromWorker message) {
  std::shared_ptr<Stream> stream;
  {
    std::lock_guard lock(mu_);
    if (session == session_) stream = stream_;
  }
  if (!stream) return absl::UnavailableError("that session with the coordinator has ended");
  return stream->Send(std::move(message));
}

void ControlLink::Resume() {
  if (auto stream = Current()) stream->Resume();
}

void ControlLink::Drop(absl::Status why) {
  if (auto stream = Current()) stream->Close(std::move(why));
}

void ControlLink::Run() {
  std::chrono::milliseconds backoff = kFirstBackoff;
  std::string last_failure;
  uint64_t logged_us = 0;
  while (true) {
    const absl::Status status = Serve();
    std::unique_lock lock(mu_);
    if (welcomed_) backoff = kFirstBackoff;
    if (stop_) return;
    const uint64_t now_us = MonotonicMicros();
    const std::string failure = status.ToString();
    if (welcomed_ || failure != last_failure || now_us - logged_us > kRepeatLogUs) {
      Log(welcomed_ ? LogLevel::kWarning : LogLevel::kError,
          welcomed_ ? "detached from the coordinator, attaching again"
                    : "cannot attach to the coordinator, trying on",
          {{"coordinator", coordinator_address_}, {"why", status}});
      last_failure = failure;
      logged_us = now_us;
    }
    changed_.wait_for(lock, backoff, [this] { return stop_; });
    changed_.wait(lock, [this] { return stop_ || may_dial_; });
    if (stop_) return;
    backoff = std::min(backoff * 2, kMaxBackoff);
  }
}

absl::Status ControlLink::Serve() {
  LinkSession session;
  {
    std::lock_guard lock(mu_);
    if (stop_) return absl::CancelledError("stopped");
    session = ++session_;
    ended_ = welcomed_ = false;
    drop_ = absl::OkStatus();
  }
  rpc::StreamOptions options;
  options.max_queued_messages = limits::kControlQueueMessages;
  options.max_queued_bytes = kQueueBytes;
  options.max_message_bytes = limits::kMaxControlMessageBytes;
  options.first_message_timeout = kAttachTimeout;
  rpc::StreamEvents<v1::ToWorker> events;
  events.on_message = [this, session](v1::ToWorker message) {
    return OnMessage(session, std::move(message));
  };
  events.on_end = [this](absl::Status status) {
    std::lock_guard lock(mu_);
    ended_ = true;
    end_status_ = std::move(status);
    changed_.notify_all();
  };
  // A new channel each time: no back-off of an older attempt delays this one.
  auto stub =
      v1::Coordinator::NewStub(rpc::MakeChannel(coordinator_address_, rpc::Traffic::kControl));
  auto stream = std::make_shared<Stream>(options, std::move(events),
                                         [&](grpc::ClientContext* context, auto* reactor) {
                                           stub->async()->Attach(context, reactor);
                                         });
  // Before Hello: its answer, and what is sent in return, may overtake this thread.
  {
    std::lock_guard lock(mu_);
    stream_ = stream;
  }
  v1::FromWorker hello;
  {
    std::lock_guard lock(mu_);
    *hello.mutable_hello() = hello_;
  }
  (void)stream->Send(
      std::move(hello));  // fails only when the stream has ended, which is seen below

  std::unique_lock lock(mu_);
  while (!stop_ && !ended_) {
    if (!drop_.ok()) {
      const absl::Status why = drop_;
      lock.unlock();
      stream->Close(why);
      lock.lock();
      changed_.wait(lock, [this] { return stop_ || ended_; });
      continue;
    }
    if (!welcomed_) {
      changed_.wait(lock, [this] { return stop_ || ended_ || welcomed_ || !drop_.ok(); });
      continue;
    }
    const uint64_t now_us = MonotonicMicros();
    const uint64_t silence_us = uint64_t{silence_timeout_ms_} * 1000;
    if (silence_us > 0 && now_us > heard_us_ + silence_us) {
      drop_ = absl::UnavailableError(
          absl::StrCat("the coordinator was silent for ", (now_us - heard_us_) / 1000, " ms"));
      continue;
    }
    const auto interval = std::chrono::milliseconds(beat_interval_ms_);
    lock.unlock();
    v1::FromWorker beat;
    beat.mutable_heartbeat()->set_sent_us(now_us);
    beat.mutable_heartbeat()->set_resident_bytes(ResidentBytes());
    (void)stream->Send(std::move(beat));  // a full queue ends in the silence above
    lock.lock();
    changed_.wait_for(lock, interval, [this] { return stop_ || ended_ || !drop_.ok(); });
  }
  const bool welcomed = welcomed_;
  // A Hello that was heard is not said again: the loop makes the next one when it hears of the end.
  if (welcomed) may_dial_ = false;
  absl::Status status = ended_ ? end_status_ : absl::CancelledError("the worker stops");
  stream_.reset();
  lock.unlock();
  stream
      .reset();  // after this no event of the session comes, unless a Send holds it a moment longer
  if (welcomed) events_.on_ended(session, status);
  return status.ok() ? absl::UnavailableError("the coordinator ended the session") : status;
}

bool ControlLink::OnMessage(LinkSession session, v1::ToWorker message) {
  heard_us_ = MonotonicMicros();
  if (message.has_ping()) return true;
  {
    std::lock_guard lock(mu_);
    if (message.has_welcome() == welcomed_) {
      drop_ = absl::InvalidArgumentError(welcomed_ ? "the coordinator sent Welcome twice"
                                                   : "the coordinator did not begin with Welcome");
      changed_.notify_all();
      return true;
    }
    if (message.has_welcome()) {
      welcomed_ = true;
      beat_interval_ms_ =
          std::clamp(message.welcome().heartbeat_interval_ms(), kMinBeatMs, kMaxBeatMs);
      silence_timeout_ms_ = message.welcome().heartbeat_timeout_ms();
      changed_.notify_all();
    }
  }
  return events_.on_message(session, std::move(message));
}

}  // namespace strait
