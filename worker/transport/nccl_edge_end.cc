// SPDX-License-Identifier: Apache-2.0
//
// How an NcclEdge ends: at once and together with others, or lingering when it was retired.
#include <utility>

#include "proto/base/log.h"
#include "proto/rpc/clock.h"
#include "worker/transport/nccl_edge.h"

namespace strait {
namespace {

using std::chrono_literals::operator""ms;

// Between two looks for whether a retired edge may go.
constexpr auto kLingerNap = 20ms;
// A teardown that people should see.
constexpr uint64_t kLongUs = 100'000;

uint64_t Micros(std::chrono::milliseconds ms) { return static_cast<uint64_t>(ms.count()) * 1000; }

}  // namespace

bool NcclEdge::IsOver() {
  if (!retired_) return false;
  if (running_.empty() && !posting_) return true;
  const uint64_t now_us = MonotonicMicros();
  if (over_until_us_ == 0) over_until_us_ = now_us + Micros(context_->options.linger_idle);
  return now_us >= over_until_us_;
}

void NcclEdge::Linger() {
  const uint64_t until_us = MonotonicMicros() + Micros(context_->options.linger_timeout);
  std::unique_lock lock(mu_);
  arena_.reset();  // others may have use for it
  while (!dropped_ && MonotonicMicros() < until_us &&
         !place_.IsLeftAlone(Micros(context_->options.linger_idle))) {
    changed_.wait_for(lock, kLingerNap);
  }
}

void NcclEdge::TearDown() {
  const uint64_t since_us = MonotonicMicros();
  place_.Stop();
  const char* call = "";
  if (comm_ != nullptr) {
    if (!place_.AwaitOthers(Micros(context_->options.leave_timeout))) {
      Log(LogLevel::kWarning,
          "an NCCL edge is torn down while another has operations on the device",
          {{"from_stage", edge_.from_stage_id}, {"to_stage", edge_.to_stage_id}});
    }
    call = TearDownCommunicator();
  }
  EdgeDevice& device = *context_->offer.device;
  // Nothing touches the memory any more when the stream is empty; only then does it go back. The arena
  // goes back to its pool, for to free it would wait for the operations of other edges.
  if (stream_ != nullptr) {
    Call("the end of the edge's stream", [&] {
      device.FreeStream(stream_);
      return kNcclSuccess;
    });
  }
  for (void* event : events_) device.FreeEvent(event);
  posting_.reset();
  running_.clear();
  waiting_.clear();
  {
    std::lock_guard lock(mu_);
    given_.clear();
    arena_.reset();
  }
  if (const uint64_t took_us = MonotonicMicros() - since_us; took_us > kLongUs) {
    Log(LogLevel::kInfo, "the teardown of an NCCL edge took long",
        {{"from_stage", edge_.from_stage_id},
         {"to_stage", edge_.to_stage_id},
         {"call", call},
         {"took_us", took_us}});
  }
}

const char* NcclEdge::TearDownCommunicator() {
  NcclApi& nccl = *context_->offer.nccl;
  bool quiet = false;
  // Who revokes or aborts tells the other end, and waits for NCCL's threads, which look up every half second.
  if (settled_ || (made_ && nccl.can_revoke())) {
    const NcclCode code = settled_ ? Call("ncclCommFinalize", [&] { return nccl.Finalize(comm_); })
                                   : Call("ncclCommRevoke", [&] { return nccl.Revoke(comm_); });
    const auto settled =
        WaitWhileInProgress(code, MonotonicMicros() + Micros(context_->options.revoke_timeout));
    quiet = settled.ok() && *settled == kNcclSuccess;
  }
  const char* const what = quiet ? "ncclCommDestroy" : "ncclCommAbort";
  const NcclCode code = Call(what, [&] { return quiet ? nccl.Destroy(comm_) : nccl.Abort(comm_); });
  comm_ = nullptr;
  if (code != kNcclSuccess) {
    Log(LogLevel::kWarning, "an NCCL edge was torn down with an error",
        {{"from_stage", edge_.from_stage_id},
         {"to_stage", edge_.to_stage_id},
         {"call", what},
         {"why", nccl.Text(code)}});
  }
  return what;
}

}  // namespace strait
