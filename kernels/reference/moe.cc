// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/reference/kernels.h"

namespace strait::reference {
namespace {

// Indices of the `count` greatest values, ascending; equal values by lower index.
std::vector<int32_t> Greatest(const std::vector<double>& values, int32_t count) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<double> Scores(const RouterParams& p, const float* logits) {
  std::vector<double> scores(logits, logits + p.n_routed_experts);
  if (p.scoring == RouterScoring::kSigmoid) {
    for (double& score : scores) score = 1.0 / (1.0 + std::exp(-score));
    return scores;
  }
  const double max = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double& score : scores) sum += score = std::exp(score - max);
  for (double& score : scores) score /= sum;
  return scores;
}

}  // namespace

void Router(const RouterParams& p) {
  const int32_t group_size = p.n_routed_experts / p.n_group;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const std::vector<double> scores = Scores(p, p.logits + t * p.n_routed_experts);
    std::vector<double> choice = scores;
    if (p.correction_bias) {
      for (int32_t e = 0; e < p.n_routed_experts; ++e) choice[e] += p.correction_bias[e];
    }
    if (p.method != RouterMethod::kGreedy) {
      std::vector<double> group_scores;
      for (int32_t g = 0; g < p.n_group; ++g) {
        std::vector<double> group(choice.begin() + g * group_size,
                                  choice.begin() + (g + 1) * group_size);
        std::sort(group.rbegin(), group.rend());
        const bool two = p.method == RouterMethod::kNoauxTc && group_size > 1;
        group_scores.push_back(two ? group[0] + group[1] : group[0]);
      }
      const std::vector<int32_t> groups = Greatest(group_scores, p.topk_group);
      const double outside =
          p.method == RouterMethod::kNoauxTc ? -std::numeric_limits<double>::infinity() : 0.0;
      for (int32_t e = 0; e < p.n_routed_experts; ++e) {
        if (!std::binary_search(groups.begin(), groups.end(), e / group_size)) choice[e] = outside;
      }
    }
    const std::vector<int32_t> experts = Greatest(choice, p.num_experts_per_tok);
    double sum = 0;
    for (int32_t e : experts) sum += scores[e];
    const bool normalize = p.norm_topk_prob && p.scoring == RouterScoring::kSigmoid;
    for (int32_t j = 0; j < p.num_experts_per_tok; ++j) {
      const double weight = normalize ? scores[experts[j]] / (sum + 1e-20) : scores[experts[j]];
      p.expert_ids[t * p.num_experts_per_tok + j] = experts[j];
      p.expert_weights[t * p.num_experts_per_tok + j] =
          static_cast<float>(weight * p.routed_scaling_factor);
    }
  }
}

void ExpertSum(const ExpertSumParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t i = 0; i < p.dim; ++i) {
      double sum = p.addend ? p.addend[t * p.dim + i] : 0.0;
      if (p.accumulate) sum += p.y[t * p.dim + i];
      for (int32_t j = 0; j < p.num_experts_per_tok; ++j) {
        const int64_t choice = t * p.num_experts_per_tok + j;
        sum += static_cast<double>(p.expert_weights[choice]) *
               p.expert_rows[p.row_of[choice] * p.dim + i];
      }
      p.y[t * p.dim + i] = static_cast<float>(sum);
    }
  }
}

}  // namespace strait::reference
