// SPDX-License-Identifier: Apache-2.0
//
// Pipeline is an ordered row of places for stages that together cover the model, with the scheduler that
// forms its steps.
//
// Owns:    its slots, its Scheduler.
// Thread:  loop thread only; Cluster changes it.
// Why:     it is assembling (slots are vacant or load), activating (all are loaded) or active (all
//          answered); every failure, whatever it was, takes it back to assembling with a new epoch.
//          What its stages have of sequences stays theirs: they are asked for it when they are
//          activated, and it is theirs still if their worker comes back in time.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "coordinator/core/context.h"
#include "coordinator/core/edges.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/scheduler.h"
#include "coordinator/core/survivors.h"
#include "proto/base/ids.h"

namespace strait {

// How a stage's prefix blocks get copies on another worker (coordinator/core/replicating.cc).
struct Copying {
  WorkerId buddy;                           // 0: none
  std::deque<Scheduler::NewPrefix> queue;   // not told to it
  std::deque<Scheduler::NewPrefix> failed;  // to be told again, a while later
  uint32_t num_coming = 0;                  // told, and not answered
  PipelineEpoch served;                     // since when it may read them
};

// One place in a pipeline.
struct StageSlot {
  enum class State { kVacant, kLoading, kLoaded, kActivating, kActive };
  LayerRange layers;
  uint64_t cache_bytes = 0;     // of latent blocks, that plans may use
  uint32_t growths_failed = 0;  // since one succeeded, for want of memory
  uint64_t grow_after_us = 0;
  uint64_t wanted_cache_bytes = 0;  // it grows to it when its worker has room (resizing.cc)
  // Not 0: vacant slots of the same group may go to one worker, where there are too few for one each.
  uint64_t group = 0;
  State state = State::kVacant;
  WorkerId worker;        // unless vacant
  uint64_t stage_id = 0;  // of this worker's stage; never reused
  uint64_t bytes_loaded = 0;
  uint64_t bytes_total = 0;
  uint64_t load_progress_us = 0;  // when bytes_loaded last grew
  uint64_t weight_bytes = 0;
  bool was_warm = false;       // its cache grows to what is wanted before it is activated
  StageTimes times;            // of its epochs before
  uint64_t rows_computed = 0;  // since it was loaded, as it reported
  uint64_t rows_stored = 0;
  // What it may have of sequences; once it is active: what it told. The scheduler's while that runs.
  Holdings may_hold;
  // Of this epoch, once it is activated:
  bool told = false;         // ActivateStage is out
  EdgeChoice edge;           // from the stage before; none at the first
  NumberedEdge numbered;     // the same
  std::string nccl_id;       // of that edge, once this stage has made it
  bool edge_made = false;    // that edge was made before this epoch (linking.cc)
  uint32_t host_blocks = 0;  // prefix blocks that it may have in its worker's host memory
  Copying copying;
  // In may_hold only because ActivateStage asked for it: a stage that fails before has none of it.
  std::set<SequenceId> restored;

  // Of a stage that has no place yet (linking.cc):
  bool link_told = false;  // LinkStage is out
  bool linked = false;     // the edge from it is up

  // Whether it has not yet answered all that ActivateStage asks for.
  bool owes_answer() const {
    return told && (state == State::kActivating || (edge.over_nccl && nccl_id.empty()));
  }
};

struct Pipeline {
  enum class State { kAssembling, kActivating, kActive };
  Pipeline(Context* context, Journal* journal) : scheduler(context, journal) {}

  PipelineId id;
  PipelineEpoch epoch;
  State state = State::kAssembling;
  std::vector<StageSlot> slots;
  bool served = false;        // was active once
  bool switched = false;      // a scale ended its epoch, no failure; it is not active yet
  uint64_t since_us = 0;      // in this state
  uint64_t last_step_us = 0;  // when the last stage reported rows
  uint64_t retry_at_us = 0;   // no activation before
  uint32_t failures = 0;      // since every link carried something
  bool links_worked = false;  // in this epoch each of them has carried something
  PlanReason why;             // it has these layers on these workers; since it was formed or scaled
  uint64_t planned_rows = 0;  // what its first workers could hold, see PipelinePlan::capacity_rows
  // While a scale prepares: what it will hold. Its caches do not grow meanwhile.
  std::optional<uint64_t> scaled_rows;
  uint64_t filled_us = 0;        // when a worker last took a place of it
  uint64_t vacant_since_us = 0;  // while a slot is vacant: since when one is, without a break
  std::string last_error;
  NumberedEdge sampled_edge;  // from the last stage to the first, if there are several and grants
  Scheduler scheduler;

  // The longest sequence that every stage can hold, vacant ones as planned, others when their caches have grown.
  uint64_t capacity_rows(const CachePolicy& policy) const;
  uint32_t num_vacant() const;
};

}  // namespace strait
