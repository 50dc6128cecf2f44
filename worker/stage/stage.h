// SPDX-License-Identifier: Apache-2.0
//
// Stage is a worker's step logic without I/O: StepPlans and hidden states in, hidden states and
// StageReports out. The same code runs in the worker process and in the simulator.
//
// Owns:    its StageModel, the latent blocks' bookkeeping, the resident sequences (token ids, page
//          tables).
// Thread:  loop thread only.
// Errors:  AcceptPlan and AcceptHidden refuse what contradicts the stage's state and leave it
//          unchanged: Aborted (older epoch; harmless), InvalidArgument (malformed),
//          FailedPrecondition (gap in steps, sequence unknown, positions that do not follow),
//          ResourceExhausted (a limit). What a refused plan means is the caller's: the worker
//          reports it and the coordinator bumps the epoch.
// Limits:  proto/limits.h: kMaxStepsInFlight plans and hidden steps waiting.
// Why:     plans are validated against the state that all plans before them leave behind, so a
//          plan is accepted or refused on arrival, before its hidden states exist.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "proto/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"

namespace strait {

// Hidden states of one whole step, as they arrive from or leave for another stage.
struct HiddenStep {
  PipelineEpoch epoch;
  StepId step;
  uint32_t num_tokens = 0;
  HiddenBuffer data;  // [num_tokens, hidden_row_bytes]
};

struct StepOutput {
  v1::StageReport report;
  std::optional<HiddenStep> hidden;  // for the next stage; absent on the last, on failure, and for
                                     // a step without rows
};

class Stage {
 public:
  Stage(uint64_t stage_id, std::unique_ptr<StageModel> model, uint32_t num_layers_total,
        uint32_t hidden_row_bytes, uint32_t vocab_size, uint32_t max_positions);
  ~Stage();

  // Enters an epoch: drops all sequences, plans and hidden states. Aborted if `epoch` is not newer.
  absl::Status Activate(PipelineEpoch epoch, uint32_t stage_index, uint32_t num_stages);

  // `num_rows`, if given, becomes the rows of an accepted plan.
  absl::Status AcceptPlan(v1::StepPlan plan, uint64_t now_us, uint32_t* num_rows = nullptr);
  absl::Status AcceptHidden(HiddenStep hidden, uint64_t now_us);

  // Whether RunNext has something to do: the next plan is here and, unless this is the first stage
  // or the plan has no rows, its hidden states are.
  bool Ready() const;

  // Runs the next step. REQUIRES: Ready(). `clock` gives microseconds, read before and after
  // computing. If the step fails, its report carries the error, plans that wait are dropped without
  // a report, and the stage refuses everything of this epoch with Aborted. `memory`: of hidden
  // states that leave; empty: host memory.
  StepOutput RunNext(const std::function<uint64_t()>& clock, const HiddenMemory& memory = {});

  // --- What others may ask ---
  uint64_t stage_id() const;
  const StageModel& model() const;
  PipelineEpoch epoch() const;
  bool is_first() const;
  bool is_last() const;
  uint32_t blocks_used() const;
  // Every block is free or in exactly one table, tables match lengths. For tests and idle moments.
  absl::Status CheckIntegrity() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace strait
