// SPDX-License-Identifier: Apache-2.0
//
// PlanLedger validates StepPlans against the state that all accepted plans before them leave
// behind: which sequences are resident, how long they are, how many blocks they hold.
//
// Owns:    that projected state; it runs ahead of the stage's real state by the plans that wait.
// Thread:  loop thread only.
// Errors:  Check names step, sequence and number: InvalidArgument (malformed), FailedPrecondition
//          (gap in steps, sequence unknown or resident twice, positions that do not follow, a
//          grant that this stage cannot follow, rows or prefix blocks that it does not have, an
//          import that is resident or of another placement),
//          ResourceExhausted (a limit, blocks). It changes nothing.
// Limits:  proto/base/limits.h: kMaxStepTokens, kMaxStepSequences, kMaxCacheOps, kMaxTopLogprobs,
//          kMaxSequencesResident, kMaxPositionEmbeddings (tokens of prefix blocks); the pool.
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
#include "worker/stage/prefix_ledger.h"

namespace strait {

// What of a stage bounds its plans.
struct StageShape {
  uint32_t num_layers = 0;
  uint32_t pool_blocks = 0;  // that it may hold
  uint32_t vocab_size = 0;
  uint32_t max_positions = 0;
  uint32_t stage_index = 0;
  uint32_t num_stages = 1;
  bool grants = false;  // what a step samples is known where it is fed again
};

class PlanLedger {
 public:
  // What an earlier epoch left of a sequence.
  struct Left {
    uint32_t rows = 0;
    uint32_t prefix_blocks = 0;  // of these
  };
  using LeftMap = absl::flat_hash_map<SequenceId, Left>;
  // The first plan names each of `left`; `prefixes` has the keys of their prefix blocks.
  PlanLedger(const StageShape& shape, LeftMap left, PrefixLedger prefixes = {});

  struct Sequence {
    uint32_t length = 0;
    StepId last_step;                  // that had rows of it
    std::optional<StepId> sampled_by;  // the step that samples its token at position `length`
  };

  // A sequence that another pipeline still has, and for whose rows there are blocks.
  struct Import {
    PlacementEpoch placement;
    uint32_t rows = 0;
  };
  // An import that a plan opens with these rows: they must have been fetched.
  struct OpenedImport {
    SequenceId id;
    PlacementEpoch placement;
    uint32_t rows = 0;
  };

  // A plan that passed, and what it changes.
  struct CheckedPlan {
    v1::StepPlan plan;
    uint32_t num_tokens = 0;     // that go through this stage
    uint32_t num_tokens_on = 0;  // of these, the leading ones that go through the next one too
    uint32_t num_stored = 0;     // of these, those that are new to the cache
    size_t num_sequences = 0;    // the plan's leading ones, whose rows go through this stage
    std::vector<SamplingParams> sampling;  // of its OpenSequence ops, in order
    // Of its operations, in order, those that have keys.
    std::vector<std::vector<ContentKey>> keys;
    PrefixLedger::Change prefixes;
    uint64_t num_prefix_tokens = 0;
    // It has operations that copies wait for: they are applied before its step begins.
    bool applies_early = false;
    // It gives blocks back. So it does, too, while a copy may use them.
    bool frees_blocks = false;
    // Absent value: closed.
    absl::flat_hash_map<SequenceId, std::optional<Sequence>> changes;
    // Absent value: opened or closed.
    absl::flat_hash_map<SequenceId, std::optional<Import>> import_changes;
    std::vector<OpenedImport> opened_imports;
    size_t num_left_named = 0;  // of those that an earlier epoch left
    uint64_t blocks_after = 0;
    uint32_t sequences_after = 0;  // resident or imported
    uint64_t num_planned = 0;      // rows of all its sequences
    uint32_t least_stages = 0;     // of its sequences so far
  };

  // REQUIRES: the caller checked stage_id and epoch.
  absl::StatusOr<CheckedPlan> Check(v1::StepPlan plan) const;
  // REQUIRES: `checked` is of the last Check, and nothing was committed since.
  void Commit(const CheckedPlan& checked);

  // Of all plans committed; before the first one of an epoch, of what the earlier one left.
  uint64_t blocks() const { return blocks_; }
  PrefixLedger& prefixes() { return prefixes_; }
  // Null: there is no such import.
  const Import* FindImport(SequenceId id) const;
  void SetPoolBlocks(uint32_t pool_blocks) { shape_.pool_blocks = pool_blocks; }

  StepId next_step() const { return next_step_; }

 private:
  const Sequence* Find(const CheckedPlan& checked, SequenceId id) const;
  // Rows that an earlier epoch left of it, if the plan is the epoch's first and has not named it.
  std::optional<Left> FindLeft(const CheckedPlan& checked, SequenceId id) const;
  const Import* FindImport(const CheckedPlan& checked, SequenceId id) const;
  absl::StatusOr<uint32_t> CheckKept(const v1::OpenSequence& open, const Left& left) const;
  // How many rows it begins with.
  absl::StatusOr<uint32_t> CheckPrefix(const v1::OpenSequence& open, CheckedPlan* checked) const;
  absl::Status CheckKeep(const v1::KeepPrefix& keep, CheckedPlan* checked) const;
  absl::Status CheckDrop(const v1::DropPrefix& drop, CheckedPlan* checked) const;
  absl::Status CheckMove(const v1::CacheOp& op, CheckedPlan* checked) const;
  absl::Status CheckImport(const v1::ImportSequence& import, CheckedPlan* checked) const;
  // What the plan has so far fits: an operation takes blocks at once, before what follows in the plan
  // gives any back.
  absl::Status CheckRoom(const char* what, const CheckedPlan& checked) const;
  // How many rows it begins with that were imported.
  absl::StatusOr<uint32_t> CheckImported(const v1::OpenSequence& open, CheckedPlan* checked) const;
  absl::Status CheckOp(const v1::CacheOp& op, CheckedPlan* checked) const;
  // Latent blocks of `length` rows behind so many prefix blocks.
  uint64_t OwnBlocks(uint32_t length, size_t prefix_blocks) const;
  absl::Status CheckOpen(const v1::OpenSequence& open, CheckedPlan* checked) const;
  absl::Status CheckClose(const v1::CloseSequence& close, CheckedPlan* checked) const;
  absl::Status CheckSequence(const v1::SequenceStep& step, CheckedPlan* checked) const;
  // Of how many tokens the step is, and that they are some.
  absl::StatusOr<uint32_t> CheckTokens(const v1::SequenceStep& step, const Sequence& before,
                                       const CheckedPlan& checked) const;
  // Through how many stages its rows go: no more than those of the sequence before it.
  absl::StatusOr<uint32_t> CheckStages(const v1::SequenceStep& step,
                                       const CheckedPlan& checked) const;
  absl::Status CheckLogits(const v1::SequenceStep& step, uint32_t num_tokens,
                           uint32_t stages) const;

  StageShape shape_;
  StepId next_step_{1};
  uint64_t blocks_ = 0;
  absl::flat_hash_map<SequenceId, Sequence> sequences_;
  absl::flat_hash_map<SequenceId, Import> imports_;
  LeftMap left_;  // empty after the first plan
  PrefixLedger prefixes_;
};

}  // namespace strait
