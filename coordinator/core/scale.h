// SPDX-License-Identifier: Apache-2.0
//
// A scale gives every pipeline, one after the other, another number of stages while it serves. PlanScale says
// on which workers a pipeline's new stages lie and what they take, now and in the end. Scale remembers how
// far it is; Cluster (scaling.cc) takes it through.
//
// Thread:  PlanScale is pure; Scale: loop thread only.
// Errors:  ResourceExhausted with the numbers: not enough memory, or less cache than sequences need.
// Why:     old and new stages of a worker are there at the same time: they share the weights of their
//          layers, the new ones' cache is a part of the old ones', but each has a workspace and edges. So
//          the old caches shrink first where there is no room, the new ones grow when the old stages are
//          gone, and no row that stays on its worker is copied. Rows of layers that go to another worker are copied while the
//          old stages serve: to the new stage itself where it is alone, else to a landing beside the old ones, with
//          memory of its own. The planner's layers are final: nothing moves twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "coordinator/core/copy_ahead.h"
#include "coordinator/core/core.h"
#include "coordinator/core/pipeline.h"
#include "coordinator/core/planner.h"
#include "proto/base/ids.h"

namespace strait {

// A worker that the new stages may lie on.
struct ScaleHost {
  WorkerId worker;
  WorkerMemory memory;              // less what stages of other pipelines take
  std::vector<uint32_t> old_slots;  // of this pipeline, on this worker; none: a spare
  // A spare that comes where a worker is left out, so that the others keep their layers.
  bool follows = false;
};

struct ScaledStage {
  WorkerId worker;
  StagePlan plan;                  // in the end
  uint64_t first_cache_bytes = 0;  // until the old stages are gone
  std::vector<uint64_t> successor_of;
  bool lands = false;  // rows come to it before the switch: no old stage is on its worker
};

// A stage without a place beside old ones: rows of layers that its worker does not have come to it before the switch,
// for the stage that it is for.
struct ScaledLanding {
  uint32_t stage_index = 0;  // of ScalePlan::stages
  LayerRange layers;
  uint64_t cache_bytes = 0;
};

inline constexpr size_t kMaxScalePlans = 512;

struct ScalePlan {
  std::vector<ScaledStage> stages;
  std::vector<ScaledLanding>
      landings;  // none for rows that have no room beside the old stages: they are replayed
  uint64_t capacity_rows = 0;             // in the end
  std::vector<uint64_t> old_cache_bytes;  // by old slot: what it may keep while both are there
  uint32_t num_hosts = 0;                 // workers with a stage
  uint64_t moved_bytes = 0;  // weights and rows that come to a worker which does not have them
};

// What must have room.
struct ScaleNeeds {
  uint64_t resident_rows = 0;  // the most that a sequence in this pipeline may grow to
  uint64_t promised_rows = 0;  // the most that any sequence may grow to that this pipeline can hold
  uint64_t reserved_rows = 0;  // of all its sequences now, in whole blocks
};

// `hosts`: the pipeline's workers in the order of their stages, then spares, the better ones first. With more
// of its own than stages some are left out; spares are taken while there are fewer. One that `follows` counts as one of
// its own. A worker of several stages has contiguous ones. Of plans whose capacity and whose heaviest stage are within 5 %
// of the best one's, that which moves the fewest bytes; where there are too many to look at (kMaxScalePlans), those with the
// least memory are left out, and spares come last.
// REQUIRES: `hosts` is not empty.
absl::StatusOr<ScalePlan> PlanScale(const CoreOptions& options, const ModelShape& model,
                                    absl::Span<const StageSlot> old_slots,
                                    absl::Span<const ScaleHost> hosts, uint32_t num_stages,
                                    const ScaleNeeds& needs);

// How many of `num_stages` each of these workers has: one at least, then evenly by memory.
// REQUIRES: 0 < memory_bytes.size() <= num_stages.
std::vector<uint32_t> StagesOfHosts(absl::Span<const uint64_t> memory_bytes, uint32_t num_stages);

// What the stages that take the place of `old_slots` on one worker may hold of sequences: of each as many rows as all
// of `layers` have, none where one of them is in none of these slots.
Holdings HoldingsOfSuccessor(LayerRange layers, absl::Span<const StageSlot* const> old_slots);

struct Scale {
  enum class Phase {
    kWaiting,     // for the turn of the next pipeline
    kMakingRoom,  // its old stages' caches shrink
    kLoading,     // its new stages load; the old ones serve
    kCopying,     // rows of layers that change workers come to the new stages; the old ones serve
    kStill,       // the old stages finish their steps, and the last rows come
    kSwitched,    // the new stages are in their places, and enter an epoch
    kGrowing,     // they serve; the old ones go, caches grow
  };
  ScaleId id;
  bool drains = false;  // of one pipeline, which has so many stages already: a worker is left out
  uint32_t num_stages = 0;
  std::vector<PipelineId> pipelines;  // whose turn has not come; by falling id
  uint32_t done = 0;                  // have it
  uint32_t hosts_min = 0;             // of any pipeline that has it
  Phase phase = Phase::kWaiting;
  uint64_t since_us = 0;  // in this phase

  // --- Of the pipeline whose turn it is ---
  PipelineId pipeline;
  ScalePlan plan;
  std::vector<StageSlot> next;      // until the switch; then they are the pipeline's slots
  std::vector<StageSlot> landings;  // until the switch
  std::optional<CopyAhead> ahead;   // since all of them are loaded, likewise
  bool rest_asked = false;          // since it stands still
  uint32_t stands = 0;              // how often it stood still in vain
  uint64_t held_before = 0;  // rows of its residents, summed over layers, when the epoch ended
  uint64_t pause_begin_us =
      0;  // its last step before the change, or that itself if nobody waited for one
  uint64_t first_step_us = 0;  // after it; 0: none yet

  // --- Sums ---
  uint64_t pause_us = 0;  // the longest
  uint64_t rows_kept = 0;
  uint64_t rows_lost = 0;
  uint64_t moved_bytes = 0;  // of rows, to other workers

  // Its pipeline is as before, and stays so if this scale ends.
  bool prepares() const {
    return phase == Phase::kMakingRoom || phase == Phase::kLoading || phase == Phase::kCopying ||
           phase == Phase::kStill;
  }
};

const char* Name(Scale::Phase phase);

}  // namespace strait
