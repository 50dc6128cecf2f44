// SPDX-License-Identifier: Apache-2.0
//
// How a stage applies the cache operations of plans, and copies of its rows end.
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/wire/epoch_wire.h"
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
    const uint64_t blocks = BlocksTaken(op, *plan);
    if (blocks > 0 && !HasBlocks(residents.cache().blocks_used() + blocks)) return false;
    ApplyCacheOp(op, plan);
  }
  if (wire.step_id() == 1) residents.cache().DropUnheldPrefixes();
  return true;
}

uint64_t Stage::State::BlocksTaken(const v1::CacheOp& op, const WaitingPlan& plan) const {
  const uint32_t num_layers = model->spec().layers.size();
  if (op.has_return_prefix()) return plan.checked.keys[plan.done.keys].size() * num_layers;
  if (!op.has_import()) return 0;
  const SequenceId id{op.import().sequence_id()};
  const uint32_t before = residents.imported(id) ? residents.cache().length(id) : 0;
  return BlocksOfSequence(op.import().rows(), num_layers) - BlocksOfSequence(before, num_layers);
}

void Stage::State::ApplyCacheOp(const v1::CacheOp& op, WaitingPlan* plan) {
  PlanLedger::CheckedPlan& checked = plan->checked;
  LatentCache& cache = residents.cache();
  if (op.has_open()) {
    const v1::OpenSequence& open = op.open();
    SamplingParams& sampling = checked.sampling[plan->done.opened++];
    if (open.imported_rows() > 0) {
      return residents.OpenImport(open, std::move(sampling),
                                  importer.Open(SequenceId{open.sequence_id()}));
    }
    const uint32_t kept =
        open.kept_rows().empty() ? 0 : open.kept_rows(static_cast<int>(stage_index));
    absl::Span<const ContentKey> prefix;
    if (!open.prefix_keys().empty()) prefix = checked.keys[plan->done.keys++];
    return residents.Open(open, std::move(sampling), kept, prefix);
  }
  if (op.has_import()) {
    const v1::ImportSequence& import = op.import();
    const SequenceId id{import.sequence_id()};
    residents.Import(id, import.rows());
    return importer.Take(id, {import.placement().term(), import.placement().counter()},
                         import.rows());
  }
  if (op.has_close()) {
    const SequenceId id{op.close().sequence_id()};
    importer.Close(id);
    exporter.Close(id);
    residents.Close(id);
    return returning.Closed(id);
  }
  for (const ContentKey& key : checked.keys[plan->done.keys++]) {
    if (op.has_keep_prefix()) {
      const SequenceId id{op.keep_prefix().sequence_id()};
      cache.has_prefix(key) ? cache.JoinPrefix(id, key) : cache.KeepPrefix(id, key);
    } else if (op.has_drop_prefix()) {
      DropPrefix(key);
    } else if (op.has_offload_prefix()) {
      tier.Offload(key, cache.PrefixBlocks(key));
    } else if (op.has_return_prefix()) {
      cache.TakePrefix(key);
      unfilled.insert(key);
      tier.Return(key, cache.PrefixBlocks(key));
    } else {
      tier.Forget(key);
    }
  }
}

void Stage::State::DropPrefix(const ContentKey& key) {
  LatentCache& cache = residents.cache();
  if (!cache.has_prefix(key)) return;
  unfilled.erase(key);
  if (tier.Uses(key)) {
    tier.Abandon(key, cache.DropPinned(key));
  } else {
    cache.DropPrefix(key);
  }
}

bool Stage::State::AppliesEarly(const WaitingPlan& plan) const {
  return plan.checked.applies_early || (plan.checked.frees_blocks && residents.cache().in_copies());
}

void Stage::State::Prepare() {
  if (failed || plans.empty() || !AppliesEarly(plans.front())) return;
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
    if (!end.ok || !end.abandoned.empty()) continue;
    ledger.prefixes().Returned(end.key);
    unfilled.erase(end.key);
  }
  cache.KeepFreed(StepId{});
}

std::vector<CopyEnd> Stage::State::PollEnds(uint64_t now_us) {
  std::vector<CopyEnd> ends = model->copies().Poll();
  // What goes, a step that is begun may still use.
  if (!begun.empty()) residents.cache().KeepFreed(begun.back().id());
  importer.OnCopies(ends, now_us);
  exporter.OnCopies(ends);
  residents.cache().KeepFreed(StepId{});
  return ends;
}

void Stage::State::EndCopies() {
  importer.Clear();
  exporter.Clear();
  HostMoves untold;
  OnMoved(tier.Clear([this] { return PollEnds(0); }), &untold);
  while (model->copies().num_under_way() > 0) {
    if (PollEnds(0).empty()) std::this_thread::yield();
  }
}

void Stage::PollCopies(uint64_t now_us, HostMoves* moves, RowMoves* rows) {
  State& s = *state_;
  s.OnMoved(s.tier.Poll(now_us, s.PollEnds(now_us)), moves);
  if (!s.tier.busy()) moves->copied = s.tier.TakeCopied();
  s.Prepare();
  s.KeepLanded();
  RowMoves told{s.importer.Poll(now_us), s.exporter.Poll()};
  if (rows != nullptr) *rows = std::move(told);
  if (s.restoring && (now_us >= s.restore_until_us || s.IsRestored())) s.EndRestores();
}

void Stage::FetchRows(const v1::FetchRows& fetch, uint64_t now_us) {
  State& s = *state_;
  if (!s.CheckEpoch(FromWire(fetch.epoch()), "a fetch").ok()) return;
  if (s.epoch == PipelineEpoch{}) {
    if (absl::Status landed = s.Land(fetch, now_us); !landed.ok()) {
      s.importer.RefuseFetch(fetch, std::move(landed));
    }
    return;
  }
  const PlanLedger::Import* const import = s.ledger.FindImport(SequenceId{fetch.sequence_id()});
  const PlacementEpoch placement = {fetch.placement().term(), fetch.placement().counter()};
  const bool is_known = import != nullptr && import->placement == placement;
  s.importer.Fetch(fetch, is_known ? import->rows : 0, s.traits.vocab_size, now_us);
}

void Stage::AskRows(bool last, uint64_t now_us) { state_->importer.Ask(last, now_us); }

void Stage::ServeRows(const v1::ServeRows& serve) {
  State& s = *state_;
  if (s.CheckEpoch(FromWire(serve.epoch()), "a serve").ok()) s.exporter.Serve(serve);
}

void Stage::EndTransfers() {
  if (state_->restoring) state_->EndRestores();
  state_->importer.EndFetches();
  state_->exporter.Clear();
}

void Stage::OnAsk(PeerAskId id, const RowsAsk& ask) {
  State& s = *state_;
  if (s.failed || ask.epoch != s.epoch) {
    return s.exporter.Refuse(
        id, absl::AbortedError(absl::StrCat("rows of epoch ", ToString(ask.epoch), ", stage ",
                                            s.stage_id, " is in ", ToString(s.epoch),
                                            s.failed ? ", where a step failed" : "")));
  }
  s.exporter.OnAsk(id, ask);
}

}  // namespace strait
