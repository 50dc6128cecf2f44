// SPDX-License-Identifier: Apache-2.0
//
// Core decides everything: which worker serves which layers, which sequence runs where and in
// which step, and what happens when a worker dies. Events and `now` go in, messages come out.
//
// Owns:    the journal of every sequence, pipelines, epochs, byte accounting.
// Thread:  loop thread only. No I/O, no clock, no randomness: the same events give the same
//          messages.
// Errors:  what a worker or client does wrong becomes a message (a refusal, a new epoch, an
//          eviction); a report that contradicts the accounting evicts the worker and replays its
//          sequences.
// Limits:  CoreOptions; proto/base/limits.h.
// Why:     the server (coordinator/service) and the simulator (tests/sim) run this same code.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/engine.h"
#include "proto/base/ids.h"
#include "proto/model/reservation.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

// Longer than this between two calls, the process was stopped (or the machine): nobody else's fault.
inline constexpr uint64_t kCallGapUs = 100'000;

// What becomes of the rows of a sequence that has to give way: they go to the workers' host memory, or are
// computed again; kAuto: what is faster, by measured rates.
enum class PreemptMode { kAuto, kPark, kReplay };

struct CoreOptions {
  uint64_t term = 1;               // raised by every coordinator that takes over
  uint32_t num_pipelines = 1;      // wanted; formed as soon as enough idle workers are there
  uint32_t num_stages = 1;         // of each pipeline
  uint32_t max_step_tokens = 512;  // rows of one step, all sequences together
  uint32_t prefill_chunk = 256;    // rows of one sequence in one step
  uint32_t max_running = 256;      // sequences resident in one pipeline
  uint32_t max_waiting = 1024;     // sequences admitted and not resident, whole cluster
  // Steps in flight that may sample for one sequence: all but the first are planned before their
  // token is known, with sampled(step k). 1: none is granted.
  uint32_t grant_depth = 2;
  // Sequences of the same first tokens share their rows (scheduler.h).
  bool prefix_cache = false;
  // Where workers offer host memory.
  PreemptMode preempt = PreemptMode::kAuto;
  bool grants() const { return grant_depth > 1 && steps_in_flight != 1; }
  // Per pipeline; 0: num_stages + 1, and one more for each step of grant_depth above 2.
  uint32_t steps_in_flight = 0;
  // This and all other times are of a clock that all but stands still while the coordinator itself
  // does: between two calls of Core pass at most kCallGapUs, or half a heartbeat timeout.
  uint64_t heartbeat_timeout_us = 5'000'000;
  uint64_t request_timeout_us = 600'000'000;  // when the request names none
  // How long waiting requests survive without any pipeline before they fail Unavailable.
  uint64_t no_pipeline_grace_us = 30'000'000;
  uint64_t max_cache_bytes_per_stage = 0;  // 0: what memory leaves after weights
  // For tests with made-up workers: a Hello may leave weights_fingerprint and cache_row_bytes 0.
  bool accept_untold = false;
  // A worker that loads, and has not got any further for longer than this, is evicted.
  uint64_t load_timeout_us = 30'000'000;
  // A stage that sits on a step for longer than this and kStepPatience times its estimate is evicted
  // (coordinator/core/fault_policy.h), or on an activation for longer than that.
  uint64_t step_timeout_us = 10'000'000;
  uint64_t activation_timeout_us = 30'000'000;
  // A sequence that gets no token for so long because links fail ends Unavailable.
  uint64_t replay_timeout_us = 120'000'000;
  // Of a sequence that moves to another pipeline: in all; without getting any further; while it stands
  // still. Over one of them the move is given up, and the sequence goes on where it is.
  uint64_t migrate_timeout_us = 300'000'000;
  uint64_t migrate_stall_us = 10'000'000;
  uint64_t migrate_pause_us = 2'000'000;
  uint64_t migrate_bytes_per_s = 0;  // of one move at one stage; 0: unbounded
  uint64_t replicate_bytes_per_s =
      0;  // that one worker fetches as copies of others' blocks; 0: unbounded
  // After which workers that are left take the layers of a lost stage, where no spare has come.
  uint64_t spare_wait_us = 20'000'000;
  uint32_t warm_spares = 0;  // spares that hold weights ready, at most (coordinator/core/warm.h)
  uint64_t restore_timeout_us = 10'000'000;  // for which a stage fetches copies before it begins
  // Of this process, random; edge nonces are made from it, so nobody outside can guess one.
  uint64_t edge_secret = 0;
};

// What Core must know of the model; made from proto/model/model_config.h by the server, invented by the
// simulator.
struct ModelShape {
  uint32_t vocab_size = 0;
  uint32_t max_positions = 0;
  std::vector<TokenId> eos_token_ids;
  std::vector<uint64_t> layer_weight_bytes;  // [num_hidden_layers]
  uint64_t embedding_bytes = 0;              // with the first layer
  uint64_t head_bytes = 0;                   // with the last: norm and head
  uint64_t block_bytes = 0;                  // one latent block of one layer
  std::vector<uint64_t>
      workspace_bytes;  // WorkspaceSizes of proto/model/stage_memory.h; empty: none
  uint64_t fingerprint = 0;

  // What a sequence costs (proto/model/reservation.h).
  CachePolicy policy() const { return {block_bytes}; }
};

// InvalidArgument names the option, its value and its bounds.
absl::Status ValidateOptions(const CoreOptions& options, const ModelShape& model);

// ---- Messages out ----

struct SendToWorker {
  WorkerId worker;
  v1::ToWorker message;
};
// Ends a worker's stream; it re-attaches or is replaced. Core has forgotten it already.
struct EvictWorker {
  WorkerId worker;
  absl::Status why;
};
struct RequestRefused {
  RequestId request;
  absl::Status why;
};
struct RequestAdmitted {
  RequestId request;
};
struct PromptCached {
  RequestId request;
  uint32_t sequence_index;
  uint32_t cached_tokens;
};
struct PromptScored {
  RequestId request;
  uint32_t sequence_index;
  std::vector<TokenInfo> scores;
};
struct TokenEmitted {
  RequestId request;
  uint32_t sequence_index;
  TokenInfo token;
};
struct SequenceEnded {
  RequestId request;
  uint32_t sequence_index;
  FinishReason reason;
  std::optional<TokenId> stop_token;
  absl::Status status;
  bool last_of_request;
};
// To OnScale, once.
using ScaleId = Id<struct ScaleTag>;
struct ScaleAnswered {
  ScaleId scale;
  absl::Status status;  // ok: every pipeline has so many stages now
  v1::ScaleReply reply;
};
// Now and then, while a scale is under way.
struct ScaleTold {
  ScaleId scale;
  ScaleReport report;
};
// To OnMigrate and OnDrain: how it goes, and once that it is over.
using VerbId = Id<struct VerbTag>;
struct MoveTold {
  VerbId verb;
  MoveReport report;
};
struct DrainTold {
  VerbId verb;
  DrainReport report;
};
struct VerbEnded {
  VerbId verb;
  absl::Status status;
};
using CoreMessage = std::variant<SendToWorker, EvictWorker, RequestRefused, RequestAdmitted,
                                 PromptCached, PromptScored, TokenEmitted, SequenceEnded,
                                 ScaleAnswered, ScaleTold, MoveTold, DrainTold, VerbEnded>;

// Counters that only grow, and gauges; for metrics and status.
struct CoreStats {
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;  // computed, replays not counted
  uint64_t generated_tokens = 0;
  uint64_t replayed_tokens = 0;
  uint64_t recomputed_rows = 0;  // the same, times the stages that each went through again
  uint64_t kept_rows = 0;  // that stages took along into a new epoch; each stage counts its own
  uint64_t granted_tokens = 0;      // planned before the token that they feed was known
  uint64_t surplus_tokens = 0;      // sampled for sequences that had ended
  uint64_t cached_rows = 0;         // that sequences found in prefix blocks when they were placed
  uint64_t prefix_blocks_made = 0;  // full blocks that became prefix blocks
  uint64_t prefix_blocks_dropped = 0;   // to make room
  uint64_t prefix_blocks_survived = 0;  // that sequences took along into a new epoch, on any stage
  uint64_t prefix_blocks_mended =
      0;  // of these, that were computed again where a stage lacked them
  uint64_t prefix_blocks_offloaded = 0;  // to host memory, to make room
  uint64_t prefix_blocks_returned = 0;   // from there
  uint64_t prefix_blocks_lost = 0;  // of which the copy there was none any more; computed again
  uint64_t prefix_blocks_forgotten = 0;  // there, to make room
  uint64_t host_copied_bytes = 0;        // to and from there, all stages
  uint64_t host_copying_us = 0;          // in which copies were under way, summed over stages
  uint64_t replicas_made = 0;            // blocks of one stage that got a copy on another worker
  uint64_t replicas_failed = 0;
  uint64_t replicas_refused = 0;  // for want of memory there
  uint64_t replicated_bytes = 0;
  uint64_t replicated_shared_bytes = 0;  // of these: not by gRPC
  uint64_t restored_rows =
      0;  // that stages began with from such copies, at most; each stage counts its own
  uint64_t warm_stages_taken = 0;  // lost stages whose successor had the weights already
  uint64_t decoding_us = 0;        // summed over sequences; where copies are made
  uint64_t protected_us = 0;       // of it, while a death would have cost 127 rows at most
  uint64_t preemptions = 0;
  uint64_t migrations = 0;  // sequences that moved with all their rows
  uint64_t migrations_failed = 0;
  uint64_t migrated_bytes = 0;
  uint64_t migrated_shared_bytes = 0;  // of these: by shared memory
  uint64_t migrated_nccl_bytes = 0;    // of these: from device to device
  uint64_t migration_pause_us = 0;     // summed; the longest
  uint64_t migration_pause_us_max = 0;
  uint64_t recoveries = 0;             // pipelines that came back with a new epoch
  uint64_t sequences_interrupted = 0;  // that had tokens when their pipeline failed under them
  uint64_t workers_lost = 0;
  uint64_t requests_refused = 0;
  uint64_t requests_ended[4] = {0, 0, 0, 0};  // by FinishReason
  uint32_t running = 0;
  uint32_t waiting = 0;
  uint32_t pipelines_active = 0;
  uint64_t cache_bytes_used = 0;           // of latent blocks that rows hold
  uint64_t cache_bytes_free_prefixes = 0;  // of these: of prefix blocks that no sequence has now
  uint64_t cache_bytes_total = 0;
  uint64_t host_bytes_used = 0;  // of workers' host memory: of prefix blocks that went there
  uint64_t host_bytes_total = 0;
};

// A pipeline gets other stages, by a scale or since a worker of it is drained.
struct ChangeUnderWay {
  PipelineId pipeline;
  const char* phase = "";  // by Name(Scale::Phase), coordinator/core/scale.h
  bool drains = false;
  std::vector<WorkerId> hosts;  // of the stages that it gets
  std::vector<WorkerId> serve;  // of its stages now; from the switch on they are the same
};

class Core {
 public:
  // REQUIRES: ValidateOptions(options, model).ok().
  Core(CoreOptions options, ModelShape model);
  ~Core();

  // ---- Events ----
  // A worker's Hello was valid in itself; Core answers Welcome or EvictWorker (another wire version,
  // model, cache format; other weights than those of the workers that are attached).
  void OnWorkerAttached(WorkerId worker, const v1::Hello& hello, uint64_t now_us);
  void OnWorkerMessage(WorkerId worker, const v1::FromWorker& message, uint64_t now_us);
  void OnWorkerLost(WorkerId worker, absl::Status why, uint64_t now_us);
  void OnSubmit(RequestId request, RequestSpec spec, uint64_t now_us);
  void OnCancel(RequestId request, std::optional<uint32_t> sequence_index, uint64_t now_us);
  // Every pipeline, one after the other, is to have so many stages, and serves meanwhile. Answered by ScaleTold and once by
  // ScaleAnswered: InvalidArgument, ResourceExhausted (no room), FailedPrecondition (a pipeline does not
  // serve, or another scale is under way), Aborted or what failed.
  void OnScale(ScaleId id, ScaleSpec spec, uint64_t now_us);
  // Answered by MoveTold and VerbEnded, as VerbListener says.
  void OnMigrate(VerbId id, MigrateSpec spec, uint64_t now_us);
  // Answered by DrainTold and VerbEnded, likewise.
  void OnDrain(VerbId id, DrainSpec spec, uint64_t now_us);
  // Prefix blocks that no sequence has go, in host memory and their copies on other workers, too.
  void OnFlush(uint64_t now_us);
  // Deadlines, heartbeat timeouts. Call at least every kCallGapUs, and it may be called at any time.
  void OnTick(uint64_t now_us);

  // Messages since the last call, in order. To be called after each event (or batch of events):
  // forming of steps happens here, so that one step serves all events of a batch.
  std::vector<CoreMessage> Take(uint64_t now_us);

  // ---- What others may ask ----
  bool Ready() const;  // a pipeline is active
  CoreStats Stats() const;
  // JSON text: workers, layer ranges, pipelines, cache bytes by layer, sequences (documented in
  // coordinator/core/STATUS.md).
  std::string StatusJson(uint64_t now_us) const;
  // Nothing: no pipeline gets other stages now. For the simulator, which strikes in each phase of that.
  std::optional<ChangeUnderWay> Change() const;
  // Of every stage: reserved and held bytes are those of its sequences by their lengths there, and
  // within its capacity; no worker's memory is booked twice; a sequence is in one place. Used by tests at
  // every tick.
  absl::Status CheckIntegrity() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace strait
