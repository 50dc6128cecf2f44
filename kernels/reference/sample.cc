// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "kernels/reference/kernels.h"

namespace strait::reference {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

std::vector<double> AdjustedLogits(const SampleParams& p) {
  std::vector<double> logits(p.logits, p.logits + p.vocab_size);
  for (double& logit : logits) {
    if (std::isnan(logit)) logit = kNever;
  }
  for (int64_t i = 0; i < p.num_banned_tokens; ++i) logits[p.banned_tokens[i]] = kNever;
  for (int64_t i = 0; i < p.num_logit_bias; ++i) {
    logits[p.logit_bias[i].token_id] += p.logit_bias[i].bias;
  }
  std::set<int32_t> seen;
  for (int64_t i = 0; i < p.num_prompt_tokens; ++i) seen.insert(p.prompt_tokens[i].token_id);
  for (int64_t i = 0; i < p.num_output_tokens; ++i) seen.insert(p.output_tokens[i].token_id);
  for (int32_t id : seen) {
    if (logits[id] > 0) {
      logits[id] /= p.repetition_penalty;
    } else {
      logits[id] *= p.repetition_penalty;
    }
  }
  for (int64_t i = 0; i < p.num_output_tokens; ++i) {
    const TokenCount& token = p.output_tokens[i];
    logits[token.token_id] -= p.frequency_penalty * token.count + p.presence_penalty;
  }
  return logits;
}

}  // namespace

LogitStats ComputeLogitStats(const float* logits, int64_t vocab_size) {
  const float max = *std::max_element(logits, logits + vocab_size);
  double sum = 0;
  for (int64_t i = 0; i < vocab_size; ++i) sum += std::exp(static_cast<double>(logits[i]) - max);
  return {max, max + std::log(sum)};
}

int32_t Sample(const SampleParams& p, double uniform) {
  std::vector<double> logits = AdjustedLogits(p);
  // Ids from the best token to the worst.
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (p.temperature == 0 || logits[order[0]] == kNever) return order[0];

  std::vector<double> probability(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    probability[i] = std::exp((logits[i] - logits[order[0]]) / p.temperature);
  }
  std::set<int32_t> kept;
  for (int32_t id : order) {
    if (p.top_k > 0 && kept.size() == static_cast<size_t>(p.top_k)) break;
    if (probability[id] >= p.min_p) kept.insert(id);
  }
  double total = 0;
  for (int32_t id : kept) total += probability[id];
  double sum = 0;
  for (int32_t id : order) {
    if (!kept.contains(id)) continue;
    if (sum >= p.top_p * total && sum > 0) kept.erase(id);
    sum += probability[id];
  }
  total = 0;
  for (int32_t id : kept) total += probability[id];
  sum = 0;
  for (int32_t id : kept) {
    sum += probability[id];
    if (sum > uniform * total) return id;
  }
  return *kept.rbegin();
}

}  // namespace strait::reference
