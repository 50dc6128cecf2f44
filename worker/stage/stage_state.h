// SPDX-License-Identifier: Apache-2.0
//
// What a Stage has: private to worker/stage/stage*.cc, which share it out by what happens to it. Plans and
// hidden states come in (stage.cc), epochs are entered and left (stage_epochs.cc), rows are fetched before it is
// active (stage_restores.cc), steps are begun and finished (stage_steps.cc), plans' cache operations are applied
// (stage_ops.cc).
//
// Owns, Borrows, Thread: as Stage.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "worker/cache/host_tier.h"
#include "worker/stage/begun_step.h"
#include "worker/stage/plan_ledger.h"
#include "worker/stage/residents.h"
#include "worker/stage/returning_ids.h"
#include "worker/stage/stage.h"
#include "worker/transfer/exporter.h"
#include "worker/transfer/importer.h"

namespace strait {

// How far a plan's cache operations were applied.
struct OpsDone {
  int ops = 0;
  size_t opened = 0;
  size_t keys = 0;  // of CheckedPlan::keys
};

struct WaitingPlan {
  PlanLedger::CheckedPlan checked;
  OpsDone done;
  uint32_t num_logits = 0;
  uint64_t arrived_us = 0;
  bool has_rows() const { return checked.num_tokens > 0; }
  uint64_t step_id() const { return checked.plan.step_id(); }
  bool ops_are_done() const { return done.ops == checked.plan.cache_ops_size(); }
};

struct WaitingHidden {
  HiddenStep hidden;
  uint64_t arrived_us = 0;
};

// A sequence whose first rows are fetched before the stage is active.
struct RestoredSequence {
  SequenceId id;
  PlacementEpoch placement;
  std::vector<ContentKey> keys;  // of its whole blocks
  std::vector<TokenId> tokens;   // of their rows
  uint32_t num_shared = 0;  // leading blocks that are here, or that a sequence before it fetches
  bool is_fetched = false;  // those behind are an import's
};

// A sequence whose rows come to a stage that is in no epoch yet.
struct LandedSequence {
  PlacementEpoch placement;
  std::vector<ContentKey>
      keys;  // of its leading blocks that are prefix blocks where they come from
};

struct Stage::State {
  State(uint64_t id, std::unique_ptr<StageModel> stage_model, const StageTraits& stage_traits,
        BlockPool* block_pool, HostBudget* host_budget, TransferShare* transfer_share)
      : stage_id(id),
        model(std::move(stage_model)),
        traits(stage_traits),
        pool(block_pool),
        capacity_blocks(model->spec().pool_blocks),
        residents(model->spec().layers.size(), block_pool),
        tier(model->spec().layers.size(), &model->copies(), host_budget),
        own_share(transfer_share == nullptr ? std::make_unique<TransferShare>() : nullptr),
        importer(RowTraitsOf(), &model->copies(), &residents.cache(), Share(transfer_share),
                 [this] {
                   return Importer::Steps{steps_begun, steps_finished};
                 }),
        exporter(
            RowTraitsOf(), &model->copies(), &residents.cache(), Share(transfer_share),
            [this](SequenceId id) { return residents.FinishedRows(id); },
            [this](const ContentKey& key) { return HasPrefixRows(key); }),
        ledger(Shape(), {}) {}

  StageShape Shape() const {
    return {.num_layers = model->spec().layers.size(),
            .pool_blocks = capacity_blocks,
            .vocab_size = traits.vocab_size,
            .max_positions = traits.max_positions,
            .stage_index = stage_index,
            .num_stages = num_stages,
            .grants = grants};
  }
  RowTraits RowTraitsOf() const {
    return {.layers = model->spec().layers, .shape = traits.row_shape, .origin = traits.origin};
  }
  TransferShare* Share(TransferShare* given) const {
    return given == nullptr ? own_share.get() : given;
  }
  bool is_first() const { return model->spec().layers.begin == 0; }
  bool is_last() const { return model->spec().layers.end == traits.num_layers; }
  // Whether sampled ids come back to it, or go back from it, over an edge.
  bool takes_ids() const { return grants && is_first() && !is_last(); }
  bool gives_ids() const { return grants && is_last() && !is_first(); }

  absl::Status CheckEpoch(PipelineEpoch theirs, const char* what) const;
  absl::Status CheckPairing(const WaitingPlan* plan, const HiddenStep* hidden) const;
  // That the rows which it makes prefix blocks are finished.
  absl::Status CheckFinished(const v1::StepPlan& plan) const;
  // That the imports which it opens have been fetched.
  absl::Status CheckFetched(const PlanLedger::CheckedPlan& checked) const;
  uint32_t NumPlansWithRows() const;

  bool MayGoAhead(const WaitingPlan& next) const;

  // Those that are left. False: one that takes blocks waits for copies to end, and so do all behind it.
  bool ApplyCacheOps(WaitingPlan* plan);
  void ApplyCacheOp(const v1::CacheOp& op, WaitingPlan* plan);
  // That the operation, which is the plan's next, takes.
  uint64_t BlocksTaken(const v1::CacheOp& op, const WaitingPlan& plan) const;
  // Whether it fits beside what copies still use.
  bool HasBlocks(uint64_t num_blocks) const;
  // Whether its operations do not wait for its step: what it gives back may be copied, and what it takes must
  // then fit beside that.
  bool AppliesEarly(const WaitingPlan& plan) const;
  // The next plan's operations, if copies wait for them: these need not wait for its step.
  void Prepare();
  void DropPrefix(const ContentKey& key);
  bool HasPrefixRows(const ContentKey& key) const {
    return residents.cache().has_prefix(key) && !unfilled.contains(key);
  }
  // Takes blocks for what is to come of it, at most so many of each layer, and has it fetched. `coming`: keys that
  // sequences before it fetch.
  RestoredSequence BeginRestore(const v1::FetchRows& fetch, uint32_t most_blocks,
                                std::set<ContentKey>* coming, uint64_t now_us);
  bool IsRestored() const;
  // What is here of them is left.
  void EndRestores();
  // Rows for a stage that is in no epoch yet (stage_landing.cc): takes blocks, and has them fetched.
  absl::Status Land(const v1::FetchRows& fetch, uint64_t now_us);
  // Blocks whose rows came become prefix blocks, as they are where they come from.
  void KeepLanded();
  // Nothing lands any more; the tokens of the rows that are here. Then, when no copy is under way, these are left.
  std::vector<std::pair<SequenceId, std::vector<TokenId>>> TakeLanded();
  void LeaveLanded(std::vector<std::pair<SequenceId, std::vector<TokenId>>> here);
  void OnMoved(std::vector<HostTier::End> ends, HostMoves* moves);
  // Copies that have ended, of whoever's: the importer's and the exporter's are seen to.
  std::vector<CopyEnd> PollEnds(uint64_t now_us);
  // Nothing moves any more; returns when all copies have ended.
  void EndCopies();
  // Rows that are new here: their tokens and blocks.
  void StoreRows(const v1::SequenceStep& step, Resident& resident, BatchSequence* sequence,
                 BegunStep* begun);
  // The rows of a sequence, and what of the model's batch they are.
  BatchSequence AppendRows(const v1::SequenceStep& step, BegunStep* begun);
  absl::Status Begin(WaitingPlan plan, const HiddenMemory& memory, BegunStep* step);
  void Fail();
  // What is begun goes; returns when the model has let go of it.
  void DropBegun();
  // What is under way goes, too; sequences are left with their finished rows.
  void LeaveEpoch();
  // Plans are reckoned from what is left here. REQUIRES: no plan came in this epoch.
  void ResetLedger();

  // Constant after construction.
  const uint64_t stage_id;
  const std::unique_ptr<StageModel> model;
  const StageTraits traits;
  BlockPool* const pool;

  uint32_t capacity_blocks;
  bool is_followed = false;  // a successor took what it had

  // Of the epoch.
  PipelineEpoch epoch;
  bool failed = false;
  bool grants = false;
  uint32_t stage_index = 0;
  uint32_t num_stages = 1;
  uint32_t host_blocks = 0;
  Residents residents;
  HostTier tier;
  const std::unique_ptr<TransferShare> own_share;  // where no other was given
  Importer importer;
  Exporter exporter;
  std::set<ContentKey> unfilled;  // prefix blocks whose rows are on their way back from host memory
  bool restoring = false;
  uint64_t restore_until_us = 0;
  std::vector<RestoredSequence> restores;
  std::map<SequenceId, LandedSequence> landed;  // before its first epoch
  PlanLedger ledger;                            // ahead of `residents` by the plans that wait
  std::deque<WaitingPlan> plans;
  std::deque<WaitingHidden> hiddens;  // in step order; the i-th belongs to the i-th plan with rows
  ReturningIds returning;             // to the first of several stages
  std::deque<BegunStep> begun;        // oldest first
  uint64_t steps_begun = 0;           // ever; not that which is being begun
  uint64_t steps_finished = 0;        // of these
  uint64_t last_end_us = 0;           // of a step
};

}  // namespace strait
