// SPDX-License-Identifier: Apache-2.0
//
// Transport carries hidden states from a stage to the next, and sampled ids from the last to the
// first: a pipeline's edges are a ring, and each stage has one at either end. Implementations: gRPC
// (worker/transport/grpc_transport.h), NCCL (worker/transport/nccl_transport.h; hidden states
// only), simulated (tests/sim).
//
// Owns:    its connections; callbacks are borrowed and outlive it.
// Thread:  all methods: loop thread. Events come on the transport's own threads and
//          must only enqueue.
// Errors:  an edge that broke, stalled past its deadline or was refused is told once by
//          on_edge_down; a dead peer never blocks a caller. Both sides of a broken edge tell it.
//          Who does not answer at all does not for kAnswerTimeout.
// Limits:  kDataQueueBytes waiting per edge, then Send answers ResourceExhausted; as many bytes
//          delivered and not consumed on the receiving side, then it reads no more.
// Why:     an edge has an id of its own and knows no pipeline epoch: steps carry theirs, and what
//          is left of an older one is refused by the stage. So an edge whose ends stay survives the
//          failure of another stage.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "worker/hidden_step.h"

namespace strait {

// From Connect, or Probe, to a first word of the peer. It comes from a thread that does nothing else, so a worker that
// computes answers, too; only one that cannot be reached is silent for so long.
inline constexpr std::chrono::milliseconds kAnswerTimeout{4'000};

// One direction of one pipeline edge.
struct Edge {
  uint64_t id = 0;  // given by the coordinator; rises, never reused
  uint64_t from_stage_id = 0;
  uint64_t to_stage_id = 0;
  std::string peer_address;  // data address of the receiver
  uint64_t nonce = 0;        // the receiver lets in only who shows the nonce that it was told
  bool sampled = false;      // from the last stage to the first: carries sampled ids
  bool over_nccl = false;    // then also:
  std::string nccl_id;       // of its communicator; the receiver makes it, the sender is told
  uint32_t max_tokens = 0;   // of any step
  // It is made before the epoch that uses it, and up when a row of no step went over it: so nothing is left to be made
  // with the first step. Both ends are told.
  bool ahead = false;
};

struct TransportEvents {
  // The receiver accepted, or answered a Probe. `memory` is where hidden states for Send should be written, loop thread
  // only, while the edge is connected; empty: host memory.
  std::function<void(const Edge&, HiddenMemory memory)> on_edge_up;
  std::function<void(const Edge&, absl::Status)> on_edge_down;
  std::function<void(uint64_t to_stage_id, HiddenStep)> on_hidden;  // verified, whole
  std::function<void(uint64_t to_stage_id, SampledStep)> on_sampled;
  // Of an edge that was expected over NCCL: the id of the communicator that the sender must be told.
  std::function<void(const Edge&, std::string nccl_id)> on_nccl_id;
};

class Transport {
 public:
  virtual ~Transport() = default;
  // Opens the edge; a previous edge of the same from_stage_id is dropped. Answered by one event.
  virtual void Connect(const Edge& edge) = 0;
  virtual absl::Status Send(uint64_t from_stage_id, HiddenStep hidden) = 0;
  // Over an edge that is `sampled`.
  virtual absl::Status SendSampled(uint64_t from_stage_id, SampledStep sampled) = 0;
  // Whether the way to the receiver and back is open still, of an edge that is up. Answered by on_edge_up again, or
  // by on_edge_down.
  virtual void Probe(uint64_t from_stage_id) = 0;
  virtual void Disconnect(uint64_t from_stage_id) = 0;
  // Whom the receiving side lets in: only this edge. Senders of older ones are ended with Aborted;
  // a sender of a newer one waits until it is expected. `from_stage_id` 0: whichever opens first. A
  // sender that lost its connection and opens the same edge again takes the place of its old one.
  virtual void Expect(const Edge& edge) = 0;
  // The stage is gone: its senders are ended, nothing is expected for it any more.
  virtual void Forget(uint64_t to_stage_id) = 0;
  // Disconnect and Forget of a stage whose steps have all ended, at all of its neighbours, too: nothing is under way on
  // either edge. What it takes to be rid of them may come later.
  virtual void Retire(uint64_t stage_id) {
    Disconnect(stage_id);
    Forget(stage_id);
  }
  // All that came for `to_stage_id` up to this step of this epoch was used or refused: its memory
  // counts no more against the receiving side's bound.
  virtual void Consumed(uint64_t to_stage_id, PipelineEpoch epoch, StepId step) = 0;
};

}  // namespace strait
