// SPDX-License-Identifier: Apache-2.0
//
// Worker is what the coordinator knows of one worker. Its books say which stages it has, from the moment
// that it is told to load them until it says that they are gone, and what they take of its memory.
//
// Thread:  plain values and pure functions.
// Limits:  BookedBytes of its stages <= memory_bytes; Cluster asks before it books, and asserts it.
// Why:     stages of one worker share: a layer that several of them have is there once, and the
//          cache of a successor is a part of its predecessors' until those are unloaded. So what is
//          free follows from all stages together and is never kept.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/core/edges.h"
#include "coordinator/core/planner.h"
#include "proto/base/ids.h"
#include "proto/model/stage_memory.h"

namespace strait {

struct HostedStage {
  enum class Role {
    kPlace,      // has a place in a pipeline
    kNext,       // will have one when its pipeline's scale switches (coordinator/core/scale.h)
    kLanding,    // has none, and never will: rows come to it for a kNext of the worker
    kFollowed,   // had one; its successors are not all active yet
    kUnloading,  // was told to go, and has not answered
    kWarm,       // has none: its weights wait for one (coordinator/core/warm.h)
  };
  // A ResizeCache that is not answered.
  struct Resize {
    uint64_t cache_bytes = 0;
    uint64_t asked_us = 0;
  };
  struct Warm {
    bool is_loaded = false;
    uint64_t bytes_loaded = 0;
    uint64_t bytes_total = 0;
    uint64_t weight_bytes = 0;
    uint64_t load_progress_us = 0;
  };
  Role role = Role::kPlace;
  PipelineId pipeline;      // but for kUnloading and kWarm
  uint32_t slot_index = 0;  // likewise; of kFollowed: what it was; of kLanding: in Scale::landings
  LayerRange layers;
  uint64_t cache_bytes = 0;  // that it may hold, as it was loaded or has answered last
  std::optional<Resize> resize;
  std::vector<uint64_t> successor_of;  // as it was told with LoadStage; some may be gone
  Warm warm;                           // of kWarm
  // Of a scale that has not switched; it is in no epoch.
  bool is_prepared() const { return role == Role::kNext || role == Role::kLanding; }
};
using HostedStages = std::map<uint64_t, HostedStage>;  // by stage id

// What `stages` take of a worker's memory together: weights of the union of their layers, of each stage
// workspace and edges, and cache, the larger one while it is resized. What has a predecessor among
// `stages` shares with it: of the two groups the larger one counts.
uint64_t BookedBytes(const CoreOptions& options, const ModelShape& model,
                     const WorkerMemory& memory, const HostedStages& stages);

struct Worker {
  WorkerId id;
  std::string name;
  std::string data_address;
  std::string host_id;  // equal where workers would go together
  std::string numerics_id;
  std::string backend;
  uint64_t memory_bytes = 0;
  std::optional<StageCosts> costs;  // of its stages' memory; absent: as on the CPU
  uint64_t host_cache_bytes = 0;    // for prefix blocks that leave its device
  uint64_t replica_bytes = 0;       // for copies of other workers' prefix blocks
  uint64_t instance = 0;
  uint32_t num_threads = 0;
  uint32_t process_id = 0;
  NcclSupport nccl;

  WorkerMemory memory() const { return {memory_bytes, costs ? &*costs : nullptr}; }

  uint64_t attached_us = 0;
  uint64_t last_heard_us = 0;
  uint64_t resident_bytes = 0;
  HostedStages stages;         // none, or warm ones alone: a spare
  uint32_t warm_failures = 0;  // warm loads, since one succeeded
  uint64_t warm_after_us = 0;  // none before
  // Of a worker that is to have no stage (coordinator/core/draining.h): it gets none, nor new copies.
  enum class Duty { kServes, kDraining, kDrained };
  Duty duty = Duty::kServes;
  uint64_t load_progress_us = 0;  // when the bytes of any of its stages last grew
  std::string last_error;

  // Null: it has no such stage, or no more.
  HostedStage* Find(uint64_t stage_id);
  bool Has(HostedStage::Role role) const;
};

}  // namespace strait
