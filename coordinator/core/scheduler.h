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
// Limits:  CoreOptions: max_step_tokens, prefill_chunk, max_running, steps_in_flight.
// Why:     under the exact policy every layer of every stage holds the same number of blocks of a
//          sequence: a *column* is one block in each layer. So one integer per pipeline says what
//          is free: the capacity is that of the stage with the fewest blocks per layer.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "absl/status/status.h"
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

  uint32_t DecodeCap() const;
  bool WorthDecoding() const;
  void PlanCloses(Draft* draft);
  void PlanDecodes(Draft* draft);
  void PlanPrefill(Draft* draft);
  void PlanRows(Sequence* sequence, uint32_t num_rows, Draft* draft);
  void PlanClose(SequenceId id, uint32_t columns, Draft* draft);
  // Makes room for one more column of `sequence`, from the youngest down. False: it went itself.
  bool GrowOneColumn(Sequence* sequence, Draft* draft);
  void Preempt(Sequence* sequence, Draft* draft);
  void Forget(Sequence* sequence);  // it leaves; its columns are the caller's

  absl::Status CheckResults(const StepRecord& record, const v1::StageReport& report) const;
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

  std::map<SequenceId, Sequence*> residents_;
  std::map<SequenceId, Sequence*> prefilling_;  // residents with rows to plan; oldest first
  std::map<uint64_t, Sequence*> ready_;  // residents with a token to feed; longest waiting first
  std::vector<Closing> closing_;
  std::map<SequenceId, uint32_t> opened_;  // on the stages after the last planned step: rows
  StepLedger ledger_;
  std::vector<StageTimes> times_;  // of each stage
};

}  // namespace strait
