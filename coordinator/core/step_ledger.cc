// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/step_ledger.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"

namespace strait {
void StepLedger::Start(uint32_t num_stages) {
  Stop();
  reported_.assign(num_stages, 0);
}

void StepLedger::Stop() {
  reported_.clear();
  records_.clear();
  last_step_ = 0;
  decode_steps_ = with_rows_ = 0;
}

void StepLedger::Add(StepRecord record, uint64_t now_us) {
  STRAIT_CHECK(record.id == next_step());
  last_step_ = record.id.value;
  if (records_.empty()) last_progress_us_ = now_us;
  decode_steps_ += record.decodes;
  with_rows_ += record.num_rows > 0;
  records_.push_back(std::move(record));
}

absl::StatusOr<const StepRecord*> StepLedger::CheckReport(uint32_t stage_index,
                                                          const v1::StageReport& report) const {
  const uint64_t due = reported_[stage_index] + 1;
  if (report.step_id() != due || due > last_step_) {
    return absl::FailedPreconditionError(
        absl::StrCat("reports step ", report.step_id(), ", due is ",
                     due > last_step_ ? "none" : absl::StrCat("step ", due)));
  }
  const StepRecord& record = records_[due - records_.front().id.value];
  const StageStep& stage = record.stages[stage_index];
  if (report.cache_bytes() != stage.cache_bytes) {
    return absl::FailedPreconditionError(absl::StrCat("reports ", report.cache_bytes(),
                                                      " bytes of latent blocks after step ", due,
                                                      ", the plans make ", stage.cache_bytes));
  }
  if (report.tables_digest() != stage.tables_digest) {
    return absl::FailedPreconditionError(
        absl::StrCat("reports other sequences or lengths than planned after step ", due));
  }
  if (report.rows_computed() != stage.rows_computed || report.rows_stored() != stage.rows_stored) {
    return absl::FailedPreconditionError(
        absl::StrCat("reports ", report.rows_computed(), " rows computed and ",
                     report.rows_stored(), " stored in step ", due, ", the plan has ",
                     stage.rows_computed, " and ", stage.rows_stored));
  }
  return &record;
}

void StepLedger::Reported(uint32_t stage_index, uint64_t now_us) {
  const uint64_t step = ++reported_[stage_index];
  STRAIT_CHECK(step <= last_step_);
  last_progress_us_ = now_us;
  if (stage_index + 1 == reported_.size()) {
    decode_steps_ -= records_[step - records_.front().id.value].decodes;
  }
  const uint64_t by_all = *std::min_element(reported_.begin(), reported_.end());
  while (!records_.empty() && records_.front().id.value <= by_all) {
    with_rows_ -= records_.front().num_rows > 0;
    records_.pop_front();
  }
}

void StepLedger::FedByFirst(StepId step, std::vector<TokenId> ids) {
  records_[step.value - records_.front().id.value].granted_ids_first = std::move(ids);
}

void StepLedger::Sampled(StepId step, const absl::flat_hash_map<SequenceId, TokenId>& tokens) {
  for (StepRecord& record : records_) {
    if (record.id <= step) continue;
    for (GrantedRow& row : record.granted) {
      if (row.sampled_by != step) continue;
      const auto it = tokens.find(row.sequence);
      if (it != tokens.end()) row.id = it->second;
    }
  }
}

uint32_t StepLedger::SlowestStage() const {
  STRAIT_CHECK(!records_.empty());
  return static_cast<uint32_t>(std::min_element(reported_.begin(), reported_.end()) -
                               reported_.begin());
}

}  // namespace strait
