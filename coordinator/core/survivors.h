// SPDX-License-Identifier: Apache-2.0
//
// What stages keep over a change of epoch: what each may have, what it says that it has, and how
// much of that stays.
//
// Owns:    Survivors: what the stages of one pipeline told.
// Thread:  loop thread only.
// Errors:  CheckHeld: InvalidArgument or FailedPrecondition with the numbers; the worker lies.
// Limits:  sequences that a stage tells: those that it may have.
// Why:     a stage is asked for what it finished, because reports are lost with a stream. It is not
//          believed: more rows than were planned there are a lie, and rows of tokens that the
//          journal never had (granted ones, sampled and not reported) are cut.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

// What a stage may have of one sequence when it enters its next epoch.
struct MayHold {
  uint32_t planned = 0;  // rows at most
  uint32_t confirmed =
      0;  // rows below are of tokens that the journal had when they were last known
  uint32_t prefix_blocks = 0;  // at most; of what it told: so many
};

// What the stages of a pipeline keep of one sequence.
struct KeptRows {
  std::vector<uint32_t> rows;           // by stage; empty: none keeps any
  std::vector<uint32_t> prefix_blocks;  // of these, by stage
  bool empty() const { return rows.empty(); }
};
using Holdings = std::map<SequenceId, MayHold>;  // of one stage

// One more way how a stage may have come to have something of `id`: it may have either.
void AddHolding(SequenceId id, MayHold also, Holdings* holdings);

using HeldList = google::protobuf::RepeatedPtrField<v1::HeldSequence>;
// Whether a stage that may have `holdings` can have what it tells.
absl::Status CheckHeld(const Holdings& holdings, const HeldList& told);
// What it told, and may be believed of it. REQUIRES: CheckHeld.
Holdings Narrowed(const Holdings& holdings, const HeldList& told);

// What the stages of a pipeline have at the begin of an epoch.
class Survivors {
 public:
  Survivors() = default;
  explicit Survivors(std::vector<Holdings> by_stage) : by_stage_(std::move(by_stage)) {}

  // Sequences that any stage has, by rising id.
  std::vector<SequenceId> Ids() const;
  // Rows of it that each stage keeps, `rows_settled` at most: Sequence has that. A cut through a prefix
  // block is at its begin.
  KeptRows Kept(SequenceId id, uint32_t rows_settled) const;

  // The stage has done what the epoch's first plan says: what it told counts no more.
  void Forget(uint32_t stage_index) { by_stage_[stage_index].clear(); }
  const Holdings& of_stage(uint32_t stage_index) const { return by_stage_[stage_index]; }

 private:
  std::vector<Holdings> by_stage_;
};

}  // namespace strait
