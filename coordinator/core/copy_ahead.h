// SPDX-License-Identifier: Apache-2.0
//
// CopyAhead brings the rows of a pipeline's sequences to the stages that are to take its stages' places, while
// the pipeline serves: so that the change of stages loses no row.
//
//   rounds ─▶ IsNear: little is left ─▶ the pipeline plans no more steps, those under way end ─▶ Finish: the rest ─▶ IsThere
//
// Owns:    how far each sequence has come at each landing.
// Borrows: Context, the Pipeline, and its workers' addresses, of each call.
// Thread:  loop thread only.
// Errors:  OnFetched: what a landing cannot have told. What a landing cannot fetch, or has no room for, is
//          dropped there: the sequence computes those rows again.
// Limits:  CoreOptions::migrate_bytes_per_s of a sequence at a landing; migrate_stall_us without a row more: what has
//          not come then is dropped; kMaxAskedBytes of messages at a time.
// Why:     rows go as those of a sequence that moves, but nobody's home changes: the change itself is an epoch's
//          end, after which stages tell what they have. So there is nothing to commit and nothing to take back: what came in
//          time is kept, all else is replayed.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "coordinator/core/context.h"
#include "coordinator/core/pipeline.h"
#include "coordinator/core/row_messages.h"
#include "coordinator/core/survivors.h"
#include "proto/base/ids.h"
#include "proto/model/content_key.h"

namespace strait {

// Rows that may be left when the pipeline stands still: of one sequence, and of all, besides kRoundRows of each.
inline constexpr uint32_t kRestRows = 64;
inline constexpr uint64_t kAllRestRows = 1024;
// Of token ids and keys that one call of Advance sends to each landing: a worker's stream is bounded.
inline constexpr uint64_t kMaxAskedBytes = uint64_t{8} << 20;
// A sequence's next round has so many rows at least, but for the last one.
inline constexpr uint32_t kRoundRows = 32;
// A sequence that still outruns its rounds then is waited for no longer.
inline constexpr uint32_t kMaxAheadRounds = 8;

// A loaded stage that is in no epoch (LoadStage.successor_of): rows of all of its layers come to it.
struct Landing {
  uint64_t stage_id = 0;
  WorkerId worker;
  LayerRange layers;
};

class CopyAhead {
 public:
  using Address = std::function<std::string(WorkerId)>;  // its data address

  CopyAhead(Context* context, std::vector<Landing> landings, Address address, uint64_t now_us)
      : context_(context),
        landings_(std::move(landings)),
        address_(std::move(address)),
        begin_us_(now_us),
        progress_us_(now_us) {}

  // Asks for what `from` has finished and no landing was asked for; forgets who left. REQUIRES: `from` serves.
  void Advance(const Pipeline& from, uint64_t now_us);
  // So little is left that the pipeline may stand still for it; or waiting longer is of no use.
  bool IsNear(const Pipeline& from, uint64_t now_us) const;
  // The rest. REQUIRES: no step of `from` is under way.
  void Finish(const Pipeline& from, uint64_t now_us);
  // After Finish: all is there that will be.
  bool IsThere() const;
  // Nobody may read any more. REQUIRES: `from` serves.
  void End(const Pipeline& from);

  // Of a landing: true, and it is looked at.
  bool IsOf(WorkerId worker, uint64_t stage_id) const { return IndexOf(worker, stage_id) >= 0; }
  absl::Status OnFetched(WorkerId worker, const v1::RowsFetched& told, uint64_t now_us);
  // What it may tell when it is activated.
  Holdings HoldingsOf(uint64_t stage_id) const;

  uint64_t bytes() const { return bytes_; }
  // Rows of the sequences of `from` that are at every landing, and all that are to come. None where nothing lands.
  void CountRows(const Pipeline& from, uint64_t* rows, uint64_t* rows_total) const;

 private:
  struct Copied {
    PlacementEpoch placement;
    uint32_t end_row = 0;  // asked for
    uint32_t rounds = 0;
    uint32_t num_keys = 0;  // of its leading blocks, told
    bool given_up = false;
    std::vector<uint32_t> rows;      // by landing, that are there
    std::vector<uint64_t> bytes;     // likewise
    std::vector<ContentKey> coming;  // keys of blocks of the round under way
    uint32_t rows_there() const;
  };
  int IndexOf(WorkerId worker, uint64_t stage_id) const;
  // Those of its leading blocks that are prefix blocks on all stages.
  static std::vector<ContentKey> KeysOf(const Residency& residency);
  // Another sequence's rows are on their way that it begins with, too: then they come once.
  bool Waits(const std::vector<ContentKey>& keys) const;
  // Bytes that it sends to each landing.
  uint64_t Ask(const Pipeline& from, const Residency& residency, Copied* copied, uint32_t end_row,
               bool is_last, uint64_t now_us);
  void Serve(const Pipeline& from, SequenceId id, PlacementEpoch placement, bool end) const;
  // Nothing more of it comes, and what came is of no use.
  void GiveUp(SequenceId id, Copied* copied);
  void DropAt(SequenceId id) const;
  void Arrive(Copied* copied);
  RowsPass PassOf(SequenceId id, PlacementEpoch placement) const;
  // Who left is dropped, and what stalls.
  void ForgetGone(const Pipeline& from, uint64_t now_us);
  // Asks for what sequences have by kRoundRows more than was asked for; `all`: whatever that sends.
  void AskNew(const Pipeline& from, bool all, uint64_t now_us);

  Context* context_;
  std::vector<Landing> landings_;
  Address address_;
  uint64_t begin_us_;
  uint64_t progress_us_;
  uint64_t bytes_ = 0;
  std::map<SequenceId, Copied> sequences_;
  std::set<SequenceId> waiting_;  // for rows of others, since one of those last came
  absl::flat_hash_set<ContentKey, ContentKeyHash> coming_;
  absl::flat_hash_set<ContentKey, ContentKeyHash> landed_;
};

}  // namespace strait
