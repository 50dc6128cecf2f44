// SPDX-License-Identifier: Apache-2.0
//
// Drains asks for drains of workers, and checks what is told of them and what becomes of these workers.
//
// Borrows: World, Scenario, Core, ProcedureCounts.
// Thread:  the simulator's.
// Errors:  a violation of the World: a verb that is not answered once, a reason that nobody gave cause for, a drain past its
//          deadline, a worker that is drained, or is being drained, and gets a stage or a copy; one that is drained and
//          has a stage.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/json.h"
#include "strait/v1/cluster.pb.h"
#include "tests/sim/procedure_counts.h"
#include "tests/sim/scenario.h"
#include "tests/sim/world.h"

namespace strait::sim {

// Verbs of drains have numbers from here on: those of moves are smaller.
inline constexpr uint64_t kFirstDrainVerb = 1'000'000'000;

class Drains {
 public:
  Drains(World* world, const Scenario* scenario, Core* core, ProcedureCounts* counts)
      : world_(world), scenario_(scenario), core_(core), counts_(counts) {}

  // One of these workers (by instance) is to be drained; now and then what is asked for cannot be, or is taken back.
  void AskForOne(const std::vector<uint64_t>& instances);
  static bool Owns(VerbId verb) { return verb.value >= kFirstDrainVerb; }
  void OnMessage(const DrainTold& told);
  // Whether a worker is out now: its instance.
  std::optional<uint64_t> OnMessage(const VerbEnded& ended);
  // The coordinator heard that it leaves.
  void OnLeave(uint64_t instance);
  // It comes back on another stream: who was being drained serves again, though the verb is not answered yet.
  void OnAttached(uint64_t instance);
  // That one has ended.
  void OnGone(uint64_t instance);
  // What the coordinator sends to a worker. `scales`: pipelines are scaled, with the workers that there were before; a
  // drain waits for the end of it.
  void OnSent(uint64_t instance, const v1::ToWorker& message, bool scales);

  // It is to have no stage.
  bool IsOut(uint64_t instance) const;
  bool pending() const { return !verbs_.empty(); }
  // Or may be: one that leaves has no verb.
  bool any() const { return pending() || num_leaving_ > 0; }
  struct Live {
    uint64_t instance = 0;
    Phase phase = Phase::kDrainWaits;
  };
  std::vector<Live> Current() const;
  // `clock_us`: a clock that stands still while the coordinator does.
  void CheckDeadlines(uint64_t clock_us);
  uint32_t num_asked() const { return num_asked_; }
  uint32_t num_done() const { return num_done_; }
  uint32_t num_undone() const { return num_undone_; }

 private:
  enum class Duty { kServes, kDraining, kLeaving, kDrained };
  struct Verb {
    uint64_t instance = 0;  // 0: of nobody
    bool is_odd = false;    // cannot be, or is not to be
    bool undoes = false;
    bool changes = false;  // it was accepted, and its end says what the worker is
    std::optional<uint64_t> begin_us;
    uint64_t timeout_us = 0;
    std::string phase = "waiting";
    std::string way = "none";
  };
  json::Value Status() const;
  void CheckNoStages(uint64_t instance) const;

  World* const world_;
  const Scenario* const scenario_;
  Core* const core_;
  ProcedureCounts* const counts_;
  VerbId last_verb_{kFirstDrainVerb};
  std::map<VerbId, Verb> verbs_;
  std::map<uint64_t, Duty> duties_;   // others serve
  std::map<uint64_t, Phase> phases_;  // as seen last
  uint32_t num_leaving_ = 0;
  uint32_t num_asked_ = 0;
  uint32_t num_done_ = 0;
  uint32_t num_undone_ = 0;
};

}  // namespace strait::sim
