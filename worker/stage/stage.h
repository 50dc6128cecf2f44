// SPDX-License-Identifier: Apache-2.0
//
// Stage is a worker's step logic without I/O: StepPlans and hidden states in, hidden states and
// StageReports out. The same code runs in the worker process and in the simulator.
//
// Owns:    its StageModel, the resident sequences (token ids, page tables) and their latent blocks.
// Borrows: the worker's BlockPool, HostBudget and TransferShare.
// Thread:  loop thread only.
// Errors:  AcceptPlan and AcceptHidden refuse what contradicts the stage's state and leave it
//          unchanged: Aborted (older epoch; harmless), InvalidArgument (malformed),
//          FailedPrecondition (gap in steps, sequence unknown, positions that do not follow),
//          ResourceExhausted (a limit). What a refused plan means is the caller's: the worker
//          reports it and the coordinator bumps the epoch.
// Limits:  proto/base/limits.h: kMaxStepsInFlight plans and hidden steps waiting; the first stage runs
//          no further ahead of the ids that come back than so many steps. kMaxStepsBegun steps are
//          begun and not finished.
// Why:     what a step wrote stays when an epoch ends, if the step was finished: rows follow from
//          tokens alone. Of a step that was begun, failed or never came, the rows go.
//          Plans are validated against the state that all plans before them leave behind, so a
//          plan is accepted or refused on arrival, before its hidden states exist. A granted row
//          is a row in this reckoning, whatever becomes of its sequence: so all stages agree on
//          lengths and blocks without a word, and revoking means only that nothing waits for it.
//          A step is begun while the one before it computes, so that a device never waits for the
//          host; where it feeds what that one samples, the id goes from one to the other in the
//          backend, and the host learns it when the earlier one is finished.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"
#include "worker/cache/host_tier.h"
#include "worker/hidden_step.h"
#include "worker/stage/residents.h"
#include "worker/transfer/exporter.h"
#include "worker/transfer/importer.h"

namespace strait {

struct StepOutput {
  v1::StageReport report;
  std::optional<HiddenStep>
      hidden;  // for the next stage; absent on the last, on failure, and where
               // no row goes on
  // For the first stage: from the last of several, of a step that samples, in an epoch with grants.
  std::optional<SampledStep> sampled;
};

// Copies between a stage's cache and host memory that have ended.
struct HostMoves {
  std::vector<ContentKey> returned;
  std::vector<ContentKey> lost;
  HostTier::Copied copied;
  bool empty() const { return returned.empty() && lost.empty() && copied.bytes == 0; }
};

// What is to be told of rows that move from one pipeline to another.
struct RowMoves {
  std::vector<Importer::Fetched> fetched;
  std::vector<Exporter::Served> served;
};

// What a stage must know of the whole model and of its backend.
struct StageTraits {
  uint32_t num_layers = 0;        // of the whole model
  uint32_t hidden_row_bytes = 0;  // of one token on an edge
  uint32_t vocab_size = 0;
  uint32_t max_positions = 0;
  uint64_t block_bytes = 0;  // of a latent block of one layer
  RowShape row_shape;
  BlockOrigin origin;  // of all rows
};
StageTraits StageTraitsOf(const Backend& backend, uint64_t weights_fingerprint = 0);

class Stage {
 public:
  Stage(uint64_t stage_id, std::unique_ptr<StageModel> model, const StageTraits& traits,
        BlockPool* pool, HostBudget* host_budget = nullptr, TransferShare* transfer = nullptr);
  ~Stage();

  // Enters an epoch: drops plans, hidden states and, once the model has done with them, steps that
  // are begun. Sequences keep the rows of finished steps, until the epoch's first plan says what
  // becomes of them. Aborted if `epoch` is not newer.
  // `grants`: plans may refer to sampled tokens, and where there are several stages the last one
  // hands them to the first. A pipeline of one stage takes grants in any case.
  // `host_blocks`: prefix blocks that it may have in host memory, where none are at an epoch's begin.
  absl::Status Activate(PipelineEpoch epoch, uint32_t stage_index, uint32_t num_stages,
                        bool grants = false, uint32_t host_blocks = 0);

  // The stage may hold so many blocks; plans that are accepted from now on are held to it. What it holds
  // may take until the plans before have run to become less. FailedPrecondition: more than that are held
  // after all plans that it accepted. Else those of StageModel::SetCapacity.
  absl::Status SetCapacity(uint32_t num_blocks);
  uint32_t capacity_blocks() const;
  // After SetCapacity said less: the model's tables are still made for more. SettleCapacity REQUIRES: no
  // step is begun, and no more is held.
  bool NeedsSettling() const;
  void SettleCapacity();

  // Takes over what other stages of the worker left of its layers, or landed: of each sequence the rows that every
  // layer has, and whose tokens this stage will need are known; of sequences those that it may hold, by
  // rising id. Their steps that are begun end first; they enter no epoch any more. REQUIRES: it is in its
  // first epoch, without a plan; no layer is in two of them, or was taken over before.
  void TakeOver(absl::Span<Stage* const> predecessors);

  // Rows that it is to have before it is active (ActivateStage.restores) are fetched, until until_us at the latest:
  // while `restoring`. Of each sequence that it does not have, the whole blocks that came, up to the first that did
  // not, are then as an earlier epoch left them. `most_blocks`: that may be taken for them, besides what bounds it
  // anyway. REQUIRES: no plan came in this epoch.
  void Restore(const google::protobuf::RepeatedPtrField<v1::FetchRows>& restores,
               uint32_t most_blocks, uint64_t until_us, uint64_t now_us);
  bool restoring() const;

  // Blocks of its tables from `end` on are replaced by others. REQUIRES: no step is begun; the pool was
  // narrowed to `end`.
  void Compact(BlockId end, std::vector<BlockMove>* moves);

  // What it kept, by rising id, and nobody has said yet what becomes of it.
  std::vector<HeldRows> held() const;

  // `num_rows`, if given, becomes the rows of an accepted plan that go through this stage.
  absl::Status AcceptPlan(v1::StepPlan plan, uint64_t now_us, uint32_t* num_rows = nullptr);
  absl::Status AcceptHidden(HiddenStep hidden, uint64_t now_us);
  // First of several stages: ids come for every step that samples and was run here, in step order;
  // what is not that is refused as InvalidArgument.
  absl::Status AcceptSampled(SampledStep sampled);

  // Whether BeginNext has something to do: the next plan is here and, unless it has no rows, its
  // hidden states are, or on the first stage the ids that it refers to: all but those of sequences
  // that a waiting plan closes as ended. While a step is begun, only if the model takes the next
  // one ahead, and no token that it samples needs an id that is not known.
  bool Ready() const;
  // Begins the next step. REQUIRES: Ready(). `clock` gives microseconds. `memory`: of hidden states
  // that leave; empty: host memory.
  void BeginNext(const std::function<uint64_t()>& clock, const HiddenMemory& memory = {});

  // Tells copies to and from host memory that have ended, and lets plans go on that waited for them; and what
  // became of rows that move to or from another pipeline. To be called every millisecond or so while
  // CopiesRows().
  void PollCopies(uint64_t now_us, HostMoves* moves, RowMoves* rows = nullptr);

  // ---- Rows that move from one pipeline to another, or ahead to a stage that is to come ----
  // What contradicts the plans is told by PollCopies. Of an older epoch: nothing happens. In no epoch yet: it takes
  // blocks for the rows, as a landing.
  void FetchRows(const v1::FetchRows& fetch, uint64_t now_us);
  // Of a landing: nothing of it is needed.
  void DropLanded(SequenceId id);
  void ServeRows(const v1::ServeRows& serve);
  // The coordinator is gone: nothing is fetched or served any more in this epoch, and what was restored is all.
  void EndTransfers();
  // Asks other workers for rows, as far as it may. `last`: of sequences that stand still; else of all others.
  void AskRows(bool last, uint64_t now_us);
  // A peer's ask for this stage.
  void OnAsk(PeerAskId id, const RowsAsk& ask);

  size_t num_begun() const;
  // Whether FinishNext would not wait. REQUIRES: num_begun() > 0.
  bool Done() const;
  // Waits for the oldest step that is begun. REQUIRES: num_begun() > 0. The time it took counts from
  // its own begin or the end of the one before it, whichever is later. If it failed, its report
  // carries the error, plans that wait and steps begun behind it are dropped without a report, and
  // the stage refuses everything of this epoch with Aborted. If it could not be begun, what was
  // begun before it is finished as always.
  StepOutput FinishNext(const std::function<uint64_t()>& clock);

  // --- What others may ask ---
  uint64_t stage_id() const;
  const StageModel& model() const;
  PipelineEpoch epoch() const;
  bool is_first() const;
  bool is_last() const;
  uint32_t blocks_used() const;
  bool CopiesRows() const;  // PollCopies is to be called
  bool IsQuiet()
      const;  // no copy of its rows is under way, and none that PollCopies must see to the end
  const HostTier& tier() const;
  const Importer& importer() const;
  const Exporter& exporter() const;
  // The most that other stages cannot have until the plans that it has have run.
  uint32_t peak_blocks() const;
  const LatentCache& cache() const;
  // Every block is free or in exactly one table, tables match lengths. For tests and idle moments.
  absl::Status CheckIntegrity() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace strait
