// SPDX-License-Identifier: Apache-2.0
//
// How a stage applies the cache operations of plans, and copies of its prefix blocks end.
#include <utility>
#include <vector>

#include "proto/base/check.h"
#include "worker/stage/stage_state.h"

namespace strait {

bool Stage::State::HasBlocks(uint64_t num_blocks) const {
  // Without copies it does: the plan was checked. (The capacity may have become less since.)
  const uint32_t pinned = residents.cache().num_pinned();
  return pinned == 0 || num_blocks + pinned <= capacity_blocks;
}

bool Stage::State::ApplyCacheOps(WaitingPlan* plan) {
  const v1::StepPlan& wire = plan->checked.plan;
  for (; !plan->ops_are_done(); ++plan->done.ops) {
    const v1::CacheOp& op = wire.cache_ops(plan->done.ops);
    if (op.has_return_prefix()) {
      const uint64_t blocks =
          plan->checked.keys[plan->done.keys].size() * model->spec().layers.size();
      if (!HasBlocks(residents.cache().blocks_used() + blocks)) return false;
    }
    ApplyCacheOp(op, plan);
  }
  if (wire.step_id() == 1) residents.cache().DropUnheldPrefixes();
  return true;
}

void Stage::State::ApplyCacheOp(const v1::CacheOp& op, WaitingPlan* plan) {
  PlanLedger::CheckedPlan& checked = plan->checked;
  LatentCache& cache = residents.cache();
  if (op.has_open()) {
    const v1::OpenSequence& open = op.open();
    const uint32_t kept =
        open.kept_rows().empty() ? 0 : open.kept_rows(static_cast<int>(stage_index));
    absl::Span<const ContentKey> prefix;
    if (!open.prefix_keys().empty()) prefix = checked.keys[plan->done.keys++];
    return residents.Open(open, std::move(checked.sampling[plan->done.opened++]), kept, prefix);
  }
  if (op.has_close()) {
    const SequenceId id{op.close().sequence_id()};
    residents.Close(id);
    return returning.Closed(id);
  }
  for (const ContentKey& key : checked.keys[plan->done.keys++]) {
    if (op.has_keep_prefix()) {
      cache.KeepPrefix(SequenceId{op.keep_prefix().sequence_id()}, key);
    } else if (op.has_drop_prefix()) {
      DropPrefix(key);
    } else if (op.has_offload_prefix()) {
      tier.Offload(key, cache.PrefixBlocks(key));
    } else if (op.has_return_prefix()) {
      cache.TakePrefix(key);
      tier.Return(key, cache.PrefixBlocks(key));
    } else {
      tier.Forget(key);
    }
  }
}

void Stage::State::DropPrefix(const ContentKey& key) {
  LatentCache& cache = residents.cache();
  if (!cache.has_prefix(key)) return;
  if (tier.Uses(key)) {
    tier.Abandon(key, cache.DropPinned(key));
  } else {
    cache.DropPrefix(key);
  }
}

void Stage::State::Prepare() {
  if (failed || plans.empty() || !plans.front().checked.moves_prefixes) return;
  // As when a step begins: what goes, a step that is begun may still use.
  if (!begun.empty()) residents.cache().KeepFreed(begun.back().id());
  (void)ApplyCacheOps(&plans.front());
  residents.cache().KeepFreed(StepId{});
}

void Stage::State::OnMoved(std::vector<HostTier::End> ends, HostMoves* moves) {
  LatentCache& cache = residents.cache();
  if (!begun.empty()) cache.KeepFreed(begun.back().id());
  for (const HostTier::End& end : ends) {
    cache.Unpin(end.abandoned);
    if (!end.is_return) continue;
    (end.ok ? moves->returned : moves->lost).push_back(end.key);
    if (end.ok && end.abandoned.empty()) ledger.prefixes().Returned(end.key);
  }
  cache.KeepFreed(StepId{});
}

void Stage::PollCopies(uint64_t now_us, HostMoves* moves) {
  State& s = *state_;
  s.OnMoved(s.tier.Poll(now_us), moves);
  if (!s.tier.busy()) moves->copied = s.tier.TakeCopied();
  s.Prepare();
}

}  // namespace strait
