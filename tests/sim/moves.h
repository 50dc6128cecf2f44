// SPDX-License-Identifier: Apache-2.0
//
// Moves asks for moves of running sequences, and checks what is told of them.
//
// Borrows: World, Scenario, Core.
// Thread:  the simulator's.
// Errors:  a violation of the World: a verb that is not answered once, a reason that nobody gave cause for, a phase past
//          its deadline, a move that did not bring every row, a sequence that is elsewhere.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "coordinator/core/core.h"
#include "proto/base/json.h"
#include "tests/sim/move_counts.h"
#include "tests/sim/row_network.h"
#include "tests/sim/scenario.h"
#include "tests/sim/world.h"

namespace strait::sim {

// A move under way, as status tells it.
struct LiveMove {
  SequenceId sequence;
  RequestId request;  // 0: the sequence has ended
  uint32_t choice = 0;
  PipelineId from;
  PipelineId to;
  MovePhase phase = MovePhase::kReserve;
  uint64_t total_ms = 0;
  bool decodes = false;    // a client waits for its next token
  uint64_t placement = 0;  // epoch's counter, of its home
  std::tuple<MovePhase, uint64_t, uint64_t, uint64_t> progress;
  std::vector<WorkerId> sources;
  std::vector<WorkerId> destinations;
  std::vector<LayerIndex> source_layers;  // the first of each stage
  std::vector<LayerIndex> destination_layers;
};

class Moves {
 public:
  Moves(World* world, const Scenario* scenario, Core* core)
      : world_(world), scenario_(scenario), core_(core) {}

  // A random sequence is to go to a random other pipeline; now and then what is asked for cannot be. False: nothing
  // can move now.
  bool AskForOne();
  void OnMessage(const MoveTold& told);
  // Pipelines may have failed since the last call.
  void OnMessage(const VerbEnded& ended);

  // Verbs that are not answered.
  bool pending() const { return !verbs_.empty(); }
  std::vector<LiveMove> Live() const;
  // `clock_us`: a clock that stands still while the coordinator does.
  void CheckDeadlines(uint64_t clock_us);

  // What happens to rows on their way, and to copies of them: the reasons that a move may fail for.
  void OnRowFault(RowFault fault, SequenceId sequence);
  void ExpectFailedCopies() { copies_fail_ = true; }

  MoveCounts& counts() { return counts_; }
  const MoveCounts& counts() const { return counts_; }
  uint32_t num_asked() const { return num_asked_; }
  uint32_t num_done() const { return num_done_; }
  uint32_t num_other_layers() const { return num_other_layers_; }  // between other splits, done
  uint32_t num_other_stages() const { return num_other_stages_; }  // so many stages, even
  uint64_t num_late() const { return num_late_; }                  // frames

 private:
  struct Verb {
    SequenceId sequence;
    PipelineId to;
    bool is_odd = false;  // cannot be, or is not to be
    bool is_live = false;
    std::string phase = "reserve";
    uint64_t to_epoch = 0;
    bool other_layers = false;
    bool other_stages = false;
  };
  struct Watch {
    std::tuple<MovePhase, uint64_t, uint64_t, uint64_t> progress;
    uint64_t since_us = 0;
    uint64_t begin_us = 0;
    std::optional<uint64_t> frozen_us;
    std::optional<uint64_t> adopts_us;
    uint64_t total_ms = 0;
    uint64_t placement = 0;  // where it went, once it is there
  };
  json::Value Status() const;
  static uint64_t EpochOf(const json::Value& status, PipelineId pipeline);
  // How it ended, in a word or two.
  std::string Reason(const Verb& verb, const absl::Status& status) const;
  void CheckReason(const Verb& verb, const absl::Status& status);
  // A sequence that went back did so under a newer placement epoch than it had where it went.
  void CheckBack(const Verb& verb, const Watch& watch);

  World* const world_;
  const Scenario* const scenario_;
  Core* const core_;
  VerbId last_verb_;
  std::map<VerbId, Verb> verbs_;
  std::map<SequenceId, Watch> watches_;
  MoveCounts counts_;
  bool copies_fail_ = false;
  uint64_t num_corrupt_ = 0;
  uint64_t num_late_ = 0;
  uint32_t num_asked_ = 0;
  uint32_t num_done_ = 0;
  uint32_t num_other_layers_ = 0;
  uint32_t num_other_stages_ = 0;
};

}  // namespace strait::sim
