// SPDX-License-Identifier: Apache-2.0
//
// World is virtual time, chance and a list of what is to happen: everything in a simulation is a
// callback in its queue.
//
// Owns:    the events.
// Thread:  one.
// Errors:  the first Violation ends the run.
// Why:     one seed decides everything, so a failing run is replayed by its number.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace strait::sim {

class World {
 public:
  World(uint64_t seed, bool trace) : trace_(trace), random_(seed) {}
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  uint64_t now_us() const { return now_us_; }
  void At(uint64_t at_us, std::function<void()> what) {
    events_.push({at_us < now_us_ ? now_us_ : at_us, ++last_order_, std::move(what)});
  }
  void After(uint64_t delay_us, std::function<void()> what) {
    At(now_us_ + delay_us, std::move(what));
  }
  // Runs the next event; false when there is none, or after a violation.
  bool RunOne();

  // Both ends included.
  uint64_t Random(uint64_t least, uint64_t most) { return least + random_() % (most - least + 1); }
  bool Chance(double probability) {
    return static_cast<double>(random_() >> 11) * 0x1p-53 < probability;
  }
  template <class T>
  T Pick(std::initializer_list<T> choices) {
    return *(choices.begin() + Random(0, choices.size() - 1));
  }

  bool tracing() const { return trace_; }
  void Trace(const std::string& line) const;
  void Violation(std::string what);
  const std::string& violation() const { return violation_; }

 private:
  struct Event {
    uint64_t at_us;
    uint64_t order;  // first scheduled, first run
    std::function<void()> what;
    bool operator<(const Event& other) const {
      return at_us != other.at_us ? at_us > other.at_us : order > other.order;
    }
  };
  const bool trace_;
  std::mt19937_64 random_;
  std::priority_queue<Event> events_;
  uint64_t now_us_ = 1'000'000;
  uint64_t last_order_ = 0;
  std::string violation_;
};

}  // namespace strait::sim
