// SPDX-License-Identifier: Apache-2.0
//
// PlanLedger validates StepPlans against the state that all accepted plans before them leave
// behind: which sequences are resident, how long they are, how many blocks they hold.
//
// Owns:    that projected state; it runs ahead of the stage's real state by the plans that wait.
// Thread:  loop thread only.
// Errors:  Check names step, sequence and number: InvalidArgument (malformed), FailedPrecondition
//          (gap in steps, sequence unknown or resident twice, positions that do not follow, a
//          grant that this stage cannot follow), ResourceExhausted (a limit, blocks). It changes
//          nothing.
// Limits:  proto/base/limits.h: kMaxStepTokens, kMaxStepSequences, kMaxCacheOps, kMaxTopLogprobs,
//          kMaxSequencesResident; the pool.
// Why:     what passes here cannot fail for its own reasons when it runs, however much later that
//          is.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"

namespace strait {

// What of a stage bounds its plans.
struct StageShape {
  uint32_t num_layers = 0;
  uint32_t pool_blocks = 0;
  uint32_t vocab_size = 0;
  uint32_t max_positions = 0;
  bool grants = false;  // what a step samples is known where it is fed again
};

class PlanLedger {
 public:
  explicit PlanLedger(const StageShape& shape) : shape_(shape) {}

  struct Sequence {
    uint32_t length = 0;
    StepId last_step;                  // that had rows of it
    std::optional<StepId> sampled_by;  // the step that samples its token at position `length`
  };

  // A plan that passed, and what it changes.
  struct CheckedPlan {
    v1::StepPlan plan;
    uint32_t num_tokens = 0;
    std::vector<SamplingParams> sampling;  // of its OpenSequence ops, in order
    // Absent value: closed.
    absl::flat_hash_map<SequenceId, std::optional<Sequence>> changes;
    uint64_t blocks_after = 0;
    uint32_t sequences_after = 0;
  };

  // REQUIRES: the caller checked stage_id and epoch.
  absl::StatusOr<CheckedPlan> Check(v1::StepPlan plan) const;
  // REQUIRES: `checked` is of the last Check, and nothing was committed since.
  void Commit(const CheckedPlan& checked);

  StepId next_step() const { return next_step_; }

 private:
  const Sequence* Find(const CheckedPlan& checked, SequenceId id) const;
  absl::Status CheckOpen(const v1::OpenSequence& open, CheckedPlan* checked) const;
  absl::Status CheckClose(const v1::CloseSequence& close, CheckedPlan* checked) const;
  absl::Status CheckSequence(const v1::SequenceStep& step, CheckedPlan* checked) const;
  absl::Status CheckLogits(const v1::SequenceStep& step, uint32_t num_tokens) const;

  StageShape shape_;
  StepId next_step_{1};
  uint64_t blocks_ = 0;
  absl::flat_hash_map<SequenceId, Sequence> sequences_;
};

}  // namespace strait
