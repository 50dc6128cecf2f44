// SPDX-License-Identifier: Apache-2.0
//
// Residency is a sequence's life in one pipeline: which rows of it are there, what is reserved for
// it, and which answers are under way. Where a sequence lives is no part of what it is: all of
// this can be lost, and the sequence with its journal goes on elsewhere.
//
// Owns:    nothing beyond itself. Its Sequence owns it; its Scheduler changes it.
// Borrows: its Sequence and its Scheduler, which outlive it.
// Thread:  loop thread only.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "coordinator/core/prefix_index.h"
#include "coordinator/core/replay.h"
#include "proto/base/ids.h"

namespace strait {

struct Sequence;
class Scheduler;

// Prefix blocks of a sequence: its leading blocks that others may have, too.
struct PrefixHold {
  std::vector<PrefixIndex::Node*> path;  // from block 0 on, those that are such on any stage
  StageBlocks blocks;                    // of these, by stage; most() is path.size()
};

// Blocks that become prefix blocks with the next plan.
struct PrefixKeep {
  uint32_t first_block = 0;
  std::vector<ContentKey> keys;
};

struct Residency {
  // What it is while the sequence moves (coordinator/core/migration.h).
  enum class Role {
    kHome,      // its steps sample, and the journal takes their tokens
    kIncoming,  // rows come here; no plan has rows of it
    kOutgoing,  // it was home, and keeps its rows until the new one has proved itself
  };

  // --- Constant, but for one that becomes home again ---
  PlacementEpoch epoch;
  Sequence* sequence = nullptr;
  Scheduler* scheduler = nullptr;

  Role role = Role::kHome;
  // No rows of it are planned, and it gives way to nobody: it is about to move, or has.
  bool frozen = false;

  // --- What it has there ---
  StageRows rows;  // planned
  // Each stage has ReservedBytes of so many rows set aside for it (proto/model/reservation.h), less
  // those of its prefix blocks.
  uint32_t reserved_rows = 0;
  PrefixHold prefix;
  // Its next full blocks become prefix blocks; false: others of the same tokens are, which it cannot have.
  bool shares = false;
  uint32_t rows_done =
      0;  // below, rows are computed on all stages, and the journal has their tokens
  uint32_t promised_end = 0;  // blocks of the prefix index's promises that may be its own
  // Leading blocks of which every stage's layers have copies on other workers, as far as was looked, and when.
  mutable uint32_t protected_blocks = 0;
  mutable uint64_t losses_seen = 0;
  mutable std::vector<WorkerId> keepers;  // who has them, by stage
  bool returns = false;  // some of its prefix blocks are on their way back from host memory
  bool opened = false;   // a plan with its OpenSequence is out, or with blocks for what comes in
  StepId opened_by;      // that plan
  // It was preempted: nothing of the above is left, and it lives only until the results under way
  // are there.
  bool leaving = false;
  // kIncoming: rows that stages have blocks for with the next plan; they have them for `rows` by now.
  uint32_t import_rows = 0;
  StepId imported_by;  // the last plan with blocks for it
  // Of one that came in: rows that are there, until a plan opens it.
  uint32_t adopted_rows = 0;

  // --- What is under way ---
  uint64_t ready_ticket = 0;     // its place among those that may decode; 0: not among them
  uint32_t results_pending = 0;  // steps in flight that will answer for it
  uint32_t samples_pending = 0;  // those of them that sample its next tokens, see scheduler.h
  StepId sampled_by;             // the last of these
};

}  // namespace strait
