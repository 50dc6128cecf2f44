// SPDX-License-Identifier: Apache-2.0
//
// BegunStep is a step from its Begin to its report: what the model still uses of it, and what is
// said of it when it is done.
//
// Owns:    hidden states on both sides; its sequences' residents, also when a step begun behind it
//          has closed them.
// Thread:  loop thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"
#include "worker/hidden_buffer.h"
#include "worker/stage/residents.h"

namespace strait {

struct BegunStep {
  // A granted row whose id was not known when the step began.
  struct LateId {
    size_t sequence_index;  // in the plan
    int granted_index;      // in the report
  };

  v1::StepPlan plan;
  uint32_t num_tokens = 0;
  uint32_t num_tokens_on = 0;  // the leading ones, which go on to the next stage
  uint32_t num_logits = 0;
  // Of the plan's leading sequences: those that go through this stage.
  std::vector<std::shared_ptr<Resident>> residents;
  std::vector<LateId> late_ids;
  HiddenBuffer hidden_in;
  HiddenBuffer hidden_out;
  absl::Status status;       // of its Begin
  bool is_on_model = false;  // the model has it to finish
  v1::StageReport report;    // but for results, late ids and the time it took
  uint64_t begin_us = 0;

  StepId id() const { return StepId{plan.step_id()}; }
};

bool WantsSample(const v1::SequenceStep& step);
// Of which sequences, and, once results are filled in, what they are; in plan order.
std::vector<SequenceId> SampledSequences(const v1::StepPlan& plan);
std::vector<TokenId> SampledTokens(const BegunStep& step);
std::string BoundedMessage(const absl::Status& status);

// What the model answered, into the step's report and residents. REQUIRES: a result for each
// request.
void FillResults(absl::Span<const LogitsResult> results, uint32_t vocab_size, BegunStep* step);
// The step is done: what it stored outlives the epoch.
void MarkFinished(const BegunStep& step);
// The step before it is done, so its late ids are known: into its report and residents.
void FillLateIds(BegunStep* step);

}  // namespace strait
