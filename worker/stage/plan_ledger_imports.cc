// SPDX-License-Identifier: Apache-2.0
//
// How PlanLedger reckons with sequences that come from another pipeline.
#include "absl/strings/str_cat.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "worker/stage/plan_ledger.h"

namespace strait {

const PlanLedger::Import* PlanLedger::FindImport(SequenceId id) const {
  const auto it = imports_.find(id);
  return it == imports_.end() ? nullptr : &it->second;
}

const PlanLedger::Import* PlanLedger::FindImport(const CheckedPlan& checked, SequenceId id) const {
  const auto change = checked.import_changes.find(id);
  if (change == checked.import_changes.end()) return FindImport(id);
  return change->second ? &*change->second : nullptr;
}

absl::Status PlanLedger::CheckRoom(const char* what, const CheckedPlan& checked) const {
  const uint64_t blocks = checked.blocks_after +
                          static_cast<uint64_t>(checked.prefixes.num_prefixes) * shape_.num_layers;
  if (blocks <= shape_.pool_blocks) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      what, ": with them ", blocks, " latent blocks are held, the stage has ", shape_.pool_blocks));
}

absl::Status PlanLedger::CheckImport(const v1::ImportSequence& import, CheckedPlan* checked) const {
  const SequenceId id{import.sequence_id()};
  if (Find(*checked, id) != nullptr) return absl::FailedPreconditionError("it is resident");
  if (FindLeft(*checked, id)) {
    return absl::FailedPreconditionError("it is left from an earlier epoch; close it first");
  }
  if (import.rows() == 0 || import.rows() > shape_.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows is ", import.rows(), ", it must be 1 to ", shape_.max_positions));
  }
  const PlacementEpoch placement = {import.placement().term(), import.placement().counter()};
  const Import* const before = FindImport(*checked, id);
  if (before == nullptr) {
    if (checked->sequences_after >= limits::kMaxSequencesResident) {
      return absl::ResourceExhaustedError(
          absl::StrCat(checked->sequences_after, " sequences are resident or imported, at most ",
                       limits::kMaxSequencesResident));
    }
    ++checked->sequences_after;
  } else {
    if (before->placement != placement) {
      return absl::FailedPreconditionError(
          absl::StrCat("of placement ", ToString(placement), ", it is imported for ",
                       ToString(before->placement), "; close that first"));
    }
    if (import.rows() <= before->rows) {
      return absl::InvalidArgumentError(absl::StrCat(
          "rows is ", import.rows(), ", it has blocks for ", before->rows, " already"));
    }
    checked->blocks_after -= OwnBlocks(before->rows, 0);
  }
  checked->blocks_after += OwnBlocks(import.rows(), 0);
  checked->import_changes[id] = Import{placement, import.rows()};
  checked->applies_early = true;
  return CheckRoom("blocks of all rows", *checked);
}

absl::StatusOr<uint32_t> PlanLedger::CheckImported(const v1::OpenSequence& open,
                                                   CheckedPlan* checked) const {
  const SequenceId id{open.sequence_id()};
  const Import* const import = FindImport(*checked, id);
  const uint32_t rows = open.imported_rows();
  if (import == nullptr) {
    if (rows == 0) return 0;
    return absl::FailedPreconditionError(
        absl::StrCat("it begins with ", rows, " imported rows, and is not imported"));
  }
  if (rows == 0 || rows > import->rows) {
    return absl::FailedPreconditionError(absl::StrCat(
        "it is imported with blocks for ", import->rows, " rows, imported_rows is ", rows));
  }
  if (!open.kept_rows().empty() || !open.prefix_keys().empty() ||
      open.prefix_tokens().ids_size() > 0) {
    return absl::InvalidArgumentError(
        "imported rows are all that it begins with, no kept rows and no prefix blocks");
  }
  checked->opened_imports.push_back({id, import->placement, rows});
  checked->frees_blocks = true;
  checked->blocks_after -= OwnBlocks(import->rows, 0);
  --checked->sequences_after;
  checked->import_changes[id] = std::nullopt;
  return rows;
}

}  // namespace strait
