// SPDX-License-Identifier: Apache-2.0
//
// NcclTransport carries hidden states from device to device, through one NCCL communicator of two
// ranks an edge. An edge is of one epoch: an operation without its match cannot be taken back, so the
// coordinator gives NCCL edges new ids with every epoch. It may be made before that epoch (Edge.ahead).
//
// Owns:    an NcclEdge (a thread, a communicator, a stream, device memory) for every edge, those of
//          dropped edges until they are torn down; a watchdog thread.
// Thread:  as Transport. NCCL and the device are called on the edges' threads only.
// Stream:  one an edge; the stream that computes never waits for it. A step is handed over through
//          the loop, when it is there.
// Errors:  as Transport. An NCCL call that does not come back breaks its edge after init_timeout;
//          one that still has not after abort_timeout cannot be got rid of inside this process:
//          on_poisoned.
// Limits:  NcclTransportOptions; arena_steps of the largest step in device memory at either end of
//          an edge, kOpsPosted sends at once on its stream, one receive; kDataQueueBytes wait to be sent.
// Order:   an edge is made only when those that ended before are torn down; they leave the device
//          together (teardown_gate.h tells why). So drop all edges of an epoch, those that did not break
//          too, before any of the next: what one of them has on the device may hold up the others' end.
//          An edge that goes on, of another stage, posts nothing meanwhile, and what it has posted is
//          waited for; either for leave_timeout. NCCL's free waits for what is posted longer. The
//          coordinator gives a worker one stage at a time.
// Why:     no word goes with a step: both ends know its rows from the same StepPlan, and steps
//          follow each other in plan order. Ends that disagreed would hang till the deadline or
//          hand on wrong rows; but that takes two different plans, which the coordinator sees in
//          the reports of that step (tables digest, blocks used) and answers with a new epoch,
//          before a token of it is accepted.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "worker/backend.h"
#include "worker/transport/nccl_api.h"
#include "worker/transport/slot_arena.h"
#include "worker/transport/transport.h"

namespace strait {

// Of the sending end: kMaxStepsBegun that the stage has begun, and one on its way. The receiving end
// has one receive posted, and takes fewer.
inline constexpr size_t kArenaSteps = kMaxStepsBegun + 1;
inline constexpr size_t kOpsPosted = 4;
// What an end of an edge takes of the device besides its arena, at most: the communicator's buffers,
// of kMaxBlocks channels in nccl_library.cc. Over sockets it took 17 MiB (cuda_nccl_hop_bench); other
// transports have more buffers.
inline constexpr uint64_t kNcclEdgeBytes = 64 << 20;
// Retired edges whose communicators are there still, in nobody's count.
inline constexpr size_t kMaxLingering = 4;

struct NcclTransportOptions {
  uint32_t hidden_row_bytes = 0;
  size_t arena_steps = kArenaSteps;
  // From Connect or Expect to a communicator, the wait for older edges included. Shorter than the
  // coordinator's patience with an activation, so that its cause is told.
  std::chrono::milliseconds init_timeout{15'000};
  // What is sent must be fetched so soon: the receiver computes a few steps of backlog at most.
  std::chrono::milliseconds send_timeout{60'000};
  // A receive waits for the stage before it to compute: longer than the coordinator's own deadline
  // of a step, which knows better whom to blame.
  std::chrono::milliseconds receive_timeout{330'000};
  // Who is torn down waits so long for the operations of other edges, and these so long for it.
  std::chrono::milliseconds leave_timeout{5'000};
  std::chrono::milliseconds revoke_timeout{5'000};
  std::chrono::milliseconds abort_timeout{60'000};
  // A receive is posted though the one before it was not consumed: for who tells of it only when the sender has posted.
  bool posts_ahead = false;
  // A retired edge is torn down when no other has had anything on the device for so long; at the latest then; and at once
  // where more than kMaxLingering are there.
  std::chrono::milliseconds linger_idle{100};
  std::chrono::milliseconds linger_timeout{600'000};
};

// How long a loop that waits for hidden states of NCCL should turn before it sleeps: the time that a
// pipeline's other stages take for a decode step, and as long as an edge itself turns.
inline constexpr std::chrono::microseconds kEagerHiddenWait{2'000};

struct NcclEvents {
  TransportEvents transport;
  // NCCL hangs for good. The process should end; if this returns, the edge stays as it is.
  std::function<void(const std::string& why)> on_poisoned;
};

// on_poisoned of a worker: says why, and ends the process.
inline constexpr int kPoisonedExit = 70;  // EX_SOFTWARE of sysexits.h
[[noreturn]] void EndPoisonedProcess(const std::string& why);

class NcclEdge;

class NcclTransport final : public Transport {
 public:
  NcclTransport(NcclTransportOptions options, const NcclOffer& offer, NcclEvents events);
  // Waits until every communicator is gone.
  ~NcclTransport() override;

  // `edge.nccl_id` is the receiver's.
  void Connect(const Edge& edge) override;
  // ResourceExhausted also for a step beyond the edge's max_tokens.
  absl::Status Send(uint64_t from_stage_id, HiddenStep hidden) override;
  // Internal: sampled ids go over gRPC.
  absl::Status SendSampled(uint64_t from_stage_id, SampledStep sampled) override;
  // Only an edge that was made ahead has anything to prove: that NCCL knows of no error. Its peer does not answer.
  void Probe(uint64_t from_stage_id) override;
  void Disconnect(uint64_t from_stage_id) override;
  // Makes an id, tells it by on_nccl_id, and waits for the sender.
  void Expect(const Edge& edge) override;
  // A plan with rows was accepted, so hidden states of this step will come. Told in step order.
  // Posts the receive when the step told before it was consumed and there is room: one that waits
  // holds multiprocessors, and could keep this stage from computing what it waits for, as loading a
  // kernel may wait for all that runs.
  void Due(uint64_t to_stage_id, PipelineEpoch epoch, StepId step, uint32_t num_tokens);
  void Forget(uint64_t to_stage_id) override;
  // Its communicators linger, and go when no edge uses the device: edges that serve do not wait for that.
  void Retire(uint64_t stage_id) override;
  void Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) override;
  // Device memory for what Send is to be given; none while there is no room.
  std::optional<HiddenBuffer> Place(uint64_t from_stage_id, size_t bytes);

 private:
  // Tells where hidden states go with each edge that comes up: on the device; in host memory while there is no room, then
  // it is copied before it is sent.
  NcclEvents WithMemory(NcclEvents events);

  class Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace strait
