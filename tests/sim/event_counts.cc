// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/event_counts.h"

#include <cstdio>

namespace strait::sim {
namespace {

constexpr const char* kStates[kNumHostedStates] = {"none",       "loading", "loaded",
                                                   "activating", "active",  "stuck"};
constexpr const char* kEvents[kNumSimEvents] = {
    "load",    "loaded", "unload",  "activate", "plan",   "edge-up", "edge-down",
    "nccl-id", "hidden", "sampled", "begin",    "finish", "detach",  "attach",
    "orphan",  "resize", "fetch",   "serve",    "ask"};

// By state, as in HostedState: what must come.
constexpr bool kExpected[kNumHostedStates][kNumSimEvents] = {
    // load loaded unload activate plan up down id hidden sampled begin finish detach attach orphan resize fetch serve ask
    {1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},  // none: a stage that is not there
    {0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0},  // loading
    {0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0},  // loaded, in no epoch yet
    {0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0},  // activating
    {0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},  // active
    {0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0,
     0},  // stuck: told that it cannot go on in this epoch
};

}  // namespace

void EventCounts::Add(const EventCounts& other) {
  for (size_t s = 0; s < kNumHostedStates; ++s) {
    for (size_t e = 0; e < kNumSimEvents; ++e) counts_[s][e] += other.counts_[s][e];
  }
}

std::string EventCounts::Table() const {
  char text[64];
  std::snprintf(text, sizeof(text), "%-10s", "");
  std::string table = text;
  for (const char* event : kEvents) {
    std::snprintf(text, sizeof(text), " %9s", event);
    table += text;
  }
  for (size_t s = 0; s < kNumHostedStates; ++s) {
    std::snprintf(text, sizeof(text), "\n%-10s", kStates[s]);
    table += text;
    for (size_t e = 0; e < kNumSimEvents; ++e) {
      if (counts_[s][e] == 0) {
        std::snprintf(text, sizeof(text), " %9s", "-");
      } else {
        std::snprintf(text, sizeof(text), " %9llu", static_cast<unsigned long long>(counts_[s][e]));
      }
      table += text;
    }
  }
  return table;
}

std::string EventCounts::Missing() const {
  std::string missing;
  for (size_t s = 0; s < kNumHostedStates; ++s) {
    for (size_t e = 0; e < kNumSimEvents; ++e) {
      if (!kExpected[s][e] || counts_[s][e] > 0) continue;
      missing += std::string(missing.empty() ? "" : ", ") + kStates[s] + "/" + kEvents[e];
    }
  }
  return missing;
}

}  // namespace strait::sim
