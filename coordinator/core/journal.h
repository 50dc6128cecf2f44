// SPDX-License-Identifier: Apache-2.0
//
// Journal keeps every request and sequence until it ends, and is the only place that tells clients
// anything.
//
// Owns:    requests, sequences, the queue of those that wait, deadlines.
// Borrows: the Context.
// Thread:  loop thread only.
// Limits:  CoreOptions::max_waiting, asked by Core before Admit.
// Why:     tokens are accepted in position order only, here and nowhere else, so whatever happened
//          below (a replay, another pipeline) no client sees a token lost, doubled or changed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "coordinator/core/context.h"
#include "coordinator/core/sequence.h"

namespace strait {

struct Request {
  RequestId id;
  std::string client_id;
  std::string name;
  uint64_t deadline_us = 0;
  std::vector<std::unique_ptr<Sequence>> sequences;  // null: ended
  uint32_t num_live = 0;
};

class Journal {
 public:
  explicit Journal(Context* context) : context_(context) {}

  // Every sequence of it waits. REQUIRES: CheckRequest passed, `id` is new.
  Request* Admit(RequestId id, RequestSpec spec, uint64_t deadline_us);

  // Null if ended or never known.
  Request* Find(RequestId id);
  Sequence* Find(SequenceId id);

  // The queue, by age. A sequence is in it or resident, never both.
  const std::map<SequenceId, Sequence*>& waiting() const { return waiting_; }
  void Wait(Sequence* sequence);
  void StopWaiting(Sequence* sequence);
  // Of a sequence that is placed now.
  PlacementEpoch NextPlacement() { return {context_->options.term, ++last_placement_}; }

  // What the client gets. Both REQUIRE that it is the next in position order.
  void GiveScores(Sequence* sequence, std::vector<TokenInfo> scores);
  struct Finish {
    FinishReason reason;
    std::optional<TokenId> stop_token;
  };
  // Says whether the token ends the sequence; the caller then calls End.
  std::optional<Finish> GiveToken(Sequence* sequence, TokenInfo token);

  // Forgets the sequence, and its request with the last one. REQUIRES: not resident anywhere.
  void End(Sequence* sequence, FinishReason reason, std::optional<TokenId> stop_token,
           absl::Status status);

  // Ends what clients have had a part of. REQUIRES: none is resident anywhere.
  void EndBegun(const absl::Status& status);

  // A request whose deadline has passed, if any.
  Request* Expired(uint64_t now_us);

  size_t num_sequences() const { return sequences_.size(); }
  const std::map<SequenceId, Sequence*>& sequences() const { return sequences_; }
  size_t num_requests() const { return requests_.size(); }
  // Maps and sets agree with each other and with the sequences.
  absl::Status CheckIntegrity() const;

 private:
  Context* const context_;
  uint64_t last_sequence_id_ = 0;
  uint64_t last_placement_ = 0;
  absl::flat_hash_map<RequestId, std::unique_ptr<Request>> requests_;
  std::map<SequenceId, Sequence*> sequences_;
  std::map<SequenceId, Sequence*> waiting_;
  std::set<std::pair<uint64_t, RequestId>> deadlines_;
};

}  // namespace strait
