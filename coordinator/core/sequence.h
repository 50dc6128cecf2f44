// SPDX-License-Identifier: Apache-2.0
//
// Sequence is one token stream being grown, with its journal: every token of it and what its
// client was already given.
//
// Owns:    its tokens.
// Borrows: its Request (Journal owns both).
// Thread:  loop thread only.
// Why:     a sequence has no state on workers that cannot be made again from this: rows of the
//          cache follow from the tokens, sampling noise from (seed, choice, position).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "coordinator/engine.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

struct Request;
class Scheduler;

// Failures of its pipeline that a sequence survives without having got a token in between. A
// sequence that kills every worker it meets must not kill them forever.
inline constexpr uint32_t kMaxFruitlessReplays = 8;

struct Sequence {
  // --- Constant after admission ---
  SequenceId id;  // rises with age
  Request* request = nullptr;
  uint32_t index = 0;             // in the request
  SequenceSpec spec;              // its prompt is moved into `tokens`
  std::vector<TokenId> stop_ids;  // sorted: end of sequence (unless ignored) and the request's own
  uint32_t prompt_tokens = 0;

  // --- Journal ---
  std::vector<TokenId> tokens;      // prompt, then generated
  uint32_t scored = 0;              // prompt tokens whose score the client has, from position 1 on
  uint32_t rows_computed_once = 0;  // rows below were planned before: counted as replayed

  // --- Where it is: waiting (null) or resident in a pipeline ---
  Scheduler* resident_in = nullptr;
  uint32_t rows = 0;             // planned in this residency
  uint32_t columns = 0;          // of latent blocks reserved there, see scheduler.h
  bool opened = false;           // a plan with its OpenSequence is out
  uint64_t ready_ticket = 0;     // its place among those that may decode; 0: not among them
  uint32_t results_pending = 0;  // steps in flight that will answer for it
  uint32_t samples_pending = 0;  // those of them that sample its next tokens, see scheduler.h
  StepId sampled_by;             // the last of these
  uint32_t fruitless_replays = 0;

  uint32_t generated() const { return static_cast<uint32_t>(tokens.size()) - prompt_tokens; }
  bool score_only() const { return spec.max_tokens == 0; }
  // Rows that its next sampling needs; of the last prompt token nothing is wanted when it only
  // scores.
  uint32_t rows_wanted() const {
    return static_cast<uint32_t>(tokens.size()) - (score_only() ? 1 : 0);
  }
  // Rows that it may ever have: the last token is never fed.
  uint32_t rows_max() const { return prompt_tokens + spec.max_tokens - 1; }
};

// Whether `token`, generated as number `generated` (from 1), ends the sequence by a stop rule.
bool IsStop(const Sequence& sequence, TokenId token, uint32_t generated);

v1::SamplingParams ToWire(const Sequence& sequence);

}  // namespace strait
