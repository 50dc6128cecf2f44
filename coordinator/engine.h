// SPDX-License-Identifier: Apache-2.0
//
// Engine is what the HTTP front sees of the rest: requests go in, tokens come out.
//
// Thread:  Submit, Cancel and the getters: any thread. A RequestListener is called on the
//          coordinator's loop thread, one call at a time, and must only enqueue. After OnEnd or
//          OnRefused it is called no more and dropped.
// Errors:  a refused request is refused whole, by OnRefused, before any other event:
//          InvalidArgument (fix the request), ResourceExhausted (queue full: come back),
//          Unavailable (no pipeline: come back). A sequence that fails later ends with its status
//          in OnSequenceEnd.
// Why:     text lives in front of this seam: the core knows token ids only, so stop strings are
//          found by the listener, which then calls Cancel for that choice.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "proto/base/ids.h"

namespace strait {

// What a request asks of one of its token streams.
struct SequenceSpec {
  std::vector<TokenId> prompt;  // at least one token
  uint32_t max_tokens = 16;     // generated at most; 0: only score, or nothing (ends kLength)
  uint32_t min_tokens = 0;
  bool ignore_eos = false;
  std::vector<TokenId> stop_token_ids;  // besides the model's end-of-sequence ids
  bool score_prompt = false;            // log-probabilities of prompt tokens 1 … n-1
  bool want_logprobs = false;           // of generated tokens
  uint32_t num_top = 0;                 // alternatives, at most limits::kMaxTopLogprobs
  std::string cache_salt;               // sequences of unequal ones share no rows

  // Sampling (as OpenAI and vLLM mean them).
  uint64_t seed = 0;
  uint32_t choice_index = 0;
  float temperature = 1;
  uint32_t top_k = 0;
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::vector<std::pair<TokenId, float>> logit_bias;
};

struct RequestSpec {
  std::vector<SequenceSpec> sequences;  // admitted or refused together
  uint64_t timeout_us = 0;  // 0: the server's default; over it the request ends DeadlineExceeded
  std::string client_id;    // x-request-id, for the log
  std::string name;  // "cmpl-…": by which its client, and an operator, may know it; may be empty
};

struct TokenInfo {
  uint32_t position = 0;  // of this token in the sequence; the prompt starts at 0
  TokenId id = 0;
  float logprob = 0;
  std::vector<std::pair<TokenId, float>> top;
};

enum class FinishReason { kStop, kLength, kCancelled, kError };

class RequestListener {
 public:
  virtual ~RequestListener() = default;
  virtual void OnRefused(absl::Status why) = 0;
  virtual void OnAdmitted(RequestId id) = 0;
  // So many tokens of its prompt need not be computed, another sequence's are in a cache. At most once a
  // sequence, before all that follows for it; who is not told: none.
  virtual void OnPromptCached(uint32_t sequence_index, uint32_t cached_tokens) {
    (void)sequence_index, (void)cached_tokens;
  }
  // Scores of prompt positions, in order, in one or several calls; all before the sequence's first token.
  virtual void OnPromptScores(uint32_t sequence_index, std::vector<TokenInfo> scores) = 0;
  virtual void OnToken(uint32_t sequence_index, TokenInfo token) = 0;
  // Once per sequence. `stop_token` is the token that ended it, when one did (it was also given to OnToken).
  virtual void OnSequenceEnd(uint32_t sequence_index, FinishReason reason,
                             std::optional<TokenId> stop_token, absl::Status status) = 0;
};

// ---- What an operator asks of a cluster that runs ----

// A running sequence goes to another pipeline with its cache.
struct MigrateSpec {
  std::string
      sequence;  // as status tells it: its id; or its request's name, and "/choice" where there are several
  PipelineId to;
  bool dry_run = false;         // only whether it could be
  bool force_numerics = false;  // also where the other pipeline's numerics_id differs
  uint64_t timeout_us = 0;      // 0: the server's
};

// How a move goes, or went.
struct MoveReport {
  SequenceId sequence;
  PipelineId from;
  PipelineId to;
  std::string
      phase;  // "reserve", "copy", "freeze", "last rows", "adopt", "done"; of one that failed: in which it did
  uint32_t rounds = 0;
  uint32_t rows = 0;        // that are there by now, on all stages
  uint32_t rows_total = 0;  // of the sequence
  uint64_t moved_bytes = 0;
  uint64_t shared_bytes = 0;     // of these: by shared memory
  uint64_t nccl_bytes = 0;       // of these: from device to device
  uint32_t recomputed_rows = 0;  // of a move that succeeded: 0
  uint64_t pause_us = 0;  // from the last token of the old pipeline to the first of the new one
  uint64_t total_us = 0;
};

// A worker's sequences go elsewhere with their caches; then it has no stage, and gets none.
struct DrainSpec {
  std::string worker;       // its id, or its name where no other has it
  bool dry_run = false;     // only which way it would be
  bool undo = false;        // instead: a worker that drains, or is drained, gets stages again
  uint64_t timeout_us = 0;  // 0: the server's, of a move
};

// How a drain goes, or went.
struct DrainReport {
  WorkerId worker;
  std::string name;
  PipelineId pipeline;  // that it has a stage of, or had; 0: none
  // "move": sequences go to other pipelines, then this one is dissolved; "replace": the pipeline gets other stages without
  // the worker; "none": it had no stage, or no way is chosen yet.
  std::string way;
  std::string phase;  // "waiting", "moving", "replacing", "unloading", "done"; "serving": undone
  uint32_t sequences_left = 0;
  uint32_t sequences_moved = 0;
  uint64_t moved_bytes = 0;
  uint64_t rows_kept =
      0;  // by a replacement, summed over layers, copies that were fetched included
  uint64_t rows_lost = 0;  // that are computed again
  uint64_t pause_us = 0;   // the longest
  uint64_t total_us = 0;
};

// Called on the loop thread, and must only enqueue; not after OnVerbEnd.
class VerbListener {
 public:
  virtual ~VerbListener() = default;
  // Now and then, and once more before the end.
  virtual void OnMove(MoveReport report) = 0;
  virtual void OnDrain(DrainReport report) = 0;
  // Ok; InvalidArgument, NotFound (no such sequence, pipeline, worker), FailedPrecondition (not now; says when),
  // ResourceExhausted (no room, with the numbers), Aborted (what failed; all goes on as before), DeadlineExceeded.
  virtual void OnVerbEnd(absl::Status status) = 0;
};

// Every pipeline gets so many stages (1 to kMaxStagesPerPipeline) while it serves.
struct ScaleSpec {
  ScaleSpec(uint32_t num_stages = 0, bool dry_run = false)  // NOLINT: a number alone is most
      : num_stages(num_stages), dry_run(dry_run) {}
  uint32_t num_stages;
  bool dry_run;  // only what would become of each pipeline, now
};

// Why the planner chose what a pipeline has, or would have.
struct PlanReason {
  uint32_t num_plans = 0;              // that were possible
  uint64_t bottleneck_bytes = 0;       // weights of the heaviest stage, which sets the pace
  uint64_t best_bottleneck_bytes = 0;  // of the plan that is best at that
  uint64_t moved_bytes = 0;            // weights and rows that come to workers which lack them
  uint64_t best_moved_bytes = 0;       // of the plan that is best at the bottleneck
  std::string text;                    // for people, in a sentence
};

struct PlannedStage {
  WorkerId worker;
  std::string name;  // of the worker
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  uint64_t cache_bytes = 0;  // in the end
  uint64_t load_bytes = 0;   // of weights that its worker does not have
  uint64_t rows_bytes = 0;   // of rows that come from other workers, at most
};
struct PlannedPipeline {
  PipelineId pipeline;
  std::vector<PlannedStage> stages;  // none: it has so many stages already
  uint64_t capacity_rows = 0;        // the longest sequence that it would hold
  PlanReason why;
};

// How a scale goes.
struct ScaleReport {
  uint32_t num_stages = 0;
  uint32_t pipelines_done = 0;
  uint32_t pipelines_total = 0;
  PipelineId pipeline;  // whose turn it is; 0: none yet
  // "waiting", "making room", "loading", "copying", "still", "switched", "growing", "done"
  std::string phase;
  uint64_t bytes_loaded = 0;  // of this pipeline's new stages; a layer that is there counts at once
  uint64_t bytes_to_load = 0;
  uint64_t rows =
      0;  // of its sequences, that are where they are to be; of those that change workers
  uint64_t rows_total = 0;
  uint64_t moved_bytes = 0;  // of all pipelines
  uint32_t edges_up = 0;     // of those between its new stages
  uint32_t edges_total = 0;
  uint64_t total_us = 0;
  std::vector<PlannedPipeline> plans;  // of a dry run
};

// From a sequence's last token before a change to its first one after it.
struct ResidentPauses {
  uint32_t residents = 0;  // whose clients were reading
  uint64_t min_us = 0;
  uint64_t p50_us = 0;
  uint64_t max_us = 0;
};

// What it took to give every pipeline another number of stages.
struct ScaleOutcome {
  uint32_t pipelines = 0;  // that have it now, also where it failed half way
  uint64_t pause_us =
      0;  // the longest, from a pipeline's last step before the change to its first after it
  uint64_t rows_kept = 0;    // of sequences, summed over layers, that stayed in a cache
  uint64_t rows_lost = 0;    // that are computed again
  uint64_t moved_bytes = 0;  // of rows that went to other workers
  ResidentPauses pauses;
};

class Engine {
 public:
  virtual ~Engine() = default;

  // Answers through the listener only.
  virtual void Submit(RequestSpec request, std::shared_ptr<RequestListener> listener) = 0;
  // Ends one sequence of a request, or all. Unknown or ended ids are ignored. The listener still gets
  // OnSequenceEnd(kCancelled).
  virtual void Cancel(RequestId id, std::optional<uint32_t> sequence_index) = 0;

  // What is cached of sequences that are over goes, soon.
  virtual void Flush() = 0;

  // It goes on whether anybody listens or not.
  virtual void Migrate(MigrateSpec spec, std::shared_ptr<VerbListener> listener) = 0;
  virtual void Drain(DrainSpec spec, std::shared_ptr<VerbListener> listener) = 0;

  // `progress` is called now and then, and with the plans of a dry run; `done` once, behind it, by the rules of a
  // VerbListener: InvalidArgument, FailedPrecondition (no pipeline serves, or another scale is under
  // way), ResourceExhausted (no room, with the numbers), Aborted (a worker was lost meanwhile). It goes on
  // whether anybody waits or not.
  using ScaleProgress = std::function<void(ScaleReport)>;
  using ScaleDone = std::function<void(absl::Status, ScaleOutcome)>;
  virtual void Scale(ScaleSpec spec, ScaleProgress progress, ScaleDone done) = 0;

  // Whether at least one pipeline serves.
  virtual bool Ready() const = 0;
  virtual uint32_t max_positions() const = 0;  // context length served
  virtual uint32_t vocab_size() const = 0;
  virtual const std::vector<TokenId>& eos_token_ids() const = 0;
  // JSON of GET /strait/status, from the last published snapshot.
  virtual std::string StatusJson() const = 0;
  // Prometheus text of what the engine counts.
  virtual std::string MetricsText() const = 0;
};

}  // namespace strait
