// SPDX-License-Identifier: Apache-2.0
//
// Scheduler forms the steps of one pipeline: continuous batching, chunked prefill, decode
// micro-batches. It accounts for every latent block and checks what stages report against it.
//
// Owns:    the residents' bookkeeping and the steps in flight.
// Borrows: sequences (of the Journal).
// Thread:  loop thread only.
// Errors:  OnReport says how a stage contradicted the plans (the caller evicts its worker);
//          nothing is applied then.
// Limits:  CoreOptions: max_step_tokens, prefill_chunk, max_running, grant_depth, steps_in_flight.
// Why:     under the exact policy every layer of every stage holds the same number of blocks of a
//          sequence: a *column* is one block in each layer. So one integer per pipeline says what
//          is free: the capacity is that of the stage with the fewest blocks per layer.
//
// Grants. Up to grant_depth sampling steps of a sequence are in flight. Each follows the one before
// it: its row is the token that one samples, as a literal if it came back already, else granted:
// sampled(step k). None goes beyond max_tokens. Tokens are accepted in the order of steps, which is
// that of positions; when a sequence ends, what is still in flight for it is surplus and dropped
// with its rows by CloseSequence (ended), at once if a granted row might wait for an id.
//   - A granted row holds up its step, and all behind it, until step k has left the pipeline. So it
//     is planned when num_stages steps lie between, which in a full pipeline is when the id comes
//     just in time; or when nothing else is to do. A prompt's first step then waits for at most
//     grant_depth - 1 trips through the pipeline more than without grants.
//   - Preempted with tokens under way, a sequence gets them all, then it is placed anew.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/step_ledger.h"

namespace strait {

// How a stage spends its time: exponential averages over its recent steps with rows, of this epoch.
struct StageTimes {
  uint64_t steps = 0;
  double compute_us = 0;
  double wait_us = 0;  // from a plan's arrival to that of its hidden states: the pipeline's bubble

  void Add(const v1::StageReport& report);
};

class Scheduler {
 public:
  Scheduler(Context* context, Journal* journal) : context_(context), journal_(journal) {}
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Every stage is empty. REQUIRES: stopped.
  void Start(std::vector<uint32_t> layers_of_stages, uint32_t capacity_columns);
  // Forgets steps and blocks; residents wait again. Those that fail once too often without a token
  // in between end Unavailable because of `why`.
  void Stop(const absl::Status& why);
  bool started() const { return capacity_ > 0; }

  // ---- Routing ----
  uint32_t capacity() const { return capacity_; }
  uint32_t free_columns() const { return capacity_ - reserved_; }
  bool CanEverHold(const Sequence& sequence) const;
  bool HasRoom(const Sequence& sequence) const;
  // Rows that its residents still want, and one for each resident.
  uint64_t load() const { return unplanned_rows_ + residents_.size(); }
  // REQUIRES: HasRoom(*sequence); it waits, and no result of it is pending.
  void Place(Sequence* sequence);
  // The sequence ended: its blocks go with the next step.
  void Drop(Sequence* sequence);

  // ---- Steps ----
  // The next step, if one is worth it now; the caller adds stage and epoch, and sends it to all
  // stages.
  std::optional<v1::StepPlan> Form(uint64_t now_us);
  absl::Status OnReport(uint32_t stage_index, const v1::StageReport& report, uint64_t now_us);

  const StepLedger& ledger() const { return ledger_; }
  // Whether every link of the pipeline has carried something in this epoch, that from the last
  // stage to the first included, where there is one.
  bool links_proven() const { return links_proven_; }
  // REQUIRES: started.
  const StageTimes& times(uint32_t stage_index) const { return times_[stage_index]; }
  uint32_t num_residents() const { return static_cast<uint32_t>(residents_.size()); }
  uint32_t num_prefilling() const { return static_cast<uint32_t>(prefilling_.size()); }
  // Columns held by the stages after all steps planned so far.
  uint64_t columns_held() const { return held_; }
  const std::map<SequenceId, Sequence*>& residents() const { return residents_; }
  absl::Status CheckIntegrity() const;

 private:
  struct Draft {
    v1::StepPlan plan;
    StepRecord record;
    uint32_t tokens_left = 0;
    uint32_t sequences_left = 0;
  };
  // An ended sequence whose CloseSequence is not planned yet.
  struct Closing {
    SequenceId id;
    uint32_t columns;
  };
  static constexpr bool kEnded = true;

  uint32_t DecodeCap() const;
  bool WorthDecoding() const;
  // Another sampling step of it may be planned; REQUIRES: its rows reach up to its last token.
  bool MayDecode(const Sequence& sequence) const;
  void MakeReady(Sequence* sequence);
  // Its next row would hold up nothing.
  bool InTime(const Sequence& sequence) const;
  // Up to `most` of those that are ready, longest waiting first.
  std::vector<Sequence*> ChooseDecodes(size_t most) const;
  void PlanCloses(Draft* draft);
  void PlanDecodes(Draft* draft);
  void PlanPrefill(Draft* draft);
  void PlanRows(Sequence* sequence, uint32_t num_rows, Draft* draft);
  void PlanClose(SequenceId id, uint32_t columns, bool ended, Draft* draft);
  // Makes room for one more column of `sequence`, from the youngest down. False: it went itself.
  bool GrowOneColumn(Sequence* sequence, Draft* draft);
  void Preempt(Sequence* sequence, Draft* draft);
  void Forget(Sequence* sequence);  // it leaves; its columns are the caller's

  absl::Status CheckResults(const StepRecord& record, const v1::StageReport& report) const;
  // What stages say that they fed for granted rows, against what came back.
  absl::Status CheckGranted(const StepRecord& record, absl::Span<const TokenId> ids) const;
  void ApplyResults(const std::vector<WantedResult>& wanted, const v1::StageReport& report);

  Context* const context_;
  Journal* const journal_;

  uint32_t num_stages_ = 0;
  uint32_t steps_in_flight_max_ = 0;
  uint32_t capacity_ = 0;  // columns; 0: stopped
  uint32_t reserved_ = 0;  // columns of residents and closing ones
  uint64_t held_ = 0;      // columns that hold rows, in every stage, after the last planned step
  uint64_t unplanned_rows_ = 0;
  uint64_t last_ticket_ = 0;
  bool links_proven_ = false;

  std::map<SequenceId, Sequence*> residents_;
  std::map<SequenceId, Sequence*> prefilling_;  // residents with rows to plan; oldest first
  std::map<uint64_t, Sequence*> ready_;  // residents with a token to feed; longest waiting first
  std::vector<Closing> closing_;
  bool close_now_ = false;                 // one of them has a granted row that may wait for an id
  std::map<SequenceId, uint32_t> opened_;  // on the stages after the last planned step: rows
  StepLedger ledger_;
  std::vector<StageTimes> times_;  // of each stage
};

}  // namespace strait
