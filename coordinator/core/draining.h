// SPDX-License-Identifier: Apache-2.0
//
// Draining takes workers out of service: their sequences go elsewhere with their caches, then they have no stage
// and get none.
//
//   waiting ─▶ moving ─────▶ unloading ─▶ done (drained)
//         └──▶ replacing ──▶ unloading ─▶
//
// waiting    for its turn, for a scale to end, or for its pipeline to serve. From here on the worker gets no place
//            and no new copies, and its pipeline no sequence that another one can hold.
// moving     other pipelines hold all of the sequences of its pipeline: each goes by a move of its own
//            (coordinator/core/migration.h), up to kDrainMoves at once. Then the pipeline is dissolved; its other
//            workers are idle, and form a new one if they can.
// replacing  no other pipeline can: the pipeline gets as many stages on other workers (Cluster::Replace), and
//            serves until it switches. Rows of layers that stay are kept, others come from copies where there
//            are any, else they are computed again.
// unloading  its stages go.
//
// A worker that sends Leave is drained without a verb, and is told Shutdown at the end, whatever that is.
//
// Owns:    the drains under way.
// Borrows: Context, Journal, Cluster, Migrations.
// Thread:  loop thread only.
// Errors:  ResourceExhausted with the numbers: neither way is possible; Aborted: the worker died; Cancelled: undone;
//          DeadlineExceeded. But for Aborted the worker then serves on, and sequences that have moved stay
//          where they are.
// Limits:  kDrainMoves, kDrainTries; one worker at a time, others wait; CoreOptions::migrate_timeout_us where
//          the verb names no time.
// Why:     a drain is built of verbs that can fail at any time and leave all in order, so it has nothing to
//          take back itself.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/core/cluster.h"
#include "coordinator/core/context.h"
#include "coordinator/core/core.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/migration.h"

namespace strait {

inline constexpr uint32_t kDrainMoves = 4;  // at once
inline constexpr uint32_t kDrainTries = 3;  // of each sequence's move, and of a replacement
inline constexpr uint64_t kDrainRetryUs = 300'000;

struct Drain {
  enum class Phase { kWaiting, kMoving, kReplacing, kUnloading };
  enum class Way { kNone, kMove, kReplace };
  struct Tries {
    uint32_t failed = 0;
    uint64_t next_us = 0;
    absl::Status last;
  };

  // --- Constant ---
  WorkerId worker;
  std::string name;
  uint64_t begin_us = 0;
  uint64_t deadline_us = 0;
  std::optional<VerbId> verb;
  bool leaves = false;  // it is told Shutdown at the end; may become true later

  // --- How far it is ---
  Phase phase = Phase::kWaiting;
  Way way = Way::kNone;
  PipelineId pipeline;  // 0: none, or none yet
  bool begun = false;   // Cluster::Replace is under way
  uint32_t replacements_failed = 0;
  absl::Status refusal;               // why moves alone do not do
  std::map<SequenceId, Tries> tries;  // of moves that failed
  uint32_t moved = 0;
  uint64_t moved_bytes = 0;
  uint64_t rows_kept = 0;
  uint64_t rows_lost = 0;
  uint64_t pause_us = 0;
  uint64_t told_us = 0;
};
const char* Name(Drain::Phase phase);
const char* Name(Drain::Way way);

class Draining {
 public:
  Draining(Context* context, Journal* journal, Cluster* cluster, Migrations* migrations)
      : context_(context), journal_(journal), cluster_(cluster), migrations_(migrations) {}

  // Answered by DrainTold and VerbEnded.
  void OnDrain(VerbId verb, const DrainSpec& spec, uint64_t now_us);
  // Leave; other messages are not its business.
  void OnMessage(WorkerId worker, const v1::FromWorker& message, uint64_t now_us);
  // Takes every drain as far as it goes now. True: workers or pipelines have changed.
  bool Advance(uint64_t now_us);

  // Whether pipelines are to be left alone.
  bool IsBusy() const { return !drains_.empty(); }
  const std::vector<Drain>& drains() const { return drains_; }
  DrainReport ReportOf(const Drain& drain, uint64_t now_us) const;
  // Who drains has a drain, and the other way round.
  absl::Status CheckIntegrity() const;

 private:
  absl::StatusOr<WorkerId> FindWorker(const std::string& name) const;
  Drain* Find(WorkerId worker);
  Drain MakeDrain(WorkerId worker, uint64_t timeout_us, uint64_t now_us) const;
  absl::Status Undo(WorkerId worker, uint64_t now_us);
  void DryRun(VerbId verb, Drain drain, uint64_t now_us);

  // Others that serve, and of which no worker drains.
  std::vector<Pipeline*> OpenPipelines() const;
  // Whether other pipelines can hold all that `pipeline` may have to hold, now.
  absl::Status CheckMoves(const Pipeline& pipeline) const;
  Pipeline* ChooseTarget(const Pipeline& from, const Sequence& sequence) const;
  // ResourceExhausted: there is none.
  absl::Status ChooseWay(Drain* drain, const Pipeline& pipeline, uint64_t now_us);

  // Absent: it is not over. `changed` as Advance returns it.
  using End = std::optional<absl::Status>;
  End Step(Drain* drain, bool* changed, uint64_t now_us);
  End Move(Drain* drain, const Pipeline& pipeline, bool* changed, uint64_t now_us);
  End Replace(Drain* drain, const Pipeline& pipeline, bool* changed, uint64_t now_us);
  End AwaitReplace(Drain* drain, bool* changed);
  void NoteEnded();
  void Finish(Drain* drain, absl::Status status, uint64_t now_us);
  void Tell(Drain* drain, uint64_t now_us);

  Context* const context_;
  Journal* const journal_;
  Cluster* const cluster_;
  Migrations* const migrations_;
  std::vector<Drain> drains_;  // by age; the first one has its turn
};

}  // namespace strait
