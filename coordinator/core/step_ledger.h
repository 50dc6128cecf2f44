// SPDX-License-Identifier: Apache-2.0
//
// StepLedger remembers the steps in flight of one pipeline epoch and what every stage must answer
// to each.
//
// Owns:    one StepRecord per step until all stages reported it.
// Thread:  loop thread only.
// Errors:  CheckReport says how a report contradicts the plans; the ledger is unchanged.
// Limits:  the scheduler's steps in flight.
// Why:     bytes and tables after a step are known when it is planned, so a stage that counts
//          otherwise is found at that very step.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/core/prefix_index.h"
#include "coordinator/core/replay.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

// What the last stage must answer for one sequence of a step, in plan order.
struct WantedResult {
  SequenceId sequence;
  PlacementEpoch placement;   // the residency that it was planned for
  uint32_t first_scored = 0;  // position of the first token to be scored
  uint32_t num_scores = 0;
  bool sample = false;
  uint32_t score_num_top = 0;
  uint32_t sample_num_top = 0;
};

// A row whose token was not known when it was planned.
struct GrantedRow {
  SequenceId sequence;
  StepId sampled_by;
  std::optional<TokenId> id;  // since that step was answered
};

// A sequence that a step closes, with what it had.
struct ClosedRows {
  SequenceId sequence;
  StageRows rows;
  StageBlocks prefix;
};

// A sequence with blocks of rows that are full, on all stages, once the last one has answered the step.
struct FilledRows {
  SequenceId sequence;
  PlacementEpoch placement;
  uint32_t end = 0;  // of its rows in that step
};

// What one stage must report of a step.
struct StageStep {
  uint64_t cache_bytes = 0;    // held after it
  uint64_t tables_digest = 0;  // proto/wire/tables_digest.h
  uint32_t rows_computed = 0;
  uint32_t rows_stored = 0;
};

struct StepRecord {
  StepId id;
  uint32_t num_rows = 0;
  bool decodes = false;               // has rows of sequences past their prefill
  std::vector<StageStep> stages;      // by index
  std::vector<SequenceId> sequences;  // with rows, in plan order
  std::vector<uint32_t> first_rows;   // of these, likewise
  std::vector<WantedResult> wanted;
  std::vector<GrantedRow> granted;         // in plan order
  std::vector<TokenId> granted_ids_first;  // that the first stage fed for them, once it reported
  std::vector<ClosedRows> closed;
  std::vector<FilledRows> filled;
};

class StepLedger {
 public:
  void Start(uint32_t num_stages);
  void Stop();

  // The plan is on its way to all stages. REQUIRES: record.id == next_step().
  void Add(StepRecord record, uint64_t now_us);
  StepId next_step() const { return StepId{last_step_ + 1}; }
  uint32_t in_flight() const { return static_cast<uint32_t>(records_.size()); }
  uint32_t with_rows() const { return with_rows_; }
  // Steps with decode rows that the last stage has not answered.
  uint32_t decode_steps() const { return decode_steps_; }

  // FailedPrecondition or InvalidArgument: the report contradicts what was planned.
  absl::StatusOr<const StepRecord*> CheckReport(uint32_t stage_index,
                                                const v1::StageReport& report) const;
  // The stage's next report was right. A record that all have reported is forgotten.
  void Reported(uint32_t stage_index, uint64_t now_us);
  // The first stage reported `step`, which is in flight, and fed these.
  void FedByFirst(StepId step, std::vector<TokenId> ids);
  // What `step` sampled, for rows granted on it.
  void Sampled(StepId step, const absl::flat_hash_map<SequenceId, TokenId>& tokens);

  const std::deque<StepRecord>& records() const { return records_; }
  // Whether the stage, or the last one, has yet to answer it.
  bool Unanswered(const StepRecord& record, uint32_t stage_index) const {
    return record.id.value > reported_[stage_index];
  }
  bool Unanswered(const StepRecord& record) const { return record.id.value > reported_.back(); }
  // Of the last message either way, while steps are in flight.
  uint64_t last_progress_us() const { return last_progress_us_; }
  // The first stage that holds up the oldest step. REQUIRES: in_flight() > 0.
  uint32_t SlowestStage() const;
  uint64_t reported(uint32_t stage_index) const { return reported_[stage_index]; }

 private:
  std::vector<uint64_t> reported_;  // last step of each stage
  std::deque<StepRecord> records_;  // ids follow each other
  uint64_t last_step_ = 0;
  uint64_t last_progress_us_ = 0;
  uint32_t decode_steps_ = 0;
  uint32_t with_rows_ = 0;
};

}  // namespace strait
