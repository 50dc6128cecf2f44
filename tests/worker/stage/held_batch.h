// SPDX-License-Identifier: Apache-2.0
//
// HeldBatch keeps a StageBatch beyond the call that lends it, so that a fake computes a step as late
// as it may: when it is finished.
#pragma once

#include <vector>

#include "proto/base/check.h"
#include "worker/backend.h"

namespace strait {

class HeldBatch {
 public:
  HeldBatch(const StageBatch& batch, HiddenIn in, HiddenOut out)
      : hidden_in(in), hidden_out(out), logits_(batch.logits.begin(), batch.logits.end()) {
    held_.reserve(batch.sequences.size());
    for (const BatchSequence& lent : batch.sequences) {
      Held& held = held_.emplace_back();
      held.tokens.assign(lent.tokens.begin(), lent.tokens.end());
      for (const auto& table : lent.page_tables)
        held.tables.emplace_back(table.begin(), table.end());
      for (const auto& table : held.tables) held.views.emplace_back(table);
      if (lent.sampling != nullptr) held.sampling = *lent.sampling;
      BatchSequence& sequence = sequences_.emplace_back(lent);
      sequence.tokens = held.tokens;
      sequence.page_tables = held.views;
      sequence.sampling = lent.sampling != nullptr ? &held.sampling : nullptr;
    }
    batch_.sequences = sequences_;
    batch_.num_tokens = batch.num_tokens;
    batch_.logits = logits_;
  }
  HeldBatch(HeldBatch&&) = default;  // what views point to stays where it is

  // `before`: what the step begun before this one answered.
  const StageBatch& With(const std::vector<LogitsResult>& before) {
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (!sequences_[i].token_of_request) continue;
      STRAIT_CHECK(held_[i].tokens.back() == kUnknownToken);
      held_[i].tokens.back() = before.at(*sequences_[i].token_of_request).token;
      sequences_[i].token_of_request.reset();
    }
    return batch_;
  }

  const HiddenIn hidden_in;
  const HiddenOut hidden_out;

 private:
  struct Held {
    std::vector<TokenId> tokens;
    std::vector<std::vector<BlockId>> tables;
    std::vector<absl::Span<const BlockId>> views;
    SamplingParams sampling;
  };
  std::vector<Held> held_;  // [sequences]
  std::vector<BatchSequence> sequences_;
  std::vector<LogitsRequest> logits_;
  StageBatch batch_;
};

}  // namespace strait
