// SPDX-License-Identifier: Apache-2.0
//
// Migrations move running sequences from one pipeline to another with their cache, while their clients read
// on.
//
//   reserve ─▶ copy (rounds) ─▶ freeze ─▶ last rows ─▶ commit ─▶ adopt ─▶ done
//
// reserve    the destination's stages get blocks for the rows (Scheduler::Import).
// copy       they fetch rows that the source has finished, round after round, while it goes on.
// freeze     the source plans no more rows of it, and reports those under way.
// last rows  the rest is fetched; both sides say what went over, and the digests must be equal.
// commit     the coordinator's own change of state: nobody votes. The destination is its home.
// adopt      the destination's next plan opens it. The source keeps its rows until all stages of the destination
//            have reported that step.
//
// Owns:    the moves under way.
// Borrows: Context, Journal, Cluster; changes residencies through Schedulers alone.
// Thread:  loop thread only.
// Errors:  whatever fails before the commit leaves the sequence where it is; after it, and before the
//          destination has answered, it goes back to the source's rows under a newer placement epoch
//          (Scheduler::LeftHome). So it is in one place, always.
// Limits:  kMaxMigrations; CoreOptions: migrate_timeout_us, migrate_stall_us, migrate_pause_us.
// Why:     a move is given up, rather than that anybody waits for it: no third sequence gives way to it, nor
//          does its own client pay for a slow link.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/core/cluster.h"
#include "coordinator/core/context.h"
#include "coordinator/core/core.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/row_messages.h"

namespace strait {

inline constexpr size_t kMaxMigrations = 64;
// Rows that may be left for the time in which the sequence stands still.
inline constexpr uint32_t kLastRows = 64;
// A prompt whose chunks outrun the link is held after so many rounds; a sequence that decodes faster than
// its rows go over has had so many for nothing.
inline constexpr uint32_t kMaxRounds = 8;
// Between two reports to who asked for a move.
inline constexpr uint64_t kTellEveryUs = 200'000;

struct Migration {
  enum class Phase { kReserve, kCopy, kFreeze, kLastRows, kAdopt };
  // Of a stage of the destination, as it told.
  struct Fetched {
    uint64_t stage_id = 0;
    WorkerId worker;
    uint32_t rows = 0;
    uint64_t digest = 0;
    uint64_t bytes = 0;
    uint64_t shared_bytes = 0;
    uint64_t nccl_bytes = 0;
  };
  // Of a stage of the source.
  struct Served {
    uint64_t stage_id = 0;
    WorkerId worker;
    std::optional<uint64_t> digest;
  };

  // --- Constant ---
  std::optional<VerbId> verb;
  bool drains = false;  // Draining began it
  SequenceId sequence;
  PipelineId from;
  PipelineId to;
  PlacementEpoch home;  // of the residency that it leaves
  bool force_numerics = false;
  bool is_foreign = false;  // the two pipelines' numerics differ
  uint64_t begin_us = 0;
  uint64_t deadline_us = 0;

  // --- Since there is room for it ---
  PlacementEpoch placement;  // of the residency that it goes to
  std::vector<Fetched> fetched;
  std::vector<Served> served;

  // --- How far it is ---
  Phase phase = Phase::kReserve;
  uint32_t rounds = 0;
  uint32_t end_row = 0;      // of the rows asked for
  uint32_t last_rest = 0;    // rows that the round before left
  uint64_t progress_us = 0;  // when it last got any further
  uint64_t frozen_us = 0;
  bool is_held =
      false;  // frozen with more to copy than fits a pause: a prompt, which nobody reads yet
  uint64_t last_token_us = 0;  // of the source
  size_t tokens_then = 0;      // that it had
  uint64_t pause_us = 0;
  uint64_t told_us = 0;

  // Rows that all stages have.
  uint32_t rows() const;
  uint64_t bytes() const;
  uint64_t shared_bytes() const;  // of these: by shared memory
  uint64_t nccl_bytes() const;    // of these: from device to device
};
const char* Name(Migration::Phase phase);
// For how many rows the destination is to have blocks, where there are so many.
uint32_t ImportRowsFor(const Sequence& sequence, uint32_t rows);

class Migrations {
 public:
  Migrations(Context* context, Journal* journal, Cluster* cluster)
      : context_(context), journal_(journal), cluster_(cluster) {}

  // Answered by MoveTold and VerbEnded.
  void OnMigrate(VerbId verb, const MigrateSpec& spec, uint64_t now_us);
  // ---- Moves that Draining begins (coordinator/core/draining.h) ----
  // Errors as those of OnMigrate, at once.
  absl::Status Begin(SequenceId sequence, PipelineId to, uint64_t now_us);
  struct Ended {
    SequenceId sequence;
    absl::Status status;
    uint64_t bytes = 0;
    uint64_t pause_us = 0;
  };
  // Of these moves, since the last call.
  std::vector<Ended> TakeEnded() { return std::exchange(ended_, {}); }
  // Equal bits on both.
  bool Agree(const Pipeline& a, const Pipeline& b) const;
  // No further move begins.
  void set_paused(bool paused) { paused_ = paused; }

  // RowsFetched and RowsServed; other messages are not its business.
  void OnMessage(WorkerId worker, const v1::FromWorker& message, uint64_t now_us);
  // Takes every move as far as it goes now. True: a scheduler may have something to plan for it.
  bool Advance(uint64_t now_us);

  const std::map<SequenceId, Migration>& moves() const { return moves_; }
  MoveReport ReportOf(const Migration& move, uint64_t now_us) const;
  // Every residency that comes in or goes out is of a move, and the other way round.
  absl::Status CheckIntegrity() const;

 private:
  absl::StatusOr<Sequence*> FindSequence(const std::string& name) const;
  absl::StatusOr<Migration> Plan(const MigrateSpec& spec, uint64_t now_us) const;
  // Null: it does not serve.
  Pipeline* Serving(PipelineId id) const;

  enum class Outcome { kWaits, kGoesOn, kOver };
  Outcome Step(Migration* move, uint64_t now_us);
  Outcome Reserve(Migration* move, Sequence* sequence, uint64_t now_us);
  Outcome Copy(Migration* move, Sequence* sequence, uint64_t now_us);
  Outcome LetSettle(Migration* move, Sequence* sequence, uint64_t now_us);
  Outcome Commit(Migration* move, Sequence* sequence, uint64_t now_us);
  Outcome LetAdopt(Migration* move, Sequence* sequence, uint64_t now_us);
  absl::Status CheckDeadlines(const Migration& move, uint64_t now_us) const;

  // The next rows, up to `end_row`, are asked for.
  void Fetch(Migration* move, const Sequence& sequence, uint32_t end_row, bool is_last);
  // To the source's stages: they may be read; `served_rows`: what is to be told once these were.
  void Serve(const Migration& move, uint32_t served_rows, bool end);
  RowsPass PassOf(const Migration& move) const;
  // What both ends have of it goes; the sequence goes on where its home is.
  Outcome Abort(Migration* move, absl::Status why, uint64_t now_us);
  Outcome Finish(Migration* move, uint64_t now_us);
  void Tell(Migration* move, uint64_t now_us);

  Context* const context_;
  Journal* const journal_;
  Cluster* const cluster_;
  std::map<SequenceId, Migration> moves_;
  std::vector<Ended> ended_;
  bool paused_ = false;
  std::map<SequenceId, absl::Status> failures_;  // that workers told of moves, until they end
};

}  // namespace strait
