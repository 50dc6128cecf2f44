// SPDX-License-Identifier: Apache-2.0
//
// Partition says what cannot pass between two ends for a while: words to and from the coordinator, hidden states, rows.
//
// Borrows: the World.
// Thread:  the simulator's.
// Why:     whoever sends learns nothing: what is sent meanwhile comes later, as over TCP, unless somebody gives up first. So all
//          that senders ask is when the way is open again.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/world.h"

namespace strait::sim {

// The coordinator's name among addresses.
inline constexpr const char* kCoordinatorAddress = "coordinator";

class Partition {
 public:
  explicit Partition(World* world) : world_(world) {}

  // Until then nothing passes between these and all others. `control`: words to and from the coordinator; `data`: all else.
  struct Wall {
    std::set<std::string> island;
    bool control = true;
    bool data = true;
    uint64_t until_us = 0;
  };
  void Cut(Wall wall) { walls_.push_back(std::move(wall)); }

  // When what is sent now from one to the other, or back, can pass; now, if nothing is between them.
  uint64_t OpenAt(const std::string& a, const std::string& b) const;
  bool any() const;
  bool IsCut(const std::string& a, const std::string& b) const {
    return OpenAt(a, b) > world_->now_us();
  }

 private:
  World* const world_;
  std::vector<Wall> walls_;
};

}  // namespace strait::sim
