// SPDX-License-Identifier: Apache-2.0
//
// Simulation runs a whole cluster from a seed: the real Core and real Stages, clients, faults, on
// one thread in virtual time, and checks everything after every event.
//
// Owns:    all of it.
// Thread:  one.
// Errors:  Outcome::violation, empty if all went well.
#pragma once

#include <cstdint>
#include <string>

#include "coordinator/core/core.h"

namespace strait::sim {

struct Outcome {
  std::string violation;
  CoreStats stats;
  uint32_t requests = 0;
  uint32_t sequences_finished = 0;  // got all that they asked for
  uint32_t sequences_nan = 0;       // ended because their logits were NaN
  uint32_t evictions = 0;
  uint32_t lies_told = 0;
  uint32_t lies_caught = 0;
  uint64_t steps_ahead = 0;  // begun while the one before was computing
  uint64_t late_ids = 0;     // that went from one step to the next without the host
  uint64_t virtual_us = 0;
};

Outcome RunSimulation(uint64_t seed, bool trace);

}  // namespace strait::sim
