// SPDX-License-Identifier: Apache-2.0
//
// Clients make requests and check everything that they get against the Oracle, message by message.
//
// Thread:  the simulator's.
// Errors:  what differs is a violation of the World.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "coordinator/core/core.h"
#include "tests/sim/oracle.h"
#include "tests/sim/scenario.h"
#include "tests/sim/world.h"

namespace strait::sim {

class Clients {
 public:
  Clients(World* world, const Scenario* scenario) : world_(world), scenario_(scenario) {}

  // A request of the seed's making; its id is the count of requests so far.
  RequestSpec Make(RequestId* id);

  void OnCancel(RequestId id, std::optional<uint32_t> index);
  // What was cancelled must have ended by the coordinator's next messages.
  void CheckCancelled(RequestId id);
  // From now on a pipeline may fail any number of times.
  void ExpectManyFailures() { many_failures_ = true; }
  // No request outlives its deadline by more than `slack_us`.
  void CheckDeadlines(uint64_t slack_us);
  // `core_ready`: a pipeline is active; `no_pipeline_us`: for how long none was.
  void OnMessage(const RequestRefused& message, bool core_ready);
  void OnMessage(const RequestAdmitted& message);
  void OnMessage(const PromptCached& message);
  void OnMessage(const PromptScored& message);
  void OnMessage(const TokenEmitted& message);
  void OnMessage(const SequenceEnded& message, uint64_t no_pipeline_us, uint64_t workers_lost);

  uint32_t num_live() const { return num_live_; }          // requests not refused and not ended
  uint32_t num_finished() const { return num_finished_; }  // sequences that got all they asked for
  uint64_t num_cached() const { return num_cached_; }      // prompt tokens, as told
  uint32_t num_nan() const { return num_nan_; }            // sequences that ended for NaN logits
  std::string Stuck() const;                               // those that live, for the violation

 private:
  struct Stream {
    Expected expected;
    bool cached = false;  // some of its prompt was
    size_t scores = 0;
    size_t tokens = 0;
    bool cancelled = false;
    bool ended = false;
  };
  struct Live {
    RequestSpec spec;
    std::vector<Stream> streams;
    uint64_t submitted_us = 0;
    bool admitted = false;
    bool bad = false;  // must be refused
    bool ended = false;
  };
  SequenceSpec MakeSequence();
  // Of the common begin of many prompts.
  TokenId StemToken(uint64_t position);
  Live* Find(RequestId id, const char* what);
  Stream* FindStream(RequestId id, uint32_t index, const char* what);

  World* const world_;
  const Scenario* const scenario_;
  uint64_t last_id_ = 0;
  std::vector<TokenId> stem_;
  uint64_t num_cached_ = 0;
  std::map<RequestId, Live> live_;
  uint32_t num_live_ = 0;
  uint32_t num_finished_ = 0;
  uint32_t num_nan_ = 0;
  bool many_failures_ = false;
};

}  // namespace strait::sim
