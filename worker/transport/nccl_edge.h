// SPDX-License-Identifier: Apache-2.0
//
// NcclEdge is one end of one NCCL edge: a thread that makes the communicator, posts
// sends or receives in step order, sees them done, and tears the communicator down.
//
// Owns:    its thread, communicator, stream, events, arena.
// Borrows: the context; it outlives the edge.
// Thread:  Send, Due, Consumed, Place, Probe, Drop, Retire: loop thread. Watch: watchdog. All of NCCL and the device:
//          its own thread, which never holds mu_ meanwhile.
// Errors:  told once by on_edge_down, and never after Drop. Send: ResourceExhausted, Unavailable (it broke).
// Why:     a thread of its own, because a call into NCCL can hang however it was meant: then it is
//          this edge that hangs, and the watchdog and the other edges go on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "proto/rpc/clock.h"
#include "worker/transport/nccl_transport.h"
#include "worker/transport/teardown_gate.h"

namespace strait {

struct NcclEdgeContext {
  NcclTransportOptions options;
  NcclOffer offer;
  NcclEvents events;
  std::shared_ptr<ArenaPool> arenas;
  std::shared_ptr<TeardownGate> gate;
};

class NcclEdge {
 public:
  enum class Role { kSend, kReceive };

  NcclEdge(const NcclEdgeContext* context, Edge edge, Role role);
  // Drops it and waits for its end.
  ~NcclEdge();

  absl::Status Send(HiddenStep hidden);
  void Due(PipelineEpoch epoch, StepId step, uint32_t num_tokens);
  void Consumed(StepId step) {
    consumed_ = step.value;
    changed_.notify_one();
  }
  // On the device; none while there is no room, or others wait for it.
  std::optional<HiddenBuffer> Place(size_t bytes);
  // Answered by on_edge_up, unless its end was told.
  void Probe();
  // No event after this; the communicator is torn down, and until it is no new edge touches the device.
  void Drop();
  // No event after this, either; but its communicator lingers while other edges use the device.
  void Retire();
  // Since Retire, and not dropped.
  bool retired() const { return retired_ && !finished_; }
  // Calls that hang.
  void Watch(uint64_t now_us);
  // The communicator is gone and the thread ends.
  bool finished() const { return finished_; }

 private:
  struct Op {
    HiddenStep hidden;    // a receive's memory is taken when it is posted
    HiddenBuffer staged;  // host memory that is being uploaded into hidden.data
    StepId after;         // a receive's: not posted before this step was consumed
    bool proves =
        false;  // a row of no step, by which an edge that is made ahead shows that it works
  };

  void Run();
  // Returns when it was dropped, or why it cannot go on.
  absl::Status Serve();
  // Until the edges that ended before are torn down. Ok also when this one is dropped meanwhile.
  absl::Status WaitForTurn();
  absl::Status Prepare();
  absl::Status MakeCommunicator();
  // An edge that is made ahead is up when this row is over.
  void AddProof();
  // The receiver is there, or has answered a Probe.
  void TellUp();
  // Moves on what can be; whether anything did.
  absl::StatusOr<bool> Advance();
  // The first that waits; false: it is too early, there is no memory for it now, or others end.
  absl::StatusOr<bool> Post();
  absl::Status OnPosted(Op op);
  void Complete(Op op);
  absl::Status CheckPatience(uint64_t now_us);
  // Asks NCCL; DeadlineExceeded at `until_us`.
  absl::StatusOr<NcclCode> WaitWhileInProgress(NcclCode code, uint64_t until_us);
  // Retired, and what was under way has ended; or it has not for a while, though it should have.
  bool IsOver();
  // Returns when it may be torn down.
  void Linger();
  // Until there is something new, or a while.
  void Pause(bool moved);
  bool dropped();
  void TearDown();
  // The call that it ended with.
  const char* TearDownCommunicator();
  void TellDown(const absl::Status& why);
  absl::Status About(const absl::Status& why) const;
  absl::Status Error(const char* call, NcclCode code) const;
  size_t Bytes(const Op& op) const {
    return size_t{op.hidden.num_tokens} * context_->options.hidden_row_bytes;
  }
  // Calls into NCCL, watched.
  template <class F>
  NcclCode Call(const char* what, F call);

  const NcclEdgeContext* const context_;
  const Edge edge_;
  const Role role_;
  TeardownGate::Place place_;
  std::atomic<bool> silent_ = false;  // dropped, or its end was told
  std::atomic<bool> finished_ = false;
  std::atomic<bool> retired_ = false;
  std::atomic<uint64_t> consumed_ = 0;  // the last step that was
  StepId due_;                          // the last step that was told; loop thread only
  // The call that the thread is in.
  std::atomic<const char*> call_ = nullptr;
  std::atomic<uint64_t> call_since_us_ = 0;  // 0: in none
  bool poisoned_ = false;                    // watchdog thread only

  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<Op> given_;              // guarded by mu_: not yet seen by the thread
  bool dropped_ = false;              // guarded by mu_
  bool probed_ = false;               // guarded by mu_: on_edge_up is due
  std::shared_ptr<SlotArena> arena_;  // guarded by mu_: null until the communicator is there
  uint64_t queued_bytes_ = 0;         // guarded by mu_: of sends that are not done
  // Guarded by mu_: sends that wait for a place. What comes after them may not take it from them.
  size_t num_unplaced_ = 0;

  // Its own thread only:
  uint64_t set_up_until_us_ = 0;
  NcclComm* comm_ = nullptr;
  bool made_ = false;     // the communicator has two ranks
  bool proving_ = false;  // a row of no step is under way
  bool settled_ = false;  // nothing was under way when it was retired
  void* stream_ = nullptr;
  std::vector<void*> events_;  // [kOpsPosted], used in turn
  size_t next_event_ = 0;      // of the next op
  std::deque<Op> waiting_;
  std::optional<Op> posting_;                 // the call is in progress
  std::deque<std::pair<Op, void*>> running_;  // with the event that follows it
  uint64_t over_until_us_ = 0;                // then a retired one is over in any case
  uint64_t moved_us_ = 0;                     // when anything last moved
  uint64_t patient_since_us_ = 0;             // when the oldest that is under way became it
  uint64_t asked_us_ = 0;                     // when AsyncError was last asked

  std::thread thread_;
};

template <class F>
NcclCode NcclEdge::Call(const char* what, F call) {
  call_ = what;
  call_since_us_ = MonotonicMicros();
  const NcclCode code = call();
  call_since_us_ = 0;
  return code;
}

}  // namespace strait
