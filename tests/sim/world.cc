// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/world.h"

#include <cstdio>

namespace strait::sim {

bool World::RunOne() {
  if (events_.empty() || !violation_.empty()) return false;
  // Moving out of a priority_queue's top is safe: the pop looks only at times.
  Event event = std::move(const_cast<Event&>(events_.top()));
  events_.pop();
  now_us_ = event.at_us;
  event.what();
  return violation_.empty();
}

void World::Trace(const std::string& line) const {
  if (!trace_) return;
  std::printf("%10.3f ms  %s\n", static_cast<double>(now_us_) / 1000, line.c_str());
}

void World::Violation(std::string what) {
  Trace("VIOLATION " + what);
  if (violation_.empty()) violation_ = std::move(what);
}

}  // namespace strait::sim
