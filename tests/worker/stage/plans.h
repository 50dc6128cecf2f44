// SPDX-License-Identifier: Apache-2.0
//
// StepPlans in few words, for tests.
#pragma once

#include <vector>

#include "proto/base/ids.h"
#include "strait/v1/cluster.pb.h"

namespace strait {

inline void AddOpen(v1::StepPlan* plan, uint64_t id, uint32_t prompt_tokens = 1) {
  v1::OpenSequence* open = plan->add_cache_ops()->mutable_open();
  open->set_sequence_id(id);
  open->set_prompt_tokens(prompt_tokens);
  open->mutable_sampling()->set_top_p(1);
  open->mutable_sampling()->set_repetition_penalty(1);
}
inline void AddClose(v1::StepPlan* plan, uint64_t id) {
  plan->add_cache_ops()->mutable_close()->set_sequence_id(id);
}
inline v1::SequenceStep* AddRows(v1::StepPlan* plan, uint64_t id, uint32_t first_position,
                                 const std::vector<TokenId>& tokens) {
  v1::SequenceStep* step = plan->add_sequences();
  step->set_sequence_id(id);
  step->set_first_position(first_position);
  for (const TokenId token : tokens) step->mutable_literals()->add_ids(token);
  return step;
}
inline v1::SequenceStep* AddGrant(v1::StepPlan* plan, uint64_t id, uint32_t first_position,
                                  uint64_t of_step) {
  v1::SequenceStep* step = plan->add_sequences();
  step->set_sequence_id(id);
  step->set_first_position(first_position);
  step->mutable_sampled()->set_step_id(of_step);
  return step;
}
inline void WantSample(v1::SequenceStep* step, uint32_t offset, uint32_t num_top = 0) {
  v1::LogitsWanted* wanted = step->add_logits();
  wanted->set_offset(offset);
  wanted->set_sample(true);
  wanted->set_num_top(num_top);
}
inline void WantScore(v1::SequenceStep* step, uint32_t offset, TokenId token) {
  v1::LogitsWanted* wanted = step->add_logits();
  wanted->set_offset(offset);
  wanted->set_score_token(token);
}

}  // namespace strait
