// SPDX-License-Identifier: Apache-2.0
//
// Scheduler forms the steps of one pipeline: continuous batching, chunked prefill, decode
// micro-batches, replays. It accounts for every byte of every stage and checks what stages report
// against it.
//
// Owns:    the residents' bookkeeping and the steps in flight.
// Borrows: sequences (of the Journal), and changes their residencies here.
// Thread:  loop thread only.
// Errors:  OnReport says how a stage contradicted the plans (the caller evicts its worker);
//          nothing is applied then.
// Limits:  CoreOptions: max_step_tokens, prefill_chunk, max_running, grant_depth, steps_in_flight.
//
// Survivors. What stages kept over a change of epoch is placed again before anybody else; the first
// plan names all of it, to be kept or closed. Rows are then planned from the first that some stage
// lacks (coordinator/core/replay.h). Between the begin of an epoch and a stage's report of the first
// plan nobody knows whether it still has what it told: if the epoch fails then, it may have either.
//
// Grants. Up to grant_depth sampling steps of a sequence are in flight. Each follows the one before
// it: its row is the token that one samples, as a literal if it came back already, else granted:
// sampled(step k). None goes beyond max_tokens. Tokens are accepted in the order of steps, which is
// that of positions; when a sequence ends, what is still in flight for it is surplus and dropped
// with its rows by CloseSequence (ended), at once if a granted row might wait for an id.
//   - A granted row holds up its step, and all behind it, until step k has left the pipeline. So it
//     is planned when num_stages steps lie between, which in a full pipeline is when the id comes
//     just in time; or when nothing else is to do. A prompt's first step then waits for at most
//     grant_depth - 1 trips through the pipeline more than without grants.
//   - Preempted with tokens under way, a sequence gets them all, then it is placed anew.
//
// Prefix blocks (prefixes.cc; CoreOptions::prefix_cache). A block whose rows all stages have computed, and
// whose tokens the journal has, becomes a prefix block. A sequence begins with as many as its tokens have,
// never with the row that it needs next. Those that none has go when there is no room else, the one used
// longest ago first. With the epoch go all that no survivor has. A sequence whose next blocks another one
// computes is not placed before they are there.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "coordinator/core/cache_books.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/prefix_index.h"
#include "coordinator/core/replicas.h"
#include "coordinator/core/step_ledger.h"
#include "coordinator/core/survivors.h"

namespace strait {

// How a stage spends its time: exponential averages over its recent steps with rows, of this epoch.
struct StageTimes {
  uint64_t steps = 0;
  double compute_us = 0;
  double rows = 0;
  double wait_us = 0;  // from a plan's arrival to that of its hidden states: the pipeline's bubble

  void Add(const v1::StageReport& report);
};

// What the rows of a pipeline follow from besides tokens: as ContentOrigin has it.
struct RowSource {
  uint64_t weights = 0;
  std::string numerics;
};

class Scheduler {
 public:
  Scheduler(Context* context, Journal* journal) : context_(context), journal_(journal) {}
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // The stages have `survivors`; who of them can stay is placed at once.
  // REQUIRES: stopped.
  void Start(std::vector<StageCache> stages, Survivors survivors, RowSource source = {});
  void set_pipeline(PipelineId id) { pipeline_ = id; }
  // Forgets steps and bytes; residents wait again. Returns what each stage may have now.
  std::vector<Holdings> Stop();
  // Who is in the oldest step that this stage has not reported, if the stage before it has. REQUIRES: started.
  std::vector<SequenceId> InHand(uint32_t stage_index) const;
  bool started() const { return num_stages_ > 0; }

  // ---- Routing ----
  bool CanEverHold(const Sequence& sequence) const;
  // Rows of it that are in prefix blocks; that will be: others compute them now, or have them on their way.
  struct Prospect {
    uint32_t cached_rows = 0;
    uint32_t cached_unheld = 0;  // blocks of these that no sequence has
    uint32_t host_rows = 0;      // behind these: in blocks that are in host memory
    uint32_t promised_rows = 0;
    ContentKey promised;  // the last block of these
  };
  // REQUIRES: started.
  Prospect Look(Sequence* sequence);
  // `prospect` is of Look, just now.
  bool HasRoom(Sequence* sequence, const Prospect& prospect);
  // A sequence waits for promised rows. False: nobody promises this block any more.
  bool Await(const ContentKey& promised);
  // The longest sequence that has room. REQUIRES: started.
  uint64_t free_rows() const { return books_.free_rows(index_.num_unheld()); }
  // Rows that its residents still want, and one for each resident.
  uint64_t load() const { return unplanned_rows_ + residents_.size(); }
  // REQUIRES: HasRoom(sequence); it waits, and no result of it is pending.
  void Place(Sequence* sequence);
  // It leaves: its blocks go with the next step, and what is under way for it is in vain.
  void Drop(Residency* residency);
  // The sequence ended: the same wherever it lives.
  static void DropEverywhere(Sequence* sequence);

  // ---- Steps ----
  // The next step, if one is worth it now; the caller adds stage and epoch, and sends it to all
  // stages.
  std::optional<v1::StepPlan> Form(uint64_t now_us);
  // What the stage did in that step.
  absl::StatusOr<StageStep> OnReport(uint32_t stage_index, const v1::StageReport& report,
                                     uint64_t now_us);

  // Of a pipeline that never served: what its rows will follow from, so that it may begin with copies of others'.
  void Foresee(RowSource source) {
    if (source_.numerics.empty()) source_ = std::move(source);
  }

  // ---- Copies on other workers (replicating.cc) ----
  struct NewPrefix {
    ContentKey key;
    StepId step;  // that makes it one
  };
  // Prefix blocks since the last call.
  std::vector<NewPrefix> TakeNewPrefixes() { return std::exchange(new_prefixes_, {}); }
  std::vector<NewPrefix> AllPrefixes() const;  // each after what leads to it
  StepId last_step() const { return StepId{ledger_.next_step().value - 1}; }
  bool HasPrefix(const ContentKey& key, uint32_t stage_index) const;
  // It is in host memory, and may come back from there.
  bool IsOnHost(const ContentKey& key) const;
  // REQUIRES: some stage has it.
  Replicas::Place PlaceOfPrefix(const ContentKey& key) const;
  // A resident has it.
  bool HoldsPrefix(const ContentKey& key) const;
  // By what its blocks were known in the last epoch; absent: by nothing that can be told.
  std::optional<ContentKey> KeyIfKnown(Sequence* sequence, uint32_t block) const;

  // What a stage says of copies to and from host memory.
  absl::Status OnMoved(uint32_t stage_index, const v1::PrefixesMoved& moved);
  // Prefix blocks that no sequence has go. REQUIRES: started.
  void Flush();

  // ---- Moves from one pipeline to another (moves.cc) ----
  // Takes room for a sequence whose home is elsewhere: blocks of so many rows with the next plan. ResourceExhausted,
  // with the numbers: there is none without another sequence giving way. REQUIRES: started; CanEverHold; no residency
  // of it is here.
  absl::StatusOr<Residency*> Import(Sequence* sequence, uint32_t rows);
  // Whether there may be an import now: what stages told at the epoch's begin is named.
  bool MayImport() const { return started() && unnamed_.empty(); }
  bool HasRoomFor(uint32_t rows) const;
  // It has blocks for so many rows with the next plan. False: there is no room.
  bool GrowImport(Residency* residency, uint32_t rows);
  // All stages have reported the plan with its blocks.
  bool IsImported(const Residency& residency) const;
  // All stages have reported the plan that opened it.
  bool IsOpen(const Residency& residency) const;
  // Rows that all stages have reported. REQUIRES: its rows are even.
  uint32_t RowsReported(const Residency& residency) const;
  // Nothing of it is under way: all stages have reported all its rows.
  bool IsSettled(const Residency& residency) const;
  // No more rows of it are planned, and nobody's growth costs it its blocks; again. REQUIRES of Freeze: its
  // rows are even.
  void Freeze(Residency* residency);
  void Thaw(Residency* residency);
  // The sequence's home is elsewhere from now on; here its rows stay. REQUIRES: frozen, IsSettled.
  void HandOver(Residency* residency);
  // What came in is home from now on, with so many rows; the next plan opens it. REQUIRES: kIncoming, with
  // blocks for them.
  void Adopt(Residency* residency, uint32_t rows);
  // All stages have reported the step that opened it.
  bool IsAdopted(const Residency& residency) const;

  // ---- Cache sizes ----
  // The most rows that a resident may grow to. Each stage must hold that.
  uint32_t resident_rows_max() const;
  // Whether caches may become smaller now: what stages told is named, and a plan may be sent.
  bool MayShrink() const;
  // The stages have so much from the next plan on. What does not fit any more is closed, the youngest
  // first, by the plan that this returns; it goes to all stages before they are told to shrink.
  // REQUIRES: resident_rows_max() fits; MayShrink() if any gets smaller.
  std::optional<v1::StepPlan> Resize(const std::vector<uint64_t>& capacity_bytes, uint64_t now_us);

  // No step is formed while it is held; those under way go on. The begin of an epoch ends it.
  void Hold(bool held) { held_ = held; }
  bool held() const { return held_; }

  const StepLedger& ledger() const { return ledger_; }
  // Whether every link of the pipeline has carried something in this epoch, that from the last
  // stage to the first included, where there is one.
  bool links_proven() const { return links_proven_; }
  // REQUIRES: started.
  const StageTimes& times(uint32_t stage_index) const { return times_[stage_index]; }
  // Whose home is here.
  uint32_t num_residents() const { return static_cast<uint32_t>(residents_.size()) - num_away_; }
  uint32_t num_prefilling() const { return static_cast<uint32_t>(prefilling_.size()); }
  // By stage, after all steps planned so far; empty: stopped.
  const std::vector<StageCache>& stages() const { return books_.stages(); }
  // The same by layer of one stage. REQUIRES: started.
  std::vector<uint64_t> HeldByLayer(uint32_t stage_index) const;
  // Rows of its residents, kept ones included, summed over stages and their layers.
  // `known`: of those alone that stages know; others begin with rows of others.
  uint64_t HeldRows(bool known = false) const;
  // Prefix blocks; those of them that no sequence has.
  size_t num_prefix_blocks() const { return index_.num_nodes(); }
  size_t num_unheld_prefix_blocks() const { return index_.num_unheld(); }
  // Of so many, on all stages.
  uint64_t prefix_bytes(uint64_t num_blocks) const;
  size_t num_prefix_blocks_on_host() const { return index_.num_on_host(); }
  uint64_t host_blocks() const { return host_blocks_; }
  // What a block's way out of or into host memory takes, by what was measured; what its rows take to compute.
  double copy_block_us() const;
  double compute_block_us() const;
  // It was preempted here, and some of its blocks are still there.
  bool IsParked(const Sequence& sequence) const;
  const std::map<SequenceId, Residency*>& residents() const { return residents_; }
  absl::Status CheckIntegrity() const;

 private:
  struct Draft {
    v1::StepPlan plan;
    StepRecord record;
    uint32_t rows_through_all = 0;  // the others are in the record's stages already
    uint32_t tokens_left = 0;
    uint32_t sequences_left = 0;
    uint32_t prefix_tokens = 0;  // of sequences that it opens
  };
  // An ended sequence whose CloseSequence is not planned yet.
  struct Closing {
    SequenceId id;
    StageRows rows;
    uint32_t reserved_rows = 0;
    PrefixHold prefix;
    PrefixKeep keep;
  };
  static constexpr bool kEnded = true;
  // Of one plan: so that its operations stay below limits::kMaxCacheOps.
  static constexpr int kMaxKeeps = 512;

  // What a step may hold, and who is in it.
  uint32_t DecodeCap() const;
  bool WorthDecoding() const;
  // Another sampling step of it may be planned; REQUIRES: its rows reach up to its last token.
  bool MayDecode(const Residency& residency) const;
  void MakeReady(Residency* residency);
  // Its next row would hold up nothing.
  bool InTime(const Residency& residency) const;
  // Up to `most` of those that are ready, longest waiting first.
  std::vector<Residency*> ChooseDecodes(size_t most) const;

  // What goes into its plan (plan_rows.cc).
  void PlanSurvivors(Draft* draft);
  void PlanCloses(Draft* draft);
  void PlanDecodes(Draft* draft);
  void PlanPrefill(Draft* draft);
  // One that replays in steps of its own, and whose turn it is; null: others' turn.
  Residency* ChooseAlone();
  void PlanChunk(Residency* residency, uint32_t rows_max, Draft* draft);
  void PlanOpen(Residency* residency, const std::vector<uint32_t>& kept_rows, Draft* draft);
  void PlanRows(Residency* residency, StageRows::Chunk chunk, Draft* draft);
  // Scores and samples of rows [begin, begin + num_rows), which end the step's sequences.
  void PlanLogits(Residency* residency, uint32_t begin, uint32_t num_rows, Draft* draft);
  void CountRows(const Residency& residency, StageRows::Chunk chunk, Draft* draft);
  void PlanClose(Closing closing, bool ended, Draft* draft);
  // Reserves one more row of `residency`, room for which is made from the youngest down. False: it
  // went itself.
  bool ReserveOneMore(Residency* residency, Draft* draft);
  void Preempt(Residency* residency, Draft* draft);
  // What every stage will report of it.
  void Complete(Draft* draft) const;
  Draft Begin();
  // Null: it says nothing.
  std::optional<v1::StepPlan> Send(Draft draft, uint64_t now_us);

  void Forget(Residency* residency);  // it leaves the maps; what it reserved is the caller's
  // A result under way for it is there, or never will be. It may be gone then.
  static void Answered(Residency* residency, bool sampled);
  Holdings MayBeHeld(uint32_t stage_index) const;

  // Moves (moves.cc).
  void PlanImports(Draft* draft);
  void PlanAdoption(Residency* residency, Draft* draft);
  // What gives way first; null: nothing comes in.
  Residency* Incoming() const;
  // Of those that may give way; null: none may.
  Residency* Youngest() const;
  void CloseIncoming(Residency* residency, Draft* draft);
  // Its home is gone: it goes back to where it came from, or waits; where it was to go it is given up.
  void LeftHome(Sequence* sequence);
  // What went is home again, as nobody answered where it went to.
  void TakeBack(Residency* residency);
  void Restore(Residency* residency);
  absl::Status CheckStill(const Residency& residency) const;
  bool HaveAllReported(StepId step) const;

  // Prefix blocks (prefixes.cc).
  bool Survives(const Sequence& sequence) const;
  // What stages kept of it. Empty, also where rows follow from other numerics than they did.
  KeptRows KeptOf(const Sequence& sequence) const;
  ContentKey KeyOf(Sequence* sequence, uint32_t block) const;
  // What it begins with, of which others have some already.
  void TakeKept(Residency* residency, const KeptRows& kept);
  void TakeCached(Residency* residency);
  // There is room for it now, and for what returns from host memory.
  void EnterCached(Residency* residency);
  void MakePromises(Residency* residency);
  void BreakPromises(Residency* residency);
  // The last stage has answered the step: what it filled is done everywhere.
  void MarkDone(const std::vector<FilledRows>& filled);
  // Blocks of it that are done and no prefix blocks yet.
  PrefixKeep Keepable(Residency* residency);
  // They become such, as far as no other sequence's do already; false: not all.
  bool PlanKeep(SequenceId id, const PrefixKeep& keep, PrefixHold* hold, Draft* draft);
  void PlanKeeps(Draft* draft);
  // It has none of them any more. `draft` null: none is made, and no stage has been told of the sequence.
  // `ended`: nor will it begin with them again.
  void LeavePrefix(PrefixHold* hold, Draft* draft, bool ended);
  // One that no sequence has makes room, the one used longest ago; false: there is none. `draft` null: the
  // next plan says so.
  bool DropOldest(Draft* draft);
  void RemovePrefix(PrefixIndex::Node* node);
  // With the first plan of an epoch each stage drops, unasked, those that no sequence has there.
  void RemoveUnheld();

  // Host memory (host_blocks.cc).
  using Ops = google::protobuf::RepeatedPtrField<v1::CacheOp>;
  enum class KeyOp { kOffload, kDrop, kForget };
  // Together with others of its kind, as far as the order allows.
  static void AddKey(KeyOp kind, const ContentKey& key, Ops* ops);
  Ops* OpsOf(Draft* draft) {
    return draft != nullptr ? draft->plan.mutable_cache_ops() : &due_ops_;
  }
  // Full blocks become prefix blocks: for other sequences, or to be parked.
  bool KeepsPrefixes() const {
    return context_->options.prefix_cache || host_blocks_ > 0 || context_->replicates;
  }
  // There is room for it, or what makes room was used before it.
  bool MayOffload(const PrefixIndex::Node& node, Ops* ops);
  bool IsWorthOffloading() const;
  void MeasureStep(uint32_t stage_index, uint32_t num_rows, uint64_t compute_us);
  // It, and what follows it, are prefix blocks no more. REQUIRES: no sequence has them.
  void GiveUp(PrefixIndex::Node* node, Ops* ops);
  // Blocks that only this sequence could use, which ended.
  void GiveUpOwn(const ContentKey& first, Ops* ops);
  void GiveUpEnded();
  void OnReturned(const ContentKey& key);
  void OnLost(const ContentKey& key);
  void RefreshReturning();
  absl::Status CheckPrefixes(CacheBooks* due) const;

  absl::Status CheckResident(const Residency& residency) const;
  absl::Status CheckResults(const StepRecord& record, const v1::StageReport& report) const;
  // What stages say that they fed for granted rows, against what came back.
  absl::Status CheckGranted(const StepRecord& record, absl::Span<const TokenId> ids) const;
  void ApplyResults(const std::vector<WantedResult>& wanted, const v1::StageReport& report,
                    uint64_t now_us);

  Context* const context_;
  Journal* const journal_;

  PipelineId pipeline_;
  uint32_t num_stages_ = 0;  // 0: stopped
  bool held_ = false;
  uint32_t steps_in_flight_max_ = 0;
  CacheBooks books_;
  uint64_t unplanned_rows_ = 0;
  uint64_t last_ticket_ = 0;
  bool links_proven_ = false;

  std::map<SequenceId, Residency*> residents_;
  std::map<SequenceId, Residency*> prefilling_;  // residents with rows to plan; oldest first
  std::map<uint64_t, Residency*> ready_;  // residents with a token to feed; longest waiting first
  uint32_t num_uneven_ = 0;               // residents of which stages have different lengths
  uint32_t num_still_ = 0;                // residents that are frozen, or come in
  uint32_t num_away_ = 0;                 // residents whose home is elsewhere
  std::set<SequenceId> imports_due_;      // residents that the next plan has blocks for, or opens
  std::vector<Closing> closing_;
  bool alone_last_ = false;  // the last step was of one that replays alone
  bool close_now_ = false;   // one of them has a granted row that may wait for an id
  // What stages told, each until it has reported the first step; which names it, if `unnamed_` does not
  // say that it is still to come.
  Survivors survivors_;
  std::vector<SequenceId> unnamed_;  // by rising id
  RowSource source_;
  bool is_new_source_ = false;   // what survivors have follows from another one
  bool keys_are_mixed_ = false;  // while stopped: stages may have blocks by keys of either
  PrefixIndex index_;
  std::vector<NewPrefix> new_prefixes_;
  Ops due_ops_;                  // of the next plan, in order
  bool ops_are_urgent_ = false;  // it is made for their sake
  uint64_t host_blocks_ = 0;     // that every stage may have in host memory
  uint32_t num_returning_ = 0;   // residents that wait for blocks from there
  // First blocks of sequences that were preempted here, where others cannot use them.
  std::map<SequenceId, ContentKey> parked_;
  struct Rates {
    double copy_bytes_per_us = 1'000;
    double compute_us_per_row = 500;
    uint32_t most_rows = 0;  // of a step that was measured
    bool copies_measured = false;
  };
  std::vector<Rates> rates_;      // of each stage
  std::set<SequenceId> keepers_;  // residents with blocks to become prefix blocks
  bool is_awaited_ = false;       // a sequence waits for that
  StepLedger ledger_;
  std::vector<StageTimes> times_;  // of each stage
};

}  // namespace strait
