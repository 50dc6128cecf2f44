// SPDX-License-Identifier: Apache-2.0
//
// Backend runs a stage's layers over a batch: the seam between step logic and arithmetic.
// Implementations: CpuBackend (worker/model), CudaBackend (worker/model/cuda), HashBackend
// (tests/sim).
//
// Owns:    the Backend the cache; a StageModel its share of the weights, and what it needs of the backend
//          is kept alive by it.
// Thread:  Backend::Load runs on a loader thread while other stages step; all else of a StageModel
//          only on the loop thread.
// Shapes:  hidden [num_tokens, hidden_size] in the backend's hidden format, row-major; in host
//          memory, or on the device of a backend that has one (worker/hidden_buffer.h).
// Errors:  a step that fails leaves the stage unusable until its next activation: steps begun before
//          it are sound, those begun after it are void. What concerns one sequence alone is told by
//          its LogitsResult.
// Limits:  kMaxStepsBegun.
// Why:     sampling belongs to the backend, because logits need not leave a device. A step is begun
//          and finished apart, so that a device has its next step before it is done with this one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "proto/latent_block.h"
#include "worker/block_copies.h"
#include "worker/cache/cache_memory.h"
#include "worker/hidden_buffer.h"

namespace strait {

// Constant over a sequence's life; the validated form of strait.v1.SamplingParams.
struct SamplingParams {
  uint64_t seed = 0;
  uint32_t choice_index = 0;
  float temperature = 1;  // 0: greedy
  uint32_t top_k = 0;     // 0: off
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  std::vector<std::pair<TokenId, float>> logit_bias;
  uint32_t min_tokens = 0;
  std::vector<TokenId> banned_ids;  // not sampled while fewer than min_tokens are generated

  // Whether sampling looks at all of the sequence's tokens.
  bool needs_tokens() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }
};

// Stands in BatchSequence::tokens for an id that a stage has no use for, and so is not told.
inline constexpr TokenId kUnknownToken = ~TokenId{0};

// Rows of one sequence in a batch: positions first_position … first_position + num_tokens - 1.
struct BatchSequence {
  SequenceId id;
  uint32_t first_position = 0;
  uint32_t num_tokens = 0;
  // All token ids of the sequence from position 0 to this batch's last row (the tail of it is this
  // batch's). Only the first and the last stage know them all: on others those of granted rows are
  // kUnknownToken. The first stage embeds the tail, the last samples after all of them, others read
  // none.
  absl::Span<const TokenId> tokens;
  // [layers of the stage]: physical blocks of that layer by position / 64, covering this batch's
  // last row at least.
  absl::Span<const absl::Span<const BlockId>> page_tables;
  // A promise that a backend may build on, which keeps the tables where it needs them: among all
  // batches that the model is given, tables of one number are the same tables, of which entries that
  // were seen once stay as they are, and to which entries are only appended. No two sequences of a
  // batch have the same number. 0: no promise.
  uint64_t tables_id = 0;
  uint32_t prompt_tokens = 0;
  const SamplingParams* sampling = nullptr;
  // If set, the last of `tokens` is not known yet and kUnknownToken here: it is what this request
  // samples, by its index in `logits` of the step begun before, which is not finished. If the
  // sequence is sampled, it has no penalties, for these need its tokens.
  std::optional<uint32_t> token_of_request;
  // These rows are in the cache already: they attend to what is stored and are not written again.
  bool is_cached = false;
};

// Logits wanted at one row of the batch, last stage only.
struct LogitsRequest {
  uint32_t sequence_index = 0;  // in StageBatch::sequences
  uint32_t row = 0;             // row of the whole batch
  bool sample = false;          // of position + 1, keyed by that position; else: score `token`
  TokenId token = 0;
  uint32_t num_top = 0;
};

struct LogitsResult {
  TokenId token = 0;                           // the scored or the sampled one
  float logprob = 0;                           // natural log, of the raw distribution
  std::vector<std::pair<TokenId, float>> top;  // num_top entries, falling, ties by lower id
  // Not ok: the row's logits were no numbers, and all of the above is void. The step is well.
  absl::Status status;
};

// Lent for the call that it is given to, with all that it refers to.
struct StageBatch {
  absl::Span<const BatchSequence> sequences;  // rows follow each other in this order
  uint32_t num_tokens = 0;                    // sum over sequences
  absl::Span<const LogitsRequest> logits;     // empty but on the last stage; rising rows
};

// Where a stage's layers sit in the model.
struct StageSpec {
  LayerRange layers;
  uint32_t pool_blocks = 0;  // that it may hold, of the worker's latent blocks of one layer each
};

// Of one StageModel, begun and not finished.
inline constexpr size_t kMaxStepsBegun = 2;

class StageModel {
 public:
  virtual ~StageModel() = default;

  // Begins a step behind those already begun: steps compute in this order, each as if the ones
  // before it were done. Rows of the cache are written before they are attended to. hidden_in is
  // empty on the first stage (it embeds batch tokens), hidden_out on the last. Both stay the
  // model's until the step is finished, or its Begin has failed. Such a step is not begun.
  // REQUIRES: fewer than kMaxStepsBegun steps are begun; one, if TakesAhead says no.
  virtual absl::Status Begin(const StageBatch& batch, HiddenIn hidden_in, HiddenOut hidden_out) = 0;
  // Whether Begin of a step with so many rows and LogitsRequests, while another one is begun,
  // returns without waiting for that one, but for what is made once (a graph of that many rows) or
  // is rare (lists of tokens beyond a limit); and whether the step may feed what that one samples.
  virtual bool TakesAhead(uint32_t num_rows, uint32_t num_logits) const = 0;

  // Whether Finish would return at once, with results or an error. REQUIRES: a step is begun.
  virtual bool Done() const = 0;
  // Waits for the oldest step that is begun. Afterwards its hidden_in is read and its hidden_out is
  // written, also on a device, whatever the status; `results` has one for each LogitsRequest. After
  // an error the steps begun behind it are to be finished all the same: their results are void.
  // REQUIRES: a step is begun.
  virtual absl::Status Finish(std::vector<LogitsResult>* results) = 0;

  // The way to the cache's rows beside steps. They are this model's part.
  virtual BlockCopies& copies() = 0;

  // It may hold so many blocks from the next step on. Errors: ResourceExhausted, of memory for the tables
  // of more; nothing is changed. Fewer are always taken. REQUIRES: no step is begun where they are fewer.
  virtual absl::Status SetCapacity(uint32_t pool_blocks) = 0;

  virtual const StageSpec& spec() const = 0;
  virtual uint64_t weight_bytes() const = 0;
};

// How the rows of the cache lie (proto/latent_block.h).
struct RowShape {
  RowFormat format = RowFormat::kFp32;
  uint32_t rank = 0;
  uint32_t rope = 0;
  uint32_t row_bytes() const { return RowBytes(format, rank, rope); }
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Reads weights, but for layers that another model of this backend has: these they share. The cache is
  // not taken here, but by cache().Resize. `progress(bytes_done, bytes_total)` may be called from any
  // thread. Errors: ResourceExhausted (says needed and available bytes), NotFound, DataLoss,
  // InvalidArgument.
  virtual absl::StatusOr<std::unique_ptr<StageModel>> Load(
      const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) = 0;

  // Of all its models.
  virtual CacheMemory& cache() = 0;

  // Makes host memory of another's such as BlockCopies::Take gives, until the answer goes: null where all memory is.
  // Neither needs the backend's loop; both may take milliseconds, and what is given back may wait for what a device
  // computes. Errors: ResourceExhausted, Internal.
  virtual absl::StatusOr<std::shared_ptr<void>> LockPages(absl::Span<std::byte>) { return nullptr; }

  virtual uint32_t hidden_row_bytes() const = 0;  // bytes of one token's hidden state on an edge
  virtual uint64_t block_bytes() const = 0;       // of a latent block of one layer
  virtual RowShape row_shape() const = 0;         // of every layer
  virtual uint32_t num_layers() const = 0;        // of the whole model
  virtual uint32_t vocab_size() const = 0;
  virtual uint32_t max_positions() const = 0;  // context length
  // Backend, kernel revision and mode: equal ids promise equal bits.
  virtual std::string numerics_id() const = 0;
};

}  // namespace strait
