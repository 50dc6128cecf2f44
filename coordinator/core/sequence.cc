// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/sequence.h"

#include <algorithm>

#include "proto/base/check.h"

namespace strait {

uint32_t Sequence::rows_settled() const {
  const bool scores = spec.score_prompt && scored + 1 < prompt_tokens;
  // Row r scores the token of position r + 1; the last token's row samples.
  return scores ? scored : static_cast<uint32_t>(tokens.size()) - 1;
}

const Residency* Sequence::home() const {
  for (const std::optional<Residency>& residency : residencies) {
    if (residency && residency->role == Residency::Role::kHome) return &*residency;
  }
  return nullptr;
}

bool Sequence::resident() const {
  return std::any_of(residencies.begin(), residencies.end(),
                     [](const auto& residency) { return residency && !residency->leaving; });
}

Residency* Sequence::Find(PlacementEpoch epoch) {
  for (std::optional<Residency>& residency : residencies) {
    if (residency && residency->epoch == epoch) return &*residency;
  }
  return nullptr;
}

Residency* Sequence::AddResidency(PlacementEpoch epoch, Scheduler* scheduler) {
  for (std::optional<Residency>& residency : residencies) {
    if (residency) continue;
    residency.emplace();
    residency->epoch = epoch;
    residency->sequence = this;
    residency->scheduler = scheduler;
    return &*residency;
  }
  STRAIT_CHECK(false, "a sequence lives in two pipelines at most");
  return nullptr;
}

void Sequence::Remove(Residency* residency) {
  for (std::optional<Residency>& each : residencies) {
    if (each && &*each == residency) each.reset();
  }
}

bool IsStop(const Sequence& sequence, TokenId token, uint32_t generated) {
  if (generated <= sequence.spec.min_tokens) return false;
  return std::binary_search(sequence.stop_ids.begin(), sequence.stop_ids.end(), token);
}

v1::SamplingParams ToWire(const Sequence& sequence) {
  const SequenceSpec& spec = sequence.spec;
  v1::SamplingParams wire;
  wire.set_seed(spec.seed);
  wire.set_choice_index(spec.choice_index);
  wire.set_temperature(spec.temperature);
  wire.set_top_k(spec.top_k);
  wire.set_top_p(spec.top_p);
  wire.set_min_p(spec.min_p);
  wire.set_repetition_penalty(spec.repetition_penalty);
  wire.set_presence_penalty(spec.presence_penalty);
  wire.set_frequency_penalty(spec.frequency_penalty);
  for (const auto& [id, value] : spec.logit_bias) {
    wire.add_bias_ids(id);
    wire.add_bias_values(value);
  }
  wire.set_min_tokens(spec.min_tokens);
  if (spec.min_tokens > 0) {
    wire.mutable_banned_ids()->Add(sequence.stop_ids.begin(), sequence.stop_ids.end());
  }
  return wire;
}

}  // namespace strait
