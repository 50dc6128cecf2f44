// SPDX-License-Identifier: Apache-2.0
//
// Residents are the sequences that a stage has rows of: those of its epoch, those that an earlier
// one left and of which nobody has said yet what becomes of them, and imports: those that another
// pipeline still has, and for whose rows there are blocks.
//
// Owns:    what the stage knows of each (token ids, sampling) and its latent blocks.
// Thread:  loop thread only.
// Errors:  none but CheckIntegrity's: plans were validated by PlanLedger.
// Why:     rows of finished steps follow from the tokens alone, so an epoch's end takes nothing of
//          them. Rows of steps that were begun and not finished go.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"
#include "worker/cache/latent_cache.h"

namespace strait {

struct Resident {
  std::vector<TokenId> tokens;  // [length]
  uint32_t finished = 0;        // rows of finished steps: what outlives the epoch
  uint32_t prompt_tokens = 0;
  SamplingParams sampling;
  // What a step sampled, where it is known: on the last stage, and on the first once it came back.
  TokenId sampled = 0;
  StepId sampled_by;
  // On the last stage: the latest step begun that samples it, and by which of its requests.
  StepId asked_of;
  uint32_t asked_request = 0;
};

// A sequence that an earlier epoch left: its positions below `rows` are in the cache.
struct HeldRows {
  SequenceId id;
  uint32_t rows = 0;
  uint32_t prefix_blocks = 0;  // of these
};

class Residents {
 public:
  Residents(uint32_t num_layers, BlockPool* pool) : cache_(num_layers, pool) {}

  // Of this epoch; null: not resident. Shared with the steps that have it and are not finished.
  std::shared_ptr<Resident> Find(SequenceId id) const;

  // Cuts what is left of it to `kept_rows`, or begins it with prefix blocks. REQUIRES: not resident; no
  // more than what is left; LatentCache::Cut, Open.
  void Open(const v1::OpenSequence& open, SamplingParams sampling, uint32_t kept_rows,
            absl::Span<const ContentKey> prefix);
  // Its blocks are free afterwards, whether it is resident, left or an import; else nothing.
  void Close(SequenceId id);
  // The epoch is over: what is resident is left, with its finished rows, and imports are closed.
  // REQUIRES: no step is begun.
  void Leave();

  // It is an import with blocks for so many rows. `prefix`: prefix blocks that it begins with, if it is new. REQUIRES:
  // neither resident nor left; no fewer rows than before; LatentCache::Open.
  void Import(SequenceId id, uint32_t rows, absl::Span<const ContentKey> prefix = {});
  // An import becomes resident with the rows of these tokens, all finished. REQUIRES: it has blocks
  // for them.
  void OpenImport(const v1::OpenSequence& open, SamplingParams sampling,
                  std::vector<TokenId> tokens);
  // An import is left with the rows of these tokens; it goes if there are none. REQUIRES: as OpenImport.
  void LeaveImport(SequenceId id, std::vector<TokenId> tokens);
  bool imported(SequenceId id) const { return imports_.contains(id); }

  // Rows of finished steps that it has, resident or left; absent: it is neither.
  std::optional<uint32_t> FinishedRows(SequenceId id) const;

  // By rising id.
  std::vector<HeldRows> left() const;
  // The token ids of one that is left, of its rows. REQUIRES: it is.
  absl::Span<const TokenId> TokensLeft(SequenceId id) const { return left_.at(id)->tokens; }
  // One that a predecessor of the stage left, as LatentCache::Adopt has it. REQUIRES: neither resident nor
  // left.
  void AdoptLeft(SequenceId id, absl::Span<const TokenId> tokens,
                 absl::Span<const ContentKey> prefix, std::vector<std::vector<BlockId>> own);

  LatentCache& cache() { return cache_; }
  const LatentCache& cache() const { return cache_; }
  // Blocks and tokens agree, and every sequence with blocks is resident, left or an import. `computed`: all rows
  // of residents were, that is, no step has failed.
  absl::Status CheckIntegrity(bool computed) const;

 private:
  using Map = absl::flat_hash_map<SequenceId, std::shared_ptr<Resident>>;

  LatentCache cache_;
  Map residents_;
  Map left_;
  absl::flat_hash_set<SequenceId> imports_;
};

}  // namespace strait
