// SPDX-License-Identifier: Apache-2.0
//
// Sequence is one token stream being grown, with its journal: every token of it and what its
// client was already given.
//
// Owns:    its tokens, its residencies.
// Borrows: its Request (Journal owns both).
// Thread:  loop thread only.
// Why:     a sequence has no state on workers that cannot be made again from this: rows of the
//          cache follow from the tokens, sampling noise from (seed, choice, position).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "coordinator/core/prefix_keys.h"
#include "coordinator/core/residency.h"
#include "coordinator/engine.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

struct Request;

// A sequence that kills every worker it meets must not kill them forever, nor be mistaken for one that was only there:
// after so many deaths it replays in steps of its own, and one more is its own.
inline constexpr uint32_t kDeathsToReplayAlone = 2;

// What happened to a sequence since it got a token. The rules are FaultPolicy's and Scheduler's.
struct SequenceBlame {
  uint32_t deaths = 0;          // of workers that had it in the step that they left unfinished
  uint64_t links_since_us = 0;  // not 0: since when links of its pipelines fail
};

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
  SequenceBlame blame;
  PrefixKeys prefix_keys;            // of its full blocks
  std::optional<ContentKey> awaits;  // while it waits: a block that another one computes
  bool was_placed = false;
  uint64_t last_token_us = 0;  // when it got one
  // Some of its rows were computed by another numerics_id than its pipeline's (--force-numerics): nobody shares them.
  bool has_foreign_rows = false;
  uint32_t cached_tokens = 0;  // of its prompt, that it found in a cache when it was placed first

  // --- Where it lives ---
  // None: it waits. Two while it moves from one pipeline to another.
  static constexpr size_t kMaxResidencies = 2;
  std::array<std::optional<Residency>, kMaxResidencies> residencies;

  // The one whose steps sample, and whose tokens the journal takes. Null: it is nowhere.
  Residency* home() { return const_cast<Residency*>(std::as_const(*this).home()); }
  const Residency* home() const;
  // It has blocks in a pipeline, or will have with the next plan.
  bool resident() const;
  // Null: no longer, or never.
  Residency* Find(PlacementEpoch epoch);
  // REQUIRES: fewer than kMaxResidencies.
  Residency* AddResidency(PlacementEpoch epoch, Scheduler* scheduler);
  void Remove(Residency* residency);

  uint32_t generated() const { return static_cast<uint32_t>(tokens.size()) - prompt_tokens; }
  // No other sequence is in its steps, until it gets a token.
  bool replays_alone() const { return blame.deaths >= kDeathsToReplayAlone; }
  bool score_only() const { return spec.max_tokens == 0; }
  // Rows that its next sampling needs; of the last prompt token nothing is wanted when it only
  // scores.
  uint32_t rows_wanted() const {
    return static_cast<uint32_t>(tokens.size()) - (score_only() ? 1 : 0);
  }
  // Rows that stages may keep over an epoch: one behind them must be computed, because a token is to
  // be sampled, or scored, from it. Less than rows_wanted().
  uint32_t rows_settled() const;
  // Rows that it may ever have: the last token is never fed.
  uint32_t rows_max() const { return prompt_tokens + spec.max_tokens - 1; }
};

// Whether `token`, generated as number `generated` (from 1), ends the sequence by a stop rule.
bool IsStop(const Sequence& sequence, TokenId token, uint32_t generated);

v1::SamplingParams ToWire(const Sequence& sequence);

}  // namespace strait
