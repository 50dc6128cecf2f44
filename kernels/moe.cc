// SPDX-License-Identifier: Apache-2.0
#include "kernels/moe.h"

#include <algorithm>

#include "proto/base/check.h"

namespace strait {

void GroupByExpert(const ExpertGroupParams& p) {
  const int64_t num_choices = p.num_tokens * p.num_experts_per_tok;
  std::fill_n(p.group_begin, p.n_routed_experts + 1, 0);
  for (int64_t i = 0; i < num_choices; ++i) {
    STRAIT_CHECK(p.expert_ids[i] >= 0 && p.expert_ids[i] < p.n_routed_experts);
    ++p.group_begin[p.expert_ids[i] + 1];
  }
  for (int32_t e = 0; e < p.n_routed_experts; ++e) p.group_begin[e + 1] += p.group_begin[e];
  // group_begin[e] serves as the cursor of expert e, and ends where e + 1 began: shift back.
  for (int64_t i = 0; i < num_choices; ++i) {
    const int32_t row = p.group_begin[p.expert_ids[i]]++;
    p.token_of[row] = static_cast<int32_t>(i / p.num_experts_per_tok);
    p.row_of[i] = row;
  }
  for (int32_t e = p.n_routed_experts; e > 0; --e) p.group_begin[e] = p.group_begin[e - 1];
  p.group_begin[0] = 0;
}

}  // namespace strait
