// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts around the expert matrices: which experts a token goes to, the lists that a
// grouped gemm needs, and the weighted sum of what the experts answer.
//
// Shapes:  below.
// Why:     experts of a token are listed by ascending id, and their outputs are summed in that
//          order, so that the sum does not depend on which experts other tokens chose. Equal
//          scores go to the lower id.
//
// Intensity:the router works on n_routed_experts numbers a token; the sum is bound by memory.
#pragma once

#include <cstdint>

namespace strait {

enum class RouterScoring : uint8_t { kSoftmax, kSigmoid };

enum class RouterMethod : uint8_t {
  kGreedy,              // the num_experts_per_tok best
  kGroupLimitedGreedy,  // of the topk_group groups with the best single score (V2)
  kNoauxTc,             // of the topk_group groups with the best sum of two biased scores (V3)
};

// Semantics of transformers' DeepseekV2 and DeepseekV3 routers: V2 (softmax) multiplies by
// routed_scaling_factor and never normalizes; V3 chooses by score + bias, weighs by score,
// normalizes by (sum + 1e-20) if norm_topk_prob, then multiplies.
struct RouterParams {
  const float* logits = nullptr;           // [num_tokens, n_routed_experts] fp32, x . gate^T
  const float* correction_bias = nullptr;  // [n_routed_experts] fp32; may be null: zeros
  RouterScoring scoring = RouterScoring::kSoftmax;
  RouterMethod method = RouterMethod::kGreedy;
  int32_t n_routed_experts = 0;
  int32_t num_experts_per_tok = 0;
  int32_t n_group = 1;
  int32_t topk_group = 1;
  bool norm_topk_prob = false;
  float routed_scaling_factor = 1.0f;
  int32_t* expert_ids = nullptr;    // [num_tokens, num_experts_per_tok] ascending, out
  float* expert_weights = nullptr;  // [num_tokens, num_experts_per_tok], out
  int64_t num_tokens = 0;
};

// Turns the router's answer into one list of rows per expert.
struct ExpertGroupParams {
  const int32_t* expert_ids = nullptr;  // [num_tokens, num_experts_per_tok]
  int64_t num_tokens = 0;
  int32_t num_experts_per_tok = 0;
  int32_t n_routed_experts = 0;
  int32_t* group_begin = nullptr;  // [n_routed_experts + 1] first grouped row of an expert, out
  int32_t* token_of = nullptr;     // [num_tokens * num_experts_per_tok] token of a grouped row, out
  int32_t* row_of = nullptr;       // [num_tokens, num_experts_per_tok] grouped row of a choice, out
};

// Plain host function: grouped rows by ascending expert, then ascending token.
void GroupByExpert(const ExpertGroupParams& params);

// y[t] = (addend[t]) + sum over j of weights[t, j] * expert_rows[row_of[t, j]]: the sum runs over j
// in order by fused multiply-add from zero; addend (the shared experts) is added after it.
// With accumulate, that total is added to y[t] (the residual).
struct ExpertSumParams {
  const float* expert_rows = nullptr;     // [*, dim] fp32, dense
  const int32_t* row_of = nullptr;        // [num_tokens, num_experts_per_tok]
  const float* expert_weights = nullptr;  // [num_tokens, num_experts_per_tok]
  const float* addend = nullptr;          // [num_tokens, dim] fp32, dense; may be null
  float* y = nullptr;                     // [num_tokens, dim] fp32, dense
  bool accumulate = false;
  int64_t num_tokens = 0;
  int32_t num_experts_per_tok = 0;
  int64_t dim = 0;
};

}  // namespace strait
