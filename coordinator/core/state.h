// SPDX-License-Identifier: Apache-2.0
//
// Core::State: the parts of Core, and what needs more than one of them.
//
// Owns:    Context, Journal, Cluster, Migrations, Draining.
// Thread:  loop thread only.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "coordinator/core/cluster.h"
#include "coordinator/core/context.h"
#include "coordinator/core/core.h"
#include "coordinator/core/draining.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/migration.h"

namespace strait {

struct Core::State {
  State(CoreOptions core_options, ModelShape model);

  // Now, by the clock of CoreOptions' times. Every event asks it first, and only once.
  uint64_t Awake(uint64_t now_us);
  uint64_t AwakeAt(uint64_t now_us) const;

  // Since when no pipeline is active.
  void WatchPipelines(uint64_t now_us);
  bool GraceIsOver(uint64_t now_us) const;
  absl::Status NoPipeline() const;

  absl::Status CheckSubmit(const RequestSpec& spec, uint64_t now_us) const;
  void Admit(RequestId id, RequestSpec spec, uint64_t now_us);
  // All sequences of a request, or one; unknown and ended ones are ignored.
  void EndRequest(RequestId id, std::optional<uint32_t> sequence_index, FinishReason reason,
                  const absl::Status& status);
  // Waiting sequences, by age, to pipelines with room.
  void PlaceWaiting(uint64_t now_us);

  Context context;
  Journal journal;
  Cluster cluster;
  Migrations migrations;
  Draining draining;
  std::optional<uint64_t> no_pipeline_since_us;
  uint64_t last_call_us = 0;
  uint64_t awake_us = 0;  // at last_call_us
};

}  // namespace strait
