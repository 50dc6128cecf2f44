// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/partition.h"

#include <algorithm>

namespace strait::sim {

bool Partition::any() const {
  return std::any_of(walls_.begin(), walls_.end(),
                     [this](const Wall& wall) { return wall.until_us > world_->now_us(); });
}

uint64_t Partition::OpenAt(const std::string& a, const std::string& b) const {
  uint64_t open_us = world_->now_us();
  const bool is_control = a == kCoordinatorAddress || b == kCoordinatorAddress;
  for (const Wall& wall : walls_) {
    if (!(is_control ? wall.control : wall.data)) continue;
    if (wall.island.contains(a) == wall.island.contains(b)) continue;
    open_us = std::max(open_us, wall.until_us);
  }
  return open_us;
}

}  // namespace strait::sim
