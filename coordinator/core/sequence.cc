// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/sequence.h"

#include <algorithm>

namespace strait {

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
