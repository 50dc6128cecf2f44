// SPDX-License-Identifier: Apache-2.0
//
// Gate stands before the coordinator: while it is shut (the coordinator's process is stopped), what
// comes for it waits, in order.
//
// Borrows: the World.
// Thread:  the simulator's.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>

#include "tests/sim/world.h"

namespace strait::sim {

class Gate {
 public:
  // `on_open(us)`: it was shut for so long; called before what waited runs.
  Gate(World* world, std::function<void(uint64_t)> on_open)
      : world_(world), on_open_(std::move(on_open)) {}

  // Runs `what` now, or when the gate is open again.
  void Pass(std::function<void()> what);
  void Shut(uint64_t us);

  bool is_shut() const { return since_us_ > 0; }
  uint64_t shut_us() const { return shut_us_; }    // all times together
  uint32_t num_shut() const { return num_shut_; }  // times that are over

 private:
  void Open();

  World* const world_;
  const std::function<void(uint64_t)> on_open_;
  uint64_t until_us_ = 0;
  uint64_t since_us_ = 0;  // 0: open
  uint64_t shut_us_ = 0;
  uint32_t num_shut_ = 0;
  std::deque<std::function<void()>> waiting_;
};

}  // namespace strait::sim
