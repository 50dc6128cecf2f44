// SPDX-License-Identifier: Apache-2.0
#include "worker/transport/nccl_edge.h"

#include <sys/prctl.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "proto/base/status_macros.h"
#include "proto/rpc/clock.h"

namespace strait {
namespace {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""us;

// After something moved, the next is looked for at once for so long, then every kNap; an edge that
// has nothing under way sleeps. A step follows the one before it within tens of milliseconds.
constexpr uint64_t kEagerUs = 2'000;
constexpr uint64_t kAwakeUs = 50'000;
constexpr auto kNap = 30us;
constexpr auto kSleep = 20ms;
constexpr auto kSetUpPoll = 1ms;
// Between two looks for an error that no call of ours would show.
constexpr uint64_t kAskErrorUs = 500;
constexpr unsigned long kTimerSlackNs = 1'000;
// A wait at an epoch's end that people should see.
constexpr uint64_t kLongUs = 100'000;

uint64_t Micros(std::chrono::milliseconds ms) { return static_cast<uint64_t>(ms.count()) * 1000; }

}  // namespace

NcclEdge::NcclEdge(const NcclEdgeContext* context, Edge edge, Role role)
    : context_(context),
      edge_(std::move(edge)),
      role_(role),
      place_(context->gate.get()),
      thread_([this] { Run(); }) {}

NcclEdge::~NcclEdge() {
  Drop();
  thread_.join();
}

// ---------------------------------------------------------------- loop thread

absl::Status NcclEdge::Send(HiddenStep hidden) {
  STRAIT_CHECK(role_ == Role::kSend);
  const uint64_t bytes = uint64_t{hidden.num_tokens} * context_->options.hidden_row_bytes;
  STRAIT_CHECK(hidden.data.size() == bytes);
  if (hidden.num_tokens == 0 || hidden.num_tokens > edge_.max_tokens) {
    return About(absl::ResourceExhaustedError(
        absl::StrCat("a step of ", hidden.num_tokens, " rows, at most ", edge_.max_tokens)));
  }
  if (silent_) return About(absl::UnavailableError("it broke"));
  {
    std::lock_guard lock(mu_);
    if (queued_bytes_ + bytes > limits::kDataQueueBytes) {
      return About(absl::ResourceExhaustedError(
          absl::StrCat("the receiver does not fetch: ", queued_bytes_, " bytes wait for it")));
    }
    queued_bytes_ += bytes;
    num_unplaced_ += !hidden.data.on_device();
    given_.push_back({.hidden = std::move(hidden)});
  }
  changed_.notify_one();
  return absl::OkStatus();
}

void NcclEdge::Due(PipelineEpoch epoch, StepId step, uint32_t num_tokens) {
  STRAIT_CHECK(role_ == Role::kReceive);
  if (num_tokens == 0 || num_tokens > edge_.max_tokens) {
    TellDown(absl::ResourceExhaustedError(
        absl::StrCat("a step of ", num_tokens, " rows, at most ", edge_.max_tokens)));
    return Drop();
  }
  {
    std::lock_guard lock(mu_);
    Op op;
    op.hidden.epoch = epoch;
    op.hidden.step = step;
    op.hidden.num_tokens = num_tokens;
    // While it waits it holds multiprocessors, which the step before it needs: kernels of one block a
    // multiprocessor would take twice as long.
    if (!context_->options.posts_ahead) op.after = std::exchange(due_, step);
    given_.push_back(std::move(op));
  }
  changed_.notify_one();
}

std::optional<HiddenBuffer> NcclEdge::Place(size_t bytes) {
  std::shared_ptr<SlotArena> arena;
  {
    std::lock_guard lock(mu_);
    if (num_unplaced_ == 0) arena = arena_;
  }
  if (arena == nullptr || bytes == 0) return std::nullopt;
  return arena->Take(bytes);
}

void NcclEdge::Probe() {
  {
    std::lock_guard lock(mu_);
    probed_ = true;
  }
  changed_.notify_one();
}

void NcclEdge::Drop() {
  silent_ = true;
  {
    std::lock_guard lock(mu_);
    dropped_ = true;
  }
  place_.End();
  changed_.notify_one();
}

void NcclEdge::Retire() {
  silent_ = true;
  retired_ = true;
  changed_.notify_one();
}

// ---------------------------------------------------------------- watchdog

void NcclEdge::Watch(uint64_t now_us) {
  const uint64_t since_us = call_since_us_;
  if (since_us == 0 || now_us < since_us) return;
  const uint64_t age_us = now_us - since_us;
  if (age_us < Micros(context_->options.init_timeout)) return;
  const auto what = absl::StrCat(call_.load(), " has not come back for ", age_us / 1000, " ms");
  TellDown(absl::DeadlineExceededError(what));
  if (age_us < Micros(context_->options.abort_timeout) || std::exchange(poisoned_, true)) return;
  context_->events.on_poisoned(std::string(About(absl::DeadlineExceededError(what)).message()));
}

// ---------------------------------------------------------------- its own thread

void NcclEdge::Run() {
  // Naps of microseconds would be stretched to 50 of them.
  (void)prctl(PR_SET_TIMERSLACK, kTimerSlackNs, 0, 0, 0);
  const absl::Status ended = Serve();
  if (!ended.ok()) TellDown(ended);
  settled_ = retired_ && ended.ok() && made_ && running_.empty() && !posting_;
  if (settled_) Linger();
  TearDown();
  place_.Gone();
  finished_ = true;
}

absl::Status NcclEdge::Serve() {
  set_up_until_us_ = MonotonicMicros() + Micros(context_->options.init_timeout);
  STRAIT_RETURN_IF_ERROR(WaitForTurn());
  if (dropped()) return absl::OkStatus();
  STRAIT_RETURN_IF_ERROR(Prepare());
  STRAIT_RETURN_IF_ERROR(MakeCommunicator());
  if (edge_.ahead) {
    AddProof();
  } else {
    TellUp();
  }
  patient_since_us_ = moved_us_ = MonotonicMicros();
  for (;;) {
    bool probed = false;
    {
      std::lock_guard lock(mu_);
      if (dropped_ || IsOver()) return absl::OkStatus();
      probed = std::exchange(probed_, false);
      while (!given_.empty()) {
        waiting_.push_back(std::move(given_.front()));
        given_.pop_front();
      }
    }
    if (probed) asked_us_ = 0;  // before an answer NCCL is asked
    STRAIT_ASSIGN_OR_RETURN(const bool moved, Advance());
    if (probed) TellUp();
    STRAIT_RETURN_IF_ERROR(CheckPatience(MonotonicMicros()));
    Pause(moved);
  }
}

absl::Status NcclEdge::WaitForTurn() {
  const size_t others = place_.others_ending();
  if (others == 0) return absl::OkStatus();
  Log(LogLevel::kInfo, "a new NCCL edge waits until older ones are torn down",
      {{"from_stage", edge_.from_stage_id}, {"to_stage", edge_.to_stage_id}, {"older", others}});
  const uint64_t since_us = MonotonicMicros();
  const bool mine = place_.AwaitTurn(set_up_until_us_);
  const uint64_t waited_us = MonotonicMicros() - since_us;
  if (waited_us > kLongUs) {
    Log(LogLevel::kInfo, "a new NCCL edge waited long for the teardown of older ones",
        {{"from_stage", edge_.from_stage_id},
         {"to_stage", edge_.to_stage_id},
         {"waited_us", waited_us},
         {"torn_down", mine ? "yes" : "no"}});
  }
  if (mine) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("older NCCL edges of this worker were still being torn down after ",
                   waited_us / 1000, " ms"));
}

absl::Status NcclEdge::Prepare() {
  EdgeDevice& device = *context_->offer.device;
  STRAIT_RETURN_IF_ERROR(device.Use());
  STRAIT_ASSIGN_OR_RETURN(stream_, device.MakeStream());
  for (size_t i = 0; i < kOpsPosted; ++i) {
    STRAIT_ASSIGN_OR_RETURN(void* event, device.MakeEvent());
    events_.push_back(event);
  }
  const size_t step_bytes = size_t{edge_.max_tokens} * context_->options.hidden_row_bytes;
  // Each place is rounded up: room for so many of the largest steps all the same.
  const size_t arena_bytes = context_->options.arena_steps * (step_bytes + kSlotAlign);
  STRAIT_ASSIGN_OR_RETURN(auto arena, context_->arenas->Take(arena_bytes));
  std::lock_guard lock(mu_);
  arena_ = std::move(arena);
  return absl::OkStatus();
}

absl::Status NcclEdge::MakeCommunicator() {
  NcclApi& nccl = *context_->offer.nccl;
  std::string id = edge_.nccl_id;
  if (role_ == Role::kReceive) {
    const NcclCode code = Call("ncclGetUniqueId", [&] { return nccl.MakeId(&id); });
    if (code != kNcclSuccess) return Error("ncclGetUniqueId", code);
    if (!silent_) context_->events.transport.on_nccl_id(edge_, id);
  }
  const int rank = role_ == Role::kSend ? 0 : 1;
  NcclCode code = Call("ncclCommInitRankConfig", [&] { return nccl.Init(&comm_, id, rank); });
  STRAIT_ASSIGN_OR_RETURN(code, WaitWhileInProgress(code, set_up_until_us_));
  if (code == kNcclInProgress) return absl::OkStatus();  // dropped meanwhile
  if (code != kNcclSuccess) return Error("ncclCommInitRankConfig", code);
  made_ = true;
  return absl::OkStatus();
}

void NcclEdge::AddProof() {
  Op op;
  op.proves = proving_ = true;
  op.hidden.num_tokens = 1;
  if (role_ == Role::kSend) {
    op.hidden.data = HiddenBuffer(std::vector<std::byte>(Bytes(op)));
    std::lock_guard lock(mu_);
    queued_bytes_ += Bytes(op);
    ++num_unplaced_;
  }
  waiting_.push_back(std::move(op));
}

void NcclEdge::TellUp() {
  if (role_ == Role::kSend && !silent_) context_->events.transport.on_edge_up(edge_, {});
}

absl::StatusOr<NcclCode> NcclEdge::WaitWhileInProgress(NcclCode code, uint64_t until_us) {
  const uint64_t since_us = MonotonicMicros();
  while (code == kNcclInProgress) {
    if (!made_ && dropped()) return code;  // a revoke goes on
    if (const uint64_t now_us = MonotonicMicros(); now_us > until_us) {
      return absl::DeadlineExceededError(absl::StrCat(call_.load(), " was still in progress after ",
                                                      (now_us - since_us) / 1000, " ms"));
    }
    std::this_thread::sleep_for(kSetUpPoll);
    NcclCode state = kNcclSuccess;
    const NcclCode asked = Call("ncclCommGetAsyncError",
                                [&] { return context_->offer.nccl->AsyncError(comm_, &state); });
    code = asked == kNcclSuccess ? state : asked;
  }
  return code;
}

absl::StatusOr<bool> NcclEdge::Advance() {
  EdgeDevice& device = *context_->offer.device;
  bool moved = false;
  const uint64_t now_us = MonotonicMicros();
  if (posting_ || now_us >= asked_us_ + kAskErrorUs) {
    asked_us_ = now_us;
    NcclCode state = kNcclSuccess;
    const NcclCode asked = Call("ncclCommGetAsyncError",
                                [&] { return context_->offer.nccl->AsyncError(comm_, &state); });
    if (asked != kNcclSuccess) return Error("ncclCommGetAsyncError", asked);
    if (state != kNcclSuccess && state != kNcclInProgress) return Error("the edge", state);
    if (posting_ && state == kNcclSuccess) {
      moved = true;
      Op op = std::move(*posting_);
      posting_.reset();
      STRAIT_RETURN_IF_ERROR(OnPosted(std::move(op)));
    }
  }
  while (!running_.empty()) {
    STRAIT_ASSIGN_OR_RETURN(const bool done, device.Done(running_.front().second));
    if (!done) break;
    moved = true;
    Op op = std::move(running_.front().first);
    running_.pop_front();
    patient_since_us_ = MonotonicMicros();
    Complete(std::move(op));
  }
  while (!posting_ && !waiting_.empty() && running_.size() < kOpsPosted) {
    STRAIT_ASSIGN_OR_RETURN(const bool posted, Post());
    if (!posted) break;
    moved = true;
  }
  if (!posting_ && running_.empty()) place_.Leave();
  return moved;
}

absl::StatusOr<bool> NcclEdge::Post() {
  Op& first = waiting_.front();
  if (first.after.value > consumed_) return false;
  // The match of a receive that is posted ahead is posted, so who ends need not wait long for it; held, it could be what the
  // other worker's end waits for.
  const bool waits = role_ == Role::kSend || !context_->options.posts_ahead;
  if (!place_.Enter(waits ? Micros(context_->options.leave_timeout) : 0)) return false;
  const size_t bytes = Bytes(first);
  if (!first.hidden.data.on_device()) {
    std::optional<HiddenBuffer> place = arena_->Take(bytes);
    if (!place) return false;
    if (role_ == Role::kSend) {
      first.staged = std::move(first.hidden.data);
      STRAIT_RETURN_IF_ERROR(context_->offer.device->Upload(
          place->data(), std::as_const(first.staged).data(), bytes, stream_));
      std::lock_guard lock(mu_);
      --num_unplaced_;
    }
    first.hidden.data = *std::move(place);
  }
  Op op = std::move(first);
  waiting_.pop_front();
  NcclApi& nccl = *context_->offer.nccl;
  std::byte* const data = op.hidden.data.data();
  const bool send = role_ == Role::kSend;
  const char* const what = send ? "ncclSend" : "ncclRecv";
  const NcclCode code = Call(what, [&] {
    return send ? nccl.Send(comm_, data, bytes, stream_)
                : nccl.Receive(comm_, data, bytes, stream_);
  });
  if (code != kNcclSuccess && code != kNcclInProgress) {
    posting_ = std::move(op);  // its memory is NCCL's until it is torn down
    return Error(what, code);
  }
  if (code == kNcclInProgress) {
    posting_ = std::move(op);
  } else {
    STRAIT_RETURN_IF_ERROR(OnPosted(std::move(op)));
  }
  return true;
}

absl::Status NcclEdge::OnPosted(Op op) {
  void* const event = events_[next_event_];
  next_event_ = (next_event_ + 1) % events_.size();
  running_.emplace_back(std::move(op), event);
  return context_->offer.device->Record(event, stream_);
}

void NcclEdge::Complete(Op op) {
  if (role_ == Role::kSend) {
    std::lock_guard lock(mu_);
    queued_bytes_ -= Bytes(op);
  }
  if (op.proves) {
    proving_ = false;
    TellUp();
  } else if (role_ == Role::kReceive && !silent_) {
    context_->events.transport.on_hidden(edge_.to_stage_id, std::move(op.hidden));
  }
}

absl::Status NcclEdge::CheckPatience(uint64_t now_us) {
  if (proving_ && now_us > set_up_until_us_) {
    return absl::DeadlineExceededError("the first row did not go over it in time");
  }
  const bool send = role_ == Role::kSend;
  // A receive that is not posted waits for this worker, not for the other.
  const bool under_way = !running_.empty() || posting_ || (send && !waiting_.empty());
  if (!under_way) patient_since_us_ = now_us;
  const auto patience = send ? context_->options.send_timeout : context_->options.receive_timeout;
  if (now_us < patient_since_us_ + Micros(patience)) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat(send ? "hidden states were not fetched for " : "hidden states did not come for ",
                   patience.count(), " ms"));
}

void NcclEdge::Pause(bool moved) {
  const uint64_t now_us = MonotonicMicros();
  if (moved) moved_us_ = now_us;
  const uint64_t still_us = now_us - moved_us_;
  if (still_us < kEagerUs) return std::this_thread::yield();
  const bool busy = !running_.empty() || posting_ || !waiting_.empty() || still_us < kAwakeUs;
  std::unique_lock lock(mu_);
  if (!given_.empty() || dropped_ || probed_) return;
  if (busy) {
    changed_.wait_for(lock, kNap);
  } else {
    changed_.wait_for(lock, kSleep);
  }
}

bool NcclEdge::dropped() {
  std::lock_guard lock(mu_);
  return dropped_;
}

void NcclEdge::TellDown(const absl::Status& why) {
  if (silent_.exchange(true)) return;
  context_->events.transport.on_edge_down(edge_, About(why));
}

absl::Status NcclEdge::About(const absl::Status& why) const {
  return absl::Status(why.code(),
                      absl::StrCat("NCCL edge from stage ", edge_.from_stage_id, " to stage ",
                                   edge_.to_stage_id, ": ", std::string(why.message())));
}

absl::Status NcclEdge::Error(const char* call, NcclCode code) const {
  return absl::UnavailableError(absl::StrCat(call, ": ", context_->offer.nccl->Text(code)));
}

}  // namespace strait
