// SPDX-License-Identifier: Apache-2.0
//
// ReturningIds tells the first of several stages which sampled ids are still on their way back to
// it, and whether a plan has to wait for them.
//
// Owns:    one entry for each step that samples, was run here and has not come back.
// Thread:  loop thread only.
// Errors:  Check: InvalidArgument, says what is due.
// Limits:  kMaxStepsInFlight steps on their way, then no further one is ready to run.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/stage/stage.h"

namespace strait {

class ReturningIds {
 public:
  void Clear() { *this = ReturningIds(); }

  // A step was run here that samples for `sequences`, in plan order.
  void Await(StepId step, std::vector<SequenceId> sequences) {
    awaited_.push_back({step, std::move(sequences)});
  }
  // A plan that waits ends the sequence; a plan that ran has closed it.
  void Revoke(SequenceId id) { revoked_.insert(id); }
  void Closed(SequenceId id) { revoked_.erase(id); }
  bool Revoked(SequenceId id) const { return revoked_.contains(id); }

  // Whether nothing that `plan` refers to is still on its way.
  bool AreHere(const v1::StepPlan& plan) const;

  absl::Status Check(const SampledStep& sampled, uint32_t vocab_size) const;
  // They have come: of which sequences they are. REQUIRES: Check passed.
  std::vector<SequenceId> Take(StepId step);

 private:
  struct Awaited {
    StepId step;
    std::vector<SequenceId> sequences;
  };
  std::deque<Awaited> awaited_;  // in step order
  StepId last_;                  // that came
  absl::flat_hash_set<SequenceId> revoked_;
};

}  // namespace strait
